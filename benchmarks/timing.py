"""How long a function takes on the device."""

import collections
import statistics
import time

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

_MAX_KEPT_BYTES = 2**34
_FLUSH_SHAPE = (2**13, 2**13)  # of 4 bytes, several times the L2 cache.
_FLUSH = "popcnt"  # in the name of its first kernel.
_FLUSH_KERNELS = 2
_WARM_UP = 3  # As the peers of torch_peers: idle, a GPU lowers its clocks.
_ROUNDS = 3


class Program:
  """A compiled function that is to be timed.

  Its arguments have the memory layout that the compiler would choose, as they
  have where a jit makes them: nobody waits for scales to be transposed.

  Args:
    fn: what is timed.
    *args: its arguments, or their shapes: then nothing touches the device.
    in_place: the index of the argument that the result replaces, if any: each
      run goes on with what the one before made of it.

  Attributes:
    out_info: the shapes of what fn returns.
    peak_bytes: of its arguments, results and what it needs in between, as XLA
      plans them.
  """

  def __init__(self, fn, *args, in_place: int | None = None):
    self._on_gpu = jax.default_backend() == "gpu"
    self._in_place = in_place

    def flush_and_run(words, *args):
      # What fn makes of args, it does after the flush, which has an operation
      # of its own to be known by. What that writes is still in the cache and
      # would be written to memory on fn's account: so it is read again.
      words = jax.lax.optimization_barrier(jax.lax.population_count(words))
      sums = jnp.sum(words, axis=1)
      sums, args = jax.lax.optimization_barrier((sums, args))
      return sums, fn(*args)

    # Elsewhere a flush would be part of the time.
    rows, cols = _FLUSH_SHAPE if self._on_gpu else (1, 1)
    self._words = jax.ShapeDtypeStruct((rows, cols), jnp.uint32)
    donated = () if in_place is None else (1 + in_place,)
    auto = Format(Layout.AUTO)
    formats = [None if i == in_place else auto for i in range(len(args))]
    flush_and_run = jax.jit(
      flush_and_run,
      donate_argnums=donated,
      in_shardings=(None, *formats),
    )
    self._compiled = flush_and_run.lower(self._words, *args).compile()
    self.out_info = self._compiled.out_info[1]
    memory = self._compiled.memory_analysis()
    self.peak_bytes = (
      memory.temp_size_in_bytes
      + memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      # Before and after the flush, and its sums.
      - (2 * rows * cols + rows) * self._words.dtype.itemsize
    )

  def __call__(self, *args):
    """Returns what the function returns."""
    return self._compiled(*self._arguments(args))[1]

  def _arguments(self, args):
    """Returns zeros for the flush, and args, one copied if to be replaced."""
    copy = lambda i, arg: jnp.copy(arg) if i == self._in_place else arg
    args = [self._zeros(), *(copy(i, arg) for i, arg in enumerate(args))]
    formats, _ = self._compiled.input_formats
    return jax.tree.map(jax.device_put, tuple(args), formats)

  def _zeros(self):
    return jnp.zeros(self._words.shape, self._words.dtype)

  def measure(self, *args, iterations: int) -> tuple[float, dict[str, float]]:
    """Returns the median of the runs' times, and {kernel: time} of that run.

    In microseconds. On a GPU the sum of the times of a run's kernels, as CUPTI
    reports them, after the L2 cache was flushed: the gaps between kernels are
    not in it. Elsewhere wall-clock time, of no kernels.
    """
    words, *args = self._arguments(args)
    run = self._compiled
    if self._in_place is not None:
      run = _InPlace(self._compiled, self._in_place, args)
    if not self._on_gpu:
      times = []
      jax.block_until_ready(run(words, *args))
      for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(run(words, *args))
        times.append(time.perf_counter() - start)
      return 1e6 * statistics.median(times), {}
    from jax.experimental.mosaic.gpu import profiler

    # The results of all iterations are kept.
    results = self._compiled.out_info
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(results))
    iterations = max(1, min(iterations, _MAX_KEPT_BYTES // kept))
    for _ in range(_WARM_UP):
      jax.block_until_ready(run(words, *args))
    measure = profiler.measure(run, iterations=iterations, aggregate=False)
    _, runs = measure(words, *args)
    # A single run is not in a list of its own.
    runs = runs if isinstance(runs[0], list) else [runs]
    runs = [_without_flush(kernels) for kernels in runs]
    total_ms = lambda kernels: sum(time_ms for _, time_ms in kernels)
    kernels_us = collections.Counter()
    for name, time_ms in sorted(runs, key=total_ms)[len(runs) // 2]:
      kernels_us[name] += 1e3 * time_ms
    return 1e3 * statistics.median(map(total_ms, runs)), dict(kernels_us)


class _InPlace(jax.stages.Wrapped):
  """Runs a program with what its last run made of one of its arguments."""

  def __init__(self, compiled, index: int, args):
    self._compiled, self._index, self._value = compiled, index, args[index]

  def __call__(self, words, *args):
    args = list(args)
    args[self._index] = self._value
    sums, self._value = self._compiled(words, *args)
    return sums


def _without_flush(kernels):
  """What fn computes of nothing but constants may come before the flush."""
  names = [name for name, _ in kernels]
  flushes = [i for i, name in enumerate(names) if _FLUSH in name]
  if len(flushes) != 1 or "reduce" not in names[flushes[0] + 1]:
    raise RuntimeError(f"kernels must be one flush of the cache first: {names}")
  return kernels[: flushes[0]] + kernels[flushes[0] + _FLUSH_KERNELS :]


def measure_us(fn, *args, iterations: int) -> float:
  """Returns how long a call takes: see Program.measure."""
  return Program(fn, *args).measure(*args, iterations=iterations)[0]


def measure_kernels_us(compiled, *args, iterations: int) -> float:
  """Returns how long the kernels of a call run, the mean of its devices.

  Of a compiled function, the median of the calls, as CUPTI reports them: the
  gaps between kernels are not in it, the time that they wait for other devices
  is. What is read may still be in the caches. Elsewhere than on GPUs as
  measure_queued_us.
  """
  if jax.default_backend() != "gpu":
    return measure_queued_us(compiled, *args, iterations=iterations)
  from jax.experimental.mosaic.gpu import profiler

  measure = profiler.measure(compiled)
  devices = len(jax.tree.leaves(compiled.output_shardings)[0].device_set)
  times = [measure(*args)[1] for _ in range(iterations)]
  return 1e3 * statistics.median(times) / devices


def measure_queued_us(compiled, *args, iterations: int) -> float:
  """Returns how long a call of a compiled function takes on all its devices.

  Wall-clock time of calls that are queued one after the other and awaited
  together, the median of a few rounds: the host works ahead of the devices, so
  that what it does costs nothing, unless a call takes less. What is read may
  still be in the caches.
  """
  times = []
  jax.block_until_ready(compiled(*args))
  for _ in range(_ROUNDS):
    start = time.perf_counter()
    for _ in range(iterations):
      results = compiled(*args)
      if jax.default_backend() == "cpu":
        # Collectives of several calls at a time can wait for one another.
        jax.block_until_ready(results)
    jax.block_until_ready(results)
    times.append((time.perf_counter() - start) / iterations)
  return 1e6 * statistics.median(times)

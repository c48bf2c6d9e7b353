"""How long a function takes on the device."""

import collections
import statistics
import time

import jax
import jax.numpy as jnp

_MAX_KEPT_BYTES = 2**34
_FLUSH_WORDS = 2**26  # of 4 bytes, several times the L2 cache.
_FLUSH = "popcnt"  # in the name of its kernel.
_ROUNDS = 3


class Program:
  """A compiled function that is to be timed.

  Args:
    fn: what is timed.
    *args: its arguments, or their shapes: then nothing touches the device.

  Attributes:
    out_info: the shapes of what fn returns.
    peak_bytes: of its arguments, results and what it needs in between, as XLA
      plans them.
  """

  def __init__(self, fn, *args):
    self._on_gpu = jax.default_backend() == "gpu"

    def flush_and_run(words, args):
      # What fn makes of args, it does after the flush, which is one kernel. It
      # has an operation of its own to be known by.
      words = jax.lax.population_count(words)
      words, args = jax.lax.optimization_barrier((words, args))
      return words, fn(*args)

    # Elsewhere a flush would be part of the time.
    words = _FLUSH_WORDS if self._on_gpu else 1
    self._words = jax.ShapeDtypeStruct((words,), jnp.uint32)
    self._compiled = jax.jit(flush_and_run).lower(self._words, args).compile()
    self.out_info = self._compiled.out_info[1]
    memory = self._compiled.memory_analysis()
    self.peak_bytes = (
      memory.temp_size_in_bytes
      + memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - 2 * words * self._words.dtype.itemsize  # Before and after the flush.
    )

  def __call__(self, *args):
    """Returns what the function returns."""
    return self._compiled(self._zeros(), args)[1]

  def _zeros(self):
    return jnp.zeros(self._words.shape, self._words.dtype)

  def measure(self, *args, iterations: int) -> tuple[float, dict[str, float]]:
    """Returns the median of the runs' times, and {kernel: time} of that run.

    In microseconds. On a GPU the sum of the times of a run's kernels, as CUPTI
    reports them, after the L2 cache was flushed: the gaps between kernels are
    not in it. Elsewhere wall-clock time, of no kernels.
    """
    if not self._on_gpu:
      words, times = self._zeros(), []
      jax.block_until_ready(self._compiled(words, args))
      for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(self._compiled(words, args))
        times.append(time.perf_counter() - start)
      return 1e6 * statistics.median(times), {}
    from jax.experimental.mosaic.gpu import profiler

    # The results of all iterations are kept.
    results = self._compiled.out_info
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(results))
    iterations = max(1, min(iterations, _MAX_KEPT_BYTES // kept))
    measure = profiler.measure(
      self._compiled, iterations=iterations, aggregate=False
    )
    _, runs = measure(self._zeros(), args)
    # A single run is not in a list of its own.
    runs = runs if isinstance(runs[0], list) else [runs]
    runs = [_without_flush(kernels) for kernels in runs]
    total_ms = lambda kernels: sum(time_ms for _, time_ms in kernels)
    kernels_us = collections.Counter()
    for name, time_ms in sorted(runs, key=total_ms)[len(runs) // 2]:
      kernels_us[name] += 1e3 * time_ms
    return 1e3 * statistics.median(map(total_ms, runs)), dict(kernels_us)


def _without_flush(kernels):
  """What fn computes of nothing but constants may come before the flush."""
  others = [kernel for kernel in kernels if _FLUSH not in kernel[0]]
  if len(others) != len(kernels) - 1:
    names = [name for name, _ in kernels]
    raise RuntimeError(f"one kernel must be the flush of the cache: {names}")
  return others


def measure_us(fn, *args, iterations: int) -> float:
  """Returns how long a call takes: see Program.measure."""
  return Program(fn, *args).measure(*args, iterations=iterations)[0]


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

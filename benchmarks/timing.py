"""How long a function takes on the device."""

import statistics
import time

import jax
import jax.numpy as jnp

_MAX_KEPT_BYTES = 2**34
_FLUSH_WORDS = 2**26  # of 4 bytes, several times the L2 cache.


class Program:
  """A compiled function that is to be timed.

  Args:
    fn: what is timed.
    *args: its arguments, or their shapes: then nothing touches the device.
  """

  def __init__(self, fn, *args):
    self._on_gpu = jax.default_backend() == "gpu"

    def flush_and_run(words, args):
      # Whatever fn computes, it does after the flush, which is one kernel.
      words, args = jax.lax.optimization_barrier((words + 1, args))
      return words, fn(*args)

    # Elsewhere a flush would be part of the time.
    words = _FLUSH_WORDS if self._on_gpu else 1
    self._words = jax.ShapeDtypeStruct((words,), jnp.uint32)
    self._compiled = jax.jit(flush_and_run).lower(self._words, args).compile()
    self.out_info = self._compiled.out_info[1]  # Shapes of what fn returns.

  def __call__(self, *args):
    """Returns what the function returns."""
    return self._compiled(self._zeros(), args)[1]

  def _zeros(self):
    return jnp.zeros(self._words.shape, self._words.dtype)

  def measure_us(self, *args, iterations: int) -> float:
    """Returns the median of the runs' times, in microseconds.

    On a GPU the sum of the times of a run's kernels, as CUPTI reports them,
    after the L2 cache was flushed: the gaps between kernels are not in it.
    Elsewhere wall-clock time.
    """
    if self._on_gpu:
      return self._measure_kernels_us(args, iterations)
    words, times = self._zeros(), []
    jax.block_until_ready(self._compiled(words, args))
    for _ in range(iterations):
      start = time.perf_counter()
      jax.block_until_ready(self._compiled(words, args))
      times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)

  def _measure_kernels_us(self, args, iterations: int) -> float:
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
    times_ms = [sum(time for _, time in kernels[1:]) for kernels in runs]
    return 1e3 * statistics.median(times_ms)


def measure_us(fn, *args, iterations: int) -> float:
  """Returns how long a call takes: see Program.measure_us."""
  return Program(fn, *args).measure_us(*args, iterations=iterations)

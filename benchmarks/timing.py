"""How long a function takes on the device."""

import contextlib
import statistics
import time

import jax
import jax.numpy as jnp

_MAX_KEPT_BYTES = 2**35
_FLUSH_WORDS = 2**26  # of 4 bytes, several times the L2 cache.


_NO_LOCK = contextlib.nullcontext()


def measure_us(fn, *args, iterations: int, lock=_NO_LOCK) -> float:
  """Returns the median of the runs' times, in microseconds.

  On a GPU the sum of the times of a run's kernels, as CUPTI reports them, after
  the L2 cache was flushed: the gaps between kernels are not in it. Elsewhere
  wall-clock time. `lock` is held while it runs, not while it compiles.
  """
  if jax.default_backend() == "gpu":
    return _measure_kernels_us(fn, *args, iterations=iterations, lock=lock)
  compiled = jax.jit(fn).lower(*args).compile()
  times = []
  with lock:
    jax.block_until_ready(compiled(*args))
    for _ in range(iterations):
      start = time.perf_counter()
      jax.block_until_ready(compiled(*args))
      times.append(time.perf_counter() - start)
  return 1e6 * statistics.median(times)


def _measure_kernels_us(fn, *args, iterations: int, lock) -> float:
  from jax.experimental.mosaic.gpu import profiler

  def flush_and_run(words, args):
    # Whatever fn computes, it does after the flush, which is one kernel.
    words, args = jax.lax.optimization_barrier((words + 1, args))
    return words, fn(*args)

  words = jnp.zeros((_FLUSH_WORDS,), jnp.uint32)
  compiled = jax.jit(flush_and_run).lower(words, args).compile()
  # The results of all iterations are kept.
  results = compiled.out_info
  kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(results))
  iterations = max(1, min(iterations, _MAX_KEPT_BYTES // kept))
  measure = profiler.measure(compiled, iterations=iterations, aggregate=False)
  with lock:
    _, runs = measure(words, args)
  # A single run is not in a list of its own.
  runs = runs if isinstance(runs[0], list) else [runs]
  times_ms = [sum(time for _, time in kernels[1:]) for kernels in runs]
  return 1e3 * statistics.median(times_ms)

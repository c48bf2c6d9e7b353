"""How long a function takes on the device."""

import statistics
import time

import jax

_MAX_KEPT_BYTES = 2**35


def measure_us(fn, *args, iterations: int) -> float:
  """Returns the median of the runs' times, in microseconds.

  On a GPU the sum of the times of a run's kernels, as CUPTI reports them: the
  gaps between kernels are not in it. Elsewhere wall-clock time.
  """
  fn = jax.jit(fn)
  jax.block_until_ready(fn(*args))
  if jax.default_backend() == "gpu":
    from jax.experimental.mosaic.gpu import profiler

    # It keeps the results of all iterations.
    kept = sum(x.nbytes for x in jax.tree.leaves(fn(*args)))
    iterations = max(1, min(iterations, _MAX_KEPT_BYTES // kept))
    _, times_ms = profiler.measure(fn, iterations=iterations)(*args)
    # A single run is reported as a number.
    times_ms = times_ms if isinstance(times_ms, list) else [times_ms]
    return 1e3 * statistics.median(times_ms)
  times = []
  for _ in range(iterations):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    times.append(time.perf_counter() - start)
  return 1e6 * statistics.median(times)

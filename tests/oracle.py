"""What the grouped GEMMs should give, in float64, and how far off they may be.

Everything is computed in NumPy from the quantised values that the library saw;
nothing of the library is called. Bounds hold element by element.
"""

import math

import ml_dtypes
import numpy as np

BLOCK = 128
_F32_ROUNDOFF = 2.0**-24


def group_rows(sizes, m, group_offset=None, num_groups=None):
  """Returns [(start, end)] of the groups, in Python's unbounded integers."""
  rows, end = [], 0
  for size in np.asarray(sizes).tolist():
    start, end = end, min(end + max(size, 0), m)
    rows.append((start, end))
  if group_offset is None:
    return rows
  offset = int(np.asarray(group_offset).reshape(()))
  inside = lambda g: 0 <= g < len(rows)
  return [
    rows[g] if inside(g) else (0, 0) for g in range(offset, offset + num_groups)
  ]


def block_columns(sizes, t_padded):
  """Returns [(start, end)] of the groups in the padded tokens."""
  blocks = [math.ceil(max(s, 0) / BLOCK) for s in np.asarray(sizes).tolist()]
  rows = group_rows(blocks, t_padded // BLOCK)
  return [(start * BLOCK, end * BLOCK) for start, end in rows]


def dequantize(x):
  """Returns values * scales of a ScaledArray, in float64."""
  scales = np.asarray(x.scales, np.float64)
  for axis, block in enumerate(x.block_shape):
    scales = np.repeat(scales, block, axis)
  inside = tuple(slice(size) for size in x.shape)
  return np.asarray(x.values).astype(np.float64)[inside] * scales[inside]


def m_grouped(lhs, rhs, rows, bias=None):
  """out[r] = lhs[r] @ rhs[g].T + bias[g], from float64 (m, k), (g, n, k)."""
  out = np.zeros((lhs.shape[0], rhs.shape[1]))
  for g, (start, end) in enumerate(rows):
    out[start:end] = lhs[start:end] @ rhs[g].T
    if bias is not None:
      out[start:end] += bias[g]
  return out


def k_grouped(lhs, rhs, columns):
  """out[g] = lhs[:, columns of g] @ rhs[:, columns of g].T, from float64."""
  return np.stack(
    [lhs[:, start:end] @ rhs[:, start:end].T for start, end in columns]
  )


def check_m_grouped(
  out, lhs, rhs, sizes, group_offset=None, row_error=None, bias=None
):
  """Raises AssertionError, naming the worst row, unless out is right.

  lhs (m, k) and rhs (g, n, k) are ScaledArrays, bias is (g, n) floats. With
  `row_error`, |out - ref| may be that much of |ref| in every row (as vectors);
  otherwise each element may be off by what rounding sums of k float32 products
  can cost.
  """
  lhs, rhs = dequantize(lhs), dequantize(rhs)
  rows = group_rows(sizes, lhs.shape[0], group_offset, len(rhs))
  if bias is not None:
    bias = np.asarray(bias).astype(np.float64)
  with np.errstate(invalid="ignore"):
    ref = m_grouped(lhs, rhs, rows, bias)
    of_bias = None if bias is None else np.abs(bias)
    magnitude = m_grouped(np.abs(lhs), np.abs(rhs), rows, of_bias)
  check(out, ref, magnitude, lhs.shape[1] + (bias is not None), row_error)


def check_k_grouped(out, lhs, rhs, sizes, accumulator=None, row_error=None):
  """As check_m_grouped, for (g, m, n) of ScaledArrays (m, t), (n, t)."""
  lhs, rhs = dequantize(lhs), dequantize(rhs)
  columns = block_columns(sizes, lhs.shape[1])
  with np.errstate(invalid="ignore"):
    ref = k_grouped(lhs, rhs, columns)
    magnitude = k_grouped(np.abs(lhs), np.abs(rhs), columns)
  if accumulator is not None:
    accumulator = np.asarray(accumulator, np.float64)
    ref, magnitude = ref + accumulator, magnitude + np.abs(accumulator)
  check(out, ref, magnitude, lhs.shape[1], row_error)


def check(out, ref, magnitude, num_terms, row_error=None):
  """Compares out with ref, a sum of num_terms products of sum `magnitude`.

  A zero magnitude asks for an exact zero; NaN and Inf for the same in out.
  """
  dtype = np.asarray(out).dtype
  out = np.asarray(out).astype(np.float64)
  assert out.shape == ref.shape, f"shape {out.shape}, should be {ref.shape}"
  finite = np.isfinite(ref)
  same = (out == ref) | (np.isnan(out) & np.isnan(ref))
  _report_worst(~finite & ~same, out, ref, "should not be finite")
  error = np.where(finite, np.abs(out - np.where(finite, ref, 0)), 0)
  error = np.where(np.isnan(error), np.inf, error)
  if row_error is None:
    # Every product is rounded thrice at most (its scales), every sum once.
    roundings = (num_terms + 6) * _F32_ROUNDOFF
    bound = roundings / (1 - roundings) * np.where(finite, magnitude, 0)
    bound += float(ml_dtypes.finfo(dtype).eps) / 2 * (np.abs(ref) + bound)
    bound += np.where(magnitude == 0, 0, float(ml_dtypes.finfo(dtype).tiny))
    excess = np.where(finite & (error > bound), error - bound, 0)
    _report_worst(excess, out, ref, "is beyond the bound")
  else:
    norm = lambda x: np.sqrt(np.sum(x**2, axis=-1, keepdims=True))
    bound = row_error * norm(np.where(finite, ref, 0))
    excess = np.maximum(norm(error) - bound, 0) * np.ones_like(error)
    _report_worst(excess, out, ref, f"row is off by more than {row_error}")


def _report_worst(excess, out, ref, what):
  if np.any(excess):
    worst = tuple(map(int, np.unravel_index(np.argmax(excess), ref.shape)))
    bad_rows = int(np.any(excess, axis=-1).sum())
    raise AssertionError(
      f"{what}: {out[worst]} at {worst}, should be {ref[worst]} "
      f"({bad_rows} bad rows of {math.prod(ref.shape[:-1])})"
    )


# ---------------------------------------------------------------- quantize


def quantize(x, block_shape, dtype=ml_dtypes.float8_e4m3fn, power_of_two=False):
  """Returns (values, scales), in float32 arithmetic, rounded by ml_dtypes."""
  x = np.asarray(x).astype(np.float32)
  largest = np.float32(ml_dtypes.finfo(dtype).max)
  grid = [math.ceil(s / b) for s, b in zip(x.shape, block_shape, strict=True)]
  scales, values = np.zeros(grid, np.float32), np.zeros(x.shape, dtype)
  for index in np.ndindex(*grid):
    block = tuple(
      slice(i * b, (i + 1) * b) for i, b in zip(index, block_shape, strict=True)
    )
    part = x[block]
    finite = np.abs(part[np.isfinite(part)])
    amax = max(finite.max(initial=0), np.float32(1e-4))
    scale = np.float32(amax * (np.float32(1) / largest))
    if power_of_two:
      scale = np.float32(2.0 ** math.ceil(math.log2(scale)))
    with np.errstate(over="ignore", invalid="ignore"):
      scaled = np.clip(part / scale, -largest, largest)
      values[block] = np.where(np.isfinite(part), scaled, part).astype(dtype)
    scales[index] = scale
  return values, scales


def random_floats(shape, seed=0):
  """Returns float32 of random signs and, from row to row, magnitudes."""
  rng = np.random.default_rng(seed)
  magnitude = np.exp2(rng.integers(-6, 7, (*shape[:-1], 1)))
  return (rng.standard_normal(shape) * magnitude).astype(np.float32)


def pad_tokens(x, rows, t_padded):
  """Returns x (t, f) as (f, t_padded), each group padded to whole blocks."""
  out, column = np.zeros((x.shape[1], t_padded), np.float32), 0
  for start, end in rows:
    out[:, column : column + end - start] = x[start:end].T
    column += math.ceil((end - start) / BLOCK) * BLOCK
  return out

"""Random problems for the kernels, and their results in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_grouped_gemm import schedule

F8 = jnp.float8_e4m3fn


def _operand(rng, rows: int, k: int):
  """Returns FP8 (rows, k), stored in whole 8 rows and 128 columns, and f64."""
  stored = np.zeros((-(-rows // 8) * 8, -(-k // 128) * 128), np.float32)
  stored[:rows, :k] = rng.standard_normal((rows, k))
  stored = stored.astype(F8)
  return stored, stored[:rows].astype(np.float64)


def _scales(rng, *shape):
  return rng.uniform(0.5, 1.5, shape).astype(np.float32)


def _expand(scales, *shape):
  """Repeats each scale over its block of 128 along the last axes of shape."""
  for axis, size in enumerate(shape):
    scales = np.repeat(scales, 128, axis)
    scales = np.take(scales, np.arange(size), axis)
  return scales.astype(np.float64)


def m_grouped(sizes, m: int, n: int, k: int, seed: int = 0, bias: bool = False):
  """Returns the kernel's operands and (out, magnitude) in float64."""
  rng = np.random.default_rng(seed)
  g, k_blocks = len(sizes), -(-k // 128)
  lhs, lhs_f64 = _operand(rng, m, k)
  lhs_scales = _scales(rng, m, k_blocks)
  lhs_f64 *= _expand(lhs_scales.T, lhs.shape[1]).T
  rhs_scales = _scales(rng, g, -(-n // 128), k_blocks)
  rhs, rhs_f64 = zip(*(_operand(rng, n, k) for _ in range(g)), strict=True)
  out, magnitude = np.zeros((m, n)), np.zeros((m, n))
  # As large as the products.
  biases = (
    np.sqrt(k) * rng.standard_normal((g, n)) if bias else np.zeros((g, n))
  )
  biases = biases.astype(np.float32)
  starts, ends = schedule.group_bounds(jnp.asarray(sizes, jnp.int32), m)
  for i in range(g):
    rows = slice(int(starts[i]), int(ends[i]))
    weights = rhs_f64[i] * _expand(rhs_scales[i], n, lhs.shape[1])
    out[rows] = lhs_f64[rows] @ weights.T + biases[i]
    magnitude[rows] = np.abs(lhs_f64[rows]) @ np.abs(weights).T
    magnitude[rows] += np.abs(biases[i])
  sizes = np.asarray(sizes, np.int32)
  operands = (lhs, lhs_scales, np.stack(rhs), rhs_scales, sizes, None)
  if bias:
    operands = *operands, biases
  return jax.tree.map(jnp.asarray, operands), out, magnitude


def k_grouped(sizes, t: int, m: int, n: int, accumulator: bool, seed: int = 0):
  """Returns the kernel's operands and (out, magnitude) in float64."""
  rng = np.random.default_rng(seed)
  g, blocks = len(sizes), schedule.max_token_blocks(t, len(sizes))
  starts, ends = schedule.token_block_bounds(
    jnp.asarray(sizes, jnp.int32), blocks
  )
  operands, dense = [], []
  for rows in (m, n):
    values, values_f64 = _operand(rng, rows, blocks * 128)
    scales = _scales(rng, rows, blocks)
    operands += [values, scales]
    dense.append(values_f64 * _expand(scales.T, blocks * 128).T)
  start = rng.standard_normal((g, m, n)).astype(np.float32)
  out = start.astype(np.float64) if accumulator else np.zeros((g, m, n))
  magnitude = np.abs(out)
  for i in range(g):
    tokens = slice(128 * int(starts[i]), 128 * int(ends[i]))
    out[i] += dense[0][:, tokens] @ dense[1][:, tokens].T
    magnitude[i] += np.abs(dense[0][:, tokens]) @ np.abs(dense[1][:, tokens]).T
  operands += [starts, ends, start if accumulator else None]
  return jax.tree.map(jnp.asarray, operands), out, magnitude


def check(out, expected, magnitude, label=""):
  """Asserts that each element is within what rounding can explain.

  The interpreter multiplies in f32, and out is rounded once: so an error of
  half a unit of out's precision, and 2^-20 of the sum of the products'
  magnitudes for the sums in f32.
  """
  half_unit = float(jnp.finfo(out.dtype).eps) / 2
  error = np.abs(np.asarray(out).astype(np.float64) - expected)
  bound = half_unit * np.abs(expected) + 2**-20 * magnitude
  bad = ~(error <= bound)  # A NaN is bad.
  first = np.argwhere(bad)[:1]
  assert not bad.any(), f"{label}: {bad.sum()} wrong, the first at {first}"

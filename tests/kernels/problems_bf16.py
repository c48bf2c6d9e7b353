"""Random problems of 16-bit operands, and their results in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_grouped_gemm import schedule

COLS = 64  # Kernels read rows of whole 128 bytes, whole 8 rows.


def _stored(x, dtype):
  """Returns x in `dtype` and padded as kernels read it, and x in float64."""
  rows, cols = x.shape[-2:]
  padding = [(0, 0)] * (x.ndim - 2) + [(0, -rows % 8), (0, -cols % COLS)]
  values = x.astype(dtype)
  return np.pad(values, padding), values.astype(np.float64)


def m_grouped(sizes, m, n, k, transposed, dtype=jnp.bfloat16):
  """Returns the kernel's operands and (out, magnitude) in float64."""
  rng = np.random.default_rng(0)
  shape = (len(sizes), n, k) if transposed else (len(sizes), k, n)
  lhs, lhs_f64 = _stored(rng.standard_normal((m, k)), dtype)
  rhs, rhs_f64 = _stored(rng.standard_normal(shape), dtype)
  if transposed:
    rhs_f64 = rhs_f64.mT
  else:  # Rows of rhs are columns of lhs.
    rhs = np.pad(rhs, ((0, 0), (0, lhs.shape[1] - rhs.shape[1]), (0, 0)))
  out, magnitude = np.zeros((m, n)), np.zeros((m, n))
  starts, ends = schedule.group_bounds(jnp.asarray(sizes, jnp.int32), m)
  for i in range(len(sizes)):
    rows = slice(int(starts[i]), int(ends[i]))
    out[rows] = lhs_f64[rows] @ rhs_f64[i]
    magnitude[rows] = np.abs(lhs_f64[rows]) @ np.abs(rhs_f64[i])
  operands = (lhs, rhs, np.asarray(sizes, np.int32), None)
  return jax.tree.map(jnp.asarray, operands), out, magnitude


def k_grouped(starts, ends, t, m, n, dtype=jnp.bfloat16):
  """Returns the kernel's operands and (out, magnitude) in float64.

  Rows of no group are NaN.
  """
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((t, m)), rng.standard_normal((t, n))
  owned = np.zeros(t, bool)
  for start, end in zip(starts, ends, strict=True):
    owned[start:end] = True
  x[~owned] = y[~owned] = np.nan
  (lhs, x), (rhs, y) = _stored(x, dtype), _stored(y, dtype)
  rows = [slice(*bounds) for bounds in zip(starts, ends, strict=True)]
  out = np.stack([x[r].T @ y[r] for r in rows])
  magnitude = np.stack([np.abs(x[r]).T @ np.abs(y[r]) for r in rows])
  starts, ends = (np.asarray(b, np.int32) for b in (starts, ends))
  operands = (lhs, rhs, starts, ends)
  return jax.tree.map(jnp.asarray, operands), out, magnitude

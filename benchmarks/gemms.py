"""The grouped GEMMs to time: operands, implementations, and their check.

Operands are quantised random numbers: a GPU draws less power, and so runs
faster, on zeros or constants.
"""

import jax
import jax.numpy as jnp

from benchmarks.shapes import Problem
from jax_grouped_gemm import (
  k_grouped_gemm,
  m_grouped_gemm,
  quantize,
  quantize_for_k_grouped,
)

# Largest |row of out - row of the reference| / |row of the reference|. bf16
# peers also round the operands.
_MAX_ROW_ERROR = {"ours": 4e-3, "lax_ragged_dot": 1e-2}
_MAX_DENSE_GROUPS = 8  # jax.lax.ragged_dot multiplies all rows by all groups.


@jax.jit
def _max_row_error(out, expected):
  """Inf where a row that should be zero is not."""
  out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
  error = jnp.linalg.norm(out - expected, axis=-1)
  norm = jnp.linalg.norm(expected, axis=-1)
  return jnp.max(jnp.where(error == 0, 0, error / norm))


class MGrouped:
  """out[r] = lhs[r] @ rhs[group of r].T."""

  def __init__(self, p: Problem):
    m = sum(p.sizes)
    keys = jax.random.split(jax.random.key(0))
    self.sizes = jnp.asarray(p.sizes, jnp.int32)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    lhs = normal(keys[0], (m, p.k), jnp.bfloat16)
    rhs = normal(keys[1], (len(p.sizes), p.n, p.k), jnp.bfloat16)
    self.lhs = quantize(lhs, (1, 128))
    self.rhs = quantize(rhs, (1, 128, 128))

  def calls(self):
    """Returns {implementation: (function, operands)}."""
    calls = {"ours": (m_grouped_gemm, (self.lhs, self.rhs, self.sizes))}
    if self.sizes.size <= _MAX_DENSE_GROUPS:
      lhs = self.lhs.dequantize(jnp.bfloat16)
      rhs = self.rhs.dequantize(jnp.bfloat16).mT
      calls["lax_ragged_dot"] = jax.lax.ragged_dot, (lhs, rhs, self.sizes)
    return calls

  def expected(self):
    """Returns the result to compare with, in float32 arithmetic."""
    return m_grouped_gemm(
      self.lhs,
      self.rhs,
      self.sizes,
      preferred_element_type=jnp.float32,
      implementation="xla",
    )


class KGrouped:
  """out[g] = lhs[:, tokens of g] @ rhs[:, tokens of g].T."""

  def __init__(self, p: Problem):
    t = sum(p.sizes)
    self.sizes = jnp.asarray(p.sizes, jnp.int32)
    self.lhs, self.rhs = (
      quantize_for_k_grouped(
        jax.random.normal(key, (t, features), jnp.bfloat16), self.sizes
      )
      for key, features in zip(
        jax.random.split(jax.random.key(0)), (p.n, p.k), strict=True
      )
    )

  def calls(self):
    """Returns {implementation: (function, operands)}."""
    return {"ours": (k_grouped_gemm, (self.lhs, self.rhs, self.sizes))}

  def expected(self):
    """Returns the result to compare with, in float32 arithmetic."""
    return k_grouped_gemm(self.lhs, self.rhs, self.sizes, implementation="xla")


GEMMS = {"m_grouped": MGrouped, "k_grouped": KGrouped}


def check(impl: str, out, expected) -> dict:
  """Returns the fields of a result that say whether it is right."""
  error = float(_max_row_error(out, expected))
  return {"max_row_error": error, "verified": error <= _MAX_ROW_ERROR[impl]}

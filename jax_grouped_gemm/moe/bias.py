"""A bias per group, added to the group's rows."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jax_grouped_gemm import checks, schedule
from jax_grouped_gemm.group_sizes import check_group_sizes
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.scaled_array import wide_dtype


def add_bias(
  x: Float[Array, "m n"],
  bias: Float[Array, "g n"] | None,
  group_sizes: Int[Array, "g"],
) -> Float[Array, "m n"]:
  """out[r] = x[r] + bias[group of r], x as it is for rows of no group.

  The gradient of the bias is a product with ones, in float32: no scatter. What
  is not finite in x's gradient makes NaN of that entry of that group's.
  """
  if bias is None:
    return x
  x = jnp.asarray(x)
  if x.ndim != 2:
    raise ValueError(f"x must be (m, n), got {x.shape}")
  m, n = x.shape
  g = jnp.size(group_sizes)
  group_sizes, _ = check_group_sizes(group_sizes, m, g)
  bias = checks.check_bias("bias", bias, (g, n))
  return _add_bias(*vary_alike(x, bias, group_sizes))


def _membership(m: int, group_sizes) -> Array:
  """(m, g), whether the row is the group's."""
  starts, ends = schedule.group_bounds(group_sizes, m)
  row = jnp.arange(m, dtype=jnp.int32)[:, None]
  return (row >= starts[None]) & (row < ends[None])


@jax.custom_vjp
def _add_bias(x, bias, group_sizes):
  ends = schedule.group_bounds(group_sizes, x.shape[0])[1]
  row = jnp.arange(x.shape[0], dtype=jnp.int32)
  group = jnp.searchsorted(ends, row, side="right", method="compare_all")
  wide = wide_dtype(x.dtype)
  bias = bias.astype(wide)
  rows = jnp.where(
    (row < ends[-1])[:, None],
    bias[jnp.minimum(group, bias.shape[0] - 1)],
    0,
  )
  return (x.astype(wide) + rows).astype(x.dtype)


def _add_bias_fwd(x, bias, group_sizes):
  # Not the bias itself, only its dtype.
  return _add_bias(x, bias, group_sizes), (group_sizes, bias[:0])


def _add_bias_bwd(residuals, dout):
  group_sizes, bias = residuals
  is_member = _membership(dout.shape[0], group_sizes)
  finite = jnp.isfinite(dout)
  sums = _sum_rows(is_member, jnp.where(finite, dout, 0))
  damaged = _sum_rows(is_member, (~finite).astype(jnp.bfloat16))
  dbias = jnp.where(damaged > 0, jnp.nan, sums)
  return dout, dbias.astype(bias.dtype), None


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def _sum_rows(is_member, x) -> Float32[Array, "g n"]:
  return lax.dot_general(
    is_member.astype(x.dtype),
    x,
    (((0,), (0,)), ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=wide_dtype(x.dtype),
  )

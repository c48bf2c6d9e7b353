"""A bias per group, added to the group's rows."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_grouped_gemm import checks, manual_axes, schedule
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.group_sizes import check_group_sizes
from jax_grouped_gemm.kernels.unquantized import Unquantized
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.scaled_array import wide_dtype

_ONES = 8  # columns: the kernels multiply as many as well as one.
_KERNEL_ITEMSIZE = 2  # bytes of what they multiply.


def add_bias(
  x: Float[Array, "m n"],
  bias: Float[Array, "g n"] | None,
  group_sizes: Int[Array, "g"],
  *,
  implementation: str | None = None,
) -> Float[Array, "m n"]:
  """out[r] = x[r] + bias[group of r], x as it is for rows of no group.

  The gradient of the bias is a product with ones, in float32: no scatter. What
  is not finite in x's gradient is in the sums of its own group alone.

  Args:
    x: a row per token copy.
    bias: of each group; None: nothing is added.
    group_sizes: rows of each group.
    implementation: of that product, as in ragged_dot; XLA's where x does not
      have 16 bits.
  """
  implementations.check(implementation)
  if bias is None:
    return x
  x = jnp.asarray(x)
  if x.ndim != 2:
    raise ValueError(f"x must be (m, n), got {x.shape}")
  m, n = x.shape
  g = jnp.size(group_sizes)
  group_sizes, _ = check_group_sizes(group_sizes, m, g)
  bias = checks.check_bias("bias", bias, (g, n))
  return _add_bias(implementation, *vary_alike(x, bias, group_sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_bias(implementation, x, bias, group_sizes):
  ends = schedule.group_bounds(group_sizes, x.shape[0])[1]
  row = jnp.arange(x.shape[0], dtype=jnp.int32)
  group = schedule.range_of(ends, row)
  wide = wide_dtype(x.dtype)
  bias = bias.astype(wide)
  rows = jnp.where(
    (row < ends[-1])[:, None],
    bias[jnp.minimum(group, bias.shape[0] - 1)],
    0,
  )
  return (x.astype(wide) + rows).astype(x.dtype)


def _add_bias_fwd(implementation, x, bias, group_sizes):
  # Its body, for gradients to have forward-mode derivatives.
  out = _add_bias.__wrapped__(implementation, x, bias, group_sizes)
  # Not the bias itself, only its dtype.
  return out, (group_sizes, bias[:0])


def _add_bias_bwd(implementation, residuals, dout):
  group_sizes, bias = residuals
  starts, ends = schedule.group_bounds(group_sizes, dout.shape[0])
  if dout.dtype.itemsize != _KERNEL_ITEMSIZE:
    implementation = "xla"
  implementation = implementations.choose(implementation, None)
  if implementation == "xla":
    dbias = _sum_groups(dout, starts, ends)
  else:
    product = Unquantized(None, implementation, use_lax=False, has_offset=False)
    ones = 1 + manual_axes.zeros((dout.shape[0], _ONES), dout.dtype, dout)
    wide = wide_dtype(dout.dtype)
    dbias = product.rhs_gradient(ones, dout, starts, ends, wide)[:, 0]
  return dout, dbias.astype(bias.dtype), None


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def _sum_groups(x, starts, ends):
  """Sums of each group's rows, without a loop; NaN if a row is not finite."""
  row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
  is_member = (row >= starts[None]) & (row < ends[None])

  def sum_rows(x):
    return lax.dot_general(
      is_member.astype(x.dtype),
      x,
      (((0,), (0,)), ((), ())),
      precision=lax.Precision.HIGHEST,
      preferred_element_type=wide_dtype(x.dtype),
    )

  finite = jnp.isfinite(x)
  damaged = sum_rows((~finite).astype(jnp.bfloat16)) > 0
  return jnp.where(damaged, jnp.nan, sum_rows(jnp.where(finite, x, 0)))

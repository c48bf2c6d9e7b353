"""Grouped matrix multiplication without quantisation, and its two gradients.

jax.lax.ragged_dot on GPUs; the scans of reference.py on CPUs, where
jax.lax.ragged_dot is a dense product and costs g times the arithmetic.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_grouped_gemm.kernels import reference


@dataclasses.dataclass(frozen=True)
class Unquantized:
  """The products of ragged_dot. Groups are rows [starts, ends), in sequence.

  Attributes:
    precision: as jax.lax.ragged_dot has it.
    use_lax: whether jax.lax.ragged_dot computes.
    has_offset: whether the first group may start past the first row.
  """

  precision: lax.PrecisionLike
  use_lax: bool
  has_offset: bool

  def product(
    self,
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "g k n"],
    starts: Int32[Array, "g"],
    ends: Int32[Array, "g"],
    dtype: DTypeLike,
  ) -> Float[Array, "m n"]:
    """out[r] = lhs[r] @ rhs[group of r], 0 for rows of no group."""
    if not self.use_lax:
      return reference.m_grouped_matmul(
        lhs,
        rhs,
        starts,
        ends,
        rhs_axis=0,
        out_dtype=dtype,
        precision=self.precision,
      )

    def dot(lhs, rhs, sizes):
      return self._ragged_dot(lhs, rhs, sizes, dtype)

    lhs = self._gather_rows(lhs, starts, ends)
    out = _vmappable(dot)(lhs, rhs, ends - starts)
    return self._scatter_rows(out, starts, ends)

  def lhs_gradient(
    self,
    dout: Float[Array, "m n"],
    rhs: Float[Array, "g k n"],
    starts: Int32[Array, "g"],
    ends: Int32[Array, "g"],
    dtype: DTypeLike,
  ) -> Float[Array, "m k"]:
    """dlhs[r] = dout[r] @ rhs[group of r].T, 0 for rows of no group."""
    if not self.use_lax:
      return reference.m_grouped_matmul(
        dout,
        rhs,
        starts,
        ends,
        rhs_axis=1,
        out_dtype=dtype,
        precision=self.precision,
      )

    def gradient(dout, rhs, sizes):
      lhs = jax.ShapeDtypeStruct((dout.shape[0], rhs.shape[1]), dtype)
      dot = lambda lhs: self._ragged_dot(lhs, rhs, sizes, dout.dtype)
      return jax.linear_transpose(dot, lhs)(dout)[0]

    dout = self._gather_rows(dout, starts, ends)
    out = _vmappable(gradient)(dout, rhs, ends - starts)
    return self._scatter_rows(out, starts, ends)

  def rhs_gradient(
    self,
    lhs: Float[Array, "m k"],
    dout: Float[Array, "m n"],
    starts: Int32[Array, "g"],
    ends: Int32[Array, "g"],
    dtype: DTypeLike,
  ) -> Float[Array, "g k n"]:
    """drhs[g] = lhs[rows of g].T @ dout[rows of g]."""
    if not self.use_lax:
      return reference.k_grouped_matmul(
        lhs, dout, starts, ends, precision=self.precision
      ).astype(dtype)

    def gradient(lhs, dout, sizes):
      shape = (*sizes.shape, lhs.shape[1], dout.shape[1])
      dot = lambda rhs: self._ragged_dot(lhs, rhs, sizes, dout.dtype)
      return jax.linear_transpose(dot, jax.ShapeDtypeStruct(shape, dtype))(
        dout
      )[0]

    lhs = self._gather_rows(lhs, starts, ends)
    dout = self._gather_rows(dout, starts, ends)
    return _vmappable(gradient)(lhs, dout, ends - starts)

  def _ragged_dot(self, lhs, rhs, sizes, dtype):
    return lax.ragged_dot(
      lhs, rhs, sizes, self.precision, preferred_element_type=dtype
    )

  def _gather_rows(self, x, starts, ends):
    """Moves the groups' rows to the front; the others, set to zero, follow."""
    if self.has_offset:
      x = jnp.roll(x, -starts[0], axis=0)
    return _keep_first(x, jnp.sum(ends - starts))

  def _scatter_rows(self, x, starts, ends):
    """Moves rows back to where _gather_rows took them from."""
    x = _keep_first(x, jnp.sum(ends - starts))
    return jnp.roll(x, starts[0], axis=0) if self.has_offset else x


def _keep_first(x, count):
  return jnp.where(jnp.arange(x.shape[0])[:, None] < count, x, 0)


def _vmappable(fn):
  """jax.lax.ragged_dot can be vmapped over the first axes of all operands only:
  gives them to those that lack one.
  """  # noqa: D205
  batched = custom_vmap(fn)

  @batched.def_vmap
  def batch(axis_size, in_batched, *args):
    args = [
      arg if has_axis else jnp.broadcast_to(arg, (axis_size, *arg.shape))
      for arg, has_axis in zip(args, in_batched, strict=True)
    ]
    return _vmappable(jax.vmap(fn))(*args), True

  return batched

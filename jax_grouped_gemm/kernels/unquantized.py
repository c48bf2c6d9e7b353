"""Grouped matrix multiplication without quantisation, and its two gradients.

The kernels for 16-bit operands on Hopper GPUs, and where they are asked for;
else jax.lax.ragged_dot on GPUs and the scans of reference.py on CPUs, where
jax.lax.ragged_dot is a dense product and costs g times the arithmetic.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import ROW_ALIGN
from jax_grouped_gemm.kernels import (
  k_grouped_bf16,
  m_grouped_bf16,
  reference,
  tuning,
)
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.undifferentiable import undifferentiable

_KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
_KERNEL_OUT_DTYPES = (*_KERNEL_DTYPES, jnp.float32)
_COL_ALIGN = 64  # 16-bit elements of a row of a swizzled SMEM tile.


def _dimensions(lhs_axis: int, rhs_axis: int, rhs_groups: tuple[int, ...]):
  """Those of jax.lax.ragged_dot_general, whose rows of lhs are in groups."""
  contracted = (lhs_axis,), (rhs_axis,)
  return lax.RaggedDotDimensionNumbers((contracted, ((), ())), (0,), rhs_groups)


_PRODUCT = _dimensions(1, 1, (0,))  # (m, k) x (g, k, n)
_LHS_GRADIENT = _dimensions(1, 2, (0,))  # (m, n) x (g, k, n)
_RHS_GRADIENT = _dimensions(0, 0, ())  # (m, k) x (m, n)


@dataclasses.dataclass(frozen=True)
class Unquantized:
  """The products of ragged_dot. Groups are rows [starts, ends), in sequence.

  Attributes:
    precision: as jax.lax.ragged_dot has it. The kernels' products of 16-bit
      operands are exact, their sums float32.
    implementation: as in ragged_dot.
    use_lax: whether jax.lax.ragged_dot computes what the kernels do not.
    has_offset: whether the first group may start past the first row.
  """

  precision: lax.PrecisionLike
  implementation: str | None
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
    chosen = self._choose(lhs, rhs)
    if chosen != "xla":
      return _m_grouped(
        lhs, rhs, starts, ends, dtype, transposed=False, implementation=chosen
      )
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

    lhs = self._gather_rows(lhs, starts, ends)
    out = self._ragged_dot(_PRODUCT, lhs, rhs, ends - starts, dtype)
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
    chosen = self._choose(dout, rhs)
    if chosen != "xla":
      return _m_grouped(
        dout, rhs, starts, ends, dtype, transposed=True, implementation=chosen
      )
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

    dout = self._gather_rows(dout, starts, ends)
    out = self._ragged_dot(_LHS_GRADIENT, dout, rhs, ends - starts, dtype)
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
    chosen = self._choose(lhs, dout)
    if chosen != "xla":
      return _k_grouped(lhs, dout, starts, ends, dtype, implementation=chosen)
    if not self.use_lax:
      return reference.k_grouped_matmul(
        lhs, dout, starts, ends, precision=self.precision
      ).astype(dtype)

    lhs = self._gather_rows(lhs, starts, ends)
    dout = self._gather_rows(dout, starts, ends)
    return self._ragged_dot(_RHS_GRADIENT, lhs, dout, ends - starts, dtype)

  def _choose(self, x, y) -> str:
    """Returns the implementation of a product of x and y."""
    if x.size * y.size == 0:
      return "xla"
    unsupported = None
    if x.dtype != y.dtype or x.dtype not in _KERNEL_DTYPES:
      unsupported = (
        "multiplies two bfloat16 or two float16 operands where the recipe does "
        f"not quantise, got {x.dtype} and {y.dtype}"
      )
    return implementations.choose(self.implementation, unsupported)

  def _ragged_dot(self, dimensions, lhs, rhs, sizes, dtype):
    dot = functools.partial(
      lax.ragged_dot_general,
      ragged_dot_dimension_numbers=dimensions,
      precision=self.precision,
      preferred_element_type=dtype,
    )
    return _vmappable(dot)(lhs, rhs, sizes)

  def _gather_rows(self, x, starts, ends):
    """Moves the groups' rows to the front; the others, set to zero, follow."""
    if self.has_offset:
      x = jnp.roll(x, -starts[0], axis=0)
    return _keep_first(x, jnp.sum(ends - starts))

  def _scatter_rows(self, x, starts, ends):
    """Moves rows back to where _gather_rows took them from."""
    x = _keep_first(x, jnp.sum(ends - starts))
    return jnp.roll(x, starts[0], axis=0) if self.has_offset else x


# ---------------------------------------------------------------- kernels


def _m_grouped(lhs, rhs, starts, ends, dtype, *, transposed, implementation):
  """out[r] = lhs[r] @ rhs[group of r], or rhs[..].T, if transposed."""
  n, out_dtype = rhs.shape[1 if transposed else 2], _kernel_out_dtype(dtype)
  # The rows before the first group are one that rhs does not hold.
  sizes = jnp.concatenate([starts[:1], ends - starts])
  return _run_kernel(
    m_grouped_bf16.m_grouped_bf16,
    (lhs, rhs),
    sizes,
    jnp.ones((1,), jnp.int32),
    m=lhs.shape[0],
    n=n,
    transposed=transposed,
    out_dtype=out_dtype,
    config=tuning.m_grouped_bf16_config(n, out_dtype),
    interpret=implementation == "interpret",
  ).astype(dtype)


def _k_grouped(lhs, rhs, starts, ends, dtype, *, implementation):
  """out[g] = lhs[rows of g].T @ rhs[rows of g]."""
  n, out_dtype = rhs.shape[1], _kernel_out_dtype(dtype)
  return _run_kernel(
    k_grouped_bf16.k_grouped_bf16,
    (lhs, rhs),
    starts,
    ends,
    m=lhs.shape[1],
    n=n,
    out_dtype=out_dtype,
    config=tuning.k_grouped_bf16_config(n, out_dtype),
    interpret=implementation == "interpret",
  ).astype(dtype)


@functools.partial(
  jax.jit,
  static_argnames=(
    *("kernel", "m", "n", "transposed", "out_dtype", "config", "interpret"),
  ),
)
def _run_kernel(kernel, operands, *indices, interpret: bool, **static):
  operands = undifferentiable(
    "where kernels multiply there are first-order gradients only; "
    'implementation="xla" has higher ones',
    operands,
  )
  lhs, rhs = (_stored(x) for x in operands)
  out = kernel(
    lhs if interpret else implementations.cuda_only(lhs),
    rhs,
    *indices,
    interpret=interpret,
    **static,
  )
  # Pallas calls the results of kernels the same on all devices (jax 0.11.2).
  return vary_alike(out, lhs)[0]


def _kernel_out_dtype(dtype: DTypeLike):
  dtype = jnp.dtype(dtype)
  return dtype if dtype in _KERNEL_OUT_DTYPES else jnp.dtype(jnp.float32)


def _stored(x: Array) -> Array:
  """Pads to what the kernels read; a copy only if something is missing."""
  *batch, rows, cols = x.shape
  missing = [(0, 0, 0)] * len(batch) + [
    (0, -rows % ROW_ALIGN, 0),
    (0, -cols % _COL_ALIGN, 0),
  ]
  return lax.pad(x, jnp.zeros((), x.dtype), missing)


# ---------------------------------------------------------------- jax.lax


def _keep_first(x, count):
  row = jnp.arange(x.shape[0], dtype=jnp.int32)
  return jnp.where(row[:, None] < count, x, 0)


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

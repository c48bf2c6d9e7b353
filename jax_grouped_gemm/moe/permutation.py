"""Copies of tokens, sorted by expert, and back.

Both directions, and their gradients, copy rows along a permutation and add them
up in a fixed order: no two writes meet, so results are the same bits on every
run, and the NaN of a token stays with that token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.kernels import copy_rows
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.moe.routing import count
from jax_grouped_gemm.scaled_array import ScaledArray, wide_dtype
from jax_grouped_gemm.schedule import as_int32


class Permutation(NamedTuple):
  """top_k copies of each of `t` tokens, sorted by expert. A pytree.

  Attributes:
    order: copy at each sorted row; copy t * top_k + i is token t's i-th.
    inverse: sorted row of each copy.
    group_sizes: rows of each expert.
  """

  order: Int32[Array, "t*top_k"]
  inverse: Int32[Array, "t top_k"]
  group_sizes: Int32[Array, "e"]


def dispatch(
  x: Float[Array, "t d"],
  experts: Int[Array, "t top_k"],
  num_experts: int,
) -> tuple[Float[Array, "t*top_k d"], Permutation]:
  """rows[r] = x[token of the r-th copy, sorted by expert] -> (t * top_k, d).

  The copies of one expert stay in the order of their tokens. A copy whose
  expert is not in [0, num_experts) goes to nobody: such rows come last, past
  the sum of the group sizes.

  Differentiable in x: a token's gradient is the sum over its copies, in
  float32.

  Args:
    x: a row per token.
    experts: of each token, as route_top_k chooses them.
    num_experts: that there are.

  Returns:
    The rows and how they are sorted, for `combine`.
  """
  x, experts = jnp.asarray(x), jnp.asarray(experts)
  if x.ndim != 2 or experts.ndim != 2 or x.shape[0] != experts.shape[0]:
    raise ValueError(
      "x must be (tokens, d) and experts (tokens, top_k), got "
      f"{x.shape} and {experts.shape}"
    )
  x, experts = vary_alike(x, experts)
  permutation = sort_by_expert(experts, num_experts)
  return gather_copies(x, permutation), permutation


def dispatch_quantized(
  x: ScaledArray, permutation: Permutation, implementation: str | None
) -> ScaledArray:
  """dispatch of tokens (t, d) that are quantised by row. No gradient."""
  order, inverse = permutation.order, permutation.inverse
  padding = 0, x.padding[1]  # No copies of the padding rows.
  x = lax.stop_gradient(x)
  values = _copy_rows(x.values, order, inverse, implementation)
  scales = x.scales[order // inverse.shape[1]]
  return ScaledArray(values, scales, x.block_shape, padding)


def sort_by_expert(
  experts: Int[Array, "t top_k"], num_experts: int
) -> Permutation:
  """How `dispatch` sorts the copies of tokens that go to these experts."""
  experts = jnp.asarray(experts)
  if experts.ndim != 2:
    raise ValueError(f"experts must be (tokens, top_k), got {experts.shape}")
  if num_experts < 1:
    raise ValueError(f"num_experts must be at least 1, got {num_experts}")
  if not jnp.issubdtype(experts.dtype, jnp.integer):
    raise TypeError(f"experts must be integers, got {experts.dtype}")
  experts = as_int32(experts)  # Before num_experts becomes of its dtype.
  inside = (experts >= 0) & (experts < num_experts)
  keys = jnp.where(inside, experts, num_experts)
  copies = lax.iota(jnp.int32, keys.size)
  (copies,) = vary_alike(copies, keys)[:1]
  # XLA sorts on GPUs in a pass for each byte of the keys.
  short = keys.reshape(-1).astype(np.min_scalar_type(num_experts))
  _, order = lax.sort((short, copies), num_keys=1, is_stable=True)
  # Every row is written once: no two writes meet.
  inverse = jnp.zeros_like(order).at[order].set(copies, unique_indices=True)
  return Permutation(
    order, inverse.reshape(experts.shape), count(keys, num_experts)
  )


def gather_copies(
  x: Float[Array, "t d"],
  permutation: Permutation,
  implementation: str | None = "xla",
) -> Float[Array, "t*top_k d"]:
  """The rows that `dispatch` returns, given how they are sorted.

  XLA makes them unless it is told otherwise: it divides arrays between devices,
  which kernels outside of jax.shard_map do not.
  """
  return _gather_copies(
    implementation, *vary_alike(x, permutation.order, permutation.inverse)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_copies(implementation, x, order, inverse):
  return _copy_rows(x, order, inverse, implementation)


def _gather_copies_fwd(implementation, x, order, inverse):
  # Its body, for gradients to have forward-mode derivatives.
  return _gather_copies.__wrapped__(implementation, x, order, inverse), inverse


def _gather_copies_bwd(implementation, inverse, drows):
  dx = drows[inverse].astype(wide_dtype(drows.dtype)).sum(axis=1)
  return dx.astype(drows.dtype), None, None


_gather_copies.defvjp(_gather_copies_fwd, _gather_copies_bwd)


def _copy_rows(
  x: Shaped[Array, "t_stored d"],
  order: Int32[Array, "m"],
  inverse: Int32[Array, "t top_k"],
  implementation: str | None,
) -> Shaped[Array, "m d"]:
  """x[order // top_k]; by the kernel where it can.

  The kernel leaves rows that no copy has as they were in memory.
  """
  supported = copy_rows.supports(x.shape[1], x.dtype.itemsize)
  if not supported or x.size * order.size == 0:
    implementation = "xla"
  implementation = implementations.choose(implementation, None)
  if implementation == "xla":
    return x[order // inverse.shape[1]]
  return _copy_rows_by_kernel(
    *vary_alike(x, inverse), len(order), implementation == "interpret"
  )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _copy_rows_by_kernel(x, inverse, m: int, interpret: bool):
  out = copy_rows.copy_rows(
    x if interpret else implementations.cuda_only(x),
    inverse,
    m,
    interpret=interpret,
  )
  return vary_alike(out, x)[0]


def combine(
  rows: Float[Array, "t*top_k d"],
  weights: Float[Array, "t top_k"],
  permutation: Permutation,
  dtype: DTypeLike | None = None,
) -> Float[Array, "t d"]:
  """out[t] = sum over i of weights[t, i] * rows[sorted row of copy (t, i)].

  Products and sums are float32. Differentiable in rows and weights.

  Args:
    rows: as dispatch sorts them.
    weights: of each copy, as route_top_k gives them.
    permutation: from dispatch.
    dtype: of the result; None: that of rows.
  """
  rows, weights = jnp.asarray(rows), jnp.asarray(weights)
  shape = permutation.inverse.shape
  if weights.shape != shape or rows.shape[:1] != permutation.order.shape:
    raise ValueError(
      f"weights must be (tokens, top_k) = {shape} and rows (tokens * top_k, d)"
      f", got {weights.shape} and {rows.shape}"
    )
  out = _weighted_sum(
    *vary_alike(rows, weights, permutation.order, permutation.inverse)
  )
  return out.astype(rows.dtype if dtype is None else dtype)


@jax.custom_vjp
def _weighted_sum(rows, weights, order, inverse) -> Float32[Array, "t d"]:
  wide = wide_dtype(rows.dtype)
  products = rows[inverse].astype(wide) * weights.astype(wide)[:, :, None]
  return products.sum(axis=1)


def _weighted_sum_fwd(rows, weights, order, inverse):
  # Its body, for gradients to have forward-mode derivatives.
  out = _weighted_sum.__wrapped__(rows, weights, order, inverse)
  return out, (rows, weights, order, inverse)


def _weighted_sum_bwd(residuals, dout):
  rows, weights, order, inverse = residuals
  top_k = inverse.shape[1]
  row_weights = weights.astype(dout.dtype).reshape(-1)[order]
  drows = row_weights[:, None] * dout[order // top_k]
  dweights = jnp.sum(
    rows[inverse].astype(dout.dtype) * dout[:, None, :], axis=-1
  )
  return drows.astype(rows.dtype), dweights.astype(weights.dtype), None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


jax.export.register_namedtuple_serialization(
  Permutation, serialized_name="jax_grouped_gemm.moe.Permutation"
)

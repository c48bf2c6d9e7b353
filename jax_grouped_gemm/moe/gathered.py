"""Few tokens: all devices get all of them, and compute their experts' part.

One collective there and one back, and no plan of what goes where: in decoding,
the launches of all that cost more than the bytes that nobody needs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32

from jax_grouped_gemm.config import ROW_ALIGN
from jax_grouped_gemm.manual_axes import vary_alike, zeros
from jax_grouped_gemm.moe.permutation import (
  Permutation,
  combine,
  dispatch_quantized,
  gather_copies,
  sort_by_expert,
)
from jax_grouped_gemm.scaled_array import ScaledArray, wide_dtype


class Tokens(NamedTuple):
  """Those of all n devices along an axis, one device's after the other's."""

  rows: Float[Array, "n*t d"]
  weights: Float32[Array, "n*t top_k"]
  quantized: ScaledArray | None  # (n * t, d), of scale blocks (1, 128)
  experts: Int32[Array, "n*t top_k"]


def run(
  axis_name: str,
  experts: Callable[[Array, Array, ScaledArray | None], Array],
  tokens: Tokens,
  num_local: int,
  implementation: str | None,
) -> tuple[Float[Array, "t d"], Int32[Array, "e"]]:
  """Returns what ExpertParallel.run does, the group sizes of this axis alone.

  Args:
    axis_name: that the experts are spread over.
    experts: as in ExpertParallel.run.
    tokens: this device's, n = 1. The gradient of rows that are quantised goes
      to the rows.
    num_local: experts of each device.
    implementation: of copying.
  """
  n, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
  dtype, shape = tokens.rows.dtype, (n, *tokens.rows.shape)
  tokens = Tokens(*vary_alike(*_all_gather(axis_name, tokens)))
  local = _sort_local(tokens.experts - me * num_local, num_local)
  quantized = tokens.quantized
  if quantized is not None:
    quantized = dispatch_quantized(quantized, local, implementation)
  rows = gather_copies(tokens.rows, local, implementation)
  sums = experts(rows, local.group_sizes, quantized)
  sums = combine(sums, tokens.weights, local, dtype)
  sums = lax.all_to_all(
    sums.reshape(shape), axis_name, split_axis=0, concat_axis=0, tiled=True
  )
  out = jnp.sum(sums.astype(wide_dtype(dtype)), axis=0).astype(dtype)
  sizes = zeros((n, num_local), jnp.int32, local.group_sizes)
  return out, sizes.at[me].set(local.group_sizes).reshape(-1)


def _sort_local(experts: Int[Array, "t top_k"], num_local: int) -> Permutation:
  """Sorts the copies of experts [0, num_local); the others have no row.

  They take the last row of what is gathered, which is past the sum of the group
  sizes always.
  """
  t, top_k = experts.shape
  copies = sort_by_expert(experts, num_local)
  most = t * min(top_k, num_local)  # A token's experts are different ones.
  rows = most + ROW_ALIGN - most % ROW_ALIGN
  order = jnp.pad(copies.order, (0, max(0, rows - copies.order.size)))[:rows]
  is_local = (experts >= 0) & (experts < num_local)
  inverse = jnp.where(is_local, copies.inverse, rows)
  return Permutation(order, inverse, copies.group_sizes)


def _all_gather(axis_name: str, tokens: Tokens) -> Tokens:
  """All devices' tokens. Quantised rows take the place of the rows."""
  gathered = _gather_tokens(axis_name, lax.stop_gradient(tokens))
  return gathered._replace(
    rows=_gathered(axis_name, tokens.rows, gathered.rows),
    weights=_gathered(axis_name, tokens.weights, gathered.weights),
  )


def _gather_tokens(axis_name: str, tokens: Tokens) -> Tokens:
  rows, weights, quantized, experts = tokens
  arrays = [weights, experts]
  if quantized is None:
    rows, weights, experts = _gather_bytes(axis_name, [rows, *arrays])
    return Tokens(rows, weights, None, experts)
  arrays += [quantized.values[: len(rows)], quantized.scales]
  weights, experts, values, scales = _gather_bytes(axis_name, arrays)
  padding = 0, quantized.padding[1]  # The rows' is not sent.
  gathered = ScaledArray(values, scales, quantized.block_shape, padding)
  return Tokens(gathered.dequantize(rows.dtype), weights, gathered, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(axis_name: str, x, gathered):
  """Returns what was gathered of x, to which its gradient goes back."""
  del x
  return gathered


def _gathered_bwd(axis_name: str, _, gradient):
  wide = gradient.astype(wide_dtype(gradient.dtype))
  sums = lax.psum_scatter(wide, axis_name, scatter_dimension=0, tiled=True)
  return sums.astype(gradient.dtype), None


_gathered.defvjp(lambda axis_name, x, gathered: (gathered, None), _gathered_bwd)


def _gather_bytes(axis_name: str, arrays):
  """Returns the arrays (t, ...) of all devices as (n * t, ...)."""
  as_bytes = [
    lax.bitcast_convert_type(x, jnp.uint8).reshape(len(x), -1) for x in arrays
  ]
  gathered = lax.all_gather(
    jnp.concatenate(as_bytes, axis=1), axis_name, tiled=True
  )
  results, start = [], 0
  for x, part in zip(arrays, as_bytes, strict=True):
    end = start + part.shape[1]
    item = (x.dtype.itemsize,) if x.dtype.itemsize > 1 else ()
    part = gathered[:, start:end].reshape(-1, *x.shape[1:], *item)
    results.append(lax.bitcast_convert_type(part, x.dtype))
    start = end
  return results

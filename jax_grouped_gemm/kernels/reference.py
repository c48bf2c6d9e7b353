"""What the kernels compute, in plain jax.numpy: runs on any backend.

Nothing here masks by multiplication: NaN in one row or group stays there.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_grouped_gemm import manual_axes, schedule
from jax_grouped_gemm.scaled_array import (
  ScaledArray,
  expand_scales,
  scales_shape,
  wide_dtype,
)

MIN_AMAX = 1e-4  # of a block, as DeepSeek-V3 and DeepGEMM have it.

# ---------------------------------------------------------------- quantize


@functools.partial(
  jax.jit, static_argnames=("block_shape", "dtype", "power_of_two_scales")
)
def quantize(
  x: Float[Array, "..."],
  *,
  block_shape: tuple[int, ...],
  dtype: DTypeLike,
  power_of_two_scales: bool,
) -> ScaledArray:
  """values = x / scales to the nearest, scales = max|x| of the block / max f8.

  NaN and Inf in x stay where they are and do not enter the scale.
  """
  x = x.astype(jnp.float32)
  largest = float(jnp.finfo(dtype).max)
  amax = jnp.maximum(_block_amax(x, block_shape), MIN_AMAX)
  # XLA turns a division by a constant into this anyway, but not everywhere.
  scales = amax * jnp.float32(1 / largest)
  if power_of_two_scales:
    scales = next_power_of_two(scales)
  finite = jnp.isfinite(x)
  # XLA turns x / broadcast(scales) into x * (1 / scales), which may round to
  # another value. It does not where the divisor depends on x.
  divisor = jnp.where(finite, expand_scales(scales, block_shape, x.shape), 1)
  scaled = jnp.clip(x / divisor, -largest, largest)
  damaged = x if dtype == jnp.float8_e5m2 else jnp.nan  # e4m3fn has no Inf.
  values = jnp.where(finite, scaled, damaged)
  # Else XLA on a GPU leaves the rounding out where values become float32 again.
  values = lax.optimization_barrier(values.astype(dtype))
  return ScaledArray(values, scales, block_shape)


def _block_amax(
  x: Float32[Array, "..."], block_shape: tuple[int, ...]
) -> Float32[Array, "..."]:
  """Returns the largest finite magnitude of each block."""
  blocks = scales_shape(x.shape, block_shape)
  magnitude = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
  missing = [
    (0, count * block - size)
    for count, block, size in zip(blocks, block_shape, x.shape, strict=True)
  ]
  split = [n for pair in zip(blocks, block_shape, strict=True) for n in pair]
  magnitude = jnp.pad(magnitude, missing).reshape(split)
  return magnitude.max(axis=tuple(range(1, 2 * x.ndim, 2)))


def next_power_of_two(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
  """Rounds positive normal numbers up to a power of two."""
  mantissa = (1 << jnp.finfo(jnp.float32).nmant) - 1
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)


@functools.partial(jax.jit, static_argnames=("dtype", "power_of_two_scales"))
def quantize_for_k_grouped(
  x: Float[Array, "t f"],
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  *,
  dtype: DTypeLike,
  power_of_two_scales: bool,
) -> ScaledArray:
  """x (t, f) -> (f, t_padded), each group padded to whole token blocks."""
  num_tokens = x.shape[0]
  first, sizes = schedule.token_blocks(starts, ends, num_tokens)
  place = jnp.arange(schedule.TOKEN_BLOCK, dtype=jnp.int32)
  inside = (place[None] < sizes[:, None]).reshape(-1, 1)
  token = first[:, None] + place[None]
  token = jnp.clip(token, 0, num_tokens - 1).reshape(-1)
  return quantize(
    jnp.where(inside, x[token], 0),
    block_shape=(schedule.TOKEN_BLOCK, 1),
    dtype=dtype,
    power_of_two_scales=power_of_two_scales,
  ).mT


# ---------------------------------------------------------------- GEMMs

_MIN_TILE, _MAX_TILE = 32, 512  # rows multiplied at a time.


def _make_tiles(starts, ends, m: int):
  """Returns the tiles, those past the end with the group -1, and their rows."""
  mean = -(-m // starts.shape[0])
  tile_m = min(max(1 << (mean - 1).bit_length(), _MIN_TILE), _MAX_TILE)
  tiles = schedule.make_tiles(starts, ends, m, tile_m)
  is_tile = jnp.arange(tiles.row.shape[0], dtype=jnp.int32) < tiles.count
  return tiles._replace(
    group=jnp.where(is_tile, tiles.group, -1),
    row=jnp.where(is_tile, tiles.row, m),
  ), tile_m


def _pad_rows(x: Array, count: int) -> Array:
  return jnp.pad(x, ((0, count), (0, 0)))


def _dot(lhs, rhs, lhs_axis: int, rhs_axis: int, precision):
  """Contracts an axis of each, in f32 or wider."""
  dtype = wide_dtype(lhs.dtype, rhs.dtype)
  return lax.dot_general(
    lhs.astype(dtype),
    rhs.astype(dtype),
    (((lhs_axis,), (rhs_axis,)), ((), ())),
    precision=precision,
  )


@functools.partial(
  jax.jit, static_argnames=("rhs_axis", "out_dtype", "precision")
)
def m_grouped_matmul(
  lhs: Float[Array, "m k"],
  rhs: Float[Array, "g k n"] | ScaledArray,
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  bias: Float[Array, "g n"] | None = None,
  *,
  rhs_axis: int,
  out_dtype: DTypeLike,
  precision=lax.Precision.HIGHEST,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[g] + bias[g] for starts[g] <= r < ends[g], else 0.

  `rhs_axis` is the axis of rhs[g] that is contracted.
  """
  m = lhs.shape[0]
  n = rhs.shape[2 - rhs_axis]
  tiles, tile_m = _make_tiles(starts, ends, m)
  lhs = _pad_rows(lhs, tile_m)

  def compute_tile(out, tile):
    group, row = tile

    def multiply():
      rows = lax.dynamic_slice_in_dim(lhs, row, tile_m)
      weights, added = jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, group, keepdims=False),
        (rhs, bias),
      )
      if isinstance(weights, ScaledArray):
        weights = weights.dequantize()
      product = _dot(rows, weights, 1, rhs_axis, precision)
      if added is not None:
        product += added.astype(product.dtype)
      return product.astype(out_dtype)

    def zeros():
      return manual_axes.zeros((tile_m, n), out_dtype, lhs)

    product = lax.cond(group >= 0, multiply, zeros)
    # Rows past the tile's own are overwritten by the tiles that follow.
    start = row, jnp.zeros_like(row)
    return lax.dynamic_update_slice(out, product, start), None

  out = manual_axes.zeros((m + tile_m, n), out_dtype, lhs)
  out, _ = lax.scan(compute_tile, out, (tiles.group, tiles.row))
  return out[:m]


@functools.partial(jax.jit, static_argnames=("precision",))
def k_grouped_matmul(
  lhs: Float[Array, "t m"],
  rhs: Float[Array, "t n"],
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  accumulator: Float[Array, "g m n"] | None = None,
  *,
  precision=lax.Precision.HIGHEST,
) -> Float[Array, "g m n"]:
  """out[g] = accumulator[g] + lhs[rows of g].T @ rhs[rows of g], f32 or wider.

  The rows of g are those in [starts[g], ends[g]).
  """
  groups, (t, m), n = starts.shape[0], lhs.shape, rhs.shape[1]
  dtype = wide_dtype(lhs.dtype, rhs.dtype)
  tiles, tile_t = _make_tiles(starts, ends, t)
  lhs, rhs = _pad_rows(lhs, tile_t), _pad_rows(rhs, tile_t)

  def add_tile(out, tile):
    group, row, size = tile
    inside = jnp.arange(tile_t, dtype=jnp.int32)[:, None] < size

    def multiply():
      return _dot(
        jnp.where(inside, lax.dynamic_slice_in_dim(lhs, row, tile_t), 0),
        jnp.where(inside, lax.dynamic_slice_in_dim(rhs, row, tile_t), 0),
        0,
        0,
        precision,
      )

    def zeros():
      return manual_axes.zeros((m, n), dtype, lhs)

    product = lax.cond(group >= 0, multiply, zeros)
    index = jnp.where(group >= 0, group, groups)  # The last one is scratch.
    return out.at[index].add(product), None

  if accumulator is None:
    accumulator = manual_axes.zeros((groups, m, n), dtype, lhs)
  out = jnp.pad(accumulator.astype(dtype), ((0, 1), (0, 0), (0, 0)))
  out, _ = lax.scan(add_tile, out, (tiles.group, tiles.row, tiles.size))
  return out[:groups]


@functools.partial(jax.jit, static_argnames="out_dtype")
def m_grouped_gemm(
  lhs: ScaledArray,
  rhs: ScaledArray,
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  bias: Float[Array, "g n"] | None,
  *,
  out_dtype: DTypeLike,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[g].T + bias[g], lhs (m, k), rhs (g, n, k)."""
  return m_grouped_matmul(
    lhs.dequantize(), rhs, starts, ends, bias, rhs_axis=1, out_dtype=out_dtype
  )


@functools.partial(jax.jit, static_argnames=("out_dtype", "zero_padding"))
def m_grouped_gemm_masked(
  lhs: ScaledArray,
  rhs: ScaledArray,
  group_sizes: Int32[Array, "g"],
  *,
  out_dtype: DTypeLike,
  zero_padding: bool,
) -> Float[Array, "g max_m n"]:
  """out[g] = lhs[g] @ rhs[g].T; zeros past group_sizes[g] if zero_padding."""
  shape = lhs.shape[1], rhs.shape[1]
  zeros = lambda x, _: manual_axes.zeros(shape, out_dtype, x.values)
  multiply = lambda x, weights: _dot(
    x.dequantize(), weights.dequantize(), 1, 1, lax.Precision.HIGHEST
  ).astype(out_dtype)

  def compute_group(group):
    *operands, size = group
    out = lax.cond(size > 0, multiply, zeros, *operands)
    in_use = jnp.arange(shape[0], dtype=jnp.int32)[:, None] < size
    return jnp.where(in_use, out, 0) if zero_padding else out

  return lax.map(compute_group, (lhs, rhs, group_sizes))


@functools.partial(jax.jit, static_argnames="out_dtype")
def k_grouped_gemm(
  lhs: ScaledArray,
  rhs: ScaledArray,
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  accumulator: Float32[Array, "g m n"] | None,
  *,
  out_dtype: DTypeLike,
) -> Float[Array, "g m n"]:
  """out[g] = accumulator[g] + lhs[:, blocks of g] @ rhs[:, blocks of g].T.

  Group g has the token blocks from starts[g] up to ends[g] - 1.
  """
  return k_grouped_matmul(
    lhs.dequantize().mT,
    rhs.dequantize().mT,
    starts * schedule.TOKEN_BLOCK,
    ends * schedule.TOKEN_BLOCK,
    accumulator,
  ).astype(out_dtype)

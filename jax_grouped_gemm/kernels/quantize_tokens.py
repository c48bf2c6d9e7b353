"""Quantisation along tokens, transposed, for Hopper; along rows too: one pass.

    scales[b, i] = max(|x[b, i]|, 1e-4) / largest FP8 value
    values[i, b] = (x[b, i] / scales[b, i]).T to the nearest, ties to even

b are blocks of 128 tokens of one group, those past its end zeros; i is one of
f features. x (t, f), values (f, 128 * blocks) and scales (blocks, f) are
row-major: what the K-grouped GEMM reads. With rows, also what quantize_rows
makes of the tokens of all blocks.

Each warpgroup works for itself, on every n-th tile of 128 tokens x 64 features,
or 128 with rows:
  wait full[slot] | (read, scale, convert, store rows)
  | read transposed | scale, convert | store | load ahead
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from jax_grouped_gemm.config import ROW_ALIGN, SCALE_BLOCK, WGMMA_M
from jax_grouped_gemm.kernels import (
  _fp8,
  _quantize_rows,
  _tile_loop,
  _token_tiles,
)
from jax_grouped_gemm.kernels._pipeline import Ref

# Warpgroups of a CTA, and the tiles of each on their way in; with rows tiles
# are twice as large.
_WGS, _SLOTS = 3, 2
_WGS_WITH_ROWS, _SLOTS_WITH_ROWS = 3, 1
# TMA starts at whole 8 rows: up to 7 tokens before the block's come along.
_ROWS = SCALE_BLOCK + ROW_ALIGN
_PIECE_ROWS = 64  # of a tile, quantised along rows at once.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  x_gmem: Ref  # (t, f)
  first_gmem: Ref  # (blocks,) i32: first token of the block
  size_gmem: Ref  # (blocks,) i32: its tokens
  values_gmem: Ref  # (f_stored, 128 * blocks) f8
  scales_gmem: Ref  # (blocks, f in whole tiles) f32
  rows_gmem: tuple[Ref, ...]  # Values and scales, or nothing.
  x_smem: Ref  # (wg, slots, parts, 136, 64)
  full: Ref  # (wg * slots * parts,)
  values_smem: Ref  # (wg, staged, 64, 128) f8
  scales_smem: Ref  # (wg, staged, 64) f32
  zeros_smem: Ref  # (wg, 64): in the place of the tokens of other groups


def _kernel(*operands, power_of_two_scales: bool, interpret: bool, **scratch):
  refs = _Refs(*operands[:5], operands[5:], **scratch)
  wg = lax.axis_index("wg")
  _, slots, parts, *_ = refs.x_smem.shape
  stages = refs.values_smem.shape[1]
  blocks = refs.first_gmem.shape[0]
  tiles = refs.scales_gmem.shape[1] // (parts * WGMMA_M)  # of a block
  dtype = refs.values_gmem.dtype
  static = dict(power_of_two_scales=power_of_two_scales, interpret=interpret)

  def place(tile):
    """Returns the tile's block and its number among the block's tiles."""
    return lax.div(tile, tiles), lax.rem(tile, tiles)

  def features(j, part):
    return pl.ds((j * parts + part) * WGMMA_M, WGMMA_M)

  def full(slot, part):
    return refs.full.at[(wg * slots + slot) * parts + part]

  def load(part, tile, slot):
    block, j = place(tile)
    first = lax.div(refs.first_gmem[block], ROW_ALIGN) * ROW_ALIGN
    plgpu.copy_gmem_to_smem(
      refs.x_gmem.at[pl.ds(first, _ROWS), features(j, part)],
      refs.x_smem.at[wg, slot, part],
      full(slot, part),
    )

  def quantize_part(part, tile, slot):
    block, j = place(tile)
    first, size = refs.first_gmem[block], refs.size_gmem[block]
    offset = lax.rem(first, ROW_ALIGN)
    if part == 0:
      for i in range(parts):
        plgpu.barrier_wait(full(slot, i))
      if refs.rows_gmem:
        x_parts = [refs.x_smem.at[wg, slot, i] for i in range(parts)]
        store_rows(x_parts, first, size, offset, j)
    # Where it is staged: parts in turn, or tiles of one part.
    staged = part if parts > 1 else slot
    x = _token_tiles.load_transposed(
      refs.x_smem.at[wg, slot, part],
      offset,
      size,
      refs.zeros_smem.at[wg],
      interpret,
    )
    values, scales = _fp8.quantize_rows(x, plgpu.Layout.WGMMA, dtype, **static)
    # What was staged there before, each time one group of copies.
    plgpu.wait_smem_to_gmem(stages - 1, wait_read_only=True)
    refs.values_smem[wg, staged] = values
    refs.scales_smem[wg, staged] = scales
    # Orders the reads of the slot before the next load too.
    plgpu.commit_smem()
    tokens = pl.ds(block * SCALE_BLOCK, SCALE_BLOCK)
    plgpu.copy_smem_to_gmem(
      refs.values_smem.at[wg, staged],
      refs.values_gmem.at[features(j, part), tokens],
      commit_group=False,
    )
    plgpu.copy_smem_to_gmem(
      refs.scales_smem.at[wg, staged],
      refs.scales_gmem.at[block, features(j, part)],
    )

  def store_rows(x_parts, first, size, offset, j):
    for row in range(0, SCALE_BLOCK, _PIECE_ROWS):
      x = _token_tiles.load_rows(*x_parts, offset + row, _PIECE_ROWS, interpret)
      _token_tiles.store_rows(
        *refs.rows_gmem,
        *_fp8.quantize_rows(x, _token_tiles.halves_layout(), dtype, **static),
        row=first + row,
        block=j,
        size=size - row,
        interpret=interpret,
      )

  refs.zeros_smem[wg] = plgpu.layout_cast(
    jnp.zeros(refs.zeros_smem.shape[1:], refs.zeros_smem.dtype),
    plgpu.Layout.WGMMA.reduce(1),
  )
  plgpu.commit_smem()
  _tile_loop.for_each_tile(
    blocks * tiles,
    slots,
    *(
      (functools.partial(load, part), functools.partial(quantize_part, part))
      for part in range(parts)
    ),
  )


# ---------------------------------------------------------------- launch


def quantize_tokens(
  x: BFloat16[Array, "t f"],
  first: Int32[Array, "blocks"],
  sizes: Int32[Array, "blocks"],
  *,
  dtype: DTypeLike,
  power_of_two_scales: bool,
  rows: bool = False,
  interpret: bool = False,
) -> tuple[
  Float[Array, "f_stored 128*blocks"], Float32[Array, "blocks f"], ...
]:
  """Returns values and scales of blocks of the tokens [first, first + size).

  A size is at most 128, and may be 0. f is a multiple of 16, f_stored one of 8.
  With rows: then what quantize_rows returns, of the blocks' tokens. Memory is
  left as it is elsewhere.
  """
  t, f = x.shape
  parts, wgs, slots = 1, _WGS, _SLOTS
  if rows:
    parts, wgs, slots = 2, _WGS_WITH_ROWS, _SLOTS_WITH_ROWS
  stages = parts if parts > 1 else slots
  width = parts * WGMMA_M
  # TMA wants whole swizzled tiles: a copy of x, unless its sizes are multiples
  # of 8 and 64. Beyond an array that is 64 wide, it would read that part again.
  x = jnp.pad(x, ((0, -t % ROW_ALIGN), (0, -f % WGMMA_M)))
  x = _tile_loop.at_least(x, _ROWS, width)
  f_stored = max(WGMMA_M, pl.cdiv(f, ROW_ALIGN) * ROW_ALIGN)
  blocks, tiles = first.shape[0], pl.cdiv(f, width)
  out_type = [
    jax.ShapeDtypeStruct((f_stored, blocks * SCALE_BLOCK), dtype),
    # Mosaic clips the stores of scales at the end of the array, not of a row.
    jax.ShapeDtypeStruct((blocks, tiles * width), jnp.float32),
  ]
  scratch_types = dict(
    x_smem=plgpu.SMEM((wgs, slots, parts, _ROWS, WGMMA_M), x.dtype),
    full=plgpu.Barrier(num_barriers=wgs * slots * parts),
    values_smem=plgpu.SMEM((wgs, stages, WGMMA_M, SCALE_BLOCK), dtype),
    scales_smem=plgpu.SMEM((wgs, stages, WGMMA_M), jnp.float32),
    zeros_smem=plgpu.SMEM((wgs, WGMMA_M), x.dtype),
  )
  if rows:
    out_type += _quantize_rows.out_types(t, f, 1, dtype)
  values, scales, *rows_results = _tile_loop.launch(
    functools.partial(
      _kernel, power_of_two_scales=power_of_two_scales, interpret=interpret
    ),
    out_type=tuple(out_type),
    scratch_types=scratch_types,
    name=f"quantize_{'rows_and_' if rows else ''}tokens_sm90",
    wgs=wgs,
    num_tiles=blocks * tiles,
    interpret=interpret,
  )(x, first, sizes)
  f_stored = pl.cdiv(f, ROW_ALIGN) * ROW_ALIGN
  return values[:f_stored], scales[:, :f], *rows_results

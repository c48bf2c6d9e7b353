"""K-grouped FP8 GEMM with block scales for Hopper: weight gradients.

    out[g, i, j] = accumulator[g, i, j]
                   + sum_b (lhs[i, b] @ rhs[j, b]) * lhs_scales[i, b]
                           * rhs_scales[j, b]         b in blocks of group g

b runs over blocks of 128 tokens, each of one group. lhs (m, t), rhs (n, t) and
out (g, m, n) are row-major. A group without blocks gives zeros, or its
accumulator. With one, TMA adds to it where it is: out is the same memory.

Warpgroups of one CTA, over num_stages slots of SMEM:
  wg 0, …  _compute_tiles | wait full  | wgmma, promote | arrive empty | stage
  last wg  _load_tiles    | wait empty | TMA lhs, rhs, both scales -> full
                          | wait staged | TMA to out, or added to it
The CTAs of a cluster work on neighbouring columns of one row tile: each loads
half of the lhs tile for both.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_grouped_gemm.config import (
  SCALE_BLOCK,
  WGMMA_M,
  Config,
)
from jax_grouped_gemm.kernels import (
  _epilogue,
  _k_tiles,
  _main_loop,
  _pipeline,
  _queue,
  _staging,
)
from jax_grouped_gemm.kernels._k_tiles import Tile
from jax_grouped_gemm.kernels._pipeline import Ref

# Of wider tiles, registers do not hold sums, products and scaled products: they
# are promoted in one step, slice by slice.
_MOST_COLUMNS_IN_TWO_STEPS = 128
_SLICE_N = 64


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  lhs_gmem: Ref  # (m, t) f8
  lhs_scales_gmem: Ref  # (t/128, m) f32
  rhs_gmem: Ref  # (n, t) f8
  rhs_scales_gmem: Ref  # (t/128, n) f32
  starts_gmem: Ref  # (g,) i32: first token block of the group
  ends_gmem: Ref  # (g,) i32: its last token block + 1
  out_gmem: Ref  # (g, m, n)
  lhs_smem: Ref  # (stages, tile_m, 128) f8
  rhs_smem: Ref  # (stages, tile_n, 128) f8
  lhs_scales_smem: Ref  # (stages, tile_m) f32
  rhs_scales_smem: Ref  # (stages, tile_n) f32
  out_smem: Ref  # (wg, slices, 64, slice_n): _epilogue.out_smem
  staged: Ref  # (compute_wgs,): see _staging
  stored: Ref  # (compute_wgs,)
  full: Ref  # (stages,) 4 arrivals: lhs, rhs, both scales
  empty: Ref  # (stages,) one arrival per compute warpgroup of the cluster
  turn: Ref  # (compute_wgs,): see _main_loop.Turns
  tiles_smem: Ref  # (TILE_SLOTS, fields) i32: tiles on their way to compute
  tiles_full: Ref  # (TILE_SLOTS,) one arrival
  tiles_empty: Ref  # (TILE_SLOTS,) one arrival per compute warpgroup
  claims_smem: Ref  # (5,) i32: see _claims
  adds: bool  # to what out_gmem holds
  interpret: bool
  claims_gmem: Ref | None = None  # i32: if config.dynamic


def _k_iters(refs: _Refs, group):
  return refs.ends_gmem[group] - refs.starts_gmem[group]


def _load_tile(refs: _Refs, config: Config, tile: Tile, step, beside):
  """Loads the token blocks of one tile into consecutive slots."""
  rows = pl.ds(tile.mi * config.tile_m, config.tile_m)
  cols = pl.ds(tile.ni * config.tile_n, config.tile_n)
  first_block = refs.starts_gmem[tile.group]
  shared = "cta" if config.cluster > 1 else None

  def load_slice(ki, slot):
    block = first_block + ki
    tokens = pl.ds(block * SCALE_BLOCK, SCALE_BLOCK)
    full = refs.full.at[slot]
    copy = plgpu.copy_gmem_to_smem
    lhs = refs.lhs_gmem.at[rows, tokens]
    copy(lhs, refs.lhs_smem.at[slot], full, collective_axes=shared)
    copy(refs.rhs_gmem.at[cols, tokens], refs.rhs_smem.at[slot], full)
    lhs_scales = refs.lhs_scales_gmem.at[block, rows]
    copy(lhs_scales, refs.lhs_scales_smem.at[slot], full)
    rhs_scales = refs.rhs_scales_gmem.at[block, cols]
    copy(rhs_scales, refs.rhs_scales_smem.at[slot], full)

  return _pipeline.load_slices(
    refs, config.num_stages, tile.k_iters, step, load_slice, beside
  )


def _accumulate_tile(refs: _Refs, config: Config, tile: Tile, step):
  """Returns the warpgroup's sums over the group's blocks.

  They are (64, tile_n), as slices of columns.
  """
  is_wide = config.tile_n > _MOST_COLUMNS_IN_TWO_STEPS
  promotion = _promotion_of_slices if is_wide else _promotion_in_two_steps
  sums = _main_loop.accumulate(
    refs, config, tile.k_iters, step, **promotion(refs, config)
  )
  return sums if is_wide else sums[:1]


def _promotion_in_two_steps(refs: _Refs, config: Config):
  """The next products start after one multiplication, not after both."""
  shape = (WGMMA_M, config.tile_n)

  def load_scales(slot, ki, rows):
    del ki  # The slot has both scales.
    lhs_scales = _main_loop.load_row_scales(refs.lhs_scales_smem, slot, rows)
    return lhs_scales, _load_columns(refs, slot, 0, config.tile_n)

  def promote(sums, products, scales):
    (acc, *_), (rows, cols) = sums, scales
    return acc, products * lax.broadcast_in_dim(cols, shape, (1,)), rows

  def settle(sums):
    acc, scaled, rows = sums
    return acc + scaled * lax.broadcast_in_dim(rows, shape, (0,)), scaled, rows

  zeros = _pipeline.wgmma_zeros(shape)
  no_rows = plgpu.layout_cast(
    jnp.zeros(WGMMA_M, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
  )
  return dict(
    load_scales=load_scales,
    promote=promote,
    settle=settle,
    init=lambda: (zeros, zeros, no_rows),
  )


def _promotion_of_slices(refs: _Refs, config: Config):
  """Registers hold sums, products and the column scales of one slice."""
  shape = (WGMMA_M, _SLICE_N)
  first, *others = slices = range(0, config.tile_n, _SLICE_N)

  def load_scales(slot, ki, rows):
    del ki
    lhs_scales = _main_loop.load_row_scales(refs.lhs_scales_smem, slot, rows)
    return slot, lhs_scales, _load_columns(refs, slot, first, _SLICE_N)

  def promote(sums, products, scales):
    slot, rows, cols = scales
    cols = [cols, *(_load_columns(refs, slot, c, _SLICE_N) for c in others)]
    rows = lax.broadcast_in_dim(rows, shape, (0,))
    return [
      acc
      + products[:, c:][:, :_SLICE_N]
      * lax.broadcast_in_dim(cols_of_slice, shape, (1,))
      * rows
      for c, acc, cols_of_slice in zip(slices, sums, cols, strict=True)
    ]

  return dict(
    load_scales=load_scales,
    promote=promote,
    init=lambda: [_pipeline.wgmma_zeros(shape) for _ in slices],
  )


def _load_columns(refs: _Refs, slot, col: int, count: int):
  """Returns the scales of columns of the slot."""
  scales = refs.rhs_scales_smem.at[slot, pl.ds(col, count)]
  return plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(0))


def _compute_tiles(refs: _Refs, config: Config):
  turns = _main_loop.Turns(refs.turn, config)
  turns.start_kernel()
  _k_tiles.compute_tiles(refs, config, _accumulate_tile)
  turns.end_kernel()


# ---------------------------------------------------------------- launch


def k_grouped_gemm(
  lhs: Float[Array, "m_stored t"],
  lhs_scales: Float32[Array, "m t/128"],
  rhs: Float[Array, "n_stored t"],
  rhs_scales: Float32[Array, "n t/128"],
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  accumulator: Float32[Array, "g m n"] | None,
  *,
  m: int,
  n: int,
  out_dtype: DTypeLike,
  config: Config,
  interpret: bool = False,
) -> Float[Array, "g m n"]:
  """out[g] = accumulator[g] + lhs[:, blocks of g] @ rhs[:, blocks of g].T.

  Group g has the blocks of 128 tokens from starts[g] up to ends[g] - 1. t is a
  multiple of 128, m_stored and n_stored of 8, m and n of 16.
  """
  groups = starts.shape[0]
  stages, tile_m, tile_n = config.num_stages, config.tile_m, config.tile_n
  # A staged row has 128 bytes and out has whole ones: other n cost a copy.
  slice_n = _epilogue.SWIZZLE_BYTES // jnp.dtype(out_dtype).itemsize
  missing_n = -n % slice_n

  operands = [lhs, lhs_scales.T, rhs, rhs_scales.T, starts, ends]
  adds = accumulator is not None
  out_type = jax.ShapeDtypeStruct((groups, m, n + missing_n), out_dtype)
  if adds:
    # The interpreter adds whole tiles.
    missing = (-m % tile_m, -n % tile_n) if interpret else (0, missing_n)
    missing = [(0, size) for size in (0, *missing)]
    operands.append(jnp.pad(accumulator, missing))

  scratch_types = dict(
    lhs_smem=plgpu.SMEM((stages, tile_m, SCALE_BLOCK), lhs.dtype),
    rhs_smem=plgpu.SMEM((stages, tile_n, SCALE_BLOCK), rhs.dtype),
    lhs_scales_smem=plgpu.SMEM((stages, tile_m), jnp.float32),
    rhs_scales_smem=plgpu.SMEM((stages, tile_n), jnp.float32),
    out_smem=_epilogue.out_smem(config, slice_n, out_dtype),
    **_staging.scratch_types(config.compute_wgs),
    full=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
    empty=_pipeline.empty_barriers(config),
    turn=_main_loop.turn_barriers(config),
    **_queue.scratch_types(config, Tile),
  )
  out = _pipeline.launch(
    functools.partial(
      _k_tiles.load_tiles,
      config=config,
      k_iters=_k_iters,
      load_tile=_load_tile,
    ),
    functools.partial(_compute_tiles, config=config),
    name="k_grouped_gemm_sm90",
    config=config,
    interpret=interpret,
    refs_type=functools.partial(_Refs, adds=adds),
    out_type=() if adds else out_type,
    scratch_types=scratch_types,
  )(*operands)
  return out[:, :m, :n]

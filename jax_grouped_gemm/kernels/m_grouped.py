"""M-grouped FP8 GEMM with block scales for Hopper.

    out[r, j] = sum_kb (lhs[r, kb] @ rhs[g, j, kb]) * lhs_scales[r, kb]
                       * rhs_scales[g, j // 128, kb]          r in group g
                + bias[g, j]                                  if there is one

kb runs over slices of 128 elements of k. Rows of no group are zero. lhs (m, k),
rhs (g, n, k) and out (m, n) are row-major; groups start at any row.

Warpgroups of one CTA, over num_stages slots of SMEM:
  wg 0, …  _compute_tiles | wait full  | wgmma, promote | arrive empty | stage
  last wg  _load_tiles    | wait empty | TMA lhs, rhs, lhs_scales -> full
                          | wait staged | TMA to out
The last one also walks over the group sizes and tells the others their tiles.
The CTAs of a cluster work on neighbouring columns of one row tile, and each
loads half of the lhs tile for both; or on neighbouring rows, and share rhs.
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
  ROW_ALIGN,
  SCALE_BLOCK,
  WGMMA_M,
  Config,
)
from jax_grouped_gemm.kernels import (
  _bias,
  _epilogue,
  _main_loop,
  _pipeline,
  _queue,
  _rhs_scales,
  _staging,
  _walk,
)
from jax_grouped_gemm.kernels._groups import Tile
from jax_grouped_gemm.kernels._pipeline import Ref
from jax_grouped_gemm.kernels._rhs_scales import SLICE_N
from jax_grouped_gemm.schedule import Masked


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  bias_gmem: Ref | None  # (g, n) f32
  lhs_gmem: Ref  # (m, k) f8
  lhs_scales_gmem: Ref  # (k/128, m) f32
  rhs_gmem: Ref  # (g, n, k) f8
  rhs_scales_gmem: Ref  # (g, n/128, k/128) f32
  group_sizes_gmem: Ref  # (g_all,) i32
  group_offset_gmem: Ref  # (1,) i32: of group_sizes, the first that rhs holds
  out_gmem: Ref  # (m, n) bf16 or f32
  lhs_smem: Ref  # (stages, tile_m, 128) f8
  rhs_smem: Ref  # (stages, tile_n, 128) f8
  lhs_scales_smem: Ref  # (stages, tile_m) f32
  out_smem: Ref  # (wg, slices, 64, slice_n): _epilogue.out_smem
  full: Ref  # (stages,) 3 arrivals: lhs, rhs, lhs_scales
  empty: Ref  # (stages,) one arrival per compute warpgroup of the cluster
  turn: Ref  # (compute_wgs,): see _main_loop.Turns
  rhs_scales_smem: Ref  # (TILE_SLOTS, blocks, k/128) f32: see _rhs_scales
  rhs_scales_full: Ref  # (TILE_SLOTS,)
  staged: Ref  # (compute_wgs,): see _staging
  stored: Ref  # (compute_wgs,)
  tiles_smem: Ref  # (TILE_SLOTS, fields) i32: tiles on their way to compute
  tiles_full: Ref  # (TILE_SLOTS,) one arrival
  tiles_empty: Ref  # (TILE_SLOTS,) one arrival per compute warpgroup
  claims_smem: Ref  # (5,) i32: see _claims
  interpret: bool
  claims_gmem: Ref | None = None  # i32: if config.dynamic


# ---------------------------------------------------------------- load


def _load_tiles(refs: _Refs, config: Config, masked: Masked | None):
  """Announces, loads, stores this CTA's tiles. Returns the slots it filled."""
  load_tile = functools.partial(_load_tile, refs, config)
  store_rows = functools.partial(_epilogue.store_rows, refs, config)
  return _walk.load_tiles(
    refs, config, masked, _k_iters(refs), load_tile, store_rows
  )


def _k_iters(refs: _Refs) -> int:
  return refs.lhs_gmem.shape[1] // SCALE_BLOCK


def _load_tile(
  refs, config: Config, i, tile: Tile, one_group, k_iters, step, beside
):
  """Loads the k slices of the i-th tile into consecutive slots."""
  rows = pl.ds(pl.multiple_of(tile.row, ROW_ALIGN), config.tile_m)
  cols = pl.ds(tile.ni * config.tile_n, config.tile_n)
  pl.when(k_iters > 0)(lambda: _rhs_scales.load(refs, config, i, tile))

  def load_slice(ki, slot):
    ks = pl.ds(ki * SCALE_BLOCK, SCALE_BLOCK)
    full = refs.full.at[slot]
    _pipeline.load_operands(
      config,
      refs.lhs_gmem.at[rows, ks],
      refs.lhs_smem.at[slot],
      refs.rhs_gmem.at[tile.group, cols, ks],
      refs.rhs_smem.at[slot],
      full,
      one_group,
    )
    scales = refs.lhs_scales_gmem.at[ki, rows]
    plgpu.copy_gmem_to_smem(scales, refs.lhs_scales_smem.at[slot], full)

  return _pipeline.load_slices(
    refs, config.num_stages, k_iters, step, load_slice, beside
  )


# ---------------------------------------------------------------- compute


def _compute_tiles(refs: _Refs, config: Config):
  """Computes and stages the announced tiles, at last zeros."""
  wg = lax.axis_index("wg")

  def compute_tile(i, tile: Tile, carry):
    step, count = carry
    has_rows = _staging.has_rows(tile, wg)

    @pl.when(has_rows)
    def compute():
      sums = _accumulate_tile(refs, config, i, step)
      _staging.stage(refs, count, lambda: _epilogue.write(refs, sums))

    @pl.when(~has_rows)
    def skip():
      _rhs_scales.wait(refs, i)
      _main_loop.skip(refs, config, _k_iters(refs), step)

    return step + _k_iters(refs), count + has_rows.astype(jnp.int32)

  turns = _main_loop.Turns(refs.turn, config)
  turns.start_kernel()
  start = jnp.int32(0), jnp.int32(0)
  _, count = _queue.for_each_tile(refs, Tile, compute_tile, start)
  turns.end_kernel()
  zeros = _pipeline.wgmma_zeros((WGMMA_M, SLICE_N))
  zeros = [zeros] * (config.tile_n // SLICE_N)
  _staging.stage(refs, count, lambda: _epilogue.write(refs, zeros))


def _accumulate_tile(refs: _Refs, config: Config, i, step):
  """Returns the warpgroup's (64, tile_n) of out, as slices of 64 columns."""
  shape = (WGMMA_M, SLICE_N)
  columns = [slice(c, c + SLICE_N) for c in range(0, config.tile_n, SLICE_N)]

  _rhs_scales.wait(refs, i)
  tile = _queue.read_tile(refs, Tile, i)

  def start(col):
    if refs.bias_gmem is None:
      return _pipeline.wgmma_zeros(shape)
    cols = pl.ds(tile.ni * config.tile_n + col, SLICE_N)
    return _bias.load(refs, tile.group, cols, shape, axis=1)

  def load_scales(slot, ki, rows):
    lhs_scales = _main_loop.load_row_scales(refs.lhs_scales_smem, slot, rows)
    rhs_scales = _rhs_scales.read(refs, config, i, tile.ni, ki)
    return [lhs_scales * rhs_scale for rhs_scale in rhs_scales]

  def promote(sums, products, scales):
    return [
      acc + products[:, cols] * lax.broadcast_in_dim(scale, shape, (0,))
      for acc, cols, scale in zip(sums, columns, scales, strict=True)
    ]

  return _main_loop.accumulate(
    refs,
    config,
    _k_iters(refs),
    step,
    load_scales=load_scales,
    promote=promote,
    init=lambda: [start(cols.start) for cols in columns],
  )


# ---------------------------------------------------------------- launch


def m_grouped_gemm(
  lhs: Float[Array, "m_stored k_stored"],
  lhs_scales: Float32[Array, "m k/128"],
  rhs: Float[Array, "g n_stored k_stored"],
  rhs_scales: Float32[Array, "g n/128 k/128"],
  group_sizes: Int32[Array, "g_all"],
  group_offset: Int32[Array, "1"] | None,
  bias: Float[Array, "g n"] | None = None,
  *,
  m: int,
  n: int,
  out_dtype: DTypeLike,
  config: Config,
  masked: Masked | None = None,
  interpret: bool = False,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[g].T + bias[g], g = r's group - group_offset; else 0.

  k_stored is a multiple of 128, m_stored and n_stored are multiples of 8. With
  `masked`, the groups have its rows, one group after the other.
  """
  if group_offset is None:
    group_offset = jnp.zeros((1,), jnp.int32)
  # TMA reads the scales of a tile's rows as one line, of whole 16 bytes.
  lhs_scales = jnp.pad(lhs_scales, ((0, -m % ROW_ALIGN), (0, 0))).T
  rhs_scales = _rhs_scales.pad(rhs_scales)
  stages, tile_m, tile_n = config.num_stages, config.tile_m, config.tile_n
  # A staged row has 128 bytes, so that TMA may start at any row, and out has
  # whole ones: other n cost a copy of out.
  slice_n = _epilogue.SWIZZLE_BYTES // jnp.dtype(out_dtype).itemsize
  sizes = group_sizes, group_offset.reshape(1)
  operands = lhs, lhs_scales, rhs, rhs_scales, *sizes
  refs_type, operands = _bias.add_operand(bias, config, _Refs, operands)

  out = _pipeline.launch(
    functools.partial(_load_tiles, config=config, masked=masked),
    functools.partial(_compute_tiles, config=config),
    name="m_grouped_gemm_sm90",
    config=config,
    interpret=interpret,
    refs_type=refs_type,
    out_type=jax.ShapeDtypeStruct((m, n + -n % slice_n), out_dtype),
    scratch_types=dict(
      lhs_smem=plgpu.SMEM((stages, tile_m, SCALE_BLOCK), lhs.dtype),
      rhs_smem=plgpu.SMEM((stages, tile_n, SCALE_BLOCK), rhs.dtype),
      lhs_scales_smem=plgpu.SMEM((stages, tile_m), jnp.float32),
      out_smem=_epilogue.out_smem(config, slice_n, out_dtype),
      full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      empty=_pipeline.empty_barriers(config),
      turn=_main_loop.turn_barriers(config),
      **_staging.scratch_types(config.compute_wgs),
      **_rhs_scales.scratch_types(rhs_scales.shape, config),
      **_queue.scratch_types(config, Tile),
    ),
  )(*operands)
  return _pipeline.compute_once(out)[:, :n]

"""M-grouped FP8 GEMM with block scales for groups of few rows, for Hopper.

    out[r, j] = sum_kb (rhs[g, j, kb] @ lhs[r, kb]) * lhs_scales[r, kb]
                       * rhs_scales[g, j // 128, kb]          r in group g
                + bias[g, j]                                  if there is one

kb runs over slices of 128 elements of k. Rows of no group are zero, or left
alone in the masked layout. lhs (m, k), rhs (g, n, k) and out (m, n) are
row-major; groups start at any row.

The time is that of reading rhs, once for all rows of a tile. Operands are
swapped: the 64 rows of a wgmma instruction are columns of out, its columns are
the tile_m rows of out, from 8 on. So a slice costs little besides its loads,
and num_stages of them are on their way at any time. The tile of out is
transposed when it is staged.

Warpgroups of one CTA, over num_stages slots of SMEM:
  wg 0, …  _compute_tiles | wait full  | wgmma, promote | arrive empty | stage
  last wg  _load_tiles    | wait empty | TMA rhs, lhs, lhs_scales -> full
                          | wait staged | TMA to out
The last one also walks over the group sizes and tells the others their tiles.
rhs of an empty group is never read. With split_k, the CTAs of a cluster work on
one tile, each on its part of k, and the first one adds up what they have.
"""

import dataclasses
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
  SCALE_ALIGN,
  SCALE_BLOCK,
  WGMMA_M,
  SmallGroupsConfig,
)
from jax_grouped_gemm.kernels import (
  _bias,
  _epilogue,
  _partials,
  _pipeline,
  _queue,
  _rhs_scales,
  _staging,
  _walk,
)
from jax_grouped_gemm.kernels._groups import Tile
from jax_grouped_gemm.kernels._pipeline import Ref
from jax_grouped_gemm.schedule import Masked

_BURST = 2  # slices loaded at a time: 1 % faster than one by one (H200).


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
  partials_gmem: Ref | None  # (sm, wg, 64, tile_m) f32: see _partials
  lhs_smem: Ref  # (stages, tile_m, 128) f8
  rhs_smem: Ref  # (stages, tile_n, 128) f8
  lhs_scales_smem: Ref  # (stages, >= tile_m) f32
  out_smem: Ref  # (wg, tile_m, 64) as out
  full: Ref  # (stages,) 3 arrivals: lhs, rhs, lhs_scales
  empty: Ref  # (stages,) one arrival per compute warpgroup
  rhs_scales_smem: Ref  # (TILE_SLOTS, 1, k/128) f32: see _rhs_scales
  rhs_scales_full: Ref  # (TILE_SLOTS,)
  staged: Ref  # (compute_wgs,): see _staging
  stored: Ref  # (compute_wgs,)
  tiles_smem: Ref  # (TILE_SLOTS, fields) i32: tiles on their way to compute
  tiles_full: Ref  # (TILE_SLOTS,) one arrival
  tiles_empty: Ref  # (TILE_SLOTS,) one arrival per compute warpgroup
  claims_smem: Ref  # (5,) i32: see _claims
  interpret: bool
  partial_full: Ref | None = None  # (compute_wgs,)
  partial_empty: Ref | None = None  # (compute_wgs,)
  claims_gmem: Ref | None = None  # Not used here.


def _k_part(refs: _Refs, config: SmallGroupsConfig):
  """Returns the first k slice that this CTA multiplies, and how many."""
  k_iters = refs.lhs_gmem.shape[1] // SCALE_BLOCK
  if config.split_k == 1:
    return 0, k_iters
  most, cta = pl.cdiv(k_iters, config.split_k), lax.axis_index("cta")
  return cta * most, jnp.minimum(most, k_iters - cta * most)


def _stores(config: SmallGroupsConfig):
  """Whether it is this CTA that stores the cluster's tiles."""
  return lax.axis_index("cta") == 0 if config.split_k > 1 else True


# ---------------------------------------------------------------- load


def _load_tiles(refs: _Refs, config: SmallGroupsConfig, masked: Masked | None):
  """Announces, loads, stores this CTA's tiles. Returns the slots it filled."""
  load_tile = functools.partial(_load_tile, refs, config)
  return _walk.load_tiles(
    refs,
    config,
    masked,
    _k_part(refs, config)[1],
    load_tile,
    store_rows=functools.partial(_store_rows, refs, config),
    has_rows=lambda tile, wg: _stores(config),  # Columns of all rows.
  )


def _load_tile(
  refs, config: SmallGroupsConfig, i, tile: Tile, _, k_iters, step, beside
):
  """Loads the k slices of the tile into consecutive slots."""
  pl.when(k_iters > 0)(lambda: _rhs_scales.load(refs, config, i, tile))
  rows = pl.ds(pl.multiple_of(tile.row, ROW_ALIGN), config.tile_m)
  cols = pl.ds(tile.ni * config.tile_n, config.tile_n)
  scales_smem = refs.lhs_scales_smem.at[:, pl.ds(0, config.tile_m)]
  first, _ = _k_part(refs, config)

  def load_slice(ki, slot):
    ki += first
    ks = pl.ds(ki * SCALE_BLOCK, SCALE_BLOCK)
    full = refs.full.at[slot]
    copy = plgpu.copy_gmem_to_smem
    copy(refs.rhs_gmem.at[tile.group, cols, ks], refs.rhs_smem.at[slot], full)
    copy(refs.lhs_gmem.at[rows, ks], refs.lhs_smem.at[slot], full)
    copy(refs.lhs_scales_gmem.at[ki, rows], scales_smem.at[slot], full)

  return _pipeline.load_slices(
    refs, config.num_stages, k_iters, step, load_slice, beside, _BURST
  )


# ---------------------------------------------------------------- compute


def _compute_tiles(refs: _Refs, config: SmallGroupsConfig):
  """Computes and stages the announced tiles, at last zeros."""

  stores = _stores(config)

  def compute_tile(i, _, carry):
    step, _ = carry
    acc = _accumulate_tile(refs, config, i, step)
    if config.split_k > 1:
      pl.when(~stores)(lambda: _partials.pass_on(refs, i, acc))
      sums = lambda: _partials.add(refs, acc)
    else:
      sums = lambda: acc
    write = lambda: _write(refs, sums())
    pl.when(stores)(lambda: _staging.stage(refs, i, write))
    return step + _k_part(refs, config)[1], i + 1

  start = jnp.int32(0), jnp.int32(0)
  _, tiles = _queue.for_each_tile(refs, Tile, compute_tile, start)
  if config.split_k > 1:
    pl.when(~stores)(lambda: _partials.wait_taken(refs, tiles))
  zeros = _pipeline.wgmma_zeros((WGMMA_M, config.tile_m))
  staged = jnp.where(stores, tiles, 0)
  _staging.stage(refs, staged, lambda: _write(refs, zeros))


def _accumulate_tile(refs: _Refs, config: SmallGroupsConfig, i, step):
  """Returns the warpgroup's (64, tile_m) of out.T, in float32."""
  shape = (WGMMA_M, config.tile_m)
  _rhs_scales.wait(refs, i)
  tile = _queue.read_tile(refs, Tile, i)
  first, k_iters = _k_part(refs, config)

  def add_slice(ki, acc):
    slot = lax.rem(step + ki, config.num_stages)
    rhs_scale, *_ = _rhs_scales.read(refs, config, i, tile.ni, first + ki)
    plgpu.barrier_wait(refs.full.at[slot])

    def multiply(products):
      rhs = refs.rhs_smem.at[slot, _pipeline.warpgroup_rows()]
      plgpu.wgmma(products, rhs, refs.lhs_smem.at[slot].T)
      lhs_scales = plgpu.load(
        refs.lhs_scales_smem.at[slot, pl.ds(0, config.tile_m)],
        layout=plgpu.Layout.WGMMA.reduce(0),
      )
      return products[...], lhs_scales * rhs_scale

    products, scales = pl.run_scoped(multiply, plgpu.ACC(shape))
    plgpu.barrier_arrive(refs.empty.at[slot])
    return acc + products * lax.broadcast_in_dim(scales, shape, (1,))

  start = _start(refs, config, tile, shape)
  return lax.fori_loop(0, k_iters, add_slice, start)


def _start(refs: _Refs, config: SmallGroupsConfig, tile: Tile, shape):
  """Returns what sums start as: the bias where those of a cluster are added."""
  zeros = _pipeline.wgmma_zeros(shape)
  if refs.bias_gmem is None:
    return zeros
  col = tile.ni * config.tile_n + lax.axis_index("wg") * WGMMA_M
  bias = _bias.load(refs, tile.group, pl.ds(col, WGMMA_M), shape, axis=0)
  return jnp.where(jnp.broadcast_to(_stores(config), shape), bias, zeros)


def _write(refs: _Refs, acc):
  """Writes the warpgroup's (64, tile_m) of out.T to out_smem, transposed."""
  value = acc.astype(refs.out_gmem.dtype)
  if value.dtype.itemsize == 4:
    # Mosaic transposes 16 bits on their way to SMEM, others only in registers.
    value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
  _epilogue.store_unoptimized(refs.out_smem.at[lax.axis_index("wg")].T, value)


def _store_rows(refs: _Refs, config: SmallGroupsConfig, tile: Tile, wg):
  """Stores the staged rows that belong to the tile."""
  col = tile.ni * config.tile_n + wg * WGMMA_M

  def store(offset, num_rows):
    staged = refs.out_smem.at[wg, pl.ds(offset, num_rows)]
    rows = pl.ds(tile.row + offset, num_rows)
    _epilogue.store_slice(staged, refs.out_gmem, rows, col)

  _epilogue.store_ladder(tile.offset, tile.size, config.tile_m, store)


# ---------------------------------------------------------------- launch


def small_groups_gemm(
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
  config: SmallGroupsConfig,
  masked: Masked | None = None,
  interpret: bool = False,
) -> Float[Array, "m n"]:
  """As m_grouped.m_grouped_gemm."""
  if group_offset is None:
    group_offset = jnp.zeros((1,), jnp.int32)
  # TMA reads the scales of a tile's rows as one line, of whole 16 bytes.
  lhs_scales = jnp.pad(lhs_scales, ((0, -m % ROW_ALIGN), (0, 0))).T
  rhs_scales = _rhs_scales.pad(rhs_scales)
  if lhs.shape[1] <= SCALE_BLOCK:  # Nothing to be split.
    config = dataclasses.replace(config, split_k=1)
  stages, tile_m, tile_n = config.num_stages, config.tile_m, config.tile_n
  # A warpgroup stores whole 64 columns: other n cost a copy of out.
  out_type = jax.ShapeDtypeStruct((m, n + -n % WGMMA_M), out_dtype)
  refs_type, partials = functools.partial(_Refs, partials_gmem=None), {}
  if config.split_k > 1:
    shape = _pipeline.num_clusters(config), config.compute_wgs, WGMMA_M, tile_m
    out_type = out_type, jax.ShapeDtypeStruct(shape, jnp.float32)
    refs_type, partials = _Refs, _partials.scratch_types(config)
  sizes = group_sizes, group_offset.reshape(1)
  operands = lhs, lhs_scales, rhs, rhs_scales, *sizes
  refs_type, operands = _bias.add_operand(bias, config, refs_type, operands)
  out = _pipeline.launch(
    functools.partial(_load_tiles, config=config, masked=masked),
    functools.partial(_compute_tiles, config=config),
    name="small_groups_gemm_sm90",
    config=config,
    interpret=interpret,
    refs_type=refs_type,
    out_type=out_type,
    scratch_types=dict(
      lhs_smem=plgpu.SMEM((stages, tile_m, SCALE_BLOCK), lhs.dtype),
      rhs_smem=plgpu.SMEM((stages, tile_n, SCALE_BLOCK), rhs.dtype),
      # TMA wants every slot to start at whole 128 bytes.
      lhs_scales_smem=plgpu.SMEM(
        (stages, max(tile_m, SCALE_ALIGN)), jnp.float32
      ),
      out_smem=plgpu.SMEM((config.compute_wgs, tile_m, WGMMA_M), out_dtype),
      full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      empty=plgpu.Barrier(num_arrivals=config.compute_wgs, num_barriers=stages),
      **partials,
      **_staging.scratch_types(config.compute_wgs),
      **_rhs_scales.scratch_types(rhs_scales.shape, config),
      **_queue.scratch_types(config, Tile),
    ),
  )(*operands)
  return _pipeline.compute_once(out)[:, :n]

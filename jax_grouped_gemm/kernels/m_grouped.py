"""M-grouped FP8 GEMM with block scales for Hopper.

    out[r, j] = sum_kb (lhs[r, kb] @ rhs[g, j, kb]) * lhs_scales[r, kb]
                       * rhs_scales[g, j // 128, kb]          r in group g

kb runs over slices of 128 elements of k. Rows of no group are zero. lhs (m, k),
rhs (g, n, k) and out (m, n) are row-major; groups start at any row.

Warpgroups of one CTA, over num_stages slots of SMEM:
  wg 0, 1  _compute_tile | wait full  | wgmma, promote | arrive empty | store
  wg 2     _load_tile    | wait empty | TMA lhs, rhs, lhs_scales -> full
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

from jax_grouped_gemm import schedule
from jax_grouped_gemm.config import (
  SCALE_BLOCK,
  WGMMA_M,
  Config,
)
from jax_grouped_gemm.kernels import _pipeline
from jax_grouped_gemm.kernels._pipeline import Ref

_ROW_ALIGN = 8  # TMA addresses rows of swizzled SMEM tiles in groups of 8.
_SLICE_N = 64  # columns that surely share one rhs scale, for any tile_n.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  lhs_gmem: Ref  # (m, k) f8
  lhs_scales_gmem: Ref  # (k/128, m) f32
  rhs_gmem: Ref  # (g, n, k) f8
  rhs_scales_gmem: Ref  # (g, n/128, k/128) f32
  tiles_group: Ref  # (t,) i32 in GMEM, as are the next: see schedule.Tiles
  tiles_row: Ref
  tiles_start: Ref
  tiles_size: Ref
  tiles_count: Ref  # (1,)
  out_gmem: Ref  # (m, n) bf16 or f32
  lhs_smem: Ref  # (stages, tile_m, 128) f8
  rhs_smem: Ref  # (stages, tile_n, 128) f8
  lhs_scales_smem: Ref  # (stages, tile_m) f32
  out_smem: Ref  # (wg, slices, 64, slice_n): _pipeline.out_smem
  full: Ref  # (stages,) 3 arrivals: lhs, rhs, lhs_scales
  empty: Ref  # (stages,) one arrival per compute warpgroup of the cluster


def _for_each_tile(refs: _Refs, config: Config, fn):
  """Runs `step = fn(mi, ni, step)` on this CTA's share of the tiles.

  `step` counts k slices and so tells the slot of SMEM.
  """
  cluster_n = config.tile_n * config.cluster
  grid = (refs.tiles_count[0], pl.cdiv(refs.out_gmem.shape[1], cluster_n))

  @plgpu.nd_loop(
    (grid[0] * grid[1],), collective_axes="sm", init_carry=jnp.int32(0)
  )
  def last_step(info, carry):
    mi, ni = plgpu.planar_snake(info.index[0], grid, 1, config.raster_width)
    ni = ni * config.cluster + lax.axis_index("cta")
    return fn(mi, ni, carry)

  return last_step


def _k_iters(refs: _Refs, group):
  """The k slices of a tile; none for rows of no group."""
  return lax.select(group < 0, 0, refs.lhs_gmem.shape[1] // SCALE_BLOCK)


def _load_tile(refs: _Refs, config: Config, mi, ni, step):
  """Loads the k slices of one tile into consecutive slots."""
  row = lax.div(refs.tiles_row[mi], _ROW_ALIGN) * _ROW_ALIGN
  rows = pl.ds(row, config.tile_m)
  cols = pl.ds(ni * config.tile_n, config.tile_n)
  group = refs.tiles_group[mi]
  shared = "cta" if config.cluster > 1 else None

  def load_slice(ki, slot):
    ks = pl.ds(ki * SCALE_BLOCK, SCALE_BLOCK)
    full = refs.full.at[slot]
    copy = plgpu.copy_gmem_to_smem
    lhs = refs.lhs_gmem.at[rows, ks]
    copy(lhs, refs.lhs_smem.at[slot], full, collective_axes=shared)
    copy(refs.rhs_gmem.at[group, cols, ks], refs.rhs_smem.at[slot], full)
    copy(refs.lhs_scales_gmem.at[ki, rows], refs.lhs_scales_smem.at[slot], full)

  k_iters = _k_iters(refs, group)
  return _pipeline.load_slices(
    refs.empty, config.num_stages, k_iters, step, load_slice
  )


def _load_rhs_scales(refs: _Refs, config: Config, group, ni, ki):
  """Returns the rhs scale of every 64 columns of the tile's k slice."""
  num_blocks = refs.rhs_scales_gmem.shape[1]
  first_col = ni * config.tile_n
  first_block = lax.div(first_col, SCALE_BLOCK)
  # A tile with an odd number of 64-column slices may start amid a block.
  odd = config.tile_n % SCALE_BLOCK != 0
  blocks = [
    refs.rhs_scales_gmem[
      group, jnp.minimum(first_block + b, num_blocks - 1), ki
    ]
    for b in range(config.tile_n // SCALE_BLOCK + odd)
  ]
  starts_block = lax.rem(first_col, SCALE_BLOCK) == 0
  return [
    lax.select(starts_block, blocks[j // 2], blocks[(j + 1) // 2])
    if odd
    else blocks[j // 2]
    for j in range(config.tile_n // _SLICE_N)
  ]


def _accumulate_tile(refs: _Refs, config: Config, group, ni, step):
  """Returns the warpgroup's (64, tile_n) of out, as slices of 64 columns."""
  shape = (WGMMA_M, _SLICE_N)
  columns = [slice(c, c + _SLICE_N) for c in range(0, config.tile_n, _SLICE_N)]

  def load_scales(slot, ki):
    lhs_scales = _pipeline.load_row_scales(refs.lhs_scales_smem, slot)
    rhs_scales = _load_rhs_scales(refs, config, group, ni, ki)
    return [lhs_scales * rhs_scale for rhs_scale in rhs_scales]

  def promote(accs, products, scales):
    return [
      acc + products[:, cols] * lax.broadcast_in_dim(scale, shape, (0,))
      for acc, cols, scale in zip(accs, columns, scales, strict=True)
    ]

  return _pipeline.accumulate(
    refs,
    config.tile_n,
    _k_iters(refs, group),
    step,
    load_scales=load_scales,
    promote=promote,
    init=[_pipeline.wgmma_zeros(shape) for _ in columns],
  )


def _compute_tile(refs: _Refs, config: Config, mi, ni, step):
  """Computes one tile, or zeros for rows of no group, and stores its rows."""
  group = refs.tiles_group[mi]

  def stage(slices):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for j in range(refs.out_smem.shape[1]):
      col = j * refs.out_smem.shape[3]
      value = slices[col // _SLICE_N]
      value = value[:, col % _SLICE_N :][:, : refs.out_smem.shape[3]]
      value = value.astype(refs.out_gmem.dtype)
      refs.out_smem[lax.axis_index("wg"), j] = value

  @pl.when(group >= 0)
  def stage_products():
    stage(_accumulate_tile(refs, config, group, ni, step))

  @pl.when(group < 0)
  def stage_zeros():
    zeros = _pipeline.wgmma_zeros((WGMMA_M, _SLICE_N))
    stage([zeros] * (config.tile_n // _SLICE_N))

  plgpu.commit_smem()
  _store_rows(refs, config, mi, ni)
  return step + _k_iters(refs, group)


def _store_rows(refs: _Refs, config: Config, mi, ni):
  """Stores the staged rows that belong to the tile.

  TMA needs static sizes, so `count` rows go out as the powers of two of its
  binary form, e.g. 5 rows as 4 + 1.
  """
  wg = lax.axis_index("wg")
  first = refs.tiles_start[mi] - wg * WGMMA_M
  offset = jnp.clip(first, 0, WGMMA_M)
  count = jnp.clip(first + refs.tiles_size[mi], 0, WGMMA_M) - offset
  row = refs.tiles_row[mi] + wg * WGMMA_M
  _, slices, size, slice_n = refs.out_smem.shape
  while size > 0:
    rows = pl.ds(row + offset, size)
    for j in range(slices):
      _pipeline.store_slice(
        refs.out_smem.at[wg, j, pl.ds(offset, size)],
        refs.out_gmem,
        rows,
        ni * config.tile_n + j * slice_n,
        (count & size) != 0,
      )
    offset = offset + (count & size)
    size //= 2


# ---------------------------------------------------------------- launch


def m_grouped_gemm(
  lhs: Float[Array, "m_stored k_stored"],
  lhs_scales: Float32[Array, "m k/128"],
  rhs: Float[Array, "g n_stored k_stored"],
  rhs_scales: Float32[Array, "g n/128 k/128"],
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  *,
  m: int,
  n: int,
  out_dtype: DTypeLike,
  config: Config,
  interpret: bool = False,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[g].T for starts[g] <= r < ends[g], else 0.

  k_stored is a multiple of 128, m_stored and n_stored are multiples of 8.
  """
  tiles = schedule.make_tiles(starts, ends, m, config.tile_m, _ROW_ALIGN)
  # TMA reads the scales of a tile's rows as one line, of whole 16 bytes.
  lhs_scales = jnp.pad(lhs_scales, ((0, -m % _ROW_ALIGN), (0, 0))).T
  stages, tile_m, tile_n = config.num_stages, config.tile_m, config.tile_n
  # A staged row has 128 bytes, so that TMA may start at any row, and out has
  # whole ones: other n cost a copy of out.
  slice_n = _pipeline.SWIZZLE_BYTES // jnp.dtype(out_dtype).itemsize

  def for_each_tile(fn):
    return lambda refs: _for_each_tile(
      refs, config, functools.partial(fn, refs, config)
    )

  out = _pipeline.launch(
    for_each_tile(_load_tile),
    for_each_tile(_compute_tile),
    name="m_grouped_gemm_sm90",
    config=config,
    interpret=interpret,
    refs_type=_Refs,
    out_type=jax.ShapeDtypeStruct((m, n + -n % slice_n), out_dtype),
    scratch_types=dict(
      lhs_smem=plgpu.SMEM((stages, tile_m, SCALE_BLOCK), lhs.dtype),
      rhs_smem=plgpu.SMEM((stages, tile_n, SCALE_BLOCK), rhs.dtype),
      lhs_scales_smem=plgpu.SMEM((stages, tile_m), jnp.float32),
      out_smem=_pipeline.out_smem(tile_n, slice_n, out_dtype),
      full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      empty=_pipeline.empty_barriers(config),
    ),
  )(lhs, lhs_scales, rhs, rhs_scales, *tiles)
  return out[:, :n]

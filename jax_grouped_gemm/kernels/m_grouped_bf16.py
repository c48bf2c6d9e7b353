"""M-grouped GEMM of 16-bit operands for Hopper.

    out[r] = lhs[r] @ rhs[g]        r in group g, sums in float32

Rows of no group are zero. lhs (m, k), rhs (g, k, n) or, transposed, (g, n, k)
and out (m, n) are row-major; groups start at any row.

Warpgroups of one CTA, over num_stages slots of SMEM:
  wg 0, …  _compute_tiles | wait full  | wgmma | arrive empty | … stage
  last wg  _load_tiles    | wait empty | TMA lhs, rhs -> full
                          | wait staged | TMA to out
The accumulators of the tensor cores hold a tile's sums over all of k. The last
warpgroup also walks over the group sizes and tells the others their tiles. CTAs
of a cluster share what they load as in m_grouped.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_grouped_gemm.config import ROW_ALIGN, WGMMA_M, Config
from jax_grouped_gemm.kernels import (
  _epilogue,
  _pipeline,
  _queue,
  _staging,
  _walk,
)
from jax_grouped_gemm.kernels._groups import Tile
from jax_grouped_gemm.kernels._pipeline import Ref

SLICE_K = 64  # elements of k in a slot, in the 128 bytes of a swizzled row.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  lhs_gmem: Ref  # (m, k)
  rhs_gmem: Ref  # (g, k, n), or (g, n, k) if transposed
  group_sizes_gmem: Ref  # (g_all,) i32
  group_offset_gmem: Ref  # (1,) i32: of group_sizes, the first that rhs holds
  out_gmem: Ref  # (m, n) 16-bit or f32
  lhs_smem: Ref  # (stages, tile_m, 64)
  rhs_smem: Ref  # (stages, 64, tile_n), or (stages, tile_n, 64) if transposed
  out_smem: Ref  # (wg, slices, 64, slice_n): _epilogue.out_smem
  full: Ref  # (stages,) 2 arrivals: lhs, rhs
  empty: Ref  # (stages,) one arrival per compute warpgroup of the cluster
  staged: Ref  # (compute_wgs,): see _staging
  stored: Ref  # (compute_wgs,)
  tiles_smem: Ref  # (TILE_SLOTS, fields) i32: tiles on their way to compute
  tiles_full: Ref  # (TILE_SLOTS,) one arrival
  tiles_empty: Ref  # (TILE_SLOTS,) one arrival per compute warpgroup
  claims_smem: Ref  # (5,) i32: see _claims
  interpret: bool
  claims_gmem: Ref | None = None  # i32: if config.dynamic


def _k_iters(refs: _Refs) -> int:
  return refs.lhs_gmem.shape[1] // SLICE_K


# ---------------------------------------------------------------- load


def _load_tiles(refs: _Refs, config: Config, transposed: bool):
  """Announces, loads, stores this CTA's tiles. Returns the slots it filled."""
  load_tile = functools.partial(_load_tile, refs, config, transposed)
  store_rows = functools.partial(_epilogue.store_rows, refs, config)
  return _walk.load_tiles(
    refs, config, None, _k_iters(refs), load_tile, store_rows
  )


def _load_tile(
  refs,
  config: Config,
  transposed,
  i,
  tile: Tile,
  one_group,
  k_iters,
  step,
  beside,
):
  """Loads the k slices of the tile into consecutive slots."""
  del i
  rows = pl.ds(pl.multiple_of(tile.row, ROW_ALIGN), config.tile_m)
  cols = pl.ds(tile.ni * config.tile_n, config.tile_n)

  def load_slice(ki, slot):
    ks = pl.ds(ki * SLICE_K, SLICE_K)
    rhs = (cols, ks) if transposed else (ks, cols)
    _pipeline.load_operands(
      config,
      refs.lhs_gmem.at[rows, ks],
      refs.lhs_smem.at[slot],
      refs.rhs_gmem.at[tile.group, *rhs],
      refs.rhs_smem.at[slot],
      refs.full.at[slot],
      one_group,
    )

  return _pipeline.load_slices(
    refs, config.num_stages, k_iters, step, load_slice, beside
  )


# ---------------------------------------------------------------- compute


def _compute_tiles(refs: _Refs, config: Config, transposed: bool):
  """Computes and stages the announced tiles, at last zeros."""
  wg = lax.axis_index("wg")

  def compute_tile(_, tile: Tile, carry):
    step, count = carry
    has_rows = _staging.has_rows(tile, wg)

    @pl.when(has_rows)
    def compute():
      sums = _accumulate_tile(refs, config, transposed, step)
      _staging.stage(refs, count, lambda: _epilogue.write(refs, [sums]))

    @pl.when(~has_rows)
    def skip():
      _pipeline.skip_slices(refs, config.num_stages, _k_iters(refs), step)

    return step + _k_iters(refs), count + has_rows.astype(jnp.int32)

  start = jnp.int32(0), jnp.int32(0)
  _, count = _queue.for_each_tile(refs, Tile, compute_tile, start)
  zeros = [_pipeline.wgmma_zeros((WGMMA_M, config.tile_n))]
  _staging.stage(refs, count, lambda: _epilogue.write(refs, zeros))


def _accumulate_tile(refs: _Refs, config: Config, transposed: bool, step):
  """Returns the warpgroup's (64, tile_n) of out, in float32."""
  rows = _pipeline.warpgroup_rows()

  def slot_of(ki):
    return lax.rem(step + ki, config.num_stages)

  def accumulate(acc):
    def start(ki):
      slot = slot_of(ki)
      plgpu.barrier_wait(refs.full.at[slot])
      rhs = refs.rhs_smem.at[slot]
      plgpu.wgmma(
        acc, refs.lhs_smem.at[slot, rows], rhs.T if transposed else rhs
      )

    start(0)

    @pl.loop(1, _k_iters(refs))
    def add_slice(ki):
      start(ki)
      # One slice's products stay under way: those before have ended.
      plgpu.wgmma_wait(1)
      plgpu.barrier_arrive(refs.empty.at[slot_of(ki - 1)])

    sums = acc[...]  # Waits for all.
    plgpu.barrier_arrive(refs.empty.at[slot_of(_k_iters(refs) - 1)])
    return sums

  return pl.run_scoped(accumulate, plgpu.ACC((WGMMA_M, config.tile_n)))


# ---------------------------------------------------------------- launch


def m_grouped_bf16(
  lhs: Float[Array, "m_stored k_stored"],
  rhs: Float[Array, "g k n_stored"] | Float[Array, "g n_stored k_stored"],
  group_sizes: Int32[Array, "g_all"],
  group_offset: Int32[Array, "1"] | None,
  *,
  transposed: bool,
  m: int,
  n: int,
  out_dtype: DTypeLike,
  config: Config,
  interpret: bool = False,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[group of r - group_offset], else 0.

  rhs is (g, k, n), or (g, n, k) if transposed. m_stored is a multiple of 8, the
  last axes of both operands are multiples of 64, the one before of rhs of 8.
  """
  if group_offset is None:
    group_offset = jnp.zeros((1,), jnp.int32)
  stages, tile_m, tile_n = config.num_stages, config.tile_m, config.tile_n
  # A staged row has 128 bytes, so that TMA may start at any row, and out has
  # whole ones: other n cost a copy of out.
  slice_n = _epilogue.SWIZZLE_BYTES // jnp.dtype(out_dtype).itemsize
  rhs_slot = (tile_n, SLICE_K) if transposed else (SLICE_K, tile_n)
  out = _pipeline.launch(
    functools.partial(_load_tiles, config=config, transposed=transposed),
    functools.partial(_compute_tiles, config=config, transposed=transposed),
    name="m_grouped_bf16_sm90",
    config=config,
    interpret=interpret,
    refs_type=_Refs,
    out_type=jax.ShapeDtypeStruct((m, n + -n % slice_n), out_dtype),
    scratch_types=dict(
      lhs_smem=plgpu.SMEM((stages, tile_m, SLICE_K), lhs.dtype),
      rhs_smem=plgpu.SMEM((stages, *rhs_slot), rhs.dtype),
      out_smem=_epilogue.out_smem(config, slice_n, out_dtype),
      full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      empty=_pipeline.empty_barriers(config),
      **_staging.scratch_types(config.compute_wgs),
      **_queue.scratch_types(config, Tile),
    ),
  )(lhs, rhs, group_sizes, group_offset.reshape(1))
  return _pipeline.compute_once(out)[:, :n]

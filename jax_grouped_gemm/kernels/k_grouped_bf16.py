"""K-grouped GEMM of 16-bit operands for Hopper: weight gradients.

    out[g] = lhs[rows of g].T @ rhs[rows of g]        sums in float32

lhs (t, m), rhs (t, n) and out (g, m, n) are row-major; groups start at any row.
A group without rows gives zeros.

Warpgroups of one CTA, over num_stages slots of SMEM:
  wg 0, 1  _compute_tile | wait full  | wgmma | arrive empty | … stage
  last wg  _load_tile    | wait empty | TMA lhs, rhs -> full
                         | wait staged | TMA to out
The accumulators of the tensor cores hold a tile's sums over all rows of the
group. Its first and last slice may have rows of other groups, which the compute
warpgroups set to zero in SMEM: in both operands, as 0 * NaN is NaN. The CTAs of
a cluster work on neighbouring columns of one row tile, as in k_grouped.
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
  _k_tiles,
  _pipeline,
  _queue,
  _staging,
)
from jax_grouped_gemm.kernels._k_tiles import Tile
from jax_grouped_gemm.kernels._pipeline import Ref

SLICE_T = 64  # rows in a slot.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  lhs_gmem: Ref  # (t, m)
  rhs_gmem: Ref  # (t, n)
  starts_gmem: Ref  # (g,) i32: first row of the group
  ends_gmem: Ref  # (g,) i32: its last row + 1
  out_gmem: Ref  # (g, m, n) 16-bit or f32
  lhs_smem: Ref  # (stages, wg, 64, 64)
  rhs_smem: Ref  # (stages, 64, tile_n)
  out_smem: Ref  # (wg, slices, 64, slice_n): _epilogue.out_smem
  staged: Ref  # (compute_wgs,): see _staging
  stored: Ref  # (compute_wgs,)
  full: Ref  # (stages,) one arrival for rhs, one per compute warpgroup for lhs
  empty: Ref  # (stages,) one arrival per compute warpgroup of the cluster
  masked: Ref  # one arrival per compute warpgroup: foreign rows are zero
  tiles_smem: Ref  # (TILE_SLOTS, fields) i32: tiles on their way to compute
  tiles_full: Ref  # (TILE_SLOTS,) one arrival
  tiles_empty: Ref  # (TILE_SLOTS,) one arrival per compute warpgroup
  claims_smem: Ref  # (5,) i32: see _claims
  interpret: bool
  adds: bool = False
  claims_gmem: Ref | None = None  # i32: if config.dynamic


def _first_row(refs: _Refs, group):
  """TMA starts at whole 8 rows: up to 7 rows of other groups come along."""
  return lax.div(refs.starts_gmem[group], ROW_ALIGN) * ROW_ALIGN


def _k_iters(refs: _Refs, group):
  start, end = refs.starts_gmem[group], refs.ends_gmem[group]
  slices = pl.cdiv(end - _first_row(refs, group), SLICE_T)
  return lax.select(end > start, slices, 0)


# ---------------------------------------------------------------- load


def _load_tile(refs: _Refs, config: Config, tile: Tile, step, beside):
  """Loads the k slices of one tile into consecutive slots."""
  first_row = pl.multiple_of(_first_row(refs, tile.group), ROW_ALIGN)
  cols = pl.ds(tile.ni * config.tile_n, config.tile_n)
  shared = "cta" if config.cluster > 1 else None

  def load_slice(ki, slot):
    rows = pl.ds(first_row + ki * SLICE_T, SLICE_T)
    full = refs.full.at[slot]
    copy = plgpu.copy_gmem_to_smem
    copy(refs.rhs_gmem.at[rows, cols], refs.rhs_smem.at[slot], full)
    for wg in range(config.compute_wgs):
      features = pl.ds(tile.mi * config.tile_m + wg * WGMMA_M, WGMMA_M)
      lhs = refs.lhs_gmem.at[rows, features]
      copy(lhs, refs.lhs_smem.at[slot, wg], full, collective_axes=shared)

  return _pipeline.load_slices(
    refs, config.num_stages, tile.k_iters, step, load_slice, beside
  )


# ---------------------------------------------------------------- compute


def _accumulate_tile(refs: _Refs, config: Config, tile, step):
  """Returns the warpgroup's (64, tile_n) of out, float32; k_iters >= 1."""
  wg = lax.axis_index("wg")
  group, k_iters = tile.group, tile.k_iters

  def slot_of(ki):
    return lax.rem(step + ki, config.num_stages)

  def start(acc, ki):
    slot = slot_of(ki)
    plgpu.wgmma(acc, refs.lhs_smem.at[slot, wg].T, refs.rhs_smem.at[slot])

  def finish_before(ki):
    """One slice's products stay under way: those before ki have ended."""
    plgpu.wgmma_wait(1)
    plgpu.barrier_arrive(refs.empty.at[slot_of(ki - 1)])

  def start_masked(acc, ki):
    plgpu.barrier_wait(refs.full.at[slot_of(ki)])
    _mask(refs, group, ki, slot_of(ki))
    start(acc, ki)

  def accumulate(acc):
    start_masked(acc, 0)

    @pl.loop(1, k_iters - 1)
    def add_slice(ki):
      plgpu.barrier_wait(refs.full.at[slot_of(ki)])
      start(acc, ki)
      finish_before(ki)

    @pl.when(k_iters > 1)
    def add_last_slice():
      start_masked(acc, k_iters - 1)
      finish_before(k_iters - 1)

    sums = acc[...]  # Waits for all.
    plgpu.barrier_arrive(refs.empty.at[slot_of(k_iters - 1)])
    return [sums]

  return pl.run_scoped(accumulate, plgpu.ACC((WGMMA_M, config.tile_n)))


def _mask(refs: _Refs, group, ki, slot):
  """Sets rows of other groups to zero, if the slot has any."""
  row = _first_row(refs, group) + ki * SLICE_T
  first, last = refs.starts_gmem[group] - row, refs.ends_gmem[group] - row

  def keep_own(slot_smem):
    value = plgpu.load(slot_smem, layout=plgpu.Layout.WGMMA)
    rows = plgpu.broadcasted_iota(
      jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA
    )
    own = (rows >= first) & (rows < last)
    slot_smem[...] = jnp.where(own, value, jnp.zeros_like(value))

  @pl.when((first > 0) | (last < SLICE_T))
  def mask():
    wg = lax.axis_index("wg")
    pl.when(wg == 0)(lambda: keep_own(refs.rhs_smem.at[slot]))

    @pl.when(wg == 1)
    def mask_lhs():
      for i in range(refs.lhs_smem.shape[1]):
        keep_own(refs.lhs_smem.at[slot, i])

    # The tensor cores of both warpgroups read what each has written.
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.masked)
    plgpu.barrier_wait(refs.masked)


# ---------------------------------------------------------------- launch


def k_grouped_bf16(
  lhs: Float[Array, "t_stored m_stored"],
  rhs: Float[Array, "t_stored n_stored"],
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  *,
  m: int,
  n: int,
  out_dtype: DTypeLike,
  config: Config,
  interpret: bool = False,
) -> Float[Array, "g m n"]:
  """out[g] = lhs[rows of g].T @ rhs[rows of g], rows [starts[g], ends[g]).

  t_stored is a multiple of 8, m_stored and n_stored are multiples of 64.
  """
  stages, tile_n = config.num_stages, config.tile_n
  # A staged row has 128 bytes and out has whole ones: other n cost a copy.
  slice_n = _epilogue.SWIZZLE_BYTES // jnp.dtype(out_dtype).itemsize

  out = _pipeline.launch(
    functools.partial(
      _k_tiles.load_tiles,
      config=config,
      k_iters=_k_iters,
      load_tile=_load_tile,
    ),
    functools.partial(
      _k_tiles.compute_tiles,
      config=config,
      accumulate=_accumulate_tile,
    ),
    name="k_grouped_bf16_sm90",
    config=config,
    interpret=interpret,
    refs_type=_Refs,
    out_type=jax.ShapeDtypeStruct(
      (starts.shape[0], m, n + -n % slice_n), out_dtype
    ),
    scratch_types=dict(
      lhs_smem=plgpu.SMEM(
        (stages, config.compute_wgs, SLICE_T, WGMMA_M), lhs.dtype
      ),
      rhs_smem=plgpu.SMEM((stages, SLICE_T, tile_n), rhs.dtype),
      out_smem=_epilogue.out_smem(config, slice_n, out_dtype),
      **_staging.scratch_types(config.compute_wgs),
      full=plgpu.Barrier(
        num_arrivals=1 + config.compute_wgs, num_barriers=stages
      ),
      empty=_pipeline.empty_barriers(config),
      masked=plgpu.Barrier(num_arrivals=config.compute_wgs),
      **_queue.scratch_types(config, Tile),
    ),
  )(lhs, rhs, starts, ends)
  return out[:, :, :n]

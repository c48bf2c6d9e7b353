"""The tiles of a K-grouped GEMM: their order, and their way to out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import WGMMA_M, Config
from jax_grouped_gemm.kernels import _epilogue, _pipeline, _staging


class Tile(NamedTuple):
  """What one CTA computes at a time."""

  group: jax.Array
  mi: jax.Array
  ni: jax.Array


def for_each_tile(refs, config: Config, fn, carry):
  """Runs `carry = fn(tile, carry)` on this CTA's share of the tiles."""
  groups, m, n = refs.out_gmem.shape
  plane = (
    pl.cdiv(m, config.tile_m),
    pl.cdiv(n, config.tile_n * config.cluster),
  )

  @plgpu.nd_loop(
    (groups, plane[0] * plane[1]), collective_axes="sm", init_carry=carry
  )
  def last_carry(info, carry):
    group, index = info.index
    mi, ni = plgpu.planar_snake(index, plane, 1, config.raster_width)
    ni = ni * config.cluster + lax.axis_index("cta")
    return fn(Tile(group, mi, ni), carry)

  return last_carry


def load_tiles(refs, config: Config, load_tile):
  """Loads and stores this CTA's tiles. Returns the slots that were filled.

  By `step = load_tile(refs, config, tile, step, beside)`, where `step` counts k
  slices and so tells the slot of SMEM. Meanwhile a second warp runs beside(),
  which stores the tile before and loads the accumulator of this one.
  """

  def load_next(tile: Tile, carry):
    step, last = carry

    def beside():
      @pl.loop(0, config.compute_wgs)
      def next_warpgroup(wg):
        pl.when(last.group != none)(lambda: _store(refs, config, last, wg))
        _load_accumulator(refs, config, tile, wg)

    return load_tile(refs, config, tile, step, beside), tile

  none = jnp.int32(-1)
  first = jnp.int32(0), Tile(none, none, none)
  step, last = for_each_tile(refs, config, load_next, first)

  @pl.when(last.group != none)
  def store_last():
    @_pipeline.on_second_warp
    def beside():
      @pl.loop(0, config.compute_wgs)
      def next_warpgroup(wg):
        _store(refs, config, last, wg)

  return step


def compute_tiles(refs, config: Config, k_iters, accumulate):
  """Computes and stages all tiles.

  Args:
    refs: of the kernel.
    config: of the launch.
    k_iters: k_iters(refs, group) is its number of k slices.
    accumulate: accumulate(refs, config, tile, step) returns the warpgroup's
      (64, tile_n) of out in float32, for a tile with k slices.
  """

  def compute_tile(tile: Tile, carry):
    step, count = carry
    iters = k_iters(refs, tile.group)

    def stage(value):
      _staging.stage(refs, count, lambda: _write(refs, value))

    @pl.when(iters > 0)
    def compute():
      stage(accumulate(refs, config, tile, step))

    @pl.when(iters == 0)
    def empty():
      stage(_pipeline.wgmma_zeros((WGMMA_M, config.tile_n)))

    return step + iters, count + 1

  start = jnp.int32(0), jnp.int32(0)
  _, count = for_each_tile(refs, config, compute_tile, start)
  _staging.wait_stored(refs, count)


def _slices(refs, config: Config, tile: Tile, wg):
  """Returns the warpgroup's rows of out, and the first columns of slices."""
  slices, slice_n = refs.out_smem.shape[1], refs.out_smem.shape[3]
  rows = pl.ds(tile.mi * config.tile_m + wg * WGMMA_M, WGMMA_M)
  return rows, [tile.ni * config.tile_n + j * slice_n for j in range(slices)]


def _load_accumulator(refs, config: Config, tile: Tile, wg):
  """Loads it to where the tile will be staged, if there is one."""
  if refs.accumulator_gmem is None:
    return
  rows, cols = _slices(refs, config, tile, wg)
  for j, col in enumerate(cols):
    plgpu.copy_gmem_to_smem(
      refs.accumulator_gmem.at[
        tile.group, rows, pl.ds(col, refs.out_smem.shape[3])
      ],
      refs.out_smem.at[wg, j],
      refs.accumulator_full.at[wg],
    )


def _write(refs, value):
  """Writes the tile to out_smem, on top of the accumulator if there is one."""
  wg = lax.axis_index("wg")
  slices, slice_n = refs.out_smem.shape[1], refs.out_smem.shape[3]
  if refs.accumulator_gmem is not None:
    plgpu.barrier_wait(refs.accumulator_full.at[wg])
  for j in range(slices):
    part = value[:, j * slice_n : (j + 1) * slice_n]
    if refs.accumulator_gmem is not None:
      part = part + plgpu.load(
        refs.out_smem.at[wg, j], layout=plgpu.Layout.WGMMA
      )
    refs.out_smem[wg, j] = part.astype(refs.out_gmem.dtype)


def _store(refs, config: Config, tile: Tile, wg):
  """Stores what the warpgroup stages of the tile."""
  rows, cols = _slices(refs, config, tile, wg)

  def store_rows():
    for j, col in enumerate(cols):
      _epilogue.store_slice(
        refs.out_smem.at[wg, j], refs.out_gmem.at[tile.group], rows, col
      )

  _staging.store(refs, wg, store_rows)

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
  which stores the tile before.
  """

  def load_next(tile: Tile, carry):
    step, last = carry
    next_step = load_tile(refs, config, tile, step, lambda: store(last))
    if refs.adds:  # Nothing, then, where there are no slices.
      group = lax.select(next_step > step, tile.group, none)
      tile = tile._replace(group=group)
    return next_step, tile

  def store(tile: Tile):
    @pl.when(tile.group != none)
    def store_tile():
      @pl.loop(0, config.compute_wgs)
      def next_warpgroup(wg):
        _store(refs, config, tile, wg)

  none = jnp.int32(-1)
  first = jnp.int32(0), Tile(none, none, none)
  step, last = for_each_tile(refs, config, load_next, first)
  _pipeline.on_second_warp(lambda: store(last))
  return step


def compute_tiles(refs, config: Config, k_iters, accumulate):
  """Computes and stages all tiles.

  Args:
    refs: of the kernel.
    config: of the launch.
    k_iters: k_iters(refs, group) is its number of k slices.
    accumulate: accumulate(refs, config, tile, step) returns the warpgroup's
      (64, tile_n) of out in float32, as slices of columns that out_smem's
      divide, for a tile with k slices.
  """

  def compute_tile(tile: Tile, carry):
    step, count = carry
    iters = k_iters(refs, tile.group)

    def stage(sums):
      _staging.stage(refs, count, lambda: _write(refs, config, tile, sums))

    @pl.when(iters > 0)
    def compute():
      stage(accumulate(refs, config, tile, step))

    if refs.adds:
      return step + iters, count + (iters > 0).astype(jnp.int32)

    @pl.when(iters == 0)
    def empty():
      stage([_pipeline.wgmma_zeros((WGMMA_M, config.tile_n))])

    return step + iters, count + 1

  start = jnp.int32(0), jnp.int32(0)
  _, count = for_each_tile(refs, config, compute_tile, start)
  _staging.wait_stored(refs, count)


def _slices(refs, config: Config, tile: Tile, wg):
  """Returns the warpgroup's rows of out, and the first columns of slices."""
  slices, slice_n = refs.out_smem.shape[1], refs.out_smem.shape[3]
  rows = pl.ds(tile.mi * config.tile_m + wg * WGMMA_M, WGMMA_M)
  return rows, [tile.ni * config.tile_n + j * slice_n for j in range(slices)]


def _write(refs, config: Config, tile: Tile, sums):
  """Writes the warpgroup's slices of columns to out_smem."""
  if refs.adds and refs.interpret:  # Its stores cannot add.
    rows, cols = _slices(refs, config, tile, lax.axis_index("wg"))
    width = config.tile_n // len(sums)
    sums = [
      x + refs.out_gmem[tile.group, rows, pl.ds(cols[0] + j * width, width)]
      for j, x in enumerate(sums)
    ]
  _epilogue.write(refs, sums)


def _store(refs, config: Config, tile: Tile, wg):
  """Stores what the warpgroup stages of the tile."""
  rows, cols = _slices(refs, config, tile, wg)

  def store_rows():
    for j, col in enumerate(cols):
      _epilogue.store_slice(
        refs.out_smem.at[wg, j],
        refs.out_gmem.at[tile.group],
        rows,
        col,
        add=refs.adds and not refs.interpret,
      )

  _staging.store(refs, wg, store_rows)

"""The tiles of a K-grouped GEMM: their order, and their way to out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import WGMMA_M, Config
from jax_grouped_gemm.kernels import _epilogue, _pipeline, _queue, _staging


class Tile(NamedTuple):
  """What one CTA computes at a time."""

  group: jax.Array  # END: no tile, the end
  mi: jax.Array
  ni: jax.Array
  k_iters: jax.Array  # slices of the group


def load_tiles(refs, config: Config, k_iters, load_tile):
  """Announces this CTA's tiles, loads and stores them.

  Args:
    refs: of the kernel.
    config: of the launch.
    k_iters: k_iters(refs, group) is its number of k slices.
    load_tile: load_tile(refs, config, tile, step, beside) returns the step
      after the tile; steps count slices and so tell the slot of SMEM. Meanwhile
      a second warp runs beside(), which stores the tile before.

  Returns:
    The slots that were filled.
  """
  groups, m, n = refs.out_gmem.shape
  plane = (
    pl.cdiv(m, config.tile_m),
    pl.cdiv(n, config.tile_n * config.cluster),
  )

  def find_tile(index, walk):
    group = lax.div(index, plane[0] * plane[1])
    is_tile = group < groups
    index = lax.rem(index, plane[0] * plane[1])
    mi, ni = plgpu.planar_snake(index, plane, 1, config.raster_width)
    ni = ni * config.cluster + lax.axis_index("cta")
    iters = k_iters(refs, jnp.minimum(group, groups - 1))
    tile = Tile(group, mi, ni, lax.select(is_tile, iters, 0))
    return walk, tile, is_tile, ()

  def load_next(i, tile: Tile, _, step, last: Tile):
    del i
    return load_tile(refs, config, tile, step, lambda: store(last))

  def store(tile: Tile):
    has_sums = tile.group != _queue.END
    if refs.adds:
      has_sums &= tile.k_iters > 0

    @pl.when(has_sums)
    def store_tile():
      @pl.loop(0, config.compute_wgs)
      def next_warpgroup(wg):
        _store(refs, config, tile, wg)

  zero = jnp.int32(0)
  none = Tile(jnp.int32(_queue.END), zero, zero, zero)
  # The last tile is stored beside the end, of which nothing is loaded.
  _, step = _queue.load_tiles(refs, find_tile, load_next, (), none)
  return step


def compute_tiles(refs, config: Config, accumulate):
  """Computes and stages the announced tiles.

  accumulate(refs, config, tile, step) returns the warpgroup's (64, tile_n) of
  out in float32, as slices of columns that out_smem's divide, for a tile with k
  slices.
  """

  def compute_tile(i, tile: Tile, carry):
    del i
    step, count = carry

    def stage(sums):
      _staging.stage(refs, count, lambda: _write(refs, config, tile, sums))

    @pl.when(tile.k_iters > 0)
    def compute():
      stage(accumulate(refs, config, tile, step))

    step += tile.k_iters
    if refs.adds:  # Nothing, then, where there are no slices.
      return step, count + (tile.k_iters > 0).astype(jnp.int32)

    @pl.when(tile.k_iters == 0)
    def empty():
      stage([_pipeline.wgmma_zeros((WGMMA_M, config.tile_n))])

    return step, count + 1

  start = jnp.int32(0), jnp.int32(0)
  _, count = _queue.for_each_tile(refs, Tile, compute_tile, start)
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

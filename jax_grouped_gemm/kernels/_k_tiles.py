"""The tiles of a K-grouped GEMM: their order, and their way to out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import WGMMA_M, Config
from jax_grouped_gemm.kernels import _epilogue, _pipeline


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
  """Loads by `step = load_tile(refs, config, tile, step)`.

  `step` counts k slices and so tells the slot of SMEM. Returns the last: the
  slots that were filled.
  """
  load_tile = functools.partial(load_tile, refs, config)
  return for_each_tile(refs, config, load_tile, jnp.int32(0))


def compute_tiles(refs, config: Config, k_iters, accumulate):
  """Computes and stores all tiles.

  Args:
    refs: of the kernel.
    config: of the launch.
    k_iters: k_iters(refs, group) is its number of k slices.
    accumulate: accumulate(refs, config, tile, step, beneath_first) returns the
      warpgroup's (64, tile_n) of out in float32, for a tile with k slices. It
      calls beneath_first() once the first products run, or before.
  """

  def compute_tile(tile: Tile, step):
    def begin():
      """Makes room in out_smem, and loads the accumulator there."""
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      _load_accumulator(refs, config, tile)

    iters = k_iters(refs, tile.group)

    @pl.when(iters > 0)
    def compute():
      _stage(refs, accumulate(refs, config, tile, step, begin))

    @pl.when(iters == 0)
    def empty():
      begin()
      _stage(refs, _pipeline.wgmma_zeros((WGMMA_M, config.tile_n)))

    plgpu.commit_smem()
    _store(refs, config, tile)
    return step + iters

  for_each_tile(refs, config, compute_tile, jnp.int32(0))


def _slices(refs, config: Config, tile: Tile):
  """Returns the warpgroup's rows of out, and the first columns of slices."""
  wg = lax.axis_index("wg")
  slices, slice_n = refs.out_smem.shape[1], refs.out_smem.shape[3]
  rows = pl.ds(tile.mi * config.tile_m + wg * WGMMA_M, WGMMA_M)
  cols = [tile.ni * config.tile_n + j * slice_n for j in range(slices)]
  return wg, rows, cols


def _load_accumulator(refs, config: Config, tile: Tile):
  """Loads it to where the tile will be staged, if there is one."""
  if refs.accumulator_gmem is None:
    return
  wg, rows, cols = _slices(refs, config, tile)
  for j, col in enumerate(cols):
    plgpu.copy_gmem_to_smem(
      refs.accumulator_gmem.at[
        tile.group, rows, pl.ds(col, refs.out_smem.shape[3])
      ],
      refs.out_smem.at[wg, j],
      refs.accumulator_full.at[wg],
    )


def _stage(refs, value):
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


def _store(refs, config: Config, tile: Tile):
  """Stores the staged tile."""
  wg, rows, cols = _slices(refs, config, tile)
  for j, col in enumerate(cols):
    _epilogue.store_slice(
      refs.out_smem.at[wg, j], refs.out_gmem.at[tile.group], rows, col
    )
  plgpu.commit_smem_to_gmem_group()

"""From a tile's sums in registers to its rows of out, through SMEM and TMA."""

import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jax_grouped_gemm.config import WGMMA_M, Config
from jax_grouped_gemm.kernels._groups import Tile
from jax_grouped_gemm.kernels._pipeline import Ref

SWIZZLE_BYTES = 128  # the widest row of a swizzled SMEM buffer.


def out_smem(config: Config, slice_n: int, dtype: DTypeLike):
  """SMEM (wg, slices, 64, slice_n) to stage a tile of out for TMA.

  Each slice of columns is a buffer of its own: Mosaic's stores to column slices
  of one swizzled buffer are wrong on hardware in all but the first (jax
  0.11.2). Mosaic swizzles them, so the columns of out must be whole slices.
  """
  slices = config.tile_n // slice_n
  return plgpu.SMEM((config.compute_wgs, slices, WGMMA_M, slice_n), dtype)


def store_slice(slice_smem: Ref, out_gmem: Ref, rows, col, add: bool = False):
  """Stores columns from `col` on, unless they lie beyond those of out.

  With `add`, adds them to what is there, in the memory system.
  Nothing waits for it before plgpu.commit_smem_to_gmem_group.
  """
  cols = pl.ds(col, slice_smem.shape[-1])

  # TMA clips what is out of bounds, but Mosaic drops dimensions of size 1, the
  # only slice of a narrow out, and the index of a second one with them.
  @pl.when(col < out_gmem.shape[-1])
  def store():
    plgpu.copy_smem_to_gmem(
      slice_smem,
      out_gmem.at[rows, cols],
      commit_group=False,
      reduction_op="add" if add else None,
    )


def write(refs, slices):
  """Writes the warpgroup's slices of columns to out_smem."""
  for j in range(refs.out_smem.shape[1]):
    width = refs.out_smem.shape[3]
    col = j * width
    value = slices[col // slices[0].shape[1]]
    value = value[:, col % value.shape[1] :][:, :width]
    value = value.astype(refs.out_gmem.dtype)
    refs.out_smem[lax.axis_index("wg"), j] = value


def store_unoptimized(ref: Ref, value):
  """Stores in spite of bank conflicts, which cost little once a tile."""
  if hasattr(plgpu, "store"):  # Since jax 0.12 it wants to be told.
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def store_rows(refs, config: Config, tile: Tile, wg):
  """Stores what warpgroup `wg` has staged of the tile's rows."""
  first = tile.offset - wg * WGMMA_M
  offset = jnp.clip(first, 0, WGMMA_M)
  count = jnp.clip(first + tile.size, 0, WGMMA_M) - offset
  row, col = tile.row + wg * WGMMA_M, tile.ni * config.tile_n
  _, slices, _, slice_n = refs.out_smem.shape

  def store(offset, num_rows):
    rows = pl.ds(row + offset, num_rows)
    for j in range(slices):
      staged = refs.out_smem.at[wg, j, pl.ds(offset, num_rows)]
      store_slice(staged, refs.out_gmem, rows, col + j * slice_n)

  store_ladder(offset, count, WGMMA_M, store)


def store_ladder(offset, count, num_staged: int, store):
  """Calls store(first, num_rows) for all of [offset, offset + count).

  TMA needs static sizes, so `count` of the num_staged rows go out as the powers
  of two of its binary form, e.g. 5 rows as 4 + 1.
  """
  pl.when(count == num_staged)(lambda: store(0, num_staged))

  @pl.when(count < num_staged)
  def store_part():
    first, num_rows = offset, num_staged // 2
    while num_rows > 0:
      pl.when((count & num_rows) != 0)(
        functools.partial(store, first, num_rows)
      )
      first += count & num_rows
      num_rows //= 2

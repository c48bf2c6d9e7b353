"""The tiles of a K-grouped GEMM: their order, and their way to out."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import WGMMA_M, Config
from jax_grouped_gemm.kernels import _epilogue, _pipeline


def for_each_tile(refs, config: Config, fn):
  """Runs `step = fn(group, mi, ni, step)` on this CTA's share of the tiles.

  `step` counts k slices and so tells the slot of SMEM.
  """
  groups, m, n = refs.out_gmem.shape
  plane = (
    pl.cdiv(m, config.tile_m),
    pl.cdiv(n, config.tile_n * config.cluster),
  )

  @plgpu.nd_loop(
    (groups, plane[0] * plane[1]),
    collective_axes="sm",
    init_carry=jnp.int32(0),
  )
  def last_step(info, carry):
    group, index = info.index
    mi, ni = plgpu.planar_snake(index, plane, 1, config.raster_width)
    ni = ni * config.cluster + lax.axis_index("cta")
    return fn(group, mi, ni, carry)

  return last_step


def store_tile(refs, config: Config, group, mi, ni, k_iters, accumulate):
  """Stores accumulate(), the warpgroup's (64, tile_n) of out in float32.

  On top of the accumulator, if there is one; zeros if there are no k slices.
  """
  wg = lax.axis_index("wg")
  slices, slice_n = refs.out_smem.shape[1], refs.out_smem.shape[3]
  rows = pl.ds(mi * config.tile_m + wg * WGMMA_M, WGMMA_M)
  cols = [ni * config.tile_n + j * slice_n for j in range(slices)]

  # Before out_smem is written again.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  if refs.accumulator_gmem is not None:
    for j in range(slices):
      plgpu.copy_gmem_to_smem(
        refs.accumulator_gmem.at[group, rows, pl.ds(cols[j], slice_n)],
        refs.out_smem.at[wg, j],
        refs.accumulator_full.at[wg],
      )

  def stage(value):
    if refs.accumulator_gmem is not None:
      plgpu.barrier_wait(refs.accumulator_full.at[wg])
    for j in range(slices):
      part = value[:, j * slice_n : (j + 1) * slice_n]
      if refs.accumulator_gmem is not None:
        part = part + plgpu.load(
          refs.out_smem.at[wg, j], layout=plgpu.Layout.WGMMA
        )
      refs.out_smem[wg, j] = part.astype(refs.out_gmem.dtype)

  pl.when(k_iters > 0)(lambda: stage(accumulate()))
  pl.when(k_iters == 0)(
    lambda: stage(_pipeline.wgmma_zeros((WGMMA_M, config.tile_n)))
  )
  plgpu.commit_smem()
  for j in range(slices):
    _epilogue.store_slice(
      refs.out_smem.at[wg, j], refs.out_gmem.at[group], rows, cols[j]
    )
  plgpu.commit_smem_to_gmem_group()

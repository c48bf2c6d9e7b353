"""The rhs scales of an M-grouped tile: loaded once a tile, through SMEM."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import (
  SCALE_ALIGN,
  SCALE_BLOCK,
  TILE_SLOTS,
  Config,
)

SLICE_N = 64  # columns that surely share one scale, for any tile_n.
_MAX_BOX = 256  # elements along an axis that TMA loads at once.


def pad(scales):
  """Returns scales (g, n/128, k/128) as load() wants them.

  TMA loads rows of whole 16 bytes.
  """
  return jnp.pad(scales, ((0, 0), (0, 0), (0, -scales.shape[2] % 4)))


def scratch_types(scales_shape: tuple[int, int, int], config: Config):
  """The scratch that the functions below expect in refs.

  rhs_scales_smem (TILE_SLOTS, blocks, k/128): a tile has columns of at most two
  blocks, if rhs has as many.
  """
  _, blocks, k_blocks = scales_shape
  blocks = min(pl.cdiv(config.tile_n, SCALE_BLOCK), blocks)
  stored_k_blocks = k_blocks + -k_blocks % SCALE_ALIGN
  return dict(
    rhs_scales_smem=plgpu.SMEM(
      (TILE_SLOTS, blocks, stored_k_blocks), jnp.float32
    ),
    rhs_scales_full=plgpu.Barrier(
      num_arrivals=blocks * len(_boxes(k_blocks)), num_barriers=TILE_SLOTS
    ),
  )


def _boxes(k_blocks: int):
  return [
    pl.ds(k, min(k_blocks - k, _MAX_BOX)) for k in range(0, k_blocks, _MAX_BOX)
  ]


def load(refs, config: Config, i, tile):
  """Loads the scales of the i-th tile."""
  slot = lax.rem(i, TILE_SLOTS)
  _, blocks, k_blocks = refs.rhs_scales_gmem.shape
  first = lax.div(tile.ni * config.tile_n, SCALE_BLOCK)
  for b in range(refs.rhs_scales_smem.shape[1]):
    # A tile may have columns beyond the last block; they are not stored.
    block = jnp.minimum(first + b, blocks - 1)
    for ks in _boxes(k_blocks):
      plgpu.copy_gmem_to_smem(
        refs.rhs_scales_gmem.at[tile.group, block, ks],
        refs.rhs_scales_smem.at[slot, b, ks],
        refs.rhs_scales_full.at[slot],
      )


def wait(refs, i):
  """Waits until the scales of the i-th tile are in SMEM."""
  plgpu.barrier_wait(refs.rhs_scales_full.at[lax.rem(i, TILE_SLOTS)])


def read(refs, config: Config, i, ni, ki):
  """Returns the scale of every 64 columns of the i-th tile's k slice."""
  slot = lax.rem(i, TILE_SLOTS)
  blocks = [
    refs.rhs_scales_smem[slot, b, ki]
    for b in range(refs.rhs_scales_smem.shape[1])
  ]
  slices = range(config.tile_n // SLICE_N)
  if len(blocks) == 1:
    return [blocks[0] for _ in slices]
  # A tile with an odd number of 64-column slices may start amid a block.
  starts_block = lax.rem(ni * config.tile_n, SCALE_BLOCK) == 0
  return [
    lax.select(starts_block, blocks[j // 2], blocks[(j + 1) // 2])
    for j in slices
  ]

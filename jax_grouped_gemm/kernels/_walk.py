"""A CTA's tiles on their way from the walk to the compute warpgroups."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import TILE_SLOTS, WGMMA_M, Config
from jax_grouped_gemm.kernels import _pipeline
from jax_grouped_gemm.kernels._groups import MaskedWalk, Tile, Walk
from jax_grouped_gemm.schedule import Masked

END = -1  # instead of a tile's group: no tile follows.


def load_tiles(refs, config, masked: Masked | None, k_iters: int, load_tile):
  """Announces this CTA's tiles and loads them. Returns the slots it filled.

  First those of groups that rhs holds, by load_tile(i, tile, one_group,
  k_iters, step), which returns the step after the tile. Then those of other
  rows, which are zeros. Each followed by an end.
  """
  shape = (*refs.out_gmem.shape, refs.rhs_gmem.shape[0])
  kind = functools.partial(MaskedWalk, masked=masked) if masked else Walk
  walk = functools.partial(
    kind, refs.group_sizes_gmem, refs.group_offset_gmem, shape, config
  )

  def load_tiles_of(walk: Walk, first_group, first, step):
    def load_next(state):
      i, step, group, _ = state
      index = lax.axis_index("sm") + (i - first) * lax.axis_size("sm")
      group = walk.find_group(index, group)
      is_tile = walk.is_left(group)
      tile, one_group = walk.tile(index, group)
      announce(
        refs, i, tile._replace(group=lax.select(is_tile, tile.group, END))
      )
      if walk.in_rhs:
        step = load_tile(
          i, tile, one_group, lax.select(is_tile, k_iters, 0), step
        )
      return i + 1, step, group, is_tile

    state = first, step, first_group, True
    return lax.while_loop(lambda state: state[-1], load_next, state)[:3]

  zero = jnp.int32(0)
  of_rhs, of_others = walk(in_rhs=True), walk(in_rhs=False)
  i, step, end = load_tiles_of(of_rhs, of_rhs.first_group(zero), zero, zero)
  # Spares a second walk if there are no other rows to be zeros.
  has_others = end.rows < of_others.m
  if masked:
    has_others &= masked.zero_padding
  index = lax.select(has_others, zero, end.index)
  i, *_ = load_tiles_of(of_others, of_others.first_group(index), i, zero)
  _pipeline.drain(refs.tiles_empty, TILE_SLOTS, i)
  return step


def for_each_tile(refs, fn, i, step):
  """Calls `step = fn(i, tile, step)` for the tiles announced up to an end.

  fn must release the tile, at the latest in its next call but one. Returns the
  index of the end, which is to be released as well.
  """

  def run(state):
    i, step, _ = state
    step = fn(i, read_tile(refs, i), step)
    return i + 1, step, is_tile(refs, i + 1)

  state = i, step, is_tile(refs, i)
  i, *_ = lax.while_loop(lambda state: state[-1], run, state)
  return i


def queue_types(config: Config):
  """The scratch that the functions below expect in refs."""
  return dict(
    tiles_smem=plgpu.SMEM((TILE_SLOTS, len(Tile._fields)), jnp.int32),
    tiles_full=plgpu.Barrier(num_barriers=TILE_SLOTS),
    tiles_empty=plgpu.Barrier(
      num_arrivals=config.compute_wgs, num_barriers=TILE_SLOTS
    ),
  )


def announce(refs, i, tile: Tile):
  """Hands the i-th tile to the compute warpgroups, through SMEM."""
  slot = lax.rem(i, TILE_SLOTS)

  @pl.when(i >= TILE_SLOTS)
  def wait_empty():
    plgpu.barrier_wait(refs.tiles_empty.at[slot])
    plgpu.commit_smem()  # Orders reads of rhs_scales_smem before TMA writes.

  for field, value in enumerate(tile):
    refs.tiles_smem[slot, field] = value
  plgpu.barrier_arrive(refs.tiles_full.at[slot])


def read_tile(refs, i) -> Tile:
  """Returns the i-th tile, from when is_tile(i) until release_tile(i)."""
  slot = lax.rem(i, TILE_SLOTS)
  return Tile(*(refs.tiles_smem[slot, j] for j in range(len(Tile._fields))))


def is_tile(refs, i):
  """Waits until tile i is announced. False: it is the end."""
  plgpu.barrier_wait(refs.tiles_full.at[lax.rem(i, TILE_SLOTS)])
  return read_tile(refs, i).group != END


def has_rows(tile: Tile):
  """Whether the warpgroup has any; in a group's last tile it may not."""
  first_row = lax.axis_index("wg") * WGMMA_M
  return (tile.size > 0) & (first_row < tile.offset + tile.size)


def release_tile(refs, i):
  """Lets the tile, or the end, be overwritten."""
  plgpu.barrier_arrive(refs.tiles_empty.at[lax.rem(i, TILE_SLOTS)])

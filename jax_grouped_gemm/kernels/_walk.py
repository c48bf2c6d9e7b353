"""A CTA's tiles on their way from the walk to the compute warpgroups."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import TILE_SLOTS, Config
from jax_grouped_gemm.kernels import _pipeline, _staging
from jax_grouped_gemm.kernels._groups import MaskedWalk, Tile, Walk
from jax_grouped_gemm.schedule import Masked

END = -1  # instead of a tile's group: no tile follows.


def load_tiles(
  refs,
  config,
  masked: Masked | None,
  k_iters: int,
  load_tile,
  store_rows,
  has_rows=_staging.has_rows,
):
  """Announces this CTA's tiles, loads and stores them.

  Returns the slots that were filled. First come the tiles of groups that rhs
  holds, by load_tile(i, tile, one_group, k_iters, step, beside), which returns
  the step after the tile and meanwhile runs beside() on a second warp: it
  stores the tile before, by store_rows(tile, wg) of each warpgroup that
  has_rows(tile, wg). At last the tiles of other rows, which are zeros.
  """
  shape = (*refs.out_gmem.shape, refs.rhs_gmem.shape[0])
  kind = functools.partial(MaskedWalk, masked=masked) if masked else Walk
  walk = functools.partial(
    kind, refs.group_sizes_gmem, refs.group_offset_gmem, shape, config
  )
  storing = _staging.Storing(refs, config.compute_wgs, has_rows, store_rows)

  def find_tile(walk: Walk, i, group):
    index = lax.axis_index("sm") + i * lax.axis_size("sm")
    group = walk.find_group(index, group)
    return group, *walk.tile(index, group), walk.is_left(group)

  def load_next(state):
    i, step, group, last, _ = state
    group, tile, one_group, is_tile = find_tile(of_rhs, i, group)
    tile = tile._replace(group=lax.select(is_tile, tile.group, END))
    announce(refs, i, tile)
    step = load_tile(
      i,
      tile,
      one_group,
      lax.select(is_tile, k_iters, 0),
      step,
      lambda: pl.when(i > 0)(lambda: storing.store(last)),
    )
    return i + 1, step, group, tile, is_tile

  def store_next(state):
    i, group, _ = state
    group, tile, _, is_tile = find_tile(of_others, i, group)
    store = lambda: storing.store_zeros(tile)
    pl.when(is_tile)(lambda: _pipeline.on_second_warp(store))
    return i + 1, group, is_tile

  zero = jnp.int32(0)
  of_rhs, of_others = walk(in_rhs=True), walk(in_rhs=False)
  none = Tile(*[zero] * len(Tile._fields))
  i, step, end, *_ = lax.while_loop(
    lambda state: state[-1],
    load_next,
    (zero, zero, of_rhs.first_group(zero), none, True),
  )
  # Spares a second walk if there are no other rows to be zeros.
  has_others = end.rows < of_others.m
  if masked:
    has_others &= masked.zero_padding
  index = lax.select(has_others, zero, end.index)
  _pipeline.on_second_warp(storing.wait_zeros)
  lax.while_loop(
    lambda state: state[-1],
    store_next,
    (zero, of_others.first_group(index), True),
  )
  _pipeline.on_second_warp(
    lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  )
  _pipeline.drain(refs.tiles_empty, TILE_SLOTS, i)
  return step


def for_each_tile(refs, fn, carry):
  """Calls `carry = fn(i, tile, carry)` for the announced tiles."""

  def run(state):
    i, carry, _ = state
    carry = fn(i, read_tile(refs, i), carry)
    release_tile(refs, i)
    return i + 1, carry, is_tile(refs, i + 1)

  zero = jnp.int32(0)
  i, carry, _ = lax.while_loop(
    lambda state: state[-1], run, (zero, carry, is_tile(refs, zero))
  )
  release_tile(refs, i)
  return carry


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


def release_tile(refs, i):
  """Lets the tile, or the end, be overwritten, and what was loaded with it."""
  plgpu.barrier_arrive(refs.tiles_empty.at[lax.rem(i, TILE_SLOTS)])

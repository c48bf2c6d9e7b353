"""A CTA's tiles on their way from the loading to the compute warpgroups."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import TILE_SLOTS
from jax_grouped_gemm.kernels import _claims, _pipeline

END = -1  # instead of a tile's group: no tile follows.


def scratch_types(config, tile_type):
  """The scratch that the functions below expect in refs."""
  return dict(
    tiles_smem=plgpu.SMEM((TILE_SLOTS, len(tile_type._fields)), jnp.int32),
    tiles_full=plgpu.Barrier(num_barriers=TILE_SLOTS),
    tiles_empty=plgpu.Barrier(
      num_arrivals=config.compute_wgs, num_barriers=TILE_SLOTS
    ),
    **_claims.scratch_types(),
  )


# ---------------------------------------------------------------- load


def nth_index(i):
  """Returns which tile is the cluster's i-th, if each has every n-th."""
  return lax.axis_index("sm") + i * lax.axis_size("sm")


def load_tiles(refs, find_tile, load_tile, first, none):
  """Announces and loads the cluster's tiles, from step 0 on.

  Args:
    refs: of the kernel.
    find_tile: `walk, tile, is_tile, extra = find_tile(index, walk)`; tiles are
      NamedTuples of int32 whose first field is the group.
    load_tile: `step = load_tile(i, tile, extra, step, last)` loads the i-th
      one, whose group may be END, and stores the last one meanwhile.
    first: the walk before the first tile.
    none: what the tile before the first one is said to be.

  Returns:
    The walk at the end, and the step.
  """
  claimed = _claims.is_used(refs)

  def load_next(state):
    i, index, walk, step, last, _ = state
    if claimed:
      _claims.draw(refs, i + 1)
    walk, tile, is_tile, extra = find_tile(index, walk)
    tile = tile._replace(group=lax.select(is_tile, tile.group, END))
    _announce(refs, i, tile)
    step = load_tile(i, tile, extra, step, last)
    i += 1
    index = _claims.tile(refs, i) if claimed else nth_index(i)
    return i, index, walk, step, tile, is_tile

  zero = jnp.int32(0)
  i, _, walk, step, *_ = lax.while_loop(
    lambda state: state[-1],
    load_next,
    (zero, nth_index(zero), first, zero, none, True),
  )
  _pipeline.drain(refs.tiles_empty, TILE_SLOTS, i)
  return walk, step


def _announce(refs, i, tile):
  """Hands the i-th tile to the compute warpgroups, through SMEM."""
  slot = lax.rem(i, TILE_SLOTS)

  @pl.when(i >= TILE_SLOTS)
  def wait_empty():
    plgpu.barrier_wait(refs.tiles_empty.at[slot])
    plgpu.commit_smem()  # Orders reads of rhs_scales_smem before TMA writes.

  for field, value in enumerate(tile):
    refs.tiles_smem[slot, field] = value
  plgpu.barrier_arrive(refs.tiles_full.at[slot])


# ---------------------------------------------------------------- compute


def for_each_tile(refs, tile_type, fn, carry):
  """Calls `carry = fn(i, tile, carry)` for the announced tiles."""

  def run(state):
    i, carry, _ = state
    carry = fn(i, read_tile(refs, tile_type, i), carry)
    _release_tile(refs, i)
    return i + 1, carry, _is_tile(refs, i + 1)

  zero = jnp.int32(0)
  i, carry, _ = lax.while_loop(
    lambda state: state[-1], run, (zero, carry, _is_tile(refs, zero))
  )
  _release_tile(refs, i)
  return carry


def read_tile(refs, tile_type, i):
  """Returns the i-th tile; its slot is released when fn returns."""
  slot = lax.rem(i, TILE_SLOTS)
  fields = range(len(tile_type._fields))
  return tile_type(*(refs.tiles_smem[slot, j] for j in fields))


def _is_tile(refs, i):
  """Waits until tile i is announced. False: it is the end."""
  slot = lax.rem(i, TILE_SLOTS)
  plgpu.barrier_wait(refs.tiles_full.at[slot])
  return refs.tiles_smem[slot, 0] != END


def _release_tile(refs, i):
  """Lets the tile, or the end, be overwritten, and what was loaded with it."""
  plgpu.barrier_arrive(refs.tiles_empty.at[lax.rem(i, TILE_SLOTS)])

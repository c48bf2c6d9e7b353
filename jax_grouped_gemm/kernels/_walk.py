"""The order in which a CTA visits the tiles of an M-grouped GEMM.

Group sizes are read where the tiles are made, inside the kernel, so that a call
is one launch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import TILE_SLOTS, WGMMA_M, Config
from jax_grouped_gemm.kernels import _pipeline
from jax_grouped_gemm.kernels._pipeline import Ref

ROW_ALIGN = 8  # TMA addresses rows of swizzled SMEM tiles in groups of 8.
END = -1  # instead of a tile's group: no tile follows.


class Tile(NamedTuple):
  """What one CTA computes at a time."""

  group: jax.Array  # index in rhs; END: no tile, the end
  ni: jax.Array
  row: jax.Array  # first row loaded, a multiple of 8
  offset: jax.Array  # rows of other groups before the tile's own
  size: jax.Array  # rows of its own


class Group(NamedTuple):
  """Where the walk over the groups is. Rows of no group are a last group."""

  index: jax.Array  # in group_sizes; len(group_sizes): rows of no group
  start: jax.Array  # first row
  end: jax.Array  # last row + 1
  rows: jax.Array  # rows before it, of groups that the walk is for
  row_tiles: jax.Array  # tiles of those
  first_tile: jax.Array  # cluster tiles of those, all columns


class Walk:
  """The tiles of this CTA, in the order of the groups.

  A cluster's tiles only move forward, so one walk over the groups finds them
  all. They share either rows or, if multicast is "rhs", columns: then they are
  neighbouring row tiles, of two groups where one ends between them.
  """

  def __init__(
    self, group_sizes: Ref, group_offset: Ref, shape, config: Config, in_rhs
  ):
    """Of the groups that rhs holds, or of all other rows; shape: (m, n, g)."""
    self.config, self.in_rhs = config, in_rhs
    self.group_sizes, self.group_offset = group_sizes, group_offset
    self.num_groups = group_sizes.shape[0]
    self.m, n, self.rhs_groups = shape
    self.rows = config.cluster if config.multicast == "rhs" else 1
    self.cols = config.cluster // self.rows
    self.col_clusters = pl.cdiv(n, config.tile_n * self.cols)

  def group(self, index, start, rows, row_tiles, first_tile) -> Group:
    """Group sizes are data: whatever they hold, end is within [start, m]."""
    size = self.group_sizes[jnp.minimum(index, self.num_groups - 1)]
    size = jnp.clip(size, 0, self.m - start)
    size = lax.select(index < self.num_groups, size, self.m - start)
    return Group(index, start, start + size, rows, row_tiles, first_tile)

  def first_group(self, index) -> Group:
    zero = jnp.int32(0)
    return self.group(index, zero, zero, zero, zero)

  def is_left(self, group: Group):
    """False after the last group, the rows of no group."""
    return group.index <= self.num_groups

  def rhs_index(self, group: Group):
    return group.index - self.group_offset[0]

  def size(self, group: Group):
    """Rows of the group; 0 if the walk is not for it."""
    index = self.rhs_index(group)
    in_rhs = (0 <= index) & (index < self.rhs_groups)
    in_rhs &= group.index < self.num_groups
    return lax.select(in_rhs == self.in_rhs, group.end - group.start, 0)

  def row_tiles(self, group: Group):
    rows = group.end - self.first_row(group)
    return lax.select(
      self.size(group) > 0, pl.cdiv(rows, self.config.tile_m), 0
    )

  def first_row(self, group: Group):
    """TMA starts at whole 8 rows: up to 7 rows of other groups come along."""
    return lax.div(group.start, ROW_ALIGN) * ROW_ALIGN

  def row_clusters(self, group: Group):
    """Clusters of row tiles whose first one is the group's."""
    end = pl.cdiv(group.row_tiles + self.row_tiles(group), self.rows)
    return end - pl.cdiv(group.row_tiles, self.rows)

  def next_tile(self, group: Group):
    return group.first_tile + self.row_clusters(group) * self.col_clusters

  def next_group(self, group: Group) -> Group:
    return self.group(
      group.index + 1,
      group.end,
      group.rows + self.size(group),
      group.row_tiles + self.row_tiles(group),
      self.next_tile(group),
    )

  def find_group(self, tile, group: Group) -> Group:
    """Walks on to the group of the cluster's tile, or past all groups."""
    return lax.while_loop(
      lambda group: self.is_left(group) & (tile >= self.next_tile(group)),
      self.next_group,
      group,
    )

  def neighbour(self, group: Group) -> Group:
    """Walks on to the next group with tiles, or past all groups."""
    return lax.while_loop(
      lambda group: self.is_left(group) & (self.row_tiles(group) == 0),
      self.next_group,
      self.next_group(group),
    )

  def tile(self, tile, group: Group) -> tuple[Tile, jax.Array]:
    """Returns this CTA's tile, and whether the cluster's are of one group.

    A group's tiles are visited in strips of raster_width clusters of columns.
    """
    shape = (self.row_clusters(group), self.col_clusters)
    mi, ni = plgpu.planar_snake(
      tile - group.first_tile, shape, 1, self.config.raster_width
    )
    cta = lax.axis_index("cta")
    # The group's first tile may be in a cluster with the one before it.
    mi = mi * self.rows + lax.rem(group.row_tiles, self.rows)
    one_group = mi + self.rows <= self.row_tiles(group)
    if self.rows > 1:
      is_neighbour = mi + cta >= self.row_tiles(group)
      group = lax.cond(is_neighbour, self.neighbour, lambda x: x, group)
      mi = lax.select(is_neighbour, 0, mi + cta)
    if self.cols > 1:
      ni = ni * self.cols + cta
    row = self.first_row(group) + mi * self.config.tile_m
    offset = jnp.maximum(group.start - row, 0)
    size = jnp.minimum(group.end - row, self.config.tile_m) - offset
    # Without a neighbour: any rows, none of them stored.
    left = self.is_left(group)
    index = lax.select(left & self.in_rhs, self.rhs_index(group), 0)
    return Tile(index, ni, row, offset, lax.select(left, size, 0)), one_group


# ---------------------------------------------------------------- queue


def load_tiles(refs, config: Config, k_iters: int, load_tile):
  """Announces this CTA's tiles and loads them. Returns the slots it filled.

  First those of groups that rhs holds, by load_tile(i, tile, one_group,
  k_iters, step), which returns the step after the tile. Then those of other
  rows, which are zeros. Each followed by an end.
  """
  shape = (*refs.out_gmem.shape, refs.rhs_gmem.shape[0])
  walk = functools.partial(
    Walk, refs.group_sizes_gmem, refs.group_offset_gmem, shape, config
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
  # Spares a second walk if there are no other rows.
  index = lax.select(end.rows < of_others.m, zero, end.index)
  i, *_ = load_tiles_of(of_others, of_others.first_group(index), i, zero)
  _pipeline.drain(refs.tiles_empty, TILE_SLOTS, i)
  return step


def for_each_tile(refs, fn, i, step):
  """Calls `step = fn(i, tile, step)` for the tiles announced up to an end.

  Returns the index after the end.
  """

  def run(state):
    i, step, _ = state
    step = fn(i, read_tile(refs, i), step)
    release_tile(refs, i)
    return i + 1, step, is_tile(refs, i + 1)

  state = i, step, is_tile(refs, i)
  i, *_ = lax.while_loop(lambda state: state[-1], run, state)
  release_tile(refs, i)
  return i + 1


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

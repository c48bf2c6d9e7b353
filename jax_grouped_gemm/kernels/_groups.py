"""The order in which a CTA visits the tiles of an M-grouped GEMM.

Group sizes are read where the tiles are made, inside the kernel, so that a call
is one launch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import ROW_ALIGN, WGMMA_M, Config
from jax_grouped_gemm.kernels._pipeline import Ref
from jax_grouped_gemm.schedule import Masked

# Loads that do not wait for one another: a load takes some 40 cycles.
_SIZES_AT_A_TIME = 8


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
    self.rows, self.cols = config.cluster_shape
    self.col_clusters = pl.cdiv(n, config.tile_n * self.cols)

  def group(self, index, start, rows, row_tiles, first_tile) -> Group:
    """Group sizes are data: whatever they hold, end is within [start, m]."""
    size = jnp.clip(self.stored_size(index), 0, self.m - start)
    size = lax.select(index < self.num_groups, size, self.m - start)
    return Group(index, start, start + size, rows, row_tiles, first_tile)

  def stored_size(self, index):
    return self.group_sizes[jnp.minimum(index, self.num_groups - 1)]

  def skip_empty(self, index):
    """Returns the next index, from this one on, of a group with rows.

    The short way past empty groups, of which decoding has many.
    """

    def skip(index):
      steps, are_empty = jnp.int32(1), True
      for i in range(1, _SIZES_AT_A_TIME + 1):
        are_empty &= self.stored_size(index + i) <= 0
        steps += are_empty.astype(jnp.int32)
      return index + steps

    end = jnp.maximum(index, self.num_groups)
    index = lax.while_loop(
      lambda i: (i < self.num_groups) & (self.stored_size(i) <= 0), skip, index
    )
    return jnp.minimum(index, end)

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

  def rows_of(self, mi, group: Group):
    """Returns the first row of the group's mi-th tile, and the last one + 1.

    A group's tiles are of as many warpgroups each as they can be: of 4, with 3
    in a CTA, 2 and 2. A warpgroup alone leaves the tensor cores idle while it
    promotes.
    """
    first, unit = self.first_row(group), min(WGMMA_M, self.config.tile_m)
    units = pl.cdiv(group.end - first, unit)
    tiles = jnp.maximum(self.row_tiles(group), 1)
    start, end = (lax.div(i * units, tiles) for i in (mi, mi + 1))
    return first + start * unit, first + end * unit

  def row_clusters(self, group: Group):
    """Clusters of row tiles whose first one is the group's."""
    end = pl.cdiv(group.row_tiles + self.row_tiles(group), self.rows)
    return end - pl.cdiv(group.row_tiles, self.rows)

  def next_tile(self, group: Group):
    return group.first_tile + self.row_clusters(group) * self.col_clusters

  def next_group(self, group: Group) -> Group:
    return self.group(
      self.skip_empty(group.index + 1),
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
    # Past all groups there are none: LLVM may take it that nobody divides by
    # zero, so that nobody gets there, and a kernel did not end for that.
    row_clusters = jnp.maximum(self.row_clusters(group), 1)
    shape = (row_clusters, self.col_clusters)
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
    row, end = self.rows_of(mi, group)
    offset = jnp.maximum(group.start - row, 0)
    size = jnp.minimum(group.end, end) - row - offset
    # Without a neighbour: any rows, none of them stored.
    left = self.is_left(group)
    index = lax.select(left & self.in_rhs, self.rhs_index(group), 0)
    return Tile(index, ni, row, offset, lax.select(left, size, 0)), one_group


class MaskedWalk(Walk):
  """The same where each group has rows of its own, the first of them in use.

  Of the rows in use, or of the others.
  """

  def __init__(self, *args, masked: Masked, **kwargs):
    super().__init__(*args, **kwargs)
    self.masked = masked

  def group(self, index, start, rows, row_tiles, first_tile) -> Group:
    """Group sizes are data: whatever they hold, the rows are the group's."""
    del start
    is_group = index < self.num_groups
    start = jnp.minimum(index, self.num_groups) * self.masked.rows
    end = start + lax.select(is_group, self.masked.rows, 0)
    size = jnp.clip(self.stored_size(index), 0, self.masked.max_m)
    used = start + lax.select(is_group, size, 0)
    start, end = (start, used) if self.in_rhs else (used, end)
    return Group(index, start, end, rows, row_tiles, first_tile)

  def size(self, group: Group):
    """Rows of the group that the walk is for."""
    return group.end - group.start

  def skip_empty(self, index):
    """All rows of an empty group are others."""
    return super().skip_empty(index) if self.in_rhs else index

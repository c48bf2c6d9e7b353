"""M-grouped FP8 GEMM with block scales for Hopper.

    out[r, j] = sum_kb (lhs[r, kb] @ rhs[g, j, kb]) * lhs_scales[r, kb]
                       * rhs_scales[g, j // 128, kb]          r in group g

kb runs over slices of 128 elements of k. Rows of no group are zero. lhs (m, k),
rhs (g, n, k) and out (m, n) are row-major; groups start at any row.

Warpgroups of one CTA, over num_stages slots of SMEM:
  wg 0, 1  _compute_tile | wait full  | wgmma, promote | arrive empty | store
  wg 2     _load_tile    | wait empty | TMA lhs, rhs, lhs_scales -> full
The CTAs of a cluster work on neighbouring columns of one row tile: each loads
half of the lhs tile for both.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_grouped_gemm.config import (
  COMPUTE_WGS,
  SCALE_BLOCK,
  WGMMA_M,
  Config,
)
from jax_grouped_gemm.kernels import _pipeline
from jax_grouped_gemm.kernels._pipeline import Ref

_ROW_ALIGN = 8  # TMA addresses rows of swizzled SMEM tiles in groups of 8.
_SLICE_N = 64  # columns that surely share one rhs scale, for any tile_n.
_TILE_SLOTS = 2  # tiles announced to the compute warpgroups.
_END = -1  # instead of a tile's group: no tile follows.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  lhs_gmem: Ref  # (m, k) f8
  lhs_scales_gmem: Ref  # (k/128, m) f32
  rhs_gmem: Ref  # (g, n, k) f8
  rhs_scales_gmem: Ref  # (g, n/128, k/128) f32
  group_sizes_gmem: Ref  # (g_all,) i32
  group_offset_gmem: Ref  # (1,) i32: of group_sizes, the first that rhs holds
  out_gmem: Ref  # (m, n) bf16 or f32
  lhs_smem: Ref  # (stages, tile_m, 128) f8
  rhs_smem: Ref  # (stages, tile_n, 128) f8
  lhs_scales_smem: Ref  # (stages, tile_m) f32
  out_smem: Ref  # (wg, slices, 64, slice_n): _pipeline.out_smem
  full: Ref  # (stages,) 3 arrivals: lhs, rhs, lhs_scales
  empty: Ref  # (stages,) one arrival per compute warpgroup of the cluster
  turn: Ref  # (stages,): see _pipeline.accumulate
  rhs_scales_smem: Ref  # (_TILE_SLOTS, blocks, k/128) f32: of a tile's columns
  rhs_scales_full: Ref  # (_TILE_SLOTS,) one arrival
  tiles_smem: Ref  # (_TILE_SLOTS, fields) i32: tiles on their way to compute
  tiles_full: Ref  # (_TILE_SLOTS,) one arrival
  tiles_empty: Ref  # (_TILE_SLOTS,) one arrival per compute warpgroup


class _Tile(NamedTuple):
  """What one CTA computes at a time."""

  group: jax.Array  # index in rhs; _END: no tile, the end
  ni: jax.Array
  row: jax.Array  # first row loaded, a multiple of 8
  offset: jax.Array  # rows of other groups before the tile's own
  size: jax.Array  # rows of its own


class _Group(NamedTuple):
  """Where the walk over the groups is. Rows of no group are a last group."""

  index: jax.Array  # in group_sizes; len(group_sizes): rows of no group
  start: jax.Array  # first row
  end: jax.Array  # last row + 1
  rows: jax.Array  # rows before it, of groups that the walk is for
  row_tiles: jax.Array  # tiles of those
  first_tile: jax.Array  # cluster tiles of those, all columns


# ---------------------------------------------------------------- schedule


class _Walk:
  """The tiles of this CTA, in the order of the groups.

  A cluster's tiles only move forward, so one walk over the groups finds them
  all. They share either rows or, if multicast is "rhs", columns: then they are
  neighbouring row tiles, of two groups where one ends between them.
  """

  def __init__(self, refs: _Refs, config: Config, in_rhs: bool):
    """Of the groups that rhs holds, or of all other rows."""
    self.refs, self.config, self.in_rhs = refs, config, in_rhs
    self.num_groups = refs.group_sizes_gmem.shape[0]
    self.m, n = refs.out_gmem.shape
    self.rows = config.cluster if config.multicast == "rhs" else 1
    self.cols = config.cluster // self.rows
    self.col_clusters = pl.cdiv(n, config.tile_n * self.cols)

  def group(self, index, start, rows, row_tiles, first_tile) -> _Group:
    """Group sizes are data: whatever they hold, end is within [start, m]."""
    size = self.refs.group_sizes_gmem[jnp.minimum(index, self.num_groups - 1)]
    size = jnp.clip(size, 0, self.m - start)
    size = lax.select(index < self.num_groups, size, self.m - start)
    return _Group(index, start, start + size, rows, row_tiles, first_tile)

  def first_group(self, index) -> _Group:
    zero = jnp.int32(0)
    return self.group(index, zero, zero, zero, zero)

  def is_left(self, group: _Group):
    """False after the last group, the rows of no group."""
    return group.index <= self.num_groups

  def rhs_index(self, group: _Group):
    return group.index - self.refs.group_offset_gmem[0]

  def size(self, group: _Group):
    """Rows of the group; 0 if the walk is not for it."""
    index = self.rhs_index(group)
    in_rhs = (0 <= index) & (index < self.refs.rhs_gmem.shape[0])
    in_rhs &= group.index < self.num_groups
    return lax.select(in_rhs == self.in_rhs, group.end - group.start, 0)

  def row_tiles(self, group: _Group):
    rows = group.end - self.first_row(group)
    return lax.select(
      self.size(group) > 0, pl.cdiv(rows, self.config.tile_m), 0
    )

  def first_row(self, group: _Group):
    """TMA starts at whole 8 rows: up to 7 rows of other groups come along."""
    return lax.div(group.start, _ROW_ALIGN) * _ROW_ALIGN

  def row_clusters(self, group: _Group):
    """Clusters of row tiles whose first one is the group's."""
    end = pl.cdiv(group.row_tiles + self.row_tiles(group), self.rows)
    return end - pl.cdiv(group.row_tiles, self.rows)

  def next_tile(self, group: _Group):
    return group.first_tile + self.row_clusters(group) * self.col_clusters

  def next_group(self, group: _Group) -> _Group:
    return self.group(
      group.index + 1,
      group.end,
      group.rows + self.size(group),
      group.row_tiles + self.row_tiles(group),
      self.next_tile(group),
    )

  def find_group(self, tile, group: _Group) -> _Group:
    """Walks on to the group of the cluster's tile, or past all groups."""
    return lax.while_loop(
      lambda group: self.is_left(group) & (tile >= self.next_tile(group)),
      self.next_group,
      group,
    )

  def neighbour(self, group: _Group) -> _Group:
    """Walks on to the next group with tiles, or past all groups."""
    return lax.while_loop(
      lambda group: self.is_left(group) & (self.row_tiles(group) == 0),
      self.next_group,
      self.next_group(group),
    )

  def tile(self, tile, group: _Group) -> tuple[_Tile, jax.Array]:
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
    return _Tile(index, ni, row, offset, lax.select(left, size, 0)), one_group


# ---------------------------------------------------------------- load


def _load_tiles(refs: _Refs, config: Config):
  """Announces this CTA's tiles and loads them. Returns the slots it filled.

  First those of groups that rhs holds, then those of other rows, which are
  zeros, each followed by an end.
  """
  zero = jnp.int32(0)
  walk = _Walk(refs, config, in_rhs=True)
  i, step, last = _load_walk(refs, config, walk, zero, zero, walk.first_group(zero))
  walk = _Walk(refs, config, in_rhs=False)
  # Spares a second walk if there are no other rows.
  index = lax.select(last.rows < walk.m, zero, last.index)
  start = walk.first_group(index)
  i, step, _ = _load_walk(refs, config, walk, i, step, start)
  _pipeline.drain(refs.tiles_empty, _TILE_SLOTS, i)
  return step


def _load_walk(refs: _Refs, config: Config, walk: _Walk, first, step, start):
  """Returns (tiles announced, slots filled, the end of the walk)."""

  def load_next(state):
    i, step, group, _ = state
    index = lax.axis_index("sm") + (i - first) * lax.axis_size("sm")
    group = walk.find_group(index, group)
    left = walk.is_left(group)
    tile, one_group = walk.tile(index, group)
    end = tile._replace(group=jnp.int32(_END))
    _announce(refs, i, jax.tree.map(functools.partial(lax.select, left), tile, end))
    if walk.in_rhs:
      k_iters = lax.select(left, _k_iters(refs), 0)
      step = _load_tile(refs, config, i, tile, one_group, k_iters, step)
    return i + 1, step, group, left

  i, step, last, _ = lax.while_loop(
    lambda state: state[-1], load_next, (first, step, start, True)
  )
  return i, step, last


def _announce(refs: _Refs, i, tile: _Tile):
  slot = lax.rem(i, _TILE_SLOTS)

  @pl.when(i >= _TILE_SLOTS)
  def wait_empty():
    plgpu.barrier_wait(refs.tiles_empty.at[slot])
    plgpu.commit_smem()  # Orders reads of rhs_scales_smem before TMA writes.

  for field, value in enumerate(tile):
    refs.tiles_smem[slot, field] = value
  plgpu.barrier_arrive(refs.tiles_full.at[slot])


def _k_iters(refs: _Refs) -> int:
  return refs.lhs_gmem.shape[1] // SCALE_BLOCK


def _load_tile(refs, config: Config, i, tile: _Tile, one_group, k_iters, step):
  """Loads the k slices of one tile into consecutive slots."""
  @pl.when(k_iters > 0)
  def load_rhs_scales():
    slot = lax.rem(i, _TILE_SLOTS)
    _, blocks, k_blocks = refs.rhs_scales_smem.shape
    first_block = lax.div(tile.ni * config.tile_n, SCALE_BLOCK)
    # Columns beyond those of rhs_scales, and blocks, are zeros.
    scales = refs.rhs_scales_gmem.at[
      tile.group, pl.ds(first_block, blocks), pl.ds(0, k_blocks)
    ]
    full = refs.rhs_scales_full.at[slot]
    plgpu.copy_gmem_to_smem(scales, refs.rhs_scales_smem.at[slot], full)

  rows = pl.ds(pl.multiple_of(tile.row, _ROW_ALIGN), config.tile_m)
  cols = pl.ds(tile.ni * config.tile_n, config.tile_n)
  multicast = config.multicast if config.cluster > 1 else None

  def load_slice(ki, slot):
    ks = pl.ds(ki * SCALE_BLOCK, SCALE_BLOCK)
    full = refs.full.at[slot]
    rhs = refs.rhs_gmem.at[tile.group, cols, ks]
    lhs = refs.lhs_gmem.at[rows, ks]
    scales = refs.lhs_scales_gmem.at[ki, rows]

    def copy(src, dst, is_shared=False):
      axes = "cta" if is_shared else None
      plgpu.copy_gmem_to_smem(src, dst.at[slot], full, collective_axes=axes)

    copy(lhs, refs.lhs_smem, multicast == "lhs")
    if multicast == "rhs":
      pl.when(one_group)(lambda: copy(rhs, refs.rhs_smem, True))
      pl.when(~one_group)(lambda: copy(rhs, refs.rhs_smem))
    else:
      copy(rhs, refs.rhs_smem)
    copy(scales, refs.lhs_scales_smem)

  return _pipeline.load_slices(
    refs.empty, config.num_stages, k_iters, step, load_slice
  )


# ---------------------------------------------------------------- compute


def _read_tile(refs: _Refs, i) -> _Tile:
  slot = lax.rem(i, _TILE_SLOTS)
  return _Tile(*(refs.tiles_smem[slot, j] for j in range(len(_Tile._fields))))


def _is_tile(refs: _Refs, i):
  """Waits until tile i is announced. False: it is the end."""
  plgpu.barrier_wait(refs.tiles_full.at[lax.rem(i, _TILE_SLOTS)])
  return _read_tile(refs, i).group != _END


def _release_tile(refs: _Refs, i):
  plgpu.barrier_arrive(refs.tiles_empty.at[lax.rem(i, _TILE_SLOTS)])


def _compute_tiles(refs: _Refs, config: Config, interpret: bool):
  """Computes the announced tiles, then stores the announced tiles of zeros."""

  def compute_tile(state):
    i, step, _ = state
    sums = _accumulate_tile(refs, config, i, step, interpret)
    _stage(refs, sums)
    return store_tile((i, step + _k_iters(refs), True))

  def store_tile(state):
    i, step, _ = state
    _store_rows(refs, config, _read_tile(refs, i))
    _release_tile(refs, i)
    return i + 1, step, _is_tile(refs, i + 1)

  def for_each_tile(fn, i):
    state = (i, jnp.int32(0), _is_tile(refs, i))
    i, *_ = lax.while_loop(lambda state: state[-1], fn, state)
    _release_tile(refs, i)
    return i + 1

  i = for_each_tile(compute_tile, jnp.int32(0))
  zeros = _pipeline.wgmma_zeros((WGMMA_M, _SLICE_N))
  _stage(refs, [zeros] * (config.tile_n // _SLICE_N))
  for_each_tile(store_tile, i)


def _load_rhs_scales(refs: _Refs, config: Config, i, ni, ki):
  """Returns the rhs scale of every 64 columns of tile i's k slice."""
  slot = lax.rem(i, _TILE_SLOTS)
  blocks = [
    refs.rhs_scales_smem[slot, b, ki]
    for b in range(refs.rhs_scales_smem.shape[1])
  ]
  slices = config.tile_n // _SLICE_N
  if config.tile_n % SCALE_BLOCK == 0 or len(blocks) == 1:
    return [blocks[j * _SLICE_N // SCALE_BLOCK] for j in range(slices)]
  # A tile with an odd number of 64-column slices may start amid a block.
  starts_block = lax.rem(ni * config.tile_n, SCALE_BLOCK) == 0
  return [
    lax.select(starts_block, blocks[j // 2], blocks[(j + 1) // 2])
    for j in range(slices)
  ]


def _accumulate_tile(refs: _Refs, config: Config, i, step, interpret):
  """Returns the warpgroup's (64, tile_n) of out, as slices of 64 columns."""
  shape = (WGMMA_M, _SLICE_N)
  columns = [slice(c, c + _SLICE_N) for c in range(0, config.tile_n, _SLICE_N)]

  plgpu.barrier_wait(refs.rhs_scales_full.at[lax.rem(i, _TILE_SLOTS)])
  ni = _read_tile(refs, i).ni

  def load_scales(slot, ki):
    lhs_scales = _pipeline.load_row_scales(refs.lhs_scales_smem, slot)
    rhs_scales = _load_rhs_scales(refs, config, i, ni, ki)
    return [lhs_scales * rhs_scale for rhs_scale in rhs_scales]

  def promote(sums, products, scales):
    return [
      acc + products[:, cols] * lax.broadcast_in_dim(scale, shape, (0,))
      for acc, cols, scale in zip(sums, columns, scales, strict=True)
    ]

  return _pipeline.accumulate(
    refs,
    config.tile_n,
    _k_iters(refs),
    step,
    load_scales=load_scales,
    promote=promote,
    init=[_pipeline.wgmma_zeros(shape) for _ in columns],
    interpret=interpret,
  )


def _stage(refs: _Refs, slices):
  """Writes the warpgroup's slices of 64 columns to out_smem."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for j in range(refs.out_smem.shape[1]):
    col = j * refs.out_smem.shape[3]
    value = slices[col // _SLICE_N]
    value = value[:, col % _SLICE_N :][:, : refs.out_smem.shape[3]]
    value = value.astype(refs.out_gmem.dtype)
    refs.out_smem[lax.axis_index("wg"), j] = value
  plgpu.commit_smem()


def _store_rows(refs: _Refs, config: Config, tile: _Tile):
  """Stores the staged rows that belong to the tile.

  TMA needs static sizes, so `count` rows go out as the powers of two of its
  binary form, e.g. 5 rows as 4 + 1.
  """
  wg = lax.axis_index("wg")
  first = tile.offset - wg * WGMMA_M
  offset = jnp.clip(first, 0, WGMMA_M)
  count = jnp.clip(first + tile.size, 0, WGMMA_M) - offset
  row = tile.row + wg * WGMMA_M
  _, slices, _, slice_n = refs.out_smem.shape

  def store(offset, num_rows):
    rows = pl.ds(row + offset, num_rows)
    for j in range(slices):
      _pipeline.store_slice(
        refs.out_smem.at[wg, j, pl.ds(offset, num_rows)],
        refs.out_gmem,
        rows,
        tile.ni * config.tile_n + j * slice_n,
      )

  pl.when(count == WGMMA_M)(lambda: store(0, WGMMA_M))

  @pl.when(count < WGMMA_M)
  def store_part():
    first, num_rows = offset, WGMMA_M // 2
    while num_rows > 0:
      pl.when((count & num_rows) != 0)(
        functools.partial(store, first, num_rows)
      )
      first += count & num_rows
      num_rows //= 2

  plgpu.commit_smem_to_gmem_group()


# ---------------------------------------------------------------- launch


def m_grouped_gemm(
  lhs: Float[Array, "m_stored k_stored"],
  lhs_scales: Float32[Array, "m k/128"],
  rhs: Float[Array, "g n_stored k_stored"],
  rhs_scales: Float32[Array, "g n/128 k/128"],
  group_sizes: Int32[Array, "g_all"],
  group_offset: Int32[Array, "1"] | None,
  *,
  m: int,
  n: int,
  out_dtype: DTypeLike,
  config: Config,
  interpret: bool = False,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[group of r - group_offset].T, else 0.

  k_stored is a multiple of 128, m_stored and n_stored are multiples of 8.
  """
  if group_offset is None:
    group_offset = jnp.zeros((1,), jnp.int32)
  # TMA reads the scales of a tile's rows as one line, of whole 16 bytes.
  lhs_scales = jnp.pad(lhs_scales, ((0, -m % _ROW_ALIGN), (0, 0))).T
  # TMA wants rows of whole 16 bytes.
  k_blocks = rhs_scales.shape[2]
  rhs_scales = jnp.pad(rhs_scales, ((0, 0), (0, 0), (0, -k_blocks % 4)))
  # A tile has columns of at most two scale blocks, if rhs has as many.
  blocks = min(pl.cdiv(config.tile_n, SCALE_BLOCK), rhs_scales.shape[1])
  stages, tile_m, tile_n = config.num_stages, config.tile_m, config.tile_n
  # A staged row has 128 bytes, so that TMA may start at any row, and out has
  # whole ones: other n cost a copy of out.
  slice_n = _pipeline.SWIZZLE_BYTES // jnp.dtype(out_dtype).itemsize

  out = _pipeline.launch(
    functools.partial(_load_tiles, config=config),
    functools.partial(_compute_tiles, config=config, interpret=interpret),
    name="m_grouped_gemm_sm90",
    config=config,
    interpret=interpret,
    refs_type=_Refs,
    out_type=jax.ShapeDtypeStruct((m, n + -n % slice_n), out_dtype),
    scratch_types=dict(
      lhs_smem=plgpu.SMEM((stages, tile_m, SCALE_BLOCK), lhs.dtype),
      rhs_smem=plgpu.SMEM((stages, tile_n, SCALE_BLOCK), rhs.dtype),
      lhs_scales_smem=plgpu.SMEM((stages, tile_m), jnp.float32),
      out_smem=_pipeline.out_smem(tile_n, slice_n, out_dtype),
      full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      empty=_pipeline.empty_barriers(config),
      turn=_pipeline.turn_barriers(config),
      rhs_scales_smem=plgpu.SMEM(
        (_TILE_SLOTS, blocks, k_blocks + -k_blocks % 32), jnp.float32
      ),
      rhs_scales_full=plgpu.Barrier(num_barriers=_TILE_SLOTS),
      tiles_smem=plgpu.SMEM((_TILE_SLOTS, len(_Tile._fields)), jnp.int32),
      tiles_full=plgpu.Barrier(num_barriers=_TILE_SLOTS),
      tiles_empty=plgpu.Barrier(
        num_arrivals=COMPUTE_WGS, num_barriers=_TILE_SLOTS
      ),
    ),
  )(lhs, lhs_scales, rhs, rhs_scales, group_sizes, group_offset.reshape(1))
  return out[:, :n]

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
  tiles_smem: Ref  # (_TILE_SLOTS, fields) i32: tiles on their way to compute
  tiles_full: Ref  # (_TILE_SLOTS,) one arrival
  tiles_empty: Ref  # (_TILE_SLOTS,) one arrival per compute warpgroup


class _Tile(NamedTuple):
  """What one CTA computes at a time."""

  group: jax.Array  # index in rhs
  ni: jax.Array
  row: jax.Array  # first row loaded, a multiple of 8
  offset: jax.Array  # rows of other groups before the tile's own
  size: jax.Array  # rows of its own; 0: no tile, the end


class _Group(NamedTuple):
  """Where the walk over the groups is. Rows of no group are a last group."""

  index: jax.Array  # in group_sizes; len(group_sizes): rows of no group
  start: jax.Array  # first row
  end: jax.Array  # last row + 1
  first_tile: jax.Array  # tiles before it, counted in clusters
  rows: jax.Array  # rows of those


def _make_group(refs: _Refs, index, start, first_tile, rows) -> _Group:
  """Group sizes are data: whatever they hold, end is within [start, m]."""
  groups, m = refs.group_sizes_gmem.shape[0], refs.out_gmem.shape[0]
  size = refs.group_sizes_gmem[jnp.minimum(index, groups - 1)]
  size = lax.select(index < groups, jnp.clip(size, 0, m - start), m - start)
  return _Group(index, start, start + size, first_tile, rows)


def _is_left(refs: _Refs, group: _Group):
  """False after the last group, the rows of no group."""
  return group.index <= refs.group_sizes_gmem.shape[0]


def _rhs_index(refs: _Refs, group: _Group):
  """Returns the group's index in rhs, and whether it has one."""
  index = group.index - refs.group_offset_gmem[0]
  in_rhs = (0 <= index) & (index < refs.rhs_gmem.shape[0])
  return index, in_rhs & (group.index < refs.group_sizes_gmem.shape[0])


def _first_loaded_row(group: _Group):
  """TMA starts at whole 8 rows: up to 7 rows of other groups come along."""
  return lax.div(group.start, _ROW_ALIGN) * _ROW_ALIGN


def _tiles_shape(refs: _Refs, config: Config, group: _Group, in_rhs: bool):
  """Tiles of a group: of rows, and of columns counted in clusters."""
  row_tiles = pl.cdiv(group.end - _first_loaded_row(group), config.tile_m)
  wanted = (_rhs_index(refs, group)[1] == in_rhs) & (group.end > group.start)
  col_clusters = pl.cdiv(refs.out_gmem.shape[1], config.tile_n * config.cluster)
  return lax.select(wanted, row_tiles, 0), col_clusters


def _find_group(refs: _Refs, config: Config, tile, group: _Group, in_rhs):
  """Walks on from `group` to the group of the tile, or past all groups."""

  def next_tile(group):
    row_tiles, col_clusters = _tiles_shape(refs, config, group, in_rhs)
    return group.first_tile + row_tiles * col_clusters

  def next_group(group):
    wanted = _rhs_index(refs, group)[1] == in_rhs
    rows = group.rows + lax.select(wanted, group.end - group.start, 0)
    return _make_group(refs, group.index + 1, group.end, next_tile(group), rows)

  return lax.while_loop(
    lambda group: _is_left(refs, group) & (tile >= next_tile(group)),
    next_group,
    group,
  )


def _load_tiles(refs: _Refs, config: Config):
  """Announces this CTA's tiles and loads them. Returns the slots it filled.

  First those of groups that rhs holds, then those of other rows, which are
  zeros, each ended by a tile of size 0.
  """
  zero = jnp.int32(0)
  start = _make_group(refs, zero, zero, zero, zero)
  i, step, last = _load_tiles_of(refs, config, True, zero, zero, start)
  # Spares a second walk if there are no other rows.
  index = lax.select(last.rows < refs.out_gmem.shape[0], zero, last.index)
  start = _make_group(refs, index, zero, zero, zero)
  i, step, _ = _load_tiles_of(refs, config, False, i, step, start)
  _pipeline.drain(refs.tiles_empty, _TILE_SLOTS, i)
  return step


def _load_tiles_of(refs: _Refs, config: Config, in_rhs: bool, first, step, start):
  """Returns (tiles announced, slots filled, the end of the walk).

  A group's tiles are visited in strips of raster_width clusters of columns. A
  CTA's tiles only move forward, so one walk over the groups finds them all.
  """

  def load_next(state):
    i, step, group, _ = state
    tile = lax.axis_index("sm") + (i - first) * lax.axis_size("sm")
    group = _find_group(refs, config, tile, group, in_rhs)
    left = _is_left(refs, group)
    shape = _tiles_shape(refs, config, group, in_rhs)
    mi, ni = plgpu.planar_snake(
      tile - group.first_tile, shape, 1, config.raster_width
    )
    ni = ni * config.cluster + lax.axis_index("cta")
    row = _first_loaded_row(group) + mi * config.tile_m
    offset = jnp.maximum(group.start - row, 0)
    size = jnp.minimum(group.end - row, config.tile_m) - offset
    rhs_index, _ = _rhs_index(refs, group)
    tile = _Tile(rhs_index, ni, row, offset, lax.select(left, size, 0))
    _announce(refs, i, tile)
    if in_rhs:
      k_iters = lax.select(left, _k_iters(refs), 0)
      step = _load_tile(refs, config, tile, k_iters, step)
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

  for field, value in enumerate(tile):
    refs.tiles_smem[slot, field] = value
  plgpu.barrier_arrive(refs.tiles_full.at[slot])


def _k_iters(refs: _Refs) -> int:
  return refs.lhs_gmem.shape[1] // SCALE_BLOCK


def _load_tile(refs: _Refs, config: Config, tile: _Tile, k_iters, step):
  """Loads the k slices of one tile into consecutive slots."""
  rows = pl.ds(pl.multiple_of(tile.row, _ROW_ALIGN), config.tile_m)
  cols = pl.ds(tile.ni * config.tile_n, config.tile_n)
  shared = "cta" if config.cluster > 1 else None

  def load_slice(ki, slot):
    ks = pl.ds(ki * SCALE_BLOCK, SCALE_BLOCK)
    full = refs.full.at[slot]
    copy = plgpu.copy_gmem_to_smem
    lhs = refs.lhs_gmem.at[rows, ks]
    copy(lhs, refs.lhs_smem.at[slot], full, collective_axes=shared)
    copy(refs.rhs_gmem.at[tile.group, cols, ks], refs.rhs_smem.at[slot], full)
    copy(refs.lhs_scales_gmem.at[ki, rows], refs.lhs_scales_smem.at[slot], full)

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
  return _read_tile(refs, i).size > 0


def _release_tile(refs: _Refs, i):
  plgpu.barrier_arrive(refs.tiles_empty.at[lax.rem(i, _TILE_SLOTS)])


def _compute_tiles(refs: _Refs, config: Config, interpret: bool):
  """Computes the announced tiles, then stores the announced tiles of zeros.

  A tile is stored while the first products of the next one run.
  """
  zeros = _pipeline.wgmma_zeros((WGMMA_M, _SLICE_N))
  zeros = [zeros] * (config.tile_n // _SLICE_N)

  def store_tile(i, sums):
    @pl.when(i >= 0)
    def store():
      _stage(refs, sums)
      _store_rows(refs, config, _read_tile(refs, i))
      _release_tile(refs, i)

  def compute_tile(state):
    i, step, sums, _ = state
    slot = lax.rem(step, config.num_stages)
    plgpu.barrier_wait(refs.full.at[slot])
    products = _pipeline.start_products(refs, config.tile_n, slot, interpret)
    store_tile(i - 1, sums)
    tile = _read_tile(refs, i)
    sums = _accumulate_tile(refs, config, tile, products, step, interpret)
    return i + 1, step + _k_iters(refs), sums, _is_tile(refs, i + 1)

  zero = jnp.int32(0)
  i, _, sums, _ = lax.while_loop(
    lambda state: state[-1],
    compute_tile,
    (zero, zero, zeros, _is_tile(refs, zero)),
  )
  store_tile(i - 1, sums)
  _release_tile(refs, i)

  def store_zeros(state):
    i, _ = state
    _store_rows(refs, config, _read_tile(refs, i))
    _release_tile(refs, i)
    return i + 1, _is_tile(refs, i + 1)

  _stage(refs, zeros)
  i, _ = lax.while_loop(
    lambda state: state[-1], store_zeros, (i + 1, _is_tile(refs, i + 1))
  )
  _release_tile(refs, i)


def _load_rhs_scales(refs: _Refs, config: Config, group, ni, ki):
  """Returns the rhs scale of every 64 columns of the tile's k slice."""
  num_blocks = refs.rhs_scales_gmem.shape[1]
  first_col = ni * config.tile_n
  first_block = lax.div(first_col, SCALE_BLOCK)
  # A tile with an odd number of 64-column slices may start amid a block.
  odd = config.tile_n % SCALE_BLOCK != 0
  blocks = [
    refs.rhs_scales_gmem[
      group, jnp.minimum(first_block + b, num_blocks - 1), ki
    ]
    for b in range(config.tile_n // SCALE_BLOCK + odd)
  ]
  starts_block = lax.rem(first_col, SCALE_BLOCK) == 0
  return [
    lax.select(starts_block, blocks[j // 2], blocks[(j + 1) // 2])
    if odd
    else blocks[j // 2]
    for j in range(config.tile_n // _SLICE_N)
  ]


def _accumulate_tile(refs, config: Config, tile: _Tile, products, step, interpret):
  """Returns the warpgroup's (64, tile_n) of out, as slices of 64 columns."""
  shape = (WGMMA_M, _SLICE_N)
  columns = [slice(c, c + _SLICE_N) for c in range(0, config.tile_n, _SLICE_N)]

  def load_scales(slot, ki):
    lhs_scales = _pipeline.load_row_scales(refs.lhs_scales_smem, slot)
    rhs_scales = _load_rhs_scales(refs, config, tile.group, tile.ni, ki)
    return [lhs_scales * rhs_scale for rhs_scale in rhs_scales]

  def promote(sums, products, scales):
    return [
      acc + products[:, cols] * lax.broadcast_in_dim(scale, shape, (0,))
      for acc, cols, scale in zip(sums, columns, scales, strict=True)
    ]

  return _pipeline.accumulate(
    refs,
    products,
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

  num_rows = WGMMA_M
  while num_rows > 0:
    pl.when((count & num_rows) != 0)(
      functools.partial(store, offset, num_rows)
    )
    offset = offset + (count & num_rows)
    num_rows //= 2


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
      tiles_smem=plgpu.SMEM((_TILE_SLOTS, len(_Tile._fields)), jnp.int32),
      tiles_full=plgpu.Barrier(num_barriers=_TILE_SLOTS),
      tiles_empty=plgpu.Barrier(
        num_arrivals=COMPUTE_WGS, num_barriers=_TILE_SLOTS
      ),
    ),
  )(lhs, lhs_scales, rhs, rhs_scales, group_sizes, group_offset.reshape(1))
  return out[:, :n]

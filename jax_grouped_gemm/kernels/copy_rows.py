"""Rows copied to several places for Hopper, by TMA alone.

    out[rows[t, i]] = x[t]        x (t, k), out (m, k), row-major

Each row is read once, however many copies there are. It is seen as (blocks,
cols), so that one TMA copy moves all of it, or 16 KB of it: TMA copies 256
elements at most along each axis. No element passes through registers.

Each warpgroup works for itself, on every n-th tile of (tile_rows, tile_blocks):
  wait full[slot] | slot -> rows of out | wait until the tile before is out
                                        | x -> the slot it was in
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32, Shaped

from jax_grouped_gemm.kernels import _tile_loop
from jax_grouped_gemm.kernels._pipeline import Ref

_WGS = 4  # warpgroups of a CTA.
_SLOTS = 3  # tiles of each of them.
_TILE_BYTES = 16384
_TILE_COPIES = 32  # at most: the numbers of their rows are in registers.
_MAX_BOX = 256  # elements that TMA copies along an axis.
_TMA_ALIGN = 16  # bytes


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  x_gmem: Ref  # (t, blocks, cols)
  rows_gmem: Ref  # (t in whole tiles * copies,) i32
  out_gmem: Ref  # (m, blocks, cols)
  x_smem: Ref  # (wg, slots, tile_rows, tile_blocks, cols)
  full: Ref  # (wg * slots,)


def _kernel(*operands, copies: int, m: int, interpret: bool, **scratch):
  refs = _Refs(*operands, **scratch)
  wg = lax.axis_index("wg")
  _, slots, tile_rows, tile_blocks, _ = refs.x_smem.shape
  parts = refs.x_gmem.shape[1] // tile_blocks
  num_tiles = refs.rows_gmem.shape[0] // (tile_rows * copies) * parts

  def place(tile):
    """Returns the tile's first row, and its blocks."""
    first_block = lax.rem(tile, parts) * tile_blocks
    return lax.div(tile, parts) * tile_rows, pl.ds(first_block, tile_blocks)

  def load(tile, slot):
    row, blocks = place(tile)
    plgpu.copy_gmem_to_smem(
      refs.x_gmem.at[pl.ds(row, tile_rows), blocks],
      refs.x_smem.at[wg, slot],
      refs.full.at[wg * slots + slot],
    )

  def store(tile, slot):
    row, blocks = place(tile)
    # All before the first copy, so that they are on their way together.
    targets = [
      refs.rows_gmem[row * copies + i] for i in range(tile_rows * copies)
    ]
    plgpu.barrier_wait(refs.full.at[wg * slots + slot])
    for i, target in enumerate(targets):

      @pl.when(target < m)
      def _(i=i, target=target):
        plgpu.copy_smem_to_gmem(
          refs.x_smem.at[wg, slot, pl.ds(i // copies, 1)],
          refs.out_gmem.at[pl.ds(target, 1), blocks],
          commit_group=False,
        )

    plgpu.commit_smem_to_gmem_group()

  count, tile = _tile_loop.turns(num_tiles)
  ahead = slots - 1
  for i in range(ahead):
    pl.when(i < count)(functools.partial(load, tile(i), i))

  def step(i, _):
    store(tile(i), lax.rem(i, slots))
    # The copies of the tile before have read their slot. The interpreter counts
    # copies, not groups, of which a tile has one, be it empty.
    plgpu.wait_smem_to_gmem(0 if interpret else 1, wait_read_only=True)
    then = i + ahead
    pl.when(then < count)(
      functools.partial(load, tile(then), lax.rem(then, slots))
    )
    return 0

  lax.fori_loop(0, count, step, 0)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


# ---------------------------------------------------------------- launch


def _box(k: int, itemsize: int) -> tuple[int, int] | None:
  """Returns (blocks of a tile, columns of a block): the most that TMA copies.

  None if there is no such division of k columns.
  """
  cols = [
    c
    for c in range(1, min(k, _MAX_BOX) + 1)
    if k % c == 0 and c * itemsize % _TMA_ALIGN == 0
  ]
  if not cols:
    return None
  blocks, most = k // cols[-1], _TILE_BYTES // (cols[-1] * itemsize)
  fits = [b for b in range(1, min(blocks, most) + 1) if blocks % b == 0]
  return fits[-1], cols[-1]


def supports(k: int, itemsize: int) -> bool:
  """Whether the kernel can copy rows of k elements: those of whole 16 bytes."""
  return _box(k, itemsize) is not None


def copy_rows(
  x: Shaped[Array, "t_stored k"],
  rows: Int32[Array, "t copies"],
  m: int,
  *,
  interpret: bool = False,
) -> Shaped[Array, "m k"]:
  """Returns out; what no copy goes to is left as it was in memory.

  A copy whose row is m or more goes nowhere. x may have more rows.
  """
  (t, copies), k = rows.shape, x.shape[1]
  tile_blocks, cols = _box(k, x.dtype.itemsize)
  blocks = k // cols
  tile_rows = _TILE_BYTES // (tile_blocks * cols * x.dtype.itemsize)
  tile_rows = max(1, min(tile_rows, _TILE_COPIES // copies, t))
  rows = jnp.pad(rows, ((0, -t % tile_rows), (0, 0)), constant_values=m)
  # Mosaic drops dimensions of size 1, and the rows' numbers with them.
  x = _tile_loop.at_least(x, 2, k).reshape(-1, blocks, cols)
  out = _tile_loop.launch(
    functools.partial(_kernel, copies=copies, m=m, interpret=interpret),
    out_type=jax.ShapeDtypeStruct((max(m, 2), blocks, cols), x.dtype),
    scratch_types=dict(
      x_smem=plgpu.SMEM((_WGS, _SLOTS, tile_rows, tile_blocks, cols), x.dtype),
      full=plgpu.Barrier(num_barriers=_WGS * _SLOTS),
    ),
    name="copy_rows_sm90",
    wgs=_WGS,
    num_tiles=rows.shape[0] // tile_rows * (blocks // tile_blocks),
    interpret=interpret,
  )(x, rows.reshape(-1))
  return out.reshape(-1, k)[:m]

"""Rows gathered for Hopper, by TMA alone.

    out[i] = x[index[i]]        x (t, k), out (m, k), row-major

A row is seen as (blocks, cols), so that one copy moves all of it, or 16 KB of
it: TMA copies 256 elements at most along each axis. No element passes through
registers.

Each warpgroup works for itself, on every n-th tile of (tile_rows, tile_blocks):
  wait full[slot] | slot -> out | wait until the tile before is out
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
_TILE_ROWS = 16  # at most: that many numbers of rows are in registers.
_MAX_BOX = 256  # elements that TMA copies along an axis.
_TMA_ALIGN = 16  # bytes


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  x_gmem: Ref  # (t, blocks, cols)
  index_gmem: Ref  # (m in whole tiles,) i32
  out_gmem: Ref  # (m, blocks, cols)
  x_smem: Ref  # (wg, slots, tile_rows, tile_blocks, cols)
  full: Ref  # (wg * slots,): an arrival per row


def _kernel(*operands, **scratch):
  refs = _Refs(*operands, **scratch)
  wg = lax.axis_index("wg")
  _, slots, tile_rows, tile_blocks, _ = refs.x_smem.shape
  parts = refs.x_gmem.shape[1] // tile_blocks
  num_tiles = refs.index_gmem.shape[0] // tile_rows * parts

  def place(tile):
    """Returns the tile's first row, and its blocks."""
    first_block = lax.rem(tile, parts) * tile_blocks
    return lax.div(tile, parts) * tile_rows, pl.ds(first_block, tile_blocks)

  def load(tile, slot):
    row, blocks = place(tile)
    # All before the first copy, so that they are on their way together.
    sources = [refs.index_gmem[row + i] for i in range(tile_rows)]
    for i, source in enumerate(sources):
      plgpu.copy_gmem_to_smem(
        refs.x_gmem.at[pl.ds(source, 1), blocks],
        refs.x_smem.at[wg, slot, pl.ds(i, 1)],
        refs.full.at[wg * slots + slot],
      )

  def store(tile, slot):
    row, blocks = place(tile)
    plgpu.barrier_wait(refs.full.at[wg * slots + slot])
    plgpu.copy_smem_to_gmem(
      refs.x_smem.at[wg, slot],
      refs.out_gmem.at[pl.ds(row, tile_rows), blocks],
    )

  stride = lax.axis_size("sm") * lax.axis_size("wg")
  first = lax.axis_index("sm") * lax.axis_size("wg") + wg
  count = lax.div(num_tiles - first + stride - 1, stride)
  ahead = slots - 1
  for i in range(ahead):
    pl.when(i < count)(functools.partial(load, first + i * stride, i))

  def step(i, _):
    store(first + i * stride, lax.rem(i, slots))
    # All stores but this one have read their slots.
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    then = i + ahead
    pl.when(then < count)(
      functools.partial(load, first + then * stride, lax.rem(then, slots))
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


def unsupported(k: int, itemsize: int) -> str | None:
  """Returns what of rows of k elements the kernel cannot copy, if anything."""
  if _box(k, itemsize) is None:
    return f"copies rows of whole {_TMA_ALIGN} bytes, got {k * itemsize}"
  return None


def copy_rows(
  x: Shaped[Array, "t k"], index: Int32[Array, "m"], *, interpret: bool = False
) -> Shaped[Array, "m k"]:
  """Returns x[index]. What is not in [0, t) gathers zeros."""
  (t, k), m = x.shape, index.shape[0]
  tile_blocks, cols = _box(k, x.dtype.itemsize)
  blocks = k // cols
  tile_rows = _TILE_BYTES // (tile_blocks * cols * x.dtype.itemsize)
  tile_rows = min(tile_rows, _TILE_ROWS, m)
  index = jnp.pad(index, (0, -m % tile_rows), constant_values=t)
  # Mosaic drops dimensions of size 1, and the rows' numbers with them.
  x = _tile_loop.at_least(x, 2, k).reshape(-1, blocks, cols)
  out = _tile_loop.launch(
    _kernel,
    out_type=jax.ShapeDtypeStruct((m, blocks, cols), x.dtype),
    scratch_types=dict(
      x_smem=plgpu.SMEM((_WGS, _SLOTS, tile_rows, tile_blocks, cols), x.dtype),
      full=plgpu.Barrier(num_arrivals=tile_rows, num_barriers=_WGS * _SLOTS),
    ),
    name="copy_rows_sm90",
    wgs=_WGS,
    num_tiles=index.shape[0] // tile_rows * (blocks // tile_blocks),
    interpret=interpret,
  )(x, index)
  return out.reshape(m, k)

"""Quantisation of rows in blocks of 128 columns for Hopper: one pass.

    scales[b, i] = max(|x[i, b]|, 1e-4) / largest FP8 value     b: 128 columns
    values[i, b] = x[i, b] / scales[b, i] to the nearest, ties to even

x (m, k) and values (m, k), its rows and columns rounded up with zeros, are
row-major; scales (k/128, m) are transposed, as the GEMM kernels read them.

Each warpgroup works for itself, on every n-th tile of (tile_rows, 128):
  wait full[slot] | registers | scale, convert | store | load a next tile
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jax_grouped_gemm.config import ROW_ALIGN, SCALE_ALIGN, SCALE_BLOCK
from jax_grouped_gemm.kernels import _quantize
from jax_grouped_gemm.kernels._pipeline import Ref

_WGS = 6  # warpgroups of a CTA.
_SLOTS = 3  # tiles of each warpgroup on their way in, and on their way out.
_TILE_BYTES = 8192  # of x.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  x_gmem: Ref  # (m, k)
  values_gmem: Ref  # (m_stored, k_stored) f8
  scales_gmem: Ref  # (k/128, m in whole tiles) f32
  x_smem: Ref  # (wg, slots, tile_rows, 128)
  values_smem: Ref  # (wg, slots, tile_rows, 128) f8
  scales_smem: Ref  # (wg, slots, tile_rows rounded up) f32
  full: Ref  # (wg * slots,)


def _kernel(*operands, power_of_two_scales: bool, interpret: bool, **scratch):
  refs = _Refs(*operands, **scratch)
  layout = _quantize.row_layout(refs.x_gmem.dtype)
  wg = lax.axis_index("wg")
  _, slots, tile_rows, _ = refs.x_smem.shape
  k_blocks = refs.scales_gmem.shape[0]
  num_tiles = pl.cdiv(refs.values_gmem.shape[0], tile_rows) * k_blocks

  def place(tile):
    """Returns the tile's rows, columns and column block."""
    row, block = lax.div(tile, k_blocks), lax.rem(tile, k_blocks)
    rows = pl.ds(row * tile_rows, tile_rows)
    return rows, pl.ds(block * SCALE_BLOCK, SCALE_BLOCK), block

  def load(tile, slot):
    rows, cols, _ = place(tile)
    plgpu.copy_gmem_to_smem(
      refs.x_gmem.at[rows, cols],
      refs.x_smem.at[wg, slot],
      refs.full.at[wg * slots + slot],
    )

  def quantize_tile(tile, slot):
    plgpu.barrier_wait(refs.full.at[wg * slots + slot])
    values, scales = _quantize.quantize_rows(
      _quantize.load_tile(refs.x_smem.at[wg, slot], layout, interpret),
      layout,
      refs.values_gmem.dtype,
      power_of_two_scales,
      interpret,
    )
    # The tile that was staged in this slot, each one group of copies.
    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
    refs.values_smem[wg, slot] = values
    scales_smem = refs.scales_smem.at[wg, slot, pl.ds(0, tile_rows)]
    scales_smem[...] = scales
    # Orders the reads of the slot before the next load too.
    plgpu.commit_smem()
    rows, cols, block = place(tile)
    plgpu.copy_smem_to_gmem(
      refs.values_smem.at[wg, slot],
      refs.values_gmem.at[rows, cols],
      commit_group=False,
    )
    plgpu.copy_smem_to_gmem(scales_smem, refs.scales_gmem.at[block, rows])

  _quantize.for_each_tile(num_tiles, slots, load, quantize_tile)


# ---------------------------------------------------------------- launch


def quantize_rows(
  x: Float[Array, "m k"],
  *,
  dtype: DTypeLike,
  power_of_two_scales: bool,
  interpret: bool = False,
) -> tuple[Float[Array, "m_stored k_stored"], Float32[Array, "k/128 m_stored"]]:
  """Returns values, rows and columns rounded up with zeros, and scales.

  m_stored is a multiple of 8, k_stored of 128. k is a multiple of 16.
  """
  m, k = x.shape
  # Slices of an array are not larger than it.
  missing = max(0, ROW_ALIGN - m), max(0, SCALE_BLOCK - k)
  x = jnp.pad(x, [(0, count) for count in missing])
  m_stored, k_blocks = _round_up(m, ROW_ALIGN), pl.cdiv(k, SCALE_BLOCK)
  tile_rows = _TILE_BYTES // (SCALE_BLOCK * x.dtype.itemsize)
  tile_rows = min(tile_rows, x.shape[0] // ROW_ALIGN * ROW_ALIGN)
  slots = _WGS, _SLOTS
  # Mosaic clips the stores of scales at the end of the array, not of a row.
  scales_width = _round_up(m_stored, tile_rows)
  num_tiles = scales_width // tile_rows * k_blocks
  values, scales = _quantize.launch(
    functools.partial(
      _kernel, power_of_two_scales=power_of_two_scales, interpret=interpret
    ),
    out_type=(
      jax.ShapeDtypeStruct((m_stored, k_blocks * SCALE_BLOCK), dtype),
      jax.ShapeDtypeStruct((k_blocks, scales_width), jnp.float32),
    ),
    scratch_types=dict(
      x_smem=plgpu.SMEM((*slots, tile_rows, SCALE_BLOCK), x.dtype),
      values_smem=plgpu.SMEM((*slots, tile_rows, SCALE_BLOCK), dtype),
      scales_smem=plgpu.SMEM(
        (*slots, _round_up(tile_rows, SCALE_ALIGN)), jnp.float32
      ),
      full=plgpu.Barrier(num_barriers=_WGS * _SLOTS),
    ),
    name="quantize_rows_sm90",
    wgs=_WGS,
    num_tiles=num_tiles,
    interpret=interpret,
  )(x)
  return values, scales[:, :m_stored]


def _round_up(size: int, multiple: int) -> int:
  return pl.cdiv(size, multiple) * multiple

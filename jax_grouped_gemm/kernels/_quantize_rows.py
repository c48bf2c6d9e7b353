"""Rows quantised in blocks of 128 columns, from registers to memory.

What a kernel that quantises rows writes: values (m, k), rows and columns
rounded up with zeros, and scales (k/128, m), transposed, as the GEMM kernels
read them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jax_grouped_gemm.config import ROW_ALIGN, SCALE_ALIGN, SCALE_BLOCK
from jax_grouped_gemm.kernels import _fp8
from jax_grouped_gemm.kernels._pipeline import Ref


class Out(NamedTuple):
  """Where the results go. A slot holds tiles that are side by side."""

  values_gmem: Ref  # (m_stored, k_stored) f8
  scales_gmem: Ref  # (k/128, m in whole tiles) f32
  values_smem: Ref  # (wg, slots, tiles, tile_rows, 128) f8
  scales_smem: Ref  # (wg, slots, tiles, tile_rows rounded up) f32


def out_types(m: int, k: int, tile_rows: int, dtype: DTypeLike):
  """Returns those of values and scales.

  Mosaic clips the stores of scales at the end of the array, not of a row: the
  scales are whole tiles wide.
  """
  m_stored, k_blocks = round_up(m, ROW_ALIGN), pl.cdiv(k, SCALE_BLOCK)
  return (
    jax.ShapeDtypeStruct((m_stored, k_blocks * SCALE_BLOCK), dtype),
    jax.ShapeDtypeStruct(
      (k_blocks, round_up(m_stored, tile_rows)), jnp.float32
    ),
  )


def scratch_types(slots, tiles: int, tile_rows: int, dtype: DTypeLike):
  """Returns those of values_smem and scales_smem; slots are (wgs, slots)."""
  scales = round_up(tile_rows, SCALE_ALIGN)
  return dict(
    values_smem=plgpu.SMEM((*slots, tiles, tile_rows, SCALE_BLOCK), dtype),
    scales_smem=plgpu.SMEM((*slots, tiles, scales), jnp.float32),
  )


def quantize_and_store(
  out: Out, slot, row, block, tiles, *, layout, power_of_two_scales, interpret
):
  """Stores the quantised tiles, x (tile_rows, 128) in registers each.

  Row `row` and column block `block` are the first ones of the first tile. The
  reads of SMEM before are ordered before the loads after.
  """
  wg = lax.axis_index("wg")
  _, slots, _, tile_rows, _ = out.values_smem.shape
  k_blocks = out.scales_gmem.shape[0]
  quantized = [
    _fp8.quantize_rows(
      x, layout, out.values_gmem.dtype, power_of_two_scales, interpret
    )
    for x in tiles
  ]
  # What was staged in this slot before: each time one group of copies.
  plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
  staged = pl.ds(0, tile_rows)
  for j, (values, scales) in enumerate(quantized):
    out.values_smem[wg, slot, j] = values
    out.scales_smem[wg, slot, j, staged] = scales
  plgpu.commit_smem()
  rows = pl.ds(row, tile_rows)

  def store(j):
    cols = pl.ds((block + j) * SCALE_BLOCK, SCALE_BLOCK)
    plgpu.copy_smem_to_gmem(
      out.values_smem.at[wg, slot, j],
      out.values_gmem.at[rows, cols],
      commit_group=False,
    )
    plgpu.copy_smem_to_gmem(
      out.scales_smem.at[wg, slot, j, staged],
      out.scales_gmem.at[block + j, rows],
      commit_group=False,
    )

  for j in range(len(tiles)):
    if k_blocks % len(tiles) == 0:
      store(j)
    else:
      pl.when(block + j < k_blocks)(functools.partial(store, j))
  plgpu.commit_smem_to_gmem_group()


def round_up(size: int, multiple: int) -> int:
  """Returns the least multiple that is not less than size."""
  return pl.cdiv(size, multiple) * multiple

"""Quantisation of gathered rows in blocks of 128 columns for Hopper: one pass.

    y[i] = x[index[i]]
    scales[b, i] = max(|y[i, b]|, 1e-4) / largest FP8 value     b: 128 columns
    values[i, b] = y[i, b] / scales[b, i] to the nearest, ties to even

x (t, k) and values (m, k), its rows and columns rounded up with zeros, are
row-major; scales (k/128, m) are transposed, as the GEMM kernels read them. y is
never in memory.

Each warpgroup works for itself, on every n-th tile of (tile_rows, tile_cols):
  wait full[slot] | registers | scale, convert | store | load a next tile
where each row is loaded by a copy of its own.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_grouped_gemm.config import ROW_ALIGN, SCALE_BLOCK
from jax_grouped_gemm.kernels import _quantize_rows, _tile_loop
from jax_grouped_gemm.kernels._pipeline import Ref

_WGS = 8  # warpgroups of a CTA.
_SLOTS = 2  # tiles of each warpgroup on their way in, and on their way out.
_TILE_BYTES = 8192  # of x.
_TILE_COLS = 256  # The most that TMA copies at once: few copies, long rows.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  x_gmem: Ref  # (t, k)
  index_gmem: Ref  # (m in whole tiles,) i32, t for no row
  values_gmem: Ref
  scales_gmem: Ref
  x_smem: Ref  # (wg, slots, tile_rows, tile_cols)
  full: Ref  # (wg * slots,): an arrival per row
  values_smem: Ref
  scales_smem: Ref

  @property
  def out(self) -> _quantize_rows.Out:
    return _quantize_rows.Out(
      self.values_gmem, self.scales_gmem, self.values_smem, self.scales_smem
    )


def _kernel(*operands, power_of_two_scales: bool, interpret: bool, **scratch):
  refs = _Refs(*operands, **scratch)
  layout = _tile_loop.row_layout(refs.x_gmem.dtype)
  wg = lax.axis_index("wg")
  _, slots, tile_rows, tile_cols = refs.x_smem.shape
  tile_blocks = tile_cols // SCALE_BLOCK
  col_tiles = pl.cdiv(refs.scales_gmem.shape[0], tile_blocks)
  num_tiles = refs.index_gmem.shape[0] // tile_rows * col_tiles

  def place(tile):
    """Returns the tile's first row and its first column block."""
    row = lax.div(tile, col_tiles) * tile_rows
    return row, lax.rem(tile, col_tiles) * tile_blocks

  def load(tile, slot):
    row, block = place(tile)
    cols = pl.ds(block * SCALE_BLOCK, tile_cols)
    # All before the first copy, so that they are on their way together.
    tokens = [refs.index_gmem[row + i] for i in range(tile_rows)]
    for i, token in enumerate(tokens):
      plgpu.copy_gmem_to_smem(
        refs.x_gmem.at[pl.ds(token, 1), cols],
        refs.x_smem.at[wg, slot, pl.ds(i, 1)],
        refs.full.at[wg * slots + slot],
      )

  def quantize_tile(tile, slot):
    plgpu.barrier_wait(refs.full.at[wg * slots + slot])
    tiles = [
      _tile_loop.load_tile(
        refs.x_smem.at[wg, slot, :, pl.ds(j * SCALE_BLOCK, SCALE_BLOCK)],
        layout,
        interpret,
      )
      for j in range(tile_blocks)
    ]
    _quantize_rows.quantize_and_store(
      refs.out,
      slot,
      *place(tile),
      tiles,
      layout=layout,
      power_of_two_scales=power_of_two_scales,
      interpret=interpret,
    )

  _tile_loop.for_each_tile(num_tiles, slots, (load, quantize_tile))


# ---------------------------------------------------------------- launch


def quantize_gathered(
  x: Float[Array, "t k"],
  index: Int32[Array, "m"],
  *,
  dtype: DTypeLike,
  power_of_two_scales: bool,
  interpret: bool = False,
) -> tuple[Float[Array, "m_stored k_stored"], Float32[Array, "k/128 m_stored"]]:
  """Returns values, rows and columns rounded up with zeros, and scales.

  m_stored is a multiple of 8, k_stored of 128. k is a multiple of 16. What is
  not in [0, t) gathers zeros.
  """
  (t, k), m = x.shape, index.shape[0]
  # Mosaic drops dimensions of size 1, and the tokens' numbers with them.
  x = _tile_loop.at_least(x, 2, SCALE_BLOCK)
  tile_cols = _TILE_COLS if k >= _TILE_COLS else SCALE_BLOCK
  tile_rows = _TILE_BYTES // (tile_cols * x.dtype.itemsize)
  tile_rows = min(tile_rows, _quantize_rows.round_up(m, ROW_ALIGN))
  slots = _WGS, _SLOTS
  out_type = _quantize_rows.out_types(m, k, tile_rows, dtype)
  k_blocks, scales_width = out_type[1].shape
  # TMA reads zeros where the array has no row.
  index = jnp.pad(index, (0, scales_width - m), constant_values=t)
  tile_blocks = tile_cols // SCALE_BLOCK
  values, scales = _tile_loop.launch(
    functools.partial(
      _kernel, power_of_two_scales=power_of_two_scales, interpret=interpret
    ),
    out_type=out_type,
    scratch_types=dict(
      x_smem=plgpu.SMEM((*slots, tile_rows, tile_cols), x.dtype),
      full=plgpu.Barrier(num_arrivals=tile_rows, num_barriers=_WGS * _SLOTS),
      **_quantize_rows.scratch_types(slots, tile_blocks, tile_rows, dtype),
    ),
    name="quantize_gathered_sm90",
    wgs=_WGS,
    num_tiles=scales_width // tile_rows * pl.cdiv(k_blocks, tile_blocks),
    interpret=interpret,
  )(x, index)
  return values, scales[:, : out_type[0].shape[0]]

"""Quantisation of rows in blocks of 128 columns for Hopper: one pass.

    y = x, or activation(gate, up) rounded to x's dtype, where x = [gate, up]
    scales[b, i] = max(|y[i, b]|, 1e-4) / largest FP8 value     b: 128 columns
    values[i, b] = y[i, b] / scales[b, i] to the nearest, ties to even

x (m, k) or (m, 2 k) and values (m, k), its rows and columns rounded up with
zeros, are row-major; scales (k/128, m) are transposed, as the GEMM kernels read
them.

Each warpgroup works for itself, on every n-th tile of (tile_rows, 128):
  wait full[slot] | registers | (activate) | scale, convert | store | load next
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jax_grouped_gemm.config import ROW_ALIGN, SCALE_BLOCK
from jax_grouped_gemm.kernels import _quantize_rows, _tile_loop
from jax_grouped_gemm.kernels._activations import activate
from jax_grouped_gemm.kernels._fast_math import fast_math
from jax_grouped_gemm.kernels._pipeline import Ref

_WGS = 4  # warpgroups of a CTA.
_SLOTS = 2  # tiles of each warpgroup on their way in, and on their way out.
_TILE_BYTES = 16384  # of x.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  x_gmem: Ref  # (m, k) or (m, 2, k)
  values_gmem: Ref
  scales_gmem: Ref
  x_smem: Ref  # (wg, slots, 1 or 2, tile_rows, 128)
  full: Ref  # (wg * slots,): an arrival for each of the 1 or 2
  values_smem: Ref
  scales_smem: Ref

  @property
  def out(self) -> _quantize_rows.Out:
    return _quantize_rows.Out(
      self.values_gmem, self.scales_gmem, self.values_smem, self.scales_smem
    )


def _kernel(
  *operands,
  activation: str | None,
  power_of_two_scales: bool,
  interpret: bool,
  **scratch,
):
  refs = _Refs(*operands, **scratch)
  layout = _tile_loop.row_layout(refs.x_gmem.dtype)
  wg = lax.axis_index("wg")
  _, slots, parts, tile_rows, _ = refs.x_smem.shape
  k_blocks = refs.scales_gmem.shape[0]
  num_tiles = pl.cdiv(refs.values_gmem.shape[0], tile_rows) * k_blocks

  def place(tile):
    """Returns the tile's first row and its column block."""
    return lax.div(tile, k_blocks) * tile_rows, lax.rem(tile, k_blocks)

  def load(tile, slot):
    row, block = place(tile)
    rows = pl.ds(row, tile_rows)
    cols = pl.ds(block * SCALE_BLOCK, SCALE_BLOCK)
    for i in range(parts):
      x = refs.x_gmem.at[(rows, i, cols) if activation else (rows, cols)]
      plgpu.copy_gmem_to_smem(
        x, refs.x_smem.at[wg, slot, i], refs.full.at[wg * slots + slot]
      )

  def quantize_tile(tile, slot):
    plgpu.barrier_wait(refs.full.at[wg * slots + slot])
    tiles = [
      _tile_loop.load_tile(refs.x_smem.at[wg, slot, i], layout, interpret)
      for i in range(parts)
    ]
    if activation:
      ops = fast_math(layout, interpret)
      tiles = [activate(*tiles, activation=activation, ops=ops)]
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


def quantize_rows(
  x: Float[Array, "m parts*k"],
  *,
  activation: str | None = None,
  dtype: DTypeLike,
  power_of_two_scales: bool,
  interpret: bool = False,
) -> tuple[Float[Array, "m_stored k_stored"], Float32[Array, "k/128 m_stored"]]:
  """Returns values, rows and columns rounded up with zeros, and scales.

  m_stored is a multiple of 8, k_stored of 128. k is a multiple of 16.
  """
  m, parts = x.shape[0], 2 if activation else 1
  k = x.shape[1] // parts
  if activation:
    x = x.reshape(m, parts, k)
  x = _tile_loop.at_least(x, ROW_ALIGN, SCALE_BLOCK)
  # Of e5m2, whose Inf is made of bits, registers hold half as much.
  tile_bytes = _TILE_BYTES if dtype == jnp.float8_e4m3fn else _TILE_BYTES // 2
  tile_rows = tile_bytes // (parts * SCALE_BLOCK * x.dtype.itemsize)
  tile_rows = min(tile_rows, x.shape[0] // ROW_ALIGN * ROW_ALIGN)
  slots = _WGS, _SLOTS
  out_type = _quantize_rows.out_types(m, k, tile_rows, dtype)
  k_blocks, scales_width = out_type[1].shape
  values, scales = _tile_loop.launch(
    functools.partial(
      _kernel,
      activation=activation,
      power_of_two_scales=power_of_two_scales,
      interpret=interpret,
    ),
    out_type=out_type,
    scratch_types=dict(
      x_smem=plgpu.SMEM((*slots, parts, tile_rows, SCALE_BLOCK), x.dtype),
      full=plgpu.Barrier(num_arrivals=parts, num_barriers=_WGS * _SLOTS),
      **_quantize_rows.scratch_types(slots, 1, tile_rows, dtype),
    ),
    name=f"quantize_{activation or 'rows'}_sm90",
    wgs=_WGS,
    num_tiles=scales_width // tile_rows * k_blocks,
    interpret=interpret,
  )(x)
  return values, scales[:, : out_type[0].shape[0]]

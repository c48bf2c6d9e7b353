"""The gradient of an activation for Hopper: one pass.

    d(gate), d(up) = d(out) * the derivatives of activation(gate, up)

gate_up = [gate, up] (m, 2 f), dout (m, f) and dgate_up (m, 2 f) are row-major.

Each warpgroup works for itself, on every n-th tile of (tile_rows, 128):
  wait full[slot] | registers | differentiate | store | load a next tile
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.kernels import _tile_loop
from jax_grouped_gemm.kernels._activations import gradients
from jax_grouped_gemm.kernels._fast_math import fast_math
from jax_grouped_gemm.kernels._pipeline import Ref

_WGS = 6  # warpgroups of a CTA.
_SLOTS = 2  # tiles of each warpgroup on their way in, and on their way out.
_TILE_ROWS = 8
_TILE_COLS = SCALE_BLOCK


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  gate_up_gmem: Ref  # (m, 2, f)
  dout_gmem: Ref  # (m, f)
  dgate_up_gmem: Ref  # (m, 2, f)
  in_smem: Ref  # (wg, slots, 3, tile_rows, 128): gate, up, dout
  out_smem: Ref  # (wg, slots, 2, tile_rows, 128)
  full: Ref  # (wg * slots,): an arrival for each of the three


def _kernel(*operands, activation: str, interpret: bool, **scratch):
  refs = _Refs(*operands, **scratch)
  layout = _tile_loop.row_layout(refs.dout_gmem.dtype)
  wg = lax.axis_index("wg")
  slots = refs.in_smem.shape[1]
  m, f = refs.dout_gmem.shape
  col_tiles = pl.cdiv(f, _TILE_COLS)

  def place(tile):
    """Returns the tile's rows and columns."""
    rows = pl.ds(lax.div(tile, col_tiles) * _TILE_ROWS, _TILE_ROWS)
    return rows, pl.ds(lax.rem(tile, col_tiles) * _TILE_COLS, _TILE_COLS)

  def load(tile, slot):
    rows, cols = place(tile)
    for i, x in enumerate(
      (
        refs.gate_up_gmem.at[rows, 0, cols],
        refs.gate_up_gmem.at[rows, 1, cols],
        refs.dout_gmem.at[rows, cols],
      )
    ):
      plgpu.copy_gmem_to_smem(
        x, refs.in_smem.at[wg, slot, i], refs.full.at[wg * slots + slot]
      )

  def differentiate_tile(tile, slot):
    rows, cols = place(tile)
    plgpu.barrier_wait(refs.full.at[wg * slots + slot])
    operands = (
      _tile_loop.load_tile(refs.in_smem.at[wg, slot, i], layout, interpret)
      for i in range(3)
    )
    results = gradients(
      *operands, activation=activation, ops=fast_math(layout, interpret)
    )
    # The tile that was staged in this slot, each one group of copies.
    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
    for i, result in enumerate(results):
      _tile_loop.store_tile(
        refs.out_smem.at[wg, slot, i], result, layout, interpret
      )
    # Orders the reads of the slot before the next load too.
    plgpu.commit_smem()
    for i in range(2):
      plgpu.copy_smem_to_gmem(
        refs.out_smem.at[wg, slot, i],
        refs.dgate_up_gmem.at[rows, i, cols],
        commit_group=False,
      )
    plgpu.commit_smem_to_gmem_group()

  num_tiles = pl.cdiv(m, _TILE_ROWS) * col_tiles
  _tile_loop.for_each_tile(num_tiles, slots, (load, differentiate_tile))


# ---------------------------------------------------------------- launch


def activation_backward(
  gate_up: BFloat16[Array, "m 2*f"],
  dout: BFloat16[Array, "m f"],
  *,
  activation: str,
  interpret: bool = False,
) -> BFloat16[Array, "m 2*f"]:
  """Returns d(gate_up). f is a multiple of 16."""
  m, f = dout.shape
  gate_up, dout = (
    _tile_loop.at_least(x, _TILE_ROWS, _TILE_COLS)
    for x in (gate_up.reshape(m, 2, f), dout)
  )
  slots = _WGS, _SLOTS
  tile = _TILE_ROWS, _TILE_COLS
  num_tiles = pl.cdiv(m, _TILE_ROWS) * pl.cdiv(f, _TILE_COLS)
  dgate_up = _tile_loop.launch(
    functools.partial(_kernel, activation=activation, interpret=interpret),
    out_type=jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype),
    scratch_types=dict(
      in_smem=plgpu.SMEM((*slots, 3, *tile), gate_up.dtype),
      out_smem=plgpu.SMEM((*slots, 2, *tile), gate_up.dtype),
      full=plgpu.Barrier(num_arrivals=3, num_barriers=_WGS * _SLOTS),
    ),
    name=f"{activation}_backward_sm90",
    wgs=_WGS,
    num_tiles=num_tiles,
    interpret=interpret,
  )(gate_up, dout)
  return dgate_up[:m, :, :f].reshape(m, 2 * f)

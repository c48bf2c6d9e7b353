"""Quantisation along tokens, transposed, for Hopper: one pass.

    scales[b, i] = max(|x[b, i]|, 1e-4) / largest FP8 value
    values[i, b] = (x[b, i] / scales[b, i]).T to the nearest, ties to even

b are blocks of 128 tokens of one group, those past its end zeros; i is one of
f features. x (t, f), values (f, 128 * blocks) and scales (blocks, f) are
row-major: what the K-grouped GEMM reads.

Each warpgroup works for itself, on every n-th tile of 128 tokens x 64 features:
  wait full[slot] | read transposed | scale, convert | store | load a next tile
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from jax_grouped_gemm.config import ROW_ALIGN, SCALE_BLOCK, WGMMA_M
from jax_grouped_gemm.kernels import _quantize
from jax_grouped_gemm.kernels._pipeline import Ref

_WGS = 3  # warpgroups of a CTA.
_SLOTS = 2  # tiles of each warpgroup on their way in, and on their way out.
# TMA starts at whole 8 rows: up to 7 tokens before the block's come along.
_ROWS = SCALE_BLOCK + ROW_ALIGN


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  x_gmem: Ref  # (t, f)
  first_gmem: Ref  # (blocks,) i32: first token of the block
  size_gmem: Ref  # (blocks,) i32: its tokens
  values_gmem: Ref  # (f_stored, 128 * blocks) f8
  scales_gmem: Ref  # (blocks, f in whole tiles) f32
  x_smem: Ref  # (wg, slots, 136, 64)
  values_smem: Ref  # (wg, slots, 64, 128) f8
  scales_smem: Ref  # (wg, slots, 64) f32
  full: Ref  # (wg * slots,)


def _kernel(*operands, power_of_two_scales: bool, interpret: bool, **scratch):
  refs = _Refs(*operands, **scratch)
  wg = lax.axis_index("wg")
  slots = refs.x_smem.shape[1]
  blocks = refs.first_gmem.shape[0]
  tiles = refs.scales_gmem.shape[1] // WGMMA_M  # of a block

  def place(tile):
    """Returns the tile's block and features."""
    features = pl.ds(lax.rem(tile, tiles) * WGMMA_M, WGMMA_M)
    return lax.div(tile, tiles), features

  def load(tile, slot):
    block, features = place(tile)
    first = lax.div(refs.first_gmem[block], ROW_ALIGN) * ROW_ALIGN
    plgpu.copy_gmem_to_smem(
      refs.x_gmem.at[pl.ds(first, _ROWS), features],
      refs.x_smem.at[wg, slot],
      refs.full.at[wg * slots + slot],
    )

  def quantize_tile(tile, slot):
    block, features = place(tile)
    size = refs.size_gmem[block]
    plgpu.barrier_wait(refs.full.at[wg * slots + slot])
    offset = lax.rem(refs.first_gmem[block], ROW_ALIGN)
    x = _quantize.load_transposed(refs.x_smem.at[wg, slot], offset, interpret)
    token = plgpu.broadcasted_iota(
      jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA
    )
    values, scales = _quantize.quantize_rows(
      # The tokens of other groups may be NaN.
      jnp.where(token < size, x.astype(jnp.float32), 0.0),
      plgpu.Layout.WGMMA,
      refs.values_gmem.dtype,
      power_of_two_scales,
      interpret,
    )
    # The tile that was staged in this slot, each one group of copies.
    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
    refs.values_smem[wg, slot] = values
    refs.scales_smem[wg, slot] = scales
    # Orders the reads of the slot before the next load too.
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      refs.values_smem.at[wg, slot],
      refs.values_gmem.at[features, pl.ds(block * SCALE_BLOCK, SCALE_BLOCK)],
      commit_group=False,
    )
    plgpu.copy_smem_to_gmem(
      refs.scales_smem.at[wg, slot], refs.scales_gmem.at[block, features]
    )

  _quantize.for_each_tile(blocks * tiles, slots, load, quantize_tile)


# ---------------------------------------------------------------- launch


def quantize_tokens(
  x: BFloat16[Array, "t f"],
  first: Int32[Array, "blocks"],
  sizes: Int32[Array, "blocks"],
  *,
  dtype: DTypeLike,
  power_of_two_scales: bool,
  interpret: bool = False,
) -> tuple[Float[Array, "f_stored 128*blocks"], Float32[Array, "blocks f"]]:
  """Returns values and scales of blocks of the tokens [first, first + size).

  A size is at most 128, and may be 0. f is a multiple of 16, f_stored one of 8.
  """
  t, f = x.shape
  # TMA wants whole swizzled tiles: a copy of x, unless its sizes are multiples
  # of 8 and 64.
  x = jnp.pad(x, ((0, -t % ROW_ALIGN), (0, -f % WGMMA_M)))
  x = _quantize.at_least(x, _ROWS, WGMMA_M)
  f_stored = max(WGMMA_M, pl.cdiv(f, ROW_ALIGN) * ROW_ALIGN)
  blocks, tiles = first.shape[0], pl.cdiv(f, WGMMA_M)
  slots = _WGS, _SLOTS
  values, scales = _quantize.launch(
    functools.partial(
      _kernel, power_of_two_scales=power_of_two_scales, interpret=interpret
    ),
    out_type=(
      jax.ShapeDtypeStruct((f_stored, blocks * SCALE_BLOCK), dtype),
      # Mosaic clips the stores of scales at the end of the array, not of a row.
      jax.ShapeDtypeStruct((blocks, tiles * WGMMA_M), jnp.float32),
    ),
    scratch_types=dict(
      x_smem=plgpu.SMEM((*slots, _ROWS, WGMMA_M), x.dtype),
      values_smem=plgpu.SMEM((*slots, WGMMA_M, SCALE_BLOCK), dtype),
      scales_smem=plgpu.SMEM((*slots, WGMMA_M), jnp.float32),
      full=plgpu.Barrier(num_barriers=_WGS * _SLOTS),
    ),
    name="quantize_tokens_sm90",
    wgs=_WGS,
    num_tiles=blocks * tiles,
    interpret=interpret,
  )(x, first, sizes)
  return values[: pl.cdiv(f, ROW_ALIGN) * ROW_ALIGN], scales[:, :f]

"""Quantisation of weights in 128x128 blocks for Hopper: one read, two copies.

    scales[g, i, j] = max(|w[g, i, j]|, 1e-4) / 448     i, j: blocks of 128
    values[g] = w[g] / scales[g] to the nearest, ties to even
    transposed[g] = values[g].T

w (g, k, n), values (g, k, n) and transposed (g, n, k), both rounded up to whole
blocks with zeros, are row-major.

Each warpgroup works for itself, on every n-th block:
  wait full[slot] | scale | convert, both ways | store | load a next
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.kernels import _fp8, _tile_loop
from jax_grouped_gemm.kernels._pipeline import Ref

_DTYPE = jnp.float8_e4m3fn
_WGS = 3  # warpgroups of a CTA.
_SLOTS = 1  # blocks of each warpgroup on their way in.
_SWIZZLE_BYTES = 128  # of a row in SMEM: blocks are handled in such slices.


class _Refs(NamedTuple):
  """Refs of the kernel: operands in GMEM, slots in SMEM, barriers."""

  w_gmem: Ref  # (g, k, n)
  values_gmem: Ref  # (g, k_stored, n_stored) f8
  transposed_gmem: Ref  # (g, n_stored, k_stored) f8
  scales_gmem: Ref  # (g, k/128, n/128) f32
  w_smem: Ref  # (wg, slots, slices, 128, slice_n)
  values_smem: Ref  # (wg, slices, 128, slice_n) f8
  transposed_smem: Ref  # (wg, slices, slice_n, 128) f8
  rows_smem: Ref  # (wg, 128) f32
  full: Ref  # (wg * slots,): an arrival per slice


def _kernel(*operands, power_of_two_scales: bool, interpret: bool, **scratch):
  refs = _Refs(*operands, **scratch)
  wg = lax.axis_index("wg")
  _, slots, slices, _, slice_n = refs.w_smem.shape
  groups, k_blocks, n_blocks = refs.scales_gmem.shape
  num_blocks = groups * k_blocks * n_blocks

  def place(tile):
    """Returns the block's group and its place among the blocks there."""
    row = lax.div(tile, n_blocks)
    group = lax.div(row, k_blocks)
    return group, lax.rem(row, k_blocks), lax.rem(tile, n_blocks)

  def slice_of(tile, j):
    """Returns the group, the rows and the columns of slice j of the block."""
    group, ki, ni = place(tile)
    cols = pl.ds(ni * SCALE_BLOCK + j * slice_n, slice_n)
    return group, pl.ds(ki * SCALE_BLOCK, SCALE_BLOCK), cols

  def load(tile, slot):
    for j in range(slices):
      plgpu.copy_gmem_to_smem(
        refs.w_gmem.at[slice_of(tile, j)],
        refs.w_smem.at[wg, slot, j],
        refs.full.at[wg * slots + slot],
      )

  def quantize_block(tile, slot):
    plgpu.barrier_wait(refs.full.at[wg * slots + slot])

    def read(j):
      return plgpu.load(refs.w_smem.at[wg, slot, j], layout=plgpu.Layout.WGMMA)

    def read_transposed(j):
      w = refs.w_smem.at[wg, slot, j].T
      return plgpu.load(w, layout=plgpu.Layout.WGMMA)

    row_amax = functools.partial(
      _fp8.row_amax, layout=plgpu.Layout.WGMMA, interpret=interpret
    )
    amax = functools.reduce(
      jnp.maximum, [row_amax(read(j)) for j in range(slices)]
    )
    scale = _scale(amax, refs.rows_smem.at[wg], power_of_two_scales)
    refs.scales_gmem[place(tile)] = scale
    convert = functools.partial(
      _fp8.convert_by_scalar,
      scale=scale,
      dtype=_DTYPE,
      interpret=interpret,
    )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for j in range(slices):
      refs.values_smem[wg, j] = convert(read(j))
      refs.transposed_smem[wg, j] = convert(read_transposed(j))
    # Orders the reads of the slot before the next load too.
    plgpu.commit_smem()
    for j in range(slices):
      group, rows, cols = slice_of(tile, j)
      for smem, gmem in (
        (refs.values_smem, refs.values_gmem.at[group, rows, cols]),
        (refs.transposed_smem, refs.transposed_gmem.at[group, cols, rows]),
      ):
        plgpu.copy_smem_to_gmem(smem.at[wg, j], gmem, commit_group=False)
    plgpu.commit_smem_to_gmem_group()

  _tile_loop.for_each_tile(num_blocks, slots, (load, quantize_block))


def _scale(amax, smem, power_of_two_scales: bool):
  """Returns the scale of a block, given the largest magnitude of each row.

  Warps have different rows: they exchange them through SMEM.
  """
  smem[...] = amax
  plgpu.commit_smem()
  columns = plgpu.load(smem, layout=plgpu.Layout.WGMMA.reduce(0))
  shape = (amax.shape[0], amax.shape[0])
  amax = jnp.max(lax.broadcast_in_dim(columns, shape, (1,)), axis=1)
  # The same number 128 times: Mosaic does not bitcast scalars.
  scales = _fp8.scale_of(amax, _DTYPE, power_of_two_scales)
  plgpu.commit_smem()
  smem[...] = scales
  plgpu.commit_smem()
  return smem[0]


# ---------------------------------------------------------------- launch


def quantize_weights(
  w: Float[Array, "g k n"],
  *,
  power_of_two_scales: bool,
  interpret: bool = False,
) -> tuple[
  Float[Array, "g k_stored n_stored"],
  Float[Array, "g n_stored k_stored"],
  Float32[Array, "g k/128 n/128"],
]:
  """Returns values, transposed values, in whole blocks, and scales."""
  groups, k, n = w.shape
  slice_n = _SWIZZLE_BYTES // w.dtype.itemsize
  slices = SCALE_BLOCK // slice_n
  k_blocks, n_blocks = pl.cdiv(k, SCALE_BLOCK), pl.cdiv(n, SCALE_BLOCK)
  k_stored, n_stored = k_blocks * SCALE_BLOCK, n_blocks * SCALE_BLOCK
  # TMA wants whole swizzled tiles, and slices of an array are not larger than
  # it: a copy of the weights, unless their sizes are multiples of 8 and 64.
  # Beyond an array that is one slice wide, TMA would read that slice again.
  k_missing = k_stored - k if k < SCALE_BLOCK else -k % 8
  n_missing = n_stored - n if n < SCALE_BLOCK else -n % slice_n
  w = jnp.pad(w, ((0, 0), (0, k_missing), (0, n_missing)))
  return _tile_loop.launch(
    functools.partial(
      _kernel, power_of_two_scales=power_of_two_scales, interpret=interpret
    ),
    out_type=(
      jax.ShapeDtypeStruct((groups, k_stored, n_stored), _DTYPE),
      jax.ShapeDtypeStruct((groups, n_stored, k_stored), _DTYPE),
      jax.ShapeDtypeStruct((groups, k_blocks, n_blocks), jnp.float32),
    ),
    scratch_types=dict(
      w_smem=plgpu.SMEM((_WGS, _SLOTS, slices, SCALE_BLOCK, slice_n), w.dtype),
      values_smem=plgpu.SMEM((_WGS, slices, SCALE_BLOCK, slice_n), _DTYPE),
      transposed_smem=plgpu.SMEM((_WGS, slices, slice_n, SCALE_BLOCK), _DTYPE),
      rows_smem=plgpu.SMEM((_WGS, SCALE_BLOCK), jnp.float32),
      full=plgpu.Barrier(num_arrivals=slices, num_barriers=_WGS * _SLOTS),
    ),
    name="quantize_weights_sm90",
    wgs=_WGS,
    num_tiles=groups * k_blocks * n_blocks,
    interpret=interpret,
  )(w)

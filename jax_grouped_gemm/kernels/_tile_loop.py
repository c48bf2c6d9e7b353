"""Kernels that go over an array once: their loop, tiles of it in and out."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jax_grouped_gemm.kernels._pipeline import compute_once, num_sms


def turns(num_tiles: int):
  """Returns how many tiles this warpgroup has, and tile(i), the i-th of them.

  Warpgroups take turns with the tiles.
  """
  wgs = lax.axis_size("wg")
  stride = lax.axis_size("sm") * wgs
  first = lax.axis_index("sm") * wgs + lax.axis_index("wg")
  count = lax.div(num_tiles - first + stride - 1, stride)
  return count, lambda i: first + i * stride


def for_each_tile(num_tiles: int, num_slots: int, *stages):
  """Runs each stage's load(tile, slot), then its quantize, on this warpgroup's.

  A stage is (load, quantize), the functions for a part of a tile. num_slots
  tiles are loaded ahead, a part as soon as the one before it in the slot is
  done: quantize must order its reads before that load.
  """
  count, tile = turns(num_tiles)

  for i in range(num_slots):
    for load, _ in stages:
      pl.when(i < count)(functools.partial(load, tile(i), i))

  def step(i, _):
    slot, ahead = lax.rem(i, num_slots), i + num_slots
    for load, quantize in stages:
      quantize(tile(i), slot)
      load_ahead = functools.partial(load, tile(ahead), slot)
      pl.when(ahead < count)(load_ahead)
    return 0

  lax.fori_loop(0, count, step, 0)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def launch(kernel, *, name: str, wgs: int, num_tiles: int, interpret, **types):
  """Returns the kernel, `wgs` warpgroups a CTA, as a function of operands."""
  run = plgpu.kernel(
    kernel,
    grid=(min(num_sms(), pl.cdiv(num_tiles, wgs)),),
    grid_names=("sm",),
    num_threads=wgs,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(
      # Warpgroups share nothing, and commit_smem orders what each does.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    kernel_name=name,
    interpret=plgpu.InterpretGPUParams() if interpret else None,
    **types,
  )

  def call(*operands):
    with jax.enable_x64(False):  # Kernels count in Python's and 32-bit numbers.
      return compute_once(run(*operands))

  return call


def at_least(x, rows: int, cols: int):
  """Pads x (m, ..., k) with zeros: slices are not larger than their array."""
  missing = max(0, rows - x.shape[0]), max(0, cols - x.shape[-1])
  between = [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, [(0, missing[0]), *between, (0, missing[1])])


def row_layout(dtype: DTypeLike):
  """Registers of (rows, 128): each thread has 16 bytes of neighbours in a row.

  So without swizzling, reads of x from SMEM and writes of FP8 values to it
  touch each bank once: rows are whole half warps, or warps for f32.
  """
  width = 16 // jnp.dtype(dtype).itemsize
  if width == 4:
    tiling, warps, lanes = ((4, 128), (4,)), (-3,), (-2,)
  else:
    tiling, warps, lanes = ((8, 128), (2, 128), (8,)), (-5,), (-3, -2)
  return plgpu.Layout.TILED(
    plgpu.Tiling(tiling), warp_dims=warps, lane_dims=lanes, vector_dim=-1
  )


def load_tile(ref, layout, interpret: bool):
  """Reads (rows, 128) of SMEM that is not swizzled.

  plgpu.load would have Mosaic swizzle it, and then TMA wants rows and columns
  of x in whole swizzled tiles.
  """
  if interpret:  # It cannot run what is inlined.
    return plgpu.load(ref, layout=layout)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout=layout),
  )
  def load(_, ref):
    return mgpu.FragmentedArray.load_untiled(ref, layout=layout.to_mgpu())

  return load(ref)


def store_tile(ref, x, layout, interpret: bool):
  """Writes (rows, 128) to SMEM that is not swizzled, as load_tile reads it."""
  if interpret:  # It cannot run what is inlined.
    ref[...] = x
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
  def store(_, ref, x):
    x.store_untiled(ref)

  store(ref, x)

"""From a tile of x in registers to FP8 values and their scales."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import math as mlir_math

from jax_grouped_gemm.kernels.reference import MIN_AMAX, next_power_of_two

_E5M2_MAX, _E5M2_INF = 0x7B, 0x7C  # bits, without the sign.
_ACC_ILP = 16  # values of a row's maximum that do not wait for one another.


def row_amax(x, layout, interpret: bool):
  """Returns the largest finite |x| of each row in float32, 0 if there is none.

  Mosaic's maximum keeps NaN. The hardware has one that ignores it, and of two
  bfloat16 at once.
  """
  if interpret:  # It cannot run what is inlined.
    magnitude = jnp.abs(x.astype(jnp.float32))
    finite = magnitude < jnp.inf  # NaN is not less.
    return jnp.max(jnp.where(finite, magnitude, 0.0), axis=1)
  row_layout = layout.reduce(1)
  lift = _lift_f32 if x.dtype == jnp.float32 else _lift_bf16

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(
      x.shape[:1], jnp.float32, layout=row_layout
    ),
  )
  def amax(_, x):
    magnitude = x._pointwise(lift("abs"))
    finite = x._pointwise(lift("fma.rn"), 0.0, magnitude)  # Inf becomes NaN.
    largest = _fold_vectors(finite, lift("max")).reduce(
      lift("max"), 1, acc_ilp=_ACC_ILP
    )
    largest = largest._pointwise(lift("max"), 0.0)  # If nothing was finite.
    return largest.astype(ir.F32Type.get())

  return amax(x)


def _lift_f32(name: str):
  return mgpu.FragmentedArray._lift_fast_instr(f"{name}.f32")


def _lift_bf16(name: str):
  names = f"{name}.bf16x2", f"{name}.bf16"
  return mgpu.FragmentedArray._lift_fast_packed_instr(*names)


def _fold_vectors(x: mgpu.FragmentedArray, op) -> mgpu.FragmentedArray:
  """Combines the columns of a thread's vector until 32 bits of it are left."""
  layout, width = x.layout, 32 // utils.bitwidth(x.mlir_dtype)
  vector = layout.vector_length
  if vector == width:
    return x
  registers = np.empty_like(x.registers)
  for i, register in np.ndenumerate(x.registers):
    pieces = [
      utils.vector_slice(register, slice(j, j + width))
      for j in range(0, vector, width)
    ]
    registers[i] = functools.reduce(op, pieces)
  tiling = plgpu.Tiling(
    tuple(
      (*tile[:-1], tile[-1] * width // vector) for tile in layout.tiling.tiles
    )
  )
  return mgpu.FragmentedArray(
    _registers=registers,
    _layout=dataclasses.replace(layout, tiling=tiling),
    _is_signed=None,
  )


def scale_of(amax, dtype: DTypeLike, power_of_two_scales: bool):
  """Returns the scale of blocks whose largest magnitudes are `amax`."""
  largest = float(jnp.finfo(dtype).max)
  scale = jnp.maximum(amax, MIN_AMAX) * jnp.float32(1 / largest)
  return next_power_of_two(scale) if power_of_two_scales else scale


def quantize_rows(
  x,
  layout,
  dtype: DTypeLike,
  power_of_two_scales: bool,
  interpret: bool,
):
  """Returns values (rows, 128) and scales (rows,), as reference.quantize."""
  amax = row_amax(x, layout, interpret)
  scales = scale_of(amax, dtype, power_of_two_scales)
  return _convert(x, scales, layout, dtype, interpret), scales


def convert_by_scalar(x, *, scale, dtype: DTypeLike, interpret: bool):
  """Returns x / scale in FP8, x in the layout of wgmma accumulators."""
  scales = lax.broadcast_in_dim(scale, x.shape[:1], ())
  scales = plgpu.layout_cast(scales, plgpu.Layout.WGMMA.reduce(1))
  return _convert(x, scales, plgpu.Layout.WGMMA, dtype, interpret)


def _convert(x, scales, layout, dtype: DTypeLike, interpret: bool):
  """Returns x / scales[:, None] in FP8."""
  # Nothing to clip: at most largest * (1 + 2^-22), which rounds to largest.
  corrections = 2 if x.dtype == jnp.float32 else 1
  x = x.astype(jnp.float32)
  scaled = _divide(x, scales, layout, corrections, interpret)
  if dtype == jnp.float8_e4m3fn:
    return scaled.astype(dtype)
  # The hardware's conversion saturates, so Inf is made of the largest value.
  largest = float(jnp.finfo(dtype).max)
  infinite = jnp.abs(x) == jnp.inf
  values = jnp.where(infinite, jnp.clip(x, -largest, largest), scaled)
  bits = lax.bitcast_convert_type(values.astype(dtype), jnp.int8)
  bits ^= jnp.where(infinite, _E5M2_MAX ^ _E5M2_INF, 0).astype(jnp.int8)
  return lax.bitcast_convert_type(bits, dtype)


def _divide(x, scales, layout, corrections: int, interpret: bool):
  """x / scales[:, None] to the nearest, NaN where x is not finite.

  What Mosaic makes of a division, div.full.f32, may be off by 2 units. Below
  2^-100 the quotient may be off too, but FP8 has zeros there. It takes two
  corrections, or one if x is bfloat16: all of its 2^7 significands by all 2^23
  of a scale were tried.
  """
  divisor = lax.broadcast_in_dim(scales, x.shape, (0,))
  if interpret:
    # A divisor that depends on x: see reference.quantize.
    finite = jnp.abs(x) < jnp.inf
    return jnp.where(finite, x / jnp.where(finite, divisor, 1.0), jnp.nan)
  row_layout = layout.reduce(1)

  @plgpu.inline_mgpu(
    arg_types=(row_layout,),
    return_type=plgpu.ShapeDtypeStruct(
      scales.shape, jnp.float32, layout=row_layout
    ),
  )
  def reciprocal(_, scales):
    rcp = mgpu.FragmentedArray._lift_fast_instr("rcp.rn.f32")
    return scales._pointwise(rcp)

  @plgpu.inline_mgpu(
    arg_types=(layout, layout, layout),
    return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout),
  )
  def divide(_, x, divisor, inverse):
    # Markstein: with an inverse to the nearest, a quotient that is less than a
    # unit off becomes one to the nearest. The first correction makes it so.
    # Inf becomes NaN, as Inf - Inf.
    # The signs of the products are such that -0 stays -0.
    fma = lambda a, b, c: a._pointwise(mlir_math.fma, b, c)
    minus_x, minus_inverse = -x, -inverse
    quotient = x * inverse
    for _ in range(corrections):
      excess = fma(divisor, quotient, minus_x)
      quotient = fma(excess, minus_inverse, quotient)
    return quotient

  inverse = lax.broadcast_in_dim(reciprocal(scales), x.shape, (0,))
  return divide(x, divisor, inverse)

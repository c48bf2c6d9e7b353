"""From a tile of x in registers to FP8 values and their scales."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxlib.mlir.dialects import math as mlir_math

from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.kernels._pipeline import num_sms
from jax_grouped_gemm.kernels.reference import MIN_AMAX, next_power_of_two

_E5M2_MAX, _E5M2_INF = 0x7B, 0x7C  # bits, without the sign.
_ROW_BYTES = 128  # of a swizzled SMEM buffer.


def for_each_tile(num_tiles: int, num_slots: int, load, quantize_tile):
  """Runs load(tile, slot), then quantize_tile(tile, slot), on this warpgroup's.

  Warpgroups take turns with the tiles. num_slots of them are loaded ahead:
  quantize_tile must order its reads of the slot before the next load.
  """
  wgs = lax.axis_size("wg")
  stride = lax.axis_size("sm") * wgs
  first = lax.axis_index("sm") * wgs + lax.axis_index("wg")
  count = lax.div(num_tiles - first + stride - 1, stride)

  for i in range(num_slots):
    pl.when(i < count)(functools.partial(load, first + i * stride, i))

  def step(i, _):
    slot, ahead = lax.rem(i, num_slots), i + num_slots
    quantize_tile(first + i * stride, slot)
    pl.when(ahead < count)(lambda: load(first + ahead * stride, slot))
    return 0

  lax.fori_loop(0, count, step, 0)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def launch(kernel, *, name: str, wgs: int, num_tiles: int, interpret, **types):
  """Returns the kernel, `wgs` warpgroups a CTA, as a function of operands."""
  return plgpu.kernel(
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


def load_transposed(ref, offset, interpret: bool):
  """Reads rows [offset, offset + 128) of 16-bit SMEM (136, 64) as (64, 128).

  In the layout of wgmma accumulators; offset < 8. Mosaic transposes whole tiles
  of 8 rows only: a load that starts amid one is spelt out here.
  """
  layout = plgpu.Layout.WGMMA
  shape = ref.shape[1], SCALE_BLOCK
  if interpret:  # It cannot run what is inlined.
    return plgpu.load(ref.at[pl.ds(offset, SCALE_BLOCK)].T, layout=layout)
  swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(_ROW_BYTES)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(swizzled), plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
  )
  def load(_, ref, offset):
    i32 = ir.IntegerType.get_signless(32)
    const = lambda value: utils.c(value, i32)
    div = lambda x, value: arith.divui(x, const(value))
    rem = lambda x, value: arith.remui(x, const(value))
    add, mul = arith.addi, lambda x, value: arith.muli(x, const(value))

    # Each quarter of a warp addresses the rows of an 8x8 matrix: 8 of the
    # warp's 16 columns, the others, and both again 8 rows further on.
    thread = utils.thread_idx()
    lane, warp = rem(thread, 32), rem(div(thread, 32), 4)
    row = add(offset.registers.item(), rem(lane, 8))
    row = add(row, mul(div(lane, 16), 8))
    chunk = add(mul(warp, 2), rem(div(lane, 8), 2))  # 16 bytes: 8 columns.
    swizzled_chunk = arith.xori(chunk, rem(row, 8))
    first_byte = add(mul(row, _ROW_BYTES), mul(swizzled_chunk, 16))

    vector = ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    matrices = registers.reshape(SCALE_BLOCK // 16, 4)  # A view.
    for i in range(len(matrices)):
      pointer = utils.getelementptr(
        utils.memref_ptr(ref),
        [add(first_byte, const(16 * _ROW_BYTES * i))],
        ir.IntegerType.get_signless(8),
      )
      four = nvvm.ldmatrix(
        pointer,
        layout=nvvm.MMALayout.col,
        num=4,
        shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
        elt_type=nvvm.LdStMatrixEltType.B16,
      )
      for j in range(4):
        matrix = llvm.extractvalue(i32, four, [j])
        matrices[i, j] = utils.bitcast(matrix, vector)
    return mgpu.FragmentedArray(
      _registers=registers, _layout=layout.to_mgpu(), _is_signed=None
    )

  return load(ref, offset)


def finite_magnitude(x):
  """|x|, 0 where x is not finite."""
  magnitude = jnp.abs(x)
  return jnp.where(magnitude < jnp.inf, magnitude, 0.0)  # NaN is not less.


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
  x = x.astype(jnp.float32)
  amax = jnp.max(finite_magnitude(x), axis=1)
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
  scaled = _divide(x, scales, layout, interpret)
  if dtype == jnp.float8_e4m3fn:
    return scaled.astype(dtype)
  # The hardware's conversion saturates, so Inf is made of the largest value.
  largest = float(jnp.finfo(dtype).max)
  infinite = jnp.abs(x) == jnp.inf
  values = jnp.where(infinite, jnp.clip(x, -largest, largest), scaled)
  bits = lax.bitcast_convert_type(values.astype(dtype), jnp.int8)
  bits ^= jnp.where(infinite, _E5M2_MAX ^ _E5M2_INF, 0).astype(jnp.int8)
  return lax.bitcast_convert_type(bits, dtype)


def _divide(x, scales, layout, interpret: bool):
  """x / scales[:, None] to the nearest, NaN where x is not finite.

  What Mosaic makes of a division, div.full.f32, may be off by 2 units. Below
  2^-100 the quotient may be off too, but FP8 has zeros there.
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
    for _ in range(2):
      excess = fma(divisor, quotient, minus_x)
      quotient = fma(excess, minus_inverse, quotient)
    return quotient

  inverse = lax.broadcast_in_dim(reciprocal(scales), x.shape, (0,))
  return divide(x, divisor, inverse)

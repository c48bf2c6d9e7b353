"""Tiles of tokens: read across from SMEM and along, rows stored one by one.

A tile is (136, 64), or two of them side by side, of 16 bits and swizzled as TMA
leaves them. Its tokens begin in one of its first 8 rows. Mosaic reads whole
tiles of 8 rows and stores whole tiles: what it does not is spelt out here.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from jax_grouped_gemm.config import SCALE_BLOCK

_ROW_BYTES = 128  # of a swizzled SMEM buffer.
_STEP = 16  # rows of a register of each thread.
_SWIZZLED = plgpu.RefType(
  (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(_ROW_BYTES))
)


def load_transposed(ref, offset, size, zeros, interpret: bool):
  """Reads rows [offset, offset + 128) of 16-bit SMEM (136, 64) as (64, 128).

  In the layout of wgmma accumulators; offset < 8. Rows past the first `size`
  are zero: `zeros` is SMEM, 16 bytes of them, to read in their place.
  """
  layout = plgpu.Layout.WGMMA
  shape = ref.shape[1], SCALE_BLOCK
  if interpret:  # It cannot run what is inlined.
    x = plgpu.load(ref.at[pl.ds(offset, SCALE_BLOCK)].T, layout=layout)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    return jnp.where(row < size, x, jnp.zeros((), x.dtype))

  @plgpu.inline_mgpu(
    arg_types=(
      _SWIZZLED,
      plgpu.RefType(),
      plgpu.Layout.WG_SPLAT,
      plgpu.Layout.WG_SPLAT,
    ),
    return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
  )
  def load(_, ref, zeros, offset, size):
    # Each quarter of a warp addresses the rows of an 8x8 matrix: 8 of the
    # warp's 16 columns, the others, and both again 8 rows further on.
    thread = utils.thread_idx()
    lane, warp = _rem(thread, 32), _rem(_div(thread, 32), 4)
    row = arith.addi(_rem(lane, 8), _mul(_div(lane, 16), 8))
    chunk = arith.addi(_mul(warp, 2), _rem(_div(lane, 8), 2))
    offset, size = (x.registers.item() for x in (offset, size))
    pointer = _chunk_pointer(ref, arith.addi(offset, row), chunk)
    zeros = utils.memref_ptr(zeros)

    vector = ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    matrices = registers.reshape(SCALE_BLOCK // 16, 4)  # A view.
    for i in range(len(matrices)):
      left = arith.subi(size, _const(16 * i))
      exists = arith.cmpi(arith.CmpIPredicate.slt, row, left)
      four = nvvm.ldmatrix(
        llvm.select(exists, _advance(pointer, 16 * _ROW_BYTES * i), zeros),
        layout=nvvm.MMALayout.col,
        num=4,
        shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
        elt_type=nvvm.LdStMatrixEltType.B16,
      )
      for j in range(4):
        matrix = llvm.extractvalue(ir.IntegerType.get_signless(32), four, [j])
        matrices[i, j] = utils.bitcast(matrix, vector)
    return mgpu.FragmentedArray(
      _registers=registers, _layout=layout.to_mgpu(), _is_signed=None
    )

  return load(ref, zeros, offset, size)


def halves_layout():
  """Registers of (rows, 128): a quarter warp has a row, each thread 8 + 8."""
  return plgpu.Layout.TILED(
    plgpu.Tiling(((_STEP, 128), (4, 64), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
  )


def load_rows(left, right, row, num_rows: int, interpret: bool):
  """Reads rows [row, row + num_rows) of [left, right] as (num_rows, 128).

  In halves_layout, from two refs as load_transposed reads them.
  """
  if interpret:  # It cannot run what is inlined.
    rows = pl.ds(row, num_rows)
    return jnp.concatenate([left[rows], right[rows]], axis=1)
  layout, shape = halves_layout(), (num_rows, SCALE_BLOCK)

  @plgpu.inline_mgpu(
    arg_types=(_SWIZZLED, _SWIZZLED, plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct(shape, left.dtype, layout=layout),
  )
  def load(_, left, right, row):
    # A quarter of a warp reads 128 bytes: all banks once.
    thread_row, lane = _place()
    row = arith.addi(row.registers.item(), thread_row)
    vector = ir.VectorType.get((8,), ir.MemRefType(left.type).element_type)
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    halves = registers.reshape(num_rows // _STEP, 2)  # A view.
    for j, ref in enumerate((left, right)):
      pointer = _chunk_pointer(ref, row, lane)
      for i in range(len(halves)):
        halves[i, j] = llvm.load(
          vector, _advance(pointer, _STEP * _ROW_BYTES * i), alignment=16
        )
    return mgpu.FragmentedArray(
      _registers=registers, _layout=layout.to_mgpu(), _is_signed=None
    )

  return load(left, right, row)


def store_rows(
  values_gmem, scales_gmem, values, scales, *, row, block, size, interpret: bool
):
  """Stores the first `size` rows of values (rows, 128), and their scales.

  Values in halves_layout go to row `row` and column block `block`; size may be
  less than none, or more than there are. TMA would store all rows.
  """
  num_rows = values.shape[0]
  cols = pl.ds(block * SCALE_BLOCK, SCALE_BLOCK)
  if interpret:  # It cannot run what is inlined. Each bit of size in turn:
    size = jnp.clip(size, 0, num_rows)
    for i in range(num_rows.bit_length()):
      first, count = size >> (i + 1) << (i + 1), 1 << i

      @pl.when(size & count != 0)
      def _(first=first, count=count):
        part = lambda x: lax.dynamic_slice_in_dim(x, first, count)
        rows = pl.ds(row + first, count)
        values_gmem[rows, cols] = part(values)
        scales_gmem[block, rows] = part(scales)

    return
  layout, stride = halves_layout(), values_gmem.shape[1]
  splat = plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.RefType(),
      layout,
      layout.reduce(1),
      splat,
    )
  )
  def store(_, values_gmem, scales_gmem, values, scales, size):
    thread_row, lane = _place()
    left = arith.subi(size.registers.item(), thread_row)
    is_first_lane = arith.cmpi(arith.CmpIPredicate.eq, lane, _const(0))
    place = arith.addi(_mul(thread_row, stride), _mul(lane, 8))
    values_pointer = _advance(_gmem_pointer(values_gmem), place)
    scales_pointer = _advance(_gmem_pointer(scales_gmem), _mul(thread_row, 4))
    i64 = ir.IntegerType.get_signless(64)
    halves = values.registers.reshape(num_rows // _STEP, 2)
    for i, scale in enumerate(scales.registers.flat):
      exists = arith.cmpi(arith.CmpIPredicate.sgt, left, _const(_STEP * i))
      with utils.when(exists):
        for j in range(2):
          pointer = _advance(values_pointer, _STEP * stride * i + 64 * j)
          llvm.store(utils.bitcast(halves[i, j], i64), pointer)
      with utils.when(arith.andi(exists, is_first_lane)):
        llvm.store(scale, _advance(scales_pointer, 4 * _STEP * i))

  rows = pl.ds(row, num_rows)
  store(
    values_gmem.at[rows, cols],
    scales_gmem.at[block, rows],
    values,
    scales,
    size,
  )


def _gmem_pointer(ref):
  gmem = llvm.PointerType.get(address_space=1)
  return llvm.addrspacecast(gmem, utils.memref_ptr(ref))


def _place():
  """Returns this thread's row and its number in it, as halves_layout has it."""
  thread = utils.thread_idx()
  return _rem(_div(thread, 8), _STEP), _rem(thread, 8)


def _chunk_pointer(ref, row, chunk):
  """Returns where 16 bytes are in a swizzled buffer. Rows are in 8 chunks."""
  place = arith.xori(chunk, _rem(row, 8))
  byte = arith.addi(_mul(row, _ROW_BYTES), _mul(place, 16))
  return _advance(utils.memref_ptr(ref), byte)


def _advance(pointer, num_bytes):
  """Whole tiles of 8 rows further on, rows are swizzled alike."""
  i8 = ir.IntegerType.get_signless(8)
  return utils.getelementptr(pointer, [num_bytes], i8)


def _const(value: int):
  return utils.c(value, ir.IntegerType.get_signless(32))


def _div(x, value: int):
  return arith.divui(x, _const(value))


def _rem(x, value: int):
  return arith.remui(x, _const(value))


def _mul(x, value: int):
  return arith.muli(x, _const(value))

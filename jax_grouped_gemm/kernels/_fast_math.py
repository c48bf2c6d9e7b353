"""What the hardware has an instruction for, and Mosaic makes several of."""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jax_grouped_gemm.kernels._activations import XLA_OPS, Ops

_LOG2_E = 1.4426950408889634


def fast_math(layout, interpret: bool) -> Ops:
  """Returns functions of float32 arrays in registers of the layout.

  To some 2 units, subnormal numbers as zero. Results are rounded to bfloat16
  in pairs: one by one, they would wait for the exponential function's unit.
  """
  if interpret:  # It cannot run what is inlined.
    return XLA_OPS

  def elementwise(op, dtype=jnp.float32):
    def apply(x):
      @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, layout=layout),
      )
      def inlined(_, x):
        return x._pointwise(op)

      return inlined(x)

    return apply

  instruction = mgpu.FragmentedArray._lift_fast_instr
  exp2 = elementwise(instruction("ex2.approx.ftz.f32"))
  round_bf16 = elementwise(_round_pairs, jnp.bfloat16)

  def round(x, dtype):
    return round_bf16(x) if dtype == jnp.bfloat16 else x.astype(dtype)

  return Ops(
    exp=lambda x: exp2(x * _LOG2_E),
    reciprocal=elementwise(instruction("rcp.approx.ftz.f32")),
    round=round,
  )


def _round_pairs(register: ir.Value) -> ir.Value:
  """Rounds a vector of float32 to bfloat16."""
  i32 = ir.IntegerType.get_signless(32)
  pair = ir.VectorType.get((2,), ir.BF16Type.get())
  [length] = ir.VectorType(register.type).shape
  pieces = []
  for i in range(0, length, 2):
    low, high = (
      llvm.extractelement(register, utils.c(j, i32)) for j in (i, i + 1)
    )
    bits = llvm.inline_asm(
      i32, [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"
    )
    pieces.append(utils.bitcast(bits, pair))
  return utils.vector_concat(pieces)

"""What the GEMM kernels share: the pipeline over k slices, and the launch."""

import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jaxlib.mlir.dialects import llvm

from jax_grouped_gemm.config import WGMMA_M, Config

# Registers of a thread that loads and of one that multiplies, by compute_wgs.
# An SM has 65536: 512 for the threads of one index in their warpgroups.
_REGS = {2: (40, 232), 3: (32, 160)}

Ref = Any  # Pallas refs have no public type that supports `.at`.


def load_slices(empty: Ref, num_stages: int, k_iters, step, load_slice):
  """Calls load_slice(ki, slot) for each k slice once its slot is empty.

  `step` counts the slices of all tiles and so tells the slot. Returns the step
  after the tile.
  """

  def load_next(ki, step):
    slot = lax.rem(step, num_stages)

    @pl.when(step >= num_stages)
    def wait_empty():
      plgpu.barrier_wait(empty.at[slot])
      # Orders the reads of the slot's scales before the TMA writes to come.
      # Here, and not where they are read, it costs nothing (NOTES.md).
      plgpu.commit_smem()

    load_slice(ki, slot)
    return step + 1

  return lax.fori_loop(0, k_iters, load_next, step)


def load_operands(
  config: Config, lhs, lhs_slot, rhs, rhs_slot, full, one_group
):
  """Loads a k slice of both operands, shared in the cluster as config says.

  `one_group`: whether all of its CTAs multiply by the same columns of rhs.
  """
  multicast = config.multicast if config.cluster > 1 else None

  def copy(src, dst, is_shared=False):
    axes = "cta" if is_shared else None
    plgpu.copy_gmem_to_smem(src, dst, full, collective_axes=axes)

  copy(lhs, lhs_slot, multicast == "lhs")
  if multicast == "rhs":
    pl.when(one_group)(lambda: copy(rhs, rhs_slot, is_shared=True))
    pl.when(~one_group)(lambda: copy(rhs, rhs_slot))
  else:
    copy(rhs, rhs_slot)


def skip_slices(refs, num_stages: int, k_iters, step):
  """Releases the slots of a tile that the warpgroup has nothing to do with."""

  @pl.loop(0, k_iters)
  def release_slot(ki):
    slot = lax.rem(step + ki, num_stages)
    plgpu.barrier_wait(refs.full.at[slot])
    plgpu.barrier_arrive(refs.empty.at[slot])


def drain(empty: Ref, num_slots: int, steps):
  """Waits until every slot used in `steps` steps has been released.

  Then nothing is under way any more that a CTA of the cluster could still write
  to this one, or that this one still has to read.
  """

  def wait_empty(i, _):
    step = jnp.maximum(steps - num_slots, 0) + i
    plgpu.barrier_wait(empty.at[lax.rem(step, num_slots)])
    return 0

  lax.fori_loop(0, jnp.minimum(steps, num_slots), wait_empty, 0)


def _fresh_zeros(shape):
  """Zeros that the assembler sees are zeros, wherever the compiler puts them.

  The first product of a slice then ignores its accumulator for free. The zeros
  of plgpu.ACC are one constant in all slices of an unrolled loop, and all but
  one of its copies cost a move per register.
  """

  @plgpu.inline_mgpu(
    return_type=plgpu.ShapeDtypeStruct(
      shape, jnp.float32, layout=plgpu.Layout.WGMMA
    )
  )
  def zeros(_):
    zero = llvm.inline_asm(
      ir.F32Type.get(), [], "mov.b32 $0, 0;", "=f", has_side_effects=True
    )
    return mgpu.FragmentedArray.splat(zero, shape, layout=mgpu.WGMMA_LAYOUT)

  return zeros()


def warpgroup_rows():
  """Rows of a CTA's tile that this warpgroup computes."""
  return pl.ds(lax.axis_index("wg") * WGMMA_M, WGMMA_M)


def start_products(refs, tile_n: int, slot, interpret: bool):
  """Starts the products of the slot, the warpgroup's (64, tile_n), unscaled.

  What it returns is right only after the next wgmma_wait.
  """
  rows = warpgroup_rows()

  def wgmma(acc):
    if not interpret:  # It cannot run inline assembly.
      acc[...] = _fresh_zeros(acc.shape)
    plgpu.wgmma(acc, refs.lhs_smem.at[slot, rows], refs.rhs_smem.at[slot].T)
    return plgpu.wgmma_accumulator_load(acc, wait_n=None)

  return pl.run_scoped(wgmma, plgpu.ACC((WGMMA_M, tile_n)))


def accumulate(
  refs, tile_n: int, k_iters, step, *, load_scales, promote, init, interpret
):
  """Returns promote(... promote(init, products, scales) ...) over k_iters >= 1.

  The products are the warpgroup's (64, tile_n) of one k slice, whose scales
  load_scales(slot, ki) returns. While they run on the tensor cores, the next
  slice is awaited and their scales are loaded. So little more than the
  promotion stands between the end of a slice's products and the start of the
  next ones, and the address arithmetic of those hides beneath it.

  The tensor cores are always busy if one warpgroup promotes while the products
  of the other run. Those that start together share the tensor cores, end
  together and stay so. So in each tile a warpgroup starts when the first
  products of the one before it have ended.
  """
  num_stages = refs.lhs_smem.shape[0]
  first_slot = lax.rem(step, num_stages)
  wg, turns = lax.axis_index("wg"), refs.turn.shape[0] // num_stages
  # What a warpgroup waits for, and what it tells the next one.
  turn = refs.turn.at[first_slot * turns + jnp.maximum(wg - 1, 0)]
  next_turn = refs.turn.at[first_slot * turns + jnp.minimum(wg, turns - 1)]

  def start(slot):
    return start_products(refs, tile_n, slot, interpret)

  def finish(slot, acc, products, scales, is_first):
    plgpu.wgmma_wait(0)
    products = lax.optimization_barrier(products)  # No use before the wait.
    if is_first:
      pl.when(wg < turns)(lambda: plgpu.barrier_arrive(next_turn))
    plgpu.barrier_arrive(refs.empty.at[slot])
    return lax.optimization_barrier(promote(acc, products, scales))

  def compute_slice(ki, carry, is_first=False):
    slot, acc, products = carry
    next_slot = lax.select(slot == num_stages - 1, 0, slot + 1)
    # First, so that no load slips in between the products' instructions.
    plgpu.barrier_wait(refs.full.at[next_slot])
    acc = finish(slot, acc, products, load_scales(slot, ki), is_first)
    return next_slot, acc, start(next_slot)

  def compute_two_slices(i, carry):
    return compute_slice(2 * i + 2, compute_slice(2 * i + 1, carry))

  def compute_last_slice(carry, is_first=False):
    slot, acc, products = carry
    return finish(slot, acc, products, load_scales(slot, k_iters - 1), is_first)

  def compute_more_slices(carry):
    carry = compute_slice(jnp.int32(0), carry, is_first=True)
    if not isinstance(k_iters, int):  # In pairs, K-grouped spills registers.
      carry = lax.fori_loop(1, k_iters - 1, compute_slice, carry)
      return compute_last_slice(carry)
    carry = lax.fori_loop(0, (k_iters - 2) // 2, compute_two_slices, carry)
    if k_iters % 2 == 1:
      carry = compute_slice(jnp.int32(k_iters - 2), carry)
    return compute_last_slice(carry)

  pl.when(wg > 0)(lambda: plgpu.barrier_wait(turn))
  plgpu.barrier_wait(refs.full.at[first_slot])
  return _cond(
    k_iters == 1,
    functools.partial(compute_last_slice, is_first=True),
    compute_more_slices,
    (first_slot, init, start(first_slot)),
  )


def _cond(pred, if_true, if_false, operand):
  """lax.cond, decided now if pred is known."""
  if isinstance(pred, bool):
    return if_true(operand) if pred else if_false(operand)
  return lax.cond(pred, if_true, if_false, operand)


def load_row_scales(scales_smem: Ref, slot):
  """Returns the scale of each of the warpgroup's 64 rows of the slot."""
  return plgpu.load(
    scales_smem.at[slot, warpgroup_rows()],
    layout=plgpu.Layout.WGMMA.reduce(1),
  )


def wgmma_zeros(shape):
  """Zeros in the registers' layout of wgmma accumulators."""
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def empty_barriers(config: Config):
  """One barrier a slot, with an arrival per compute warpgroup of the cluster.

  A slot that both CTAs of a cluster write into is empty when both have read it.
  """
  if config.cluster == 1:
    return plgpu.Barrier(
      num_arrivals=config.compute_wgs, num_barriers=config.num_stages
    )
  return plgpu.ClusterBarrier(
    collective_axes=("cta",),
    num_arrivals=config.compute_wgs,
    num_barriers=config.num_stages,
  )


def turn_barriers(config: Config):
  """See accumulate. For each slot: its next use comes after the wait for it."""
  return plgpu.Barrier(
    num_barriers=config.num_stages * (config.compute_wgs - 1)
  )


def launch(load, compute, *, name, config, interpret, refs_type, **types):
  """Returns the kernel as a function of its operands, one CTA per processor.

  The loading warpgroup runs `load(refs)`, which returns the number of slots it
  filled; the two others run `compute(refs)`.
  """

  load_regs, compute_regs = _REGS[config.compute_wgs]

  def kernel(*operands_and_out, **scratch):
    refs = refs_type(*operands_and_out, **scratch)
    wg = lax.axis_index("wg")

    @pl.when(wg == config.compute_wgs)
    def load_warpgroup():
      plgpu.set_max_registers(load_regs, action="decrease")
      drain(refs.empty, config.num_stages, load(refs))

    @pl.when(wg < config.compute_wgs)
    def compute_warpgroup():
      plgpu.set_max_registers(compute_regs, action="increase")
      compute(refs)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  return plgpu.kernel(
    kernel,
    grid=((config.num_sms or num_sms()) // config.cluster,),
    grid_names=("sm",),
    cluster=(config.cluster,),
    cluster_names=("cta",),
    num_threads=config.compute_wgs + 1,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(
      # full/empty above order every SMEM access, so none need be inserted.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    kernel_name=name,
    interpret=plgpu.InterpretGPUParams() if interpret else None,
    **types,
  )


def num_sms() -> int:
  """Processors of the GPU at hand; those of an H100 or H200 without one."""
  device = jax.devices()[0]
  return device.core_count if device.platform == "gpu" else 132

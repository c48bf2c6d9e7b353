"""What the GEMM kernels share: slots between load and compute; the launch."""

import functools
import os
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun

from jax_grouped_gemm.config import WGMMA_M, Config
from jax_grouped_gemm.kernels import _claims, _order

# Registers of a thread that loads and of one that multiplies, by compute_wgs.
# An SM has 65536: 512 for the threads of one index in their warpgroups.
_REGS = {1: (40, 232), 2: (40, 232), 3: (32, 160)}
NUM_SMS_VARIABLE = "JAX_GROUPED_GEMM_NUM_SMS"
_LEAST_SMS = 2  # of a cluster.

Ref = Any  # Pallas refs have no public type that supports `.at`.


def load_slices(
  refs, num_stages: int, k_iters, step, load_slice, beside, burst: int = 1
):
  """Calls load_slice(ki, slot) for each k slice once its slot is empty.

  `step` counts the slices of all tiles and so tells the slot. Returns the step
  after the tile. Meanwhile a second warp runs beside(). Slices are loaded in
  bursts, each once all of its slots are empty: they are neighbours in memory.
  """

  def load_next(i, _):
    slices = [i * burst + j for j in range(burst)]
    slots = [lax.rem(step + ki, num_stages) for ki in slices]
    exist = [ki < k_iters for ki in slices]
    for ki, slot, exists in zip(slices, slots, exist, strict=True):
      used = (step + ki >= num_stages) & exists

      @pl.when(used)
      def wait_empty(slot=slot):
        plgpu.barrier_wait(refs.empty.at[slot])
        _order.fence_copies(refs.interpret)

    for ki, slot, exists in zip(slices, slots, exist, strict=True):
      load = functools.partial(load_slice, ki, slot)
      pl.when(exists)(load) if burst > 1 else load()
    return 0

  bursts = pl.cdiv(k_iters, burst)
  on_warps(lambda: lax.fori_loop(0, bursts, load_next, 0), beside)
  return step + k_iters


def on_warps(*fns):
  """Runs the functions side by side, each on a warp of its own.

  All four warps would issue all of it four times. A barrier is to be waited for
  by the same warps always: each knows only of its own waits.
  """

  def run(warp):
    for i, fn in enumerate(fns):

      @pl.when(warp == i)
      def run_one(fn=fn):
        fn()

  plgpu.warp_map(run)


def on_second_warp(fn):
  """Runs fn() on the warp beside the loading one."""
  on_warps(lambda: None, fn)


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
    pl.when(one_group == False)(lambda: copy(rhs, rhs_slot))  # noqa: E712
  else:
    copy(rhs, rhs_slot)


def skip_slices(refs, num_stages: int, k_iters, step):
  """Releases the slots of a tile that the warpgroup has nothing to do with."""

  @pl.loop(0, k_iters)
  def release_slot(ki):
    slot = lax.rem(step + ki, num_stages)
    plgpu.barrier_wait(refs.full.at[slot])
    # No warp is to fall a round behind the one that releases.
    _order.meet_warps(refs.interpret)
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


def wgmma_zeros(shape):
  """Zeros in the registers' layout of wgmma accumulators."""
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def warpgroup_rows():
  """Rows of a CTA's tile that this warpgroup computes."""
  return pl.ds(lax.axis_index("wg") * WGMMA_M, WGMMA_M)


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


def launch(load, compute, *, name, config, interpret, refs_type, **types):
  """Returns the kernel as a function of its operands, one CTA per processor.

  The loading warpgroup runs `load(refs)`, which returns the number of slots it
  filled; the others run `compute(refs)`. With several out_types, the function
  returns the first of them. With out_type=() the last operand is what out
  starts as, and its memory is that of out if nobody needs it any more.
  """

  load_regs, compute_regs = _REGS[config.compute_wgs]

  clusters = num_clusters(config)

  def kernel(*operands_and_out, **scratch):
    if config.dynamic:
      *operands, scratch["claims_gmem"], out = operands_and_out
      operands_and_out = *operands, out
    refs = refs_type(*operands_and_out, **scratch, interpret=interpret)
    wg = lax.axis_index("wg")

    @pl.when(wg == config.compute_wgs)
    def load_warpgroup():
      plgpu.set_max_registers(load_regs, action="decrease")
      steps = load(refs)
      on_warps(lambda: drain(refs.empty, config.num_stages, steps))

    @pl.when(wg < config.compute_wgs)
    def compute_warpgroup():
      plgpu.set_max_registers(compute_regs, action="increase")
      compute(refs)

  kernel = plgpu.kernel(
    kernel,
    grid=(clusters,),
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

  def run(*operands):
    out = []
    if not types["out_type"]:
      *operands, out = operands
      out = [jax.new_ref(out)]
    if config.dynamic:
      operands = *operands, jax.new_ref(_claims.counter(clusters))
    result = kernel(*operands, *out)
    return jax.freeze(*out) if out else result

  @sequential_vmap  # The problems of a batch would draw each other's tiles.
  def call(*operands):
    # Traced as if operands were the same on all devices of jax.shard_map:
    # warp_map refuses refs that say they are not (jax 0.11.2).
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    with jax.enable_x64(False):  # Kernels count in Python's and 32-bit numbers.
      jaxpr = jax.make_jaxpr(run)(*shapes)
    out, *_ = jaxpr_as_fun(jaxpr)(*operands)
    return out

  return call


def compute_once(out):
  """Returns a kernel's results, for XLA to let them be.

  Where jax.lax.scan stacks what is also used otherwise, such as residuals of a
  layer, XLA (jax 0.11.2) runs the kernel twice, once to write to the stack.
  """
  return lax.optimization_barrier(out)


def num_clusters(config) -> int:
  """Clusters of CTAs that are launched."""
  return (config.num_sms or num_sms()) // config.cluster


def num_sms() -> int:
  """Processors of the GPU at hand; those of an H100 or H200 without one.

  The environment variable JAX_GROUPED_GEMM_NUM_SMS, read when a kernel is
  traced, makes them fewer, so that what runs beside the kernels finds some.
  """
  device = jax.devices()[0]
  count = device.core_count if device.platform == "gpu" else 132
  most = os.environ.get(NUM_SMS_VARIABLE, str(count))
  if not most.isdecimal() or int(most) < _LEAST_SMS:
    raise ValueError(
      f"{NUM_SMS_VARIABLE} must be a number from {_LEAST_SMS} on, got {most!r}"
    )
  return min(int(most), count)

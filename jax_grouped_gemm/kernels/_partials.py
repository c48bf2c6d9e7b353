"""Sums over half of k each: the cluster's first CTA adds those of the second.

Two sums have one order only, so the result is the same every time. They go
through GMEM, where they stay in L2.
"""

import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.kernels import _order


def scratch_types(config):
  """The scratch that the functions below expect in refs."""
  # An arrival of each CTA: a barrier of the cluster's is one in both of them.
  kinds = dict(collective_axes=("cta",), num_barriers=config.compute_wgs)
  return dict(
    partial_full=plgpu.ClusterBarrier(**kinds),
    partial_empty=plgpu.ClusterBarrier(**kinds),
  )


def pass_on(refs, i, sums):
  """On the second CTA: hands on its sums of the i-th tile."""
  wg = lax.axis_index("wg")
  wait_taken(refs, i)
  _store(_partial(refs), sums, refs.interpret)
  _order.fence_cluster(refs.interpret)
  plgpu.barrier_arrive(refs.partial_empty.at[wg])
  plgpu.barrier_arrive(refs.partial_full.at[wg])


def wait_taken(refs, i):
  """On the second CTA: waits until the sums of i tiles have been taken.

  Before the end, too: the first CTA arrives at barriers of this one.
  """
  pl.when(i > 0)(functools.partial(_wait, refs.partial_full))
  pl.when(i > 0)(functools.partial(_wait, refs.partial_empty))


def add(refs, sums):
  """On the first CTA: returns sums + those of the second CTA."""
  wg = lax.axis_index("wg")
  plgpu.barrier_arrive(refs.partial_full.at[wg])
  _wait(refs.partial_full)
  _order.fence_cluster(refs.interpret)
  layout = plgpu.Layout.WGMMA
  sums += plgpu.load(_partial(refs), layout=layout, optimized=False)
  _order.fence_cluster(refs.interpret)
  plgpu.barrier_arrive(refs.partial_empty.at[wg])
  _wait(refs.partial_empty)  # The other one has arrived before.
  return sums


def _partial(refs):
  return refs.partials_gmem.at[lax.axis_index("sm"), lax.axis_index("wg")]


def _store(ref, value, interpret: bool):
  """Writes to GMEM, which `ref[...] = value` cannot (jax 0.11.2)."""
  if interpret:  # It cannot run what is inlined.
    ref[...] = value
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
  def store(_, ref, value):
    value.store_untiled(ref, optimized=False)

  store(ref, value)


def _wait(barriers):
  plgpu.barrier_wait(barriers.at[lax.axis_index("wg")])

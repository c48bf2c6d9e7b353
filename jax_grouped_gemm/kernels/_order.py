"""What orders the reads of a slot of SMEM before TMA writes to it again.

Wgmma reads are in order once they have been waited for. For plain reads the
warps of a warpgroup must have met before the first one alone releases a slot of
a cluster, and the loading warp needs a fence before its copies. commit_smem
does both at a time, but in the main loop, where it also waits for memory, that
costs 2 % (H200).
"""

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm


def meet_warps(interpret: bool):
  """Waits for all warps of the warpgroup."""
  if interpret:  # It runs a warpgroup as one, and cannot run what is inlined.
    return

  @plgpu.inline_mgpu()
  def meet(_):
    utils.warpgroup_barrier()

  meet()


def fence_copies(interpret: bool):
  """Orders what was waited for, reads by others too, before copies to SMEM."""
  if interpret:  # It cannot run what is inlined.
    plgpu.commit_smem()
    return

  @plgpu.inline_mgpu()
  def fence(_):
    nvvm.fence_proxy(
      nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta
    )

  fence()


def fence_cluster(interpret: bool):
  """Orders what the warpgroup does to GMEM with what another CTA does.

  One stands on either side of a barrier of the cluster: before the arrival,
  where all warps must have met, and after the wait, where reads might otherwise
  come from a cache of this processor.
  """
  if interpret:  # It cannot run what is inlined.
    return

  @plgpu.inline_mgpu()
  def fence(_):
    llvm.inline_asm(
      ir.Type.parse("!llvm.void"),
      [],
      "fence.acq_rel.cluster;",
      "~{memory}",
      has_side_effects=True,
    )
    utils.warpgroup_barrier()

  fence()

"""Compiles for an H100 on a machine without a GPU."""

import functools
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# XLA's description of the GPU to compile for, in its text form.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def devices(count: int):
  """Returns the devices of a host with `count` H100s."""
  return topologies.get_topology_desc(
    "", platform="cuda", topology=f"1x1x{count}", target_config=_H100
  ).devices


@functools.cache
def _sharding():
  mesh = Mesh(np.array(devices(1)).reshape(1), ("x",))
  return NamedSharding(mesh, PartitionSpec())


def compile_for_hopper(fn, *args, **options):
  """Compiles jit(fn, **options) for an H100; `args` are arrays or shapes."""
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding()), args
  )
  traced = jax.jit(fn, **options).trace(*args)
  return traced.lower(lowering_platforms=("cuda",)).compile()


def spilled_bytes(ptxas_report: str) -> list[int]:
  """Returns the bytes of registers that each kernel in the report spills.

  The report is what MOSAIC_GPU_DUMP_PTXAS=1 prints.
  """
  spills = re.findall(r"(\d+) bytes spill stores", ptxas_report)
  return [int(spill) for spill in spills]

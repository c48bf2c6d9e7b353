"""From quantised arrays to the operands of the kernels, and their calls."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import (
  ROW_ALIGN,
  SCALE_BLOCK,
  Config,
  SmallGroupsConfig,
)
from jax_grouped_gemm.kernels import m_grouped, small_groups
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.scaled_array import ScaledArray


def m_grouped_kernel(config: Config | SmallGroupsConfig):
  """Returns the M-grouped kernel that the config is for."""
  if isinstance(config, SmallGroupsConfig):
    return small_groups.small_groups_gemm
  return m_grouped.m_grouped_gemm


@functools.partial(
  jax.jit,
  static_argnames=("kernel", "out_dtype", "config", "masked", "interpret"),
)
def run_kernel(kernel, lhs, rhs, *operands, interpret: bool, **static):
  """Calls the kernel with operands (m, k), (.., n, k) as it reads them."""
  values = stored_values(lhs)
  out = kernel(
    values if interpret else implementations.cuda_only(values),
    lhs.scales,
    stored_values(rhs),
    rhs.scales,
    *operands,
    m=lhs.shape[0],
    n=rhs.shape[-2],
    interpret=interpret,
    **static,
  )
  # Pallas calls the results of kernels the same on all devices (jax 0.11.2).
  return vary_alike(out, values)[0]


def stored_values(x: ScaledArray) -> Array:
  """Returns the values as kernels read them; copies if stored otherwise."""
  *batch, rows, cols = x.values.shape
  missing_cols = x.shape[-1] + -x.shape[-1] % SCALE_BLOCK - cols
  missing = [(0, 0, 0)] * len(batch) + [
    (0, -rows % ROW_ALIGN, 0),
    (0, missing_cols, 0),
  ]
  return jax.lax.pad(x.values, jnp.zeros((), x.dtype), missing)

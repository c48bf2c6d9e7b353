"""Grouped GEMMs: checks the call, then picks what computes it.

Nothing here is differentiable; ragged_dot is.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from jax_grouped_gemm import checks, manual_axes, schedule
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import SCALE_BLOCK, Config, SmallGroupsConfig
from jax_grouped_gemm.group_sizes import check_group_sizes
from jax_grouped_gemm.kernels import k_grouped, reference, tuning
from jax_grouped_gemm.launch import m_grouped_kernel, run_kernel
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.scaled_array import ScaledArray
from jax_grouped_gemm.undifferentiable import gemm_operands


def m_grouped_gemm(
  lhs: ScaledArray,
  rhs: ScaledArray,
  group_sizes: Int[Array, "g_all"],
  *,
  bias: Float[Array, "g n"] | None = None,
  preferred_element_type: DTypeLike = jnp.bfloat16,
  group_offset: Int[Array, "1"] | None = None,
  config: Config | SmallGroupsConfig | None = None,
  implementation: str | None = None,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[g].T + bias[g], g the group of r.

  lhs (m, k), rhs (g, n, k), bias (g, n) -> (m, n). The rows of a group follow
  those of the group before it. Rows at or past the sum of the sizes are zero,
  as are rows of groups that rhs does not hold.

  Args:
    lhs: blocks of (1, 128).
    rhs: blocks of (1, 128, 128).
    group_sizes: rows of each group. A negative size counts as 0, and what lies
      beyond m is cut off.
    bias: floats, added in float32 before the result is rounded. None: none.
    preferred_element_type: dtype of the result; sums are float32.
    group_offset: the first of the groups in group_sizes that rhs holds.
    config: choices of the kernel launch, SmallGroupsConfig for few rows per
      group; None looks them up.
    implementation: "mosaic_gpu", "xla" or "interpret"; None: "mosaic_gpu" on a
      Hopper GPU if the kernel supports the problem, else "xla".
  """
  lhs = checks.check_scaled("lhs", lhs, ("m", "k"), (1, SCALE_BLOCK))
  rhs = checks.check_scaled(
    "rhs", rhs, ("g", "n", "k"), (1, SCALE_BLOCK, SCALE_BLOCK)
  )
  (m, k), (g, n, rhs_k) = lhs.shape, rhs.shape
  if k != rhs_k:
    raise ValueError(
      f"lhs (m, k) and rhs (g, n, k) must have one k, got {lhs.shape} and "
      f"{rhs.shape}"
    )
  group_sizes, group_offset = check_group_sizes(group_sizes, m, g, group_offset)
  bias = checks.check_bias("bias", bias, (g, n))
  out_dtype = checks.check_out_dtype(preferred_element_type)
  checks.check_m_grouped_config(config, out_dtype, k)
  implementation = implementations.choose(
    implementation,
    checks.unsupported_by_kernels({"k": k, "n": n}, out_dtype),
  )
  lhs, rhs, bias = gemm_operands("m_grouped_gemm", lhs, rhs, bias)
  lhs, rhs, group_sizes, group_offset, bias = vary_alike(
    lhs, rhs, group_sizes, group_offset, bias
  )
  if m * n == 0:
    return manual_axes.zeros((m, n), out_dtype, lhs.values)
  if implementation == "xla" or k == 0:
    bounds = schedule.group_bounds(group_sizes, m, group_offset, g)
    return reference.m_grouped_gemm(
      lhs, rhs, *bounds, bias, out_dtype=out_dtype
    )
  config = config or tuning.m_grouped_config(m, n, k, g, out_dtype)
  return run_kernel(
    m_grouped_kernel(config),
    lhs,
    rhs,
    schedule.as_int32(group_sizes),
    None if group_offset is None else schedule.as_int32(group_offset),
    bias,
    out_dtype=out_dtype,
    config=config,
    interpret=implementation == "interpret",
  )


def k_grouped_gemm(
  lhs: ScaledArray,
  rhs: ScaledArray,
  group_sizes: Int[Array, "g"],
  *,
  accumulator: Float32[Array, "g m n"] | None = None,
  preferred_element_type: DTypeLike = jnp.float32,
  config: Config | None = None,
  implementation: str | None = None,
) -> Float[Array, "g m n"]:
  """out[g] = accumulator[g] + lhs[:, tokens of g] @ rhs[:, tokens of g].T.

  lhs (m, t_padded), rhs (n, t_padded) -> (g, m, n). A group without tokens
  gives zeros, or its accumulator.

  Args:
    lhs: as quantize_for_k_grouped makes it, blocks of (1, 128).
    rhs: the same, of the same tokens.
    group_sizes: tokens of each group of the operands; of those that were kept,
      if they were made with a group_offset.
    accumulator: is added to the result, and its memory becomes the result's if
      nobody needs it any more: donated to jit, or carried by a loop.
    preferred_element_type: dtype of the result; sums are float32.
    config: as in m_grouped_gemm.
    implementation: as in m_grouped_gemm.
  """
  lhs = checks.check_scaled("lhs", lhs, ("m", "t_padded"), (1, SCALE_BLOCK))
  rhs = checks.check_scaled("rhs", rhs, ("n", "t_padded"), (1, SCALE_BLOCK))
  (m, t), (n, rhs_t), g = lhs.shape, rhs.shape, jnp.size(group_sizes)
  if t != rhs_t or t % SCALE_BLOCK:
    raise ValueError(
      "lhs (m, t_padded) and rhs (n, t_padded) must have one t_padded, a "
      f"multiple of {SCALE_BLOCK}, got {lhs.shape} and {rhs.shape}"
    )
  group_sizes, _ = check_group_sizes(group_sizes, t, g)
  out_dtype = checks.check_out_dtype(preferred_element_type)
  accumulator = checks.check_accumulator(accumulator, (g, m, n))
  checks.check_k_grouped_config(config, out_dtype)
  unsupported = checks.unsupported_by_kernels({"m": m, "n": n}, out_dtype)
  if accumulator is not None and out_dtype != accumulator.dtype:
    unsupported = unsupported or (
      f"adds a float32 accumulator to float32 only, got {out_dtype}"
    )
  implementation = implementations.choose(implementation, unsupported)
  lhs, rhs, accumulator = gemm_operands("k_grouped_gemm", lhs, rhs, accumulator)
  lhs, rhs, group_sizes, accumulator = vary_alike(
    lhs, rhs, group_sizes, accumulator
  )
  bounds = schedule.token_block_bounds(group_sizes, t // SCALE_BLOCK)
  if m * n * t == 0:
    if accumulator is None:
      return manual_axes.zeros((g, m, n), out_dtype, lhs.values)
    return accumulator.astype(out_dtype)
  if implementation == "xla":
    return reference.k_grouped_gemm(
      lhs, rhs, *bounds, accumulator, out_dtype=out_dtype
    )
  return run_kernel(
    k_grouped.k_grouped_gemm,
    lhs,
    rhs,
    *bounds,
    accumulator,
    out_dtype=out_dtype,
    config=config
    or tuning.k_grouped_config(
      m, n, t, g, out_dtype, accumulates=accumulator is not None
    ),
    interpret=implementation == "interpret",
  )

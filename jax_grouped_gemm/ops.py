"""Quantisation and grouped GEMMs: checks the call, then picks what computes it.

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
from jax_grouped_gemm.launch import ROW_ALIGN, m_grouped_kernel, run_kernel
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.scaled_array import ScaledArray

# ---------------------------------------------------------------- quantize


def quantize(
  x: Float[Array, "..."],
  block_shape: tuple[int, ...],
  *,
  dtype: DTypeLike = jnp.float8_e4m3fn,
  power_of_two_scales: bool = False,
  implementation: str | None = None,
) -> ScaledArray:
  """x = values * scales nearly: one scale for each block of `block_shape`.

  A scale is max(|x| of the block, 1e-4) / the largest value of `dtype`, rounded
  up to a power of two if `power_of_two_scales`. Values are rounded to the
  nearest, ties to even. NaN and Inf stay where they are, Inf as NaN if `dtype`
  has none, and do not enter the scale.

  Args:
    x: float32, bfloat16, float16 or float64.
    block_shape: elements along each axis that share a scale.
    dtype: float8_e4m3fn or float8_e5m2.
    power_of_two_scales: rounds scales up, so that they multiply exactly.
    implementation: None or "xla"; kernels for it do not exist yet.
  """
  x, dtype = checks.check_quantize(x, dtype, implementation)
  block_shape = tuple(block_shape)
  if len(block_shape) != x.ndim or any(block < 1 for block in block_shape):
    raise ValueError(
      f"block_shape must have a positive entry for each axis of x {x.shape}, "
      f"got {block_shape}"
    )
  out = reference.quantize(
    x,
    block_shape=block_shape,
    dtype=dtype,
    power_of_two_scales=power_of_two_scales,
  )
  return _pad_storage(out)


def quantize_for_k_grouped(
  x: Float[Array, "t f"],
  group_sizes: Int[Array, "g_all"],
  *,
  dtype: DTypeLike = jnp.float8_e4m3fn,
  power_of_two_scales: bool = False,
  group_offset: Int[Array, "1"] | None = None,
  num_groups: int | None = None,
  implementation: str | None = None,
) -> ScaledArray:
  """x (t, f) tokens x features -> (f, t_padded), an operand of k_grouped_gemm.

  Each group's tokens are padded with zeros to a multiple of 128. t_padded is
  the most that can be needed, whatever the sizes. Scales, (f, t_padded / 128),
  are as quantize makes them. Rows of x of no group are left out.

  Args:
    x: the tokens, sorted by group.
    group_sizes: tokens of each group.
    dtype: as in quantize.
    power_of_two_scales: as in quantize.
    group_offset: first group to keep; needs `num_groups`.
    num_groups: number of groups to keep from there on; others are left out.
    implementation: as in quantize.
  """
  x, dtype = checks.check_quantize(x, dtype, implementation)
  if x.ndim != 2:
    raise ValueError(f"x must be (tokens, features), got shape {x.shape}")
  if (group_offset is None) != (num_groups is None):
    raise ValueError(
      "group_offset and num_groups go together, got "
      f"{group_offset=}, {num_groups=}"
    )
  if num_groups is None:
    num_groups = jnp.size(group_sizes)
  group_sizes, group_offset = check_group_sizes(
    group_sizes, x.shape[0], num_groups, group_offset
  )
  x, group_sizes, group_offset = vary_alike(x, group_sizes, group_offset)
  out = reference.quantize_for_k_grouped(
    x,
    *schedule.group_bounds(group_sizes, x.shape[0], group_offset, num_groups),
    dtype=dtype,
    power_of_two_scales=power_of_two_scales,
  )
  return _pad_storage(out)


def _pad_storage(x: ScaledArray) -> ScaledArray:
  """Pads the values to what the kernels read, so that no call has to."""
  if x.block_shape[-1:] != (SCALE_BLOCK,):
    return x
  aligns = [1] * (x.ndim - 2) + [_row_align(x), SCALE_BLOCK][-x.ndim :]
  padding = tuple(
    -size % align for size, align in zip(x.shape, aligns, strict=True)
  )
  values = jnp.pad(x.values, [(0, count) for count in padding])
  return ScaledArray(values, x.scales, x.block_shape, padding)


def _row_align(x: ScaledArray) -> int:
  """Rows in whole scale blocks too, if they have any, for the sake of x.mT."""
  return max((ROW_ALIGN, *x.block_shape[-2:-1]))


# ---------------------------------------------------------------- GEMMs


def m_grouped_gemm(
  lhs: ScaledArray,
  rhs: ScaledArray,
  group_sizes: Int[Array, "g_all"],
  *,
  preferred_element_type: DTypeLike = jnp.bfloat16,
  group_offset: Int[Array, "1"] | None = None,
  config: Config | SmallGroupsConfig | None = None,
  implementation: str | None = None,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[group of r].T, lhs (m, k), rhs (g, n, k) -> (m, n).

  The rows of a group follow those of the group before it. Rows at or past the
  sum of the sizes are zero, as are rows of groups that rhs does not hold.

  Args:
    lhs: blocks of (1, 128).
    rhs: blocks of (1, 128, 128).
    group_sizes: rows of each group. A negative size counts as 0, and what lies
      beyond m is cut off.
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
  out_dtype = checks.check_out_dtype(preferred_element_type)
  checks.check_m_grouped_config(config, out_dtype, k)
  implementation = implementations.choose(
    implementation,
    checks.unsupported_by_kernels({"k": k, "n": n}, lhs, rhs, out_dtype),
  )
  lhs, rhs, group_sizes, group_offset = vary_alike(
    lhs, rhs, group_sizes, group_offset
  )
  if m * n * k == 0:
    return manual_axes.zeros((m, n), out_dtype, lhs.values)
  if implementation == "xla":
    bounds = schedule.group_bounds(group_sizes, m, group_offset, g)
    return reference.m_grouped_gemm(lhs, rhs, *bounds, out_dtype=out_dtype)
  config = config or tuning.m_grouped_config(m, n, k, g, out_dtype)
  return run_kernel(
    m_grouped_kernel(config),
    lhs,
    rhs,
    schedule.as_int32(group_sizes),
    None if group_offset is None else schedule.as_int32(group_offset),
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
    group_sizes: tokens of each group, those that the operands were made with.
    accumulator: is added to the result.
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
  unsupported = checks.unsupported_by_kernels(
    {"m": m, "n": n}, lhs, rhs, out_dtype
  )
  if accumulator is not None and out_dtype != accumulator.dtype:
    unsupported = unsupported or (
      f"adds a float32 accumulator to float32 only, got {out_dtype}"
    )
  implementation = implementations.choose(implementation, unsupported)
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
    config=config or tuning.k_grouped_config(m, n, t, g),
    interpret=implementation == "interpret",
  )

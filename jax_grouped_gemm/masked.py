"""The grouped GEMM of the masked layout, where each group has its own rows.

Nothing here is differentiable: it is for decoding.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_grouped_gemm import checks, manual_axes, schedule
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import SCALE_BLOCK, Config, SmallGroupsConfig
from jax_grouped_gemm.group_sizes import check_masked_sizes
from jax_grouped_gemm.kernels import reference, tuning
from jax_grouped_gemm.launch import m_grouped_kernel, run_kernel, stored_values
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.scaled_array import ScaledArray
from jax_grouped_gemm.undifferentiable import gemm_operands


def m_grouped_gemm_masked(
  lhs: ScaledArray,
  rhs: ScaledArray,
  group_sizes: Int[Array, "g"],
  *,
  preferred_element_type: DTypeLike = jnp.bfloat16,
  expected_m: int | None = None,
  zero_padding: bool = False,
  config: Config | SmallGroupsConfig | None = None,
  implementation: str | None = None,
) -> Float[Array, "g max_m n"]:
  """out[g, i] = lhs[g, i] @ rhs[g].T for i < group_sizes[g].

  lhs (g, max_m, k), rhs (g, n, k) -> (g, max_m, n). Other rows are left
  unspecified, or are zero with `zero_padding`; what lhs has there changes
  nothing. Weights of empty groups are not read. Shapes do not depend on the
  sizes, so that one compiled call serves all of a decoding loop.

  A max_m that is no multiple of 8 costs the kernels a copy of the result, one
  that quantize did not pad a copy of lhs.

  Args:
    lhs: blocks of (1, 1, 128).
    rhs: blocks of (1, 128, 128).
    group_sizes: rows in use of each group. A negative size counts as 0, one
      beyond max_m as max_m.
    preferred_element_type: dtype of the result; sums are float32.
    expected_m: rows in use of a group on average, from which the kernel's
      choices follow. None: max_m.
    zero_padding: whether the other rows are zeros.
    config: choices of the kernel launch, SmallGroupsConfig for few rows per
      group; None looks them up.
    implementation: as in m_grouped_gemm.
  """
  axes = ("g", "max_m", "k")
  lhs = checks.check_scaled("lhs", lhs, axes, (1, 1, SCALE_BLOCK))
  rhs = checks.check_scaled(
    "rhs", rhs, ("g", "n", "k"), (1, SCALE_BLOCK, SCALE_BLOCK)
  )
  (g, max_m, k), (rhs_g, n, rhs_k) = lhs.shape, rhs.shape
  if (g, k) != (rhs_g, rhs_k):
    raise ValueError(
      "lhs (g, max_m, k) and rhs (g, n, k) must have one g and one k, got "
      f"{lhs.shape} and {rhs.shape}"
    )
  expected_m = checks.check_expected_m(expected_m, max_m)
  group_sizes = check_masked_sizes(group_sizes, max_m, g)
  out_dtype = checks.check_out_dtype(preferred_element_type)
  checks.check_m_grouped_config(config, out_dtype, k)
  implementation = implementations.choose(
    implementation,
    checks.unsupported_by_kernels({"k": k, "n": n}, out_dtype),
  )
  lhs, rhs = gemm_operands("m_grouped_gemm_masked", lhs, rhs)
  lhs, rhs, group_sizes = vary_alike(lhs, rhs, group_sizes)
  if g * max_m * n * k == 0:
    return manual_axes.zeros((g, max_m, n), out_dtype, lhs.values)
  group_sizes = schedule.as_int32(group_sizes)
  if implementation == "xla":
    return reference.m_grouped_gemm_masked(
      lhs, rhs, group_sizes, out_dtype=out_dtype, zero_padding=zero_padding
    )
  config = config or tuning.masked_config(expected_m, n, k, g, out_dtype)
  rows, masked = _rows_of_groups(lhs, bool(zero_padding))
  out = run_kernel(
    m_grouped_kernel(config),
    rows,
    rhs,
    group_sizes,
    None,
    out_dtype=out_dtype,
    config=config,
    masked=masked,
    interpret=implementation == "interpret",
  )
  return out.reshape(g, -1, n)[:, :max_m]


def _rows_of_groups(
  lhs: ScaledArray, zero_padding: bool
) -> tuple[ScaledArray, schedule.Masked]:
  """Returns lhs as (g * rows, k), and which of its rows belong to a group."""
  g, max_m, k = lhs.shape
  values = stored_values(lhs)
  _, rows, k_stored = values.shape
  scales = jnp.pad(lhs.scales, ((0, 0), (0, rows - max_m), (0, 0)))
  flat = ScaledArray(
    values.reshape(g * rows, k_stored),
    scales.reshape(g * rows, -1),
    (1, SCALE_BLOCK),
    (0, k_stored - k),
  )
  return flat, schedule.Masked(rows, max_m, zero_padding)

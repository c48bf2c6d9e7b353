"""Quantisation along tokens: checks the call, then picks what computes it."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_grouped_gemm import checks, schedule
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import ROW_ALIGN, SCALE_BLOCK
from jax_grouped_gemm.group_sizes import check_group_sizes
from jax_grouped_gemm.kernels import quantize_tokens as tokens_kernel
from jax_grouped_gemm.kernels import reference
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.quantization import (
  pad_storage,
  quantize,
  rows_of_kernel,
)
from jax_grouped_gemm.scaled_array import ScaledArray


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
  are as quantize makes them. Rows of x of no group are left out. No gradient:
  ragged_dot has one.

  Args:
    x: the tokens, sorted by group.
    group_sizes: tokens of each group.
    dtype: as in quantize.
    power_of_two_scales: as in quantize.
    group_offset: first group to keep; needs `num_groups`.
    num_groups: number of groups to keep from there on; others are left out.
    implementation: as in m_grouped_gemm. The kernel takes bfloat16 x of a
      multiple of 16 features.
  """
  return _along_tokens(
    x,
    group_sizes,
    False,
    dtype=dtype,
    power_of_two_scales=power_of_two_scales,
    group_offset=group_offset,
    num_groups=num_groups,
    implementation=implementation,
  )[-1]


def quantize_rows_and_tokens(
  x: Float[Array, "t f"], group_sizes: Int[Array, "g_all"], **options
) -> tuple[ScaledArray, ScaledArray]:
  """(quantize(x, (1, 128)), quantize_for_k_grouped(x, group_sizes)), x (t, f).

  The kernel reads x once. In the first result it leaves rows of no group, or of
  none that is kept, as they were in memory.

  Args:
    x: as in quantize_for_k_grouped.
    group_sizes: the same.
    **options: the same.
  """
  return _along_tokens(x, group_sizes, True, **options)


def _along_tokens(
  x,
  group_sizes,
  rows: bool,
  *,
  dtype: DTypeLike = jnp.float8_e4m3fn,
  power_of_two_scales: bool = False,
  group_offset=None,
  num_groups: int | None = None,
  implementation: str | None = None,
) -> tuple[ScaledArray, ...]:
  """Returns quantize_for_k_grouped of x, after quantize of its rows."""
  x, dtype = checks.check_quantize(x, dtype, implementation)
  if x.ndim != 2:
    raise ValueError(f"x must be (tokens, features), got shape {x.shape}")
  if (group_offset is None) != (num_groups is None):
    raise ValueError(
      "group_offset and num_groups go together, got "
      f"{group_offset=}, {num_groups=}"
    )
  implementation = implementations.choose(
    implementation, checks.unsupported_by_quantize_tokens(x)
  )
  if num_groups is None:
    num_groups = jnp.size(group_sizes)
  group_sizes, group_offset = check_group_sizes(
    group_sizes, x.shape[0], num_groups, group_offset
  )
  x, group_sizes, group_offset = vary_alike(x, group_sizes, group_offset)
  bounds = schedule.group_bounds(
    group_sizes, x.shape[0], group_offset, num_groups
  )
  static = dict(dtype=dtype, power_of_two_scales=power_of_two_scales)
  if implementation == "xla" or x.size == 0:
    tokens = reference.quantize_for_k_grouped(x, *bounds, **static)
    results = (pad_storage(tokens),)
    if rows:
      blocks = 1, SCALE_BLOCK
      results = quantize(x, blocks, implementation="xla", **static), *results
    return results
  return _quantize_tokens(
    x, *bounds, rows=rows, interpret=implementation == "interpret", **static
  )


@functools.partial(
  jax.jit,
  static_argnames=("rows", "dtype", "power_of_two_scales", "interpret"),
)
def _quantize_tokens(x, starts, ends, *, rows: bool, interpret: bool, **static):
  """_along_tokens, by the kernel."""
  values, scales, *of_rows = tokens_kernel.quantize_tokens(
    x if interpret else implementations.cuda_only(x),
    *schedule.token_blocks(starts, ends, x.shape[0]),
    rows=rows,
    interpret=interpret,
    **static,
  )
  values, scales, _ = vary_alike(values, scales, x)
  padding = -x.shape[1] % ROW_ALIGN, 0
  tokens = ScaledArray(values, scales.T, (1, SCALE_BLOCK), padding)
  if not rows:
    return (tokens,)
  return rows_of_kernel(*of_rows, x.shape, x), tokens

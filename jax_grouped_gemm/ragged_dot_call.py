"""What is static in a call of ragged_dot, and how it quantises."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_grouped_gemm import checks
from jax_grouped_gemm.kernels.unquantized import Unquantized
from jax_grouped_gemm.quantization import (
  quantize_rows,
  quantize_weights,
  where_supported,
)
from jax_grouped_gemm.quantized_weights import QuantizedWeights
from jax_grouped_gemm.recipe import Recipe
from jax_grouped_gemm.scaled_array import ScaledArray
from jax_grouped_gemm.token_quantization import (
  quantize_for_k_grouped,
  quantize_rows_and_tokens,
)
from jax_grouped_gemm.undifferentiable import undifferentiable


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static in a call of ragged_dot."""

  recipe: Recipe
  implementation: str | None
  unquantized: Unquantized
  out_dtype: jnp.dtype
  lhs_dtype: jnp.dtype
  rhs_dtype: jnp.dtype

  def quantize_weights(self, rhs) -> QuantizedWeights:
    """Returns both copies of rhs."""
    return quantize_weights(
      rhs,
      power_of_two_scales=self.recipe.power_of_two_scales,
      implementation=where_supported(
        self.implementation, checks.unsupported_by_quantize_weights(rhs)
      ),
    )

  def quantize_rows(self, x, dtype: DTypeLike) -> ScaledArray:
    """Returns x for m_grouped_gemm."""
    return quantize_rows(
      x,
      dtype=dtype,
      power_of_two_scales=self.recipe.power_of_two_scales,
      implementation=self.implementation,
    )

  def quantize_tokens(
    self,
    x,
    group_sizes,
    group_offset,
    groups: int,
    dtype: DTypeLike,
    quantize=quantize_for_k_grouped,
  ):
    """Returns x along tokens, for k_grouped_gemm."""
    return quantize(
      x,
      group_sizes,
      dtype=dtype,
      power_of_two_scales=self.recipe.power_of_two_scales,
      group_offset=group_offset,
      num_groups=None if group_offset is None else groups,
      implementation=where_supported(
        self.implementation, checks.unsupported_by_quantize_tokens(x)
      ),
    )

  def quantize_both(
    self, x, group_sizes, group_offset, groups: int, dtype: DTypeLike
  ) -> tuple[ScaledArray, ScaledArray]:
    """Returns both, of one read of x where the kernel runs."""
    args = x, group_sizes, group_offset, groups, dtype
    if checks.unsupported_by_quantize_tokens(x) is not None:
      return self.quantize_rows(x, dtype), self.quantize_tokens(*args)
    return self.quantize_tokens(*args, quantize=quantize_rows_and_tokens)


def differentiable_once(x):
  """Returns x; NotImplementedError where a gradient is differentiated."""
  return undifferentiable(
    "with FP8 products there are first-order gradients only; Recipe.bf16() has "
    'higher ones, with implementation="xla"',
    x,
  )

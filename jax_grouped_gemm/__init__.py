"""Grouped FP8 matrix multiplication for mixture-of-experts layers in JAX."""

from jax_grouped_gemm import moe
from jax_grouped_gemm.config import Config, SmallGroupsConfig
from jax_grouped_gemm.masked import m_grouped_gemm_masked
from jax_grouped_gemm.ops import k_grouped_gemm, m_grouped_gemm
from jax_grouped_gemm.quantization import quantize, quantize_weights
from jax_grouped_gemm.quantized_weights import QuantizedWeights
from jax_grouped_gemm.ragged_dot import ragged_dot
from jax_grouped_gemm.recipe import Recipe
from jax_grouped_gemm.scaled_array import ScaledArray
from jax_grouped_gemm.token_quantization import quantize_for_k_grouped

__all__ = [
  "Config",
  "QuantizedWeights",
  "Recipe",
  "ScaledArray",
  "SmallGroupsConfig",
  "k_grouped_gemm",
  "m_grouped_gemm",
  "m_grouped_gemm_masked",
  "moe",
  "quantize",
  "quantize_for_k_grouped",
  "quantize_weights",
  "ragged_dot",
]

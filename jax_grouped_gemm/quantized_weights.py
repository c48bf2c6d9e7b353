"""Weights in FP8, in the layouts of both GEMMs that read them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jax_grouped_gemm import checks
from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.scaled_array import ScaledArray

# For the policies of jax.checkpoint: to keep the weights' quantised copy.
QUANTIZED_WEIGHTS = "jax_grouped_gemm.quantized_weights"


class QuantizedWeights(NamedTuple):
  """Weights (g, k, n) in blocks of 128x128, in the layouts of two GEMMs.

  Attributes:
    forward: (g, n, k), rhs of m_grouped_gemm in the forward pass.
    dgrad: (g, k, n), rhs of m_grouped_gemm for the gradient of lhs. The same
      values and scales, transposed.
  """

  forward: ScaledArray
  dgrad: ScaledArray


def check_quantized_weights(name: str, weights, shape) -> QuantizedWeights:
  """Returns them with jax arrays, once they can be copies of `shape` (g, k, n).

  What they hold is not compared.
  """
  if not isinstance(weights, QuantizedWeights):
    raise TypeError(
      f"{name} must be QuantizedWeights, as quantize_weights() makes them, got "
      f"{type(weights)}"
    )
  g, k, n = shape
  copies = []
  for label, x, axes, expected in (
    (f"{name}.forward", weights.forward, "gnk", (g, n, k)),
    (f"{name}.dgrad", weights.dgrad, "gkn", (g, k, n)),
  ):
    x = checks.check_scaled(label, x, axes, (1, SCALE_BLOCK, SCALE_BLOCK))
    if x.shape != expected:
      raise ValueError(
        f"{label} must be ({', '.join(axes)}) = {expected}, got {x.shape}"
      )
    if x.dtype != jnp.float8_e4m3fn:
      raise TypeError(f"{label}.values must be float8_e4m3fn, got {x.dtype}")
    copies.append(x)
  return QuantizedWeights(*copies)


def name_quantized_weights(weights: QuantizedWeights) -> QuantizedWeights:
  """Returns them, under the name QUANTIZED_WEIGHTS for jax.checkpoint."""
  # As bytes: policies of jax.checkpoint round what they keep as IEEE types,
  # which damages float8_e4m3fn above 240 (jax 0.11.2).
  kept = checkpoint_name(_bitcast(weights, jnp.uint8), QUANTIZED_WEIGHTS)
  return _bitcast(kept, jnp.float8_e4m3fn)


def _bitcast(weights: QuantizedWeights, dtype: DTypeLike) -> QuantizedWeights:
  """Returns the weights, the bits of their values read as another dtype."""

  def read(x):
    values = lax.bitcast_convert_type(x.values, dtype)
    return ScaledArray(values, x.scales, x.block_shape, x.padding)

  return QuantizedWeights(*map(read, weights))


jax.export.register_namedtuple_serialization(
  QuantizedWeights, serialized_name="jax_grouped_gemm.QuantizedWeights"
)

"""The experts: gate and up projection in one GEMM, activation, down projection.

Each stage is a function of its own, so that a fused one can take its place and
be compared with it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_grouped_gemm import checks
from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.fused_quantization import ACTIVATIONS
from jax_grouped_gemm.group_sizes import check_group_sizes
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.moe.activation import Activation
from jax_grouped_gemm.moe.fused import Product, choose_fusion
from jax_grouped_gemm.moe.permutation import Permutation
from jax_grouped_gemm.moe.prologue import Activated, Dispatched, Rows
from jax_grouped_gemm.quantized_weights import (
  QUANTIZED_WEIGHTS,
  QuantizedWeights,
  check_quantized_weights,
)
from jax_grouped_gemm.recipe import Recipe
from jax_grouped_gemm.scaled_array import ScaledArray

Weights = Float[Array, "g in out"] | ScaledArray


def grouped_mlp(
  x: Float[Array, "m d"],
  gate_up: Weights,
  down: Weights,
  group_sizes: Int[Array, "g"],
  *,
  activation: Activation = "swiglu",
  gate_up_bias: Float[Array, "g 2*f"] | None = None,
  down_bias: Float[Array, "g d"] | None = None,
  recipe: Recipe = Recipe(),  # noqa: B008, immutable.
  permutation: Permutation | None = None,
  rematerialize: bool = False,
  quantized_x: ScaledArray | None = None,
  quantized_weights: tuple[QuantizedWeights, QuantizedWeights] | None = None,
  fuse: bool | None = None,
  implementation: str | None = None,
) -> Float[Array, "m d"]:
  """out[r] = activation(x[r] @ gate_up[g] + bias) @ down[g] + bias, r in g.

  x (m, d) -> (m, d), rows sorted by group as in ragged_dot. Rows at or past the
  sum of the sizes are zero; what x has there changes nothing. With a
  permutation x is (t, d), and its copies, (t * top_k, d), take its place.

  The first product gives f columns `gate` and then f columns `up`. In float32:

    swiglu          silu(gate) * up (arXiv 2002.05202)
    geglu           gelu(gate) * up, gelu(z) = z * (1 + erf(z / sqrt 2)) / 2
    swiglu_clamped  z * sigmoid(1.702 z) * (up' + 1), z = min(gate, 7),
                    up' = clip(up, -7, 7), as in gpt-oss' released model code
                    (which has gate and up in alternate columns)

  Float weights are multiplied, and differentiable, as ragged_dot does it.
  ScaledArrays, for serving, have the layout of m_grouped_gemm, output features
  first, and no gradient; nor has anything else then.

  Args:
    x: a row per token copy; with a permutation, a row per token.
    gate_up: (g, d, 2 f) floats, or a ScaledArray (g, 2 f, d).
    down: (g, f, d) floats, or a ScaledArray (g, d, f).
    group_sizes: rows of each group.
    activation: "swiglu", "geglu" or "swiglu_clamped".
    gate_up_bias: (g, 2 f), added in float32: where it is fused, and with
      ScaledArrays, to the sums; else to the product, once that is rounded.
    down_bias: (g, d), the same.
    recipe: of float weights, as in ragged_dot; with ScaledArrays, whose
      products are FP8, only its power_of_two_scales counts.
    permutation: as dispatch sorts copies of tokens. Passed here, where it can
      be part of their quantisation.
    rematerialize: whether the backward pass computes the activation, and
      quantises it, once more, instead of keeping it from the forward pass. What
      is fused always does.
    quantized_x: quantize(x, (1, 128)), as ragged_dot's quantized_lhs; not with
      a permutation.
    quantized_weights: quantize_weights of gate_up and of down, to be used for
      many calls, as ragged_dot's quantized_rhs.
    fuse: whether copying and activation are part of the quantisation for the
      products, and biases of the products, so that nothing else is written in
      between. None: where the kernels compute FP8 products of bfloat16 x, d and
      f multiples of 16, unless a backward pass follows, which is faster
      without. True demands it.
    implementation: as in ragged_dot.
  """
  x = jnp.asarray(x)
  is_scaled = isinstance(gate_up, ScaledArray)
  gate_up, down = _check_weights(x, gate_up, down, is_scaled)
  g, d, f = gate_up.shape[0], x.shape[1], _hidden(down, is_scaled)
  gate_up_bias = checks.check_bias("gate_up_bias", gate_up_bias, (g, 2 * f))
  down_bias = checks.check_bias("down_bias", down_bias, (g, d))
  if activation not in ACTIVATIONS:
    raise ValueError(
      f"activation must be one of {ACTIVATIONS}, got {activation!r}"
    )
  m = x.shape[0] if permutation is None else _check_permutation(permutation, x)
  group_sizes, _ = check_group_sizes(group_sizes, m, g)
  is_fused = choose_fusion(fuse, x, f, is_scaled, recipe, implementation)
  dot = Product(
    recipe, implementation, is_fused, fuse_always=bool(fuse) or rematerialize
  )
  quantized_x = checks.check_quantized_lhs("quantized_x", quantized_x, x.shape)
  if quantized_x is not None and permutation is not None:
    raise ValueError("quantized_x and permutation cannot both be given")
  if quantized_weights is not None:
    quantized_weights = _check_quantized_weights(
      quantized_weights, gate_up, down, is_scaled, recipe
    )
  copies = Rows() if permutation is None else Dispatched()
  index = quantized_x if permutation is None else permutation
  x, index, gate_up, down, gate_up_bias, down_bias, group_sizes = vary_alike(
    x, index, gate_up, down, gate_up_bias, down_bias, group_sizes
  )

  quantized_gate_up, quantized_down = quantized_weights or (None, None)

  def rest(hidden, down, down_bias, group_sizes):
    prologue = Activated(activation)
    return dot(
      prologue, hidden, down, group_sizes, None, quantized_down, down_bias
    )

  if rematerialize and not is_fused:
    keep_weights = jax.checkpoint_policies.save_only_these_names(
      QUANTIZED_WEIGHTS
    )
    rest = jax.checkpoint(rest, policy=keep_weights)
  hidden = dot(
    copies, x, gate_up, group_sizes, index, quantized_gate_up, gate_up_bias
  )
  return rest(hidden, down, down_bias, group_sizes)


# ---------------------------------------------------------------- checks


def _hidden(down: Weights, is_scaled: bool) -> int:
  return down.shape[2 if is_scaled else 1]


def check_no_copies(**weights):
  """Raises if weights are QuantizedWeights, which stand beside floats."""
  for name, value in weights.items():
    if isinstance(value, QuantizedWeights):
      raise TypeError(
        f"{name} must be floats, to which quantized_weights adds their copies, "
        "or a ScaledArray, such as QuantizedWeights.forward; got "
        "QuantizedWeights"
      )


def _check_weights(x, gate_up, down, is_scaled: bool):
  """Returns the weights as arrays, once they are known to fit."""
  check_no_copies(gate_up=gate_up, down=down)
  if is_scaled != isinstance(down, ScaledArray):
    raise TypeError(
      "gate_up and down must both be floats or both be ScaledArrays, got "
      f"{type(gate_up).__name__} and {type(down).__name__}"
    )
  if is_scaled:
    block = (1, SCALE_BLOCK, SCALE_BLOCK)
    gate_up = checks.check_scaled("gate_up", gate_up, ("g", "2 f", "d"), block)
    down = checks.check_scaled("down", down, ("g", "d", "f"), block)
    shapes = [(w.shape[0], w.shape[2], w.shape[1]) for w in (gate_up, down)]
  else:
    gate_up, down = jnp.asarray(gate_up), jnp.asarray(down)
    shapes = [gate_up.shape, down.shape]
  checks.check_input_dtype("x", x.dtype)
  fits = x.ndim == 2 and all(len(shape) == 3 for shape in shapes)
  if fits:
    g, d, f2 = shapes[0]
    fits = d == x.shape[1] and shapes[1] == (g, f2 // 2, d) and f2 % 2 == 0
  if not fits:
    layout = (
      "(g, 2 f, d) and down (g, d, f) as ScaledArrays"
      if is_scaled
      else "(g, d, 2 f) and down (g, f, d)"
    )
    raise ValueError(
      f"x must be (m, d), gate_up {layout}, got {x.shape}, {gate_up.shape} and "
      f"{down.shape}"
    )
  return gate_up, down


def _check_quantized_weights(weights, gate_up, down, is_scaled: bool, recipe):
  """Returns them with jax arrays, once they can be copies of both weights."""
  if is_scaled or not recipe.quantizes_weights:
    raise ValueError(
      "quantized_weights need float weights and a recipe whose forward or "
      f"dgrad is 'fp8', got {type(gate_up).__name__} and {recipe}"
    )
  if not isinstance(weights, tuple) or len(weights) != 2:
    raise TypeError(
      f"quantized_weights must be those of gate_up and of down, got {weights}"
    )
  return tuple(
    check_quantized_weights(f"quantized_weights[{i}]", copies, floats.shape)
    for i, (copies, floats) in enumerate(
      zip(weights, (gate_up, down), strict=True)
    )
  )


def _check_permutation(permutation: Permutation, x) -> int:
  """Returns how many copies there are of the rows of x."""
  shape = jnp.shape(permutation.inverse)
  rows = math.prod(shape)
  if (
    len(shape) != 2
    or shape[0] != x.shape[0]
    or jnp.shape(permutation.order) != (rows,)
  ):
    raise ValueError(
      "permutation must have inverse (t, top_k) and order (t * top_k,), t = "
      f"{x.shape[0]} as x, got {shape} and {jnp.shape(permutation.order)}"
    )
  return rows

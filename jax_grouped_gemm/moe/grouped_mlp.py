"""The experts: gate and up projection in one GEMM, activation, down projection.

Each stage is a function of its own, so that a fused one can take its place and
be compared with it.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_grouped_gemm import checks
from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.group_sizes import check_group_sizes
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.moe.bias import add_bias
from jax_grouped_gemm.ops import m_grouped_gemm
from jax_grouped_gemm.quantization import quantize_rows
from jax_grouped_gemm.ragged_dot import QUANTIZED_WEIGHTS, ragged_dot
from jax_grouped_gemm.recipe import Recipe
from jax_grouped_gemm.scaled_array import ScaledArray

# Of gpt-oss: the slope of its sigmoid, and where it clamps.
_CLAMPED_ALPHA = 1.702
_CLAMPED_LIMIT = 7.0

Activation = Literal["swiglu", "geglu", "swiglu_clamped"]
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
  rematerialize: bool = False,
  quantized_x: ScaledArray | None = None,
  implementation: str | None = None,
) -> Float[Array, "m d"]:
  """out[r] = activation(x[r] @ gate_up[g] + bias) @ down[g] + bias, r in g.

  x (m, d) -> (m, d), rows sorted by group as in ragged_dot. Rows at or past the
  sum of the sizes are zero; what x has there changes nothing.

  The first product gives f columns `gate` and then f columns `up`. In float32:

    swiglu          silu(gate) * up (arXiv 2002.05202)
    geglu           gelu(gate) * up, gelu(z) = z * (1 + erf(z / sqrt 2)) / 2
    swiglu_clamped  z * sigmoid(1.702 z) * (up' + 1), z = min(gate, 7),
                    up' = clip(up, -7, 7), as in gpt-oss' released model code
                    (which has gate and up in alternate columns)

  Float weights are multiplied, and differentiable, as ragged_dot does it.
  ScaledArrays, for serving, have no gradient and the layout of m_grouped_gemm:
  output features first.

  Args:
    x: a row per token copy.
    gate_up: (g, d, 2 f) floats, or a ScaledArray (g, 2 f, d).
    down: (g, f, d) floats, or a ScaledArray (g, d, f).
    group_sizes: rows of each group.
    activation: "swiglu", "geglu" or "swiglu_clamped".
    gate_up_bias: (g, 2 f), added in float32.
    down_bias: (g, d), the same.
    recipe: of float weights, as in ragged_dot; with ScaledArrays, whose
      products are FP8, only its power_of_two_scales counts.
    rematerialize: whether the backward pass computes the activation, and
      quantises it, once more, instead of keeping it from the forward pass.
    quantized_x: quantize(x, (1, 128)), as ragged_dot's quantized_lhs.
    implementation: as in ragged_dot.
  """
  x = jnp.asarray(x)
  is_scaled = isinstance(gate_up, ScaledArray)
  gate_up, down = _check_weights(x, gate_up, down, is_scaled)
  g, d, f = gate_up.shape[0], x.shape[1], _hidden(down, is_scaled)
  gate_up_bias = _check_bias("gate_up_bias", gate_up_bias, (g, 2 * f))
  down_bias = _check_bias("down_bias", down_bias, (g, d))
  if activation not in _ACTIVATIONS:
    raise ValueError(
      f"activation must be one of {tuple(_ACTIVATIONS)}, got {activation!r}"
    )
  quantized_x = checks.check_quantized_lhs("quantized_x", quantized_x, x.shape)
  group_sizes, _ = check_group_sizes(group_sizes, x.shape[0], g)
  x, gate_up, down, gate_up_bias, down_bias, group_sizes, quantized_x = (
    vary_alike(
      *(x, gate_up, down, gate_up_bias, down_bias, group_sizes, quantized_x)
    )
  )
  if is_scaled:
    # Its backward pass says that there is none.
    dot = functools.partial(_serve, recipe, implementation)
  else:
    dot = functools.partial(
      ragged_dot,
      preferred_element_type=x.dtype,
      recipe=recipe,
      implementation=implementation,
    )

  def rest(hidden, gate_up_bias, down, down_bias, group_sizes):
    hidden = add_bias(hidden, gate_up_bias, group_sizes)
    hidden = activate(hidden, activation)
    return add_bias(dot(hidden, down, group_sizes), down_bias, group_sizes)

  if rematerialize:
    keep_weights = jax.checkpoint_policies.save_only_these_names(
      QUANTIZED_WEIGHTS
    )
    rest = jax.checkpoint(rest, policy=keep_weights)
  hidden = dot(x, gate_up, group_sizes, quantized_lhs=quantized_x)
  return rest(hidden, gate_up_bias, down, down_bias, group_sizes)


# ---------------------------------------------------------------- activations


def activate(
  gate_up: Float[Array, "m 2*f"], activation: Activation = "swiglu"
) -> Float[Array, "m f"]:
  """out = activation(gate, up) of gate_up (m, 2 f), as grouped_mlp says.

  For the backward pass gate_up is kept, nothing else.
  """
  return _activate(activation, gate_up)


def _swiglu(gate, up):
  return jax.nn.silu(gate) * up


def _geglu(gate, up):
  return jax.nn.gelu(gate, approximate=False) * up


def _swiglu_clamped(gate, up):
  gate = jnp.minimum(gate, _CLAMPED_LIMIT)
  up = jnp.clip(up, -_CLAMPED_LIMIT, _CLAMPED_LIMIT)
  return gate * jax.nn.sigmoid(_CLAMPED_ALPHA * gate) * (up + 1)


_ACTIVATIONS = {
  "swiglu": _swiglu,
  "geglu": _geglu,
  "swiglu_clamped": _swiglu_clamped,
}


def _compute_activation(activation, gate_up):
  wide = gate_up.astype(jnp.promote_types(gate_up.dtype, jnp.float32))
  gate, up = jnp.split(wide, 2, axis=-1)
  return _ACTIVATIONS[activation](gate, up).astype(gate_up.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activate(activation, gate_up):
  return _compute_activation(activation, gate_up)


def _activate_fwd(activation, gate_up):
  return _compute_activation(activation, gate_up), gate_up


def _activate_bwd(activation, gate_up, dout):
  compute = functools.partial(_compute_activation, activation)
  return jax.vjp(compute, gate_up)[1](dout)


_activate.defvjp(_activate_fwd, _activate_bwd)

# ---------------------------------------------------------------- serving


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _serve(
  recipe: Recipe, implementation, x, weights, group_sizes, quantized_lhs=None
):
  """out[r] = x[r] @ weights[group of r].T, x quantised, weights (g, n, k)."""
  out_dtype = x.dtype if x.dtype == jnp.bfloat16 else jnp.float32
  if quantized_lhs is None:
    quantized_lhs = quantize_rows(
      x,
      power_of_two_scales=recipe.power_of_two_scales,
      implementation=implementation,
    )
  return m_grouped_gemm(
    quantized_lhs,
    weights,
    group_sizes,
    preferred_element_type=out_dtype,
    implementation=implementation,
  ).astype(x.dtype)


def _refuse_gradient(
  recipe, implementation, x, weights, group_sizes, quantized_lhs
):
  raise NotImplementedError(
    "ScaledArray weights have no gradient, nor has what is multiplied by them; "
    "train with float weights, which a recipe quantises"
  )


_serve.defvjp(_refuse_gradient, _refuse_gradient)

# ---------------------------------------------------------------- checks


def _hidden(down: Weights, is_scaled: bool) -> int:
  return down.shape[2 if is_scaled else 1]


def _check_weights(x, gate_up, down, is_scaled: bool):
  """Returns the weights as arrays, once they are known to fit."""
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


def _check_bias(name: str, bias, shape):
  if bias is None:
    return None
  bias = jnp.asarray(bias)
  checks.check_input_dtype(name, bias.dtype)
  if bias.shape != shape:
    raise ValueError(f"{name} must be {shape}, got {bias.shape}")
  return bias

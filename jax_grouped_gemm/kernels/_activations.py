"""The activations of gated MLPs, for the kernels and for XLA.

Written in operations that Mosaic lowers.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_grouped_gemm.scaled_array import wide_dtype

# Of gpt-oss: the slope of its sigmoid, and where it clamps.
_CLAMPED_ALPHA = 1.702
_CLAMPED_LIMIT = 7.0

# erfc(x) = t * exp(-x^2 + polynomial of t), t = 1 / (1 + x / 2), x >= 0, to
# 1.2e-7 of itself: Numerical Recipes, section 6.2. From t^9 down.
_ERFC = (
  0.17087277,
  -0.82215223,
  1.48851587,
  -1.13520398,
  0.27886807,
  -0.18628806,
  0.09678418,
  0.37409196,
  1.00002368,
  -1.26551223,
)


class Ops(NamedTuple):
  """What kernels have their own instructions for.

  Attributes:
    exp: of an array.
    reciprocal: the same.
    round: to a dtype.
  """

  exp: Callable
  reciprocal: Callable
  round: Callable


XLA_OPS = Ops(jnp.exp, lambda x: 1 / x, lambda x, dtype: x.astype(dtype))


def _sigmoid(ops: Ops, x):
  return ops.reciprocal(1 + ops.exp(-x))


def _erfc(ops: Ops, x):
  """lax.erfc, which Mosaic does not lower."""
  if x.dtype != jnp.float32:
    return lax.erfc(x)
  magnitude = jnp.abs(x)
  t = ops.reciprocal(1 + 0.5 * magnitude)
  polynomial = functools.reduce(lambda sum, c: sum * t + c, _ERFC)
  out = t * ops.exp(polynomial - x * x)
  return jnp.where(x < 0, 2 - out, out)


def _swiglu(ops, gate, up):
  return gate * _sigmoid(ops, gate) * up


def _swiglu_gradients(ops, gate, up, dout):
  sigmoid = _sigmoid(ops, gate)
  dgate = dout * up * (sigmoid * (1 + gate * (1 - sigmoid)))
  return dgate, dout * (gate * sigmoid)


def _normal_cdf(ops, x):
  return 0.5 * _erfc(ops, x * -(0.5**0.5))


def _geglu(ops, gate, up):
  return gate * _normal_cdf(ops, gate) * up


def _geglu_gradients(ops, gate, up, dout):
  cdf = _normal_cdf(ops, gate)
  density = ops.exp(gate * gate * -0.5) * (2 * math.pi) ** -0.5
  return dout * up * (cdf + gate * density), dout * (gate * cdf)


def _swiglu_clamped(ops, gate, up):
  gate = jnp.minimum(gate, _CLAMPED_LIMIT)
  up = jnp.clip(up, -_CLAMPED_LIMIT, _CLAMPED_LIMIT)
  return gate * _sigmoid(ops, _CLAMPED_ALPHA * gate) * (up + 1)


def _swiglu_clamped_gradients(ops, gate, up, dout):
  z = jnp.minimum(gate, _CLAMPED_LIMIT)
  clipped = jnp.clip(up, -_CLAMPED_LIMIT, _CLAMPED_LIMIT)
  sigmoid = _sigmoid(ops, _CLAMPED_ALPHA * z)
  slope = sigmoid * (1 + _CLAMPED_ALPHA * z * (1 - sigmoid))
  # As comparisons that are false for NaN, so that it stays visible.
  dgate = jnp.where(gate > _CLAMPED_LIMIT, 0.0, dout * (clipped + 1) * slope)
  is_clipped = jnp.abs(up) > _CLAMPED_LIMIT
  return dgate, jnp.where(is_clipped, 0.0, dout * (z * sigmoid))


# name -> function of Ops, gate and up, zero where both are; its gradients.
_FUNCTIONS = {
  "swiglu": (_swiglu, _swiglu_gradients),
  "geglu": (_geglu, _geglu_gradients),
  "swiglu_clamped": (_swiglu_clamped, _swiglu_clamped_gradients),
}
ACTIVATIONS = tuple(_FUNCTIONS)


def activate(
  gate: Float[Array, "..."],
  up: Float[Array, "..."],
  *,
  activation: str,
  ops: Ops = XLA_OPS,
) -> Float[Array, "..."]:
  """out = activation(gate, up), in float32 or wider, rounded to their dtype."""
  out = _FUNCTIONS[activation][0](ops, *_widen(gate, up))
  return ops.round(out, gate.dtype)


def gradients(
  gate: Float[Array, "..."],
  up: Float[Array, "..."],
  dout: Float[Array, "..."],
  *,
  activation: str,
  ops: Ops = XLA_OPS,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """d(gate) and d(up) of `activate`, computed and rounded as there."""
  results = _FUNCTIONS[activation][1](ops, *_widen(gate, up, dout))
  return tuple(ops.round(result, gate.dtype) for result in results)


def _widen(*arrays):
  return [x.astype(wide_dtype(x.dtype)) for x in arrays]

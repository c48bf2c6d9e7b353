"""The activations between an expert's two products, and their gradients."""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float

from jax_grouped_gemm import fused_quantization
from jax_grouped_gemm import implementation as implementations

Activation = Literal["swiglu", "geglu", "swiglu_clamped"]


def activate(
  gate_up: Float[Array, "m 2*f"],
  activation: Activation = "swiglu",
  *,
  implementation: str | None = "xla",
) -> Float[Array, "m f"]:
  """out = activation(gate, up) of gate_up (m, 2 f), as grouped_mlp says.

  For the backward pass gate_up is kept, nothing else.

  Args:
    gate_up: columns of gate, then as many of up.
    activation: as in grouped_mlp.
    implementation: of the gradient, as in ragged_dot. The result is XLA's.
  """
  implementations.check(implementation)
  return _activate(activation, implementation, gate_up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activate(activation, implementation, gate_up):
  return fused_quantization.activate(gate_up, activation)


def _activate_fwd(activation, implementation, gate_up):
  # Its body, for gradients to have forward-mode derivatives.
  out = _activate.__wrapped__(activation, implementation, gate_up)
  return out, gate_up


def _activate_bwd(activation, implementation, gate_up, dout):
  gradient = fused_quantization.activation_gradient(
    gate_up, dout, activation, implementation=implementation
  )
  return (gradient,)


_activate.defvjp(_activate_fwd, _activate_bwd)

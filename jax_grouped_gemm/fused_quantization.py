"""Quantisation together with what comes before it; an activation's gradient.

Checks the call, then picks what computes it. Quantisation has no gradient;
moe.grouped_mlp has one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_grouped_gemm import checks
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.kernels import _activations
from jax_grouped_gemm.kernels import activation_backward as backward_kernel
from jax_grouped_gemm.kernels import quantize as quantize_kernel
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.quantization import quantize, rows_of_kernel
from jax_grouped_gemm.scaled_array import ScaledArray

ACTIVATIONS = _activations.ACTIVATIONS
_BLOCKS = 1, SCALE_BLOCK


def activate(
  gate_up: Float[Array, "m 2*f"], activation: str
) -> Float[Array, "m f"]:
  """out = activation(gate, up), gate_up (m, 2 f) = [gate, up] -> (m, f).

  In float32, rounded to gate_up's dtype.
  """
  gate_up = _check_activation(gate_up, activation)
  return _activations.activate(*_halves(gate_up), activation=activation)


def quantize_activation(
  gate_up: Float[Array, "m 2*f"],
  activation: str,
  *,
  dtype: DTypeLike = jnp.float8_e4m3fn,
  power_of_two_scales: bool = False,
  implementation: str | None = None,
) -> ScaledArray:
  """quantize(activate(gate_up, activation), (1, 128)), in one pass -> (m, f).

  Args:
    gate_up: gate and, in the second half of the columns, up.
    activation: as in moe.grouped_mlp.
    dtype: as in quantize.
    power_of_two_scales: as in quantize.
    implementation: as in m_grouped_gemm. The kernel takes bfloat16 and f a
      multiple of 16. Its exponential function is the hardware's: the rounded
      activation may be XLA's neighbour.
  """
  gate_up, dtype = checks.check_quantize(gate_up, dtype, implementation)
  gate_up = _check_activation(gate_up, activation)
  implementation = implementations.choose(
    implementation, checks.unsupported_by_activation(gate_up)
  )
  static = dict(dtype=dtype, power_of_two_scales=power_of_two_scales)
  if implementation == "xla" or gate_up.size == 0:
    out = activate(gate_up, activation)
    return quantize(out, _BLOCKS, implementation="xla", **static)
  return _quantize_activation(
    gate_up,
    activation=activation,
    interpret=implementation == "interpret",
    **static,
  )


@functools.partial(
  jax.jit,
  static_argnames=("activation", "dtype", "power_of_two_scales", "interpret"),
)
def _quantize_activation(gate_up, *, interpret: bool, **static) -> ScaledArray:
  """quantize_activation, by the kernel."""
  m, f = gate_up.shape[0], gate_up.shape[1] // 2
  values, scales = quantize_kernel.quantize_rows(
    gate_up if interpret else implementations.cuda_only(gate_up),
    interpret=interpret,
    **static,
  )
  return rows_of_kernel(values, scales, (m, f), gate_up)


def activation_gradient(
  gate_up: Float[Array, "m 2*f"],
  dout: Float[Array, "m f"],
  activation: str,
  *,
  implementation: str | None = None,
) -> Float[Array, "m 2*f"]:
  """d(gate_up) of activate, given the gradient of its result, in one pass.

  Args:
    gate_up: as in quantize_activation.
    dout: of the result, in gate_up's dtype.
    activation: as in quantize_activation.
    implementation: the same.
  """
  gate_up, dout = jnp.asarray(gate_up), jnp.asarray(dout)
  implementations.check(implementation)
  gate_up = _check_activation(gate_up, activation)
  m, f = gate_up.shape[0], gate_up.shape[1] // 2
  if dout.shape != (m, f) or dout.dtype != gate_up.dtype:
    raise ValueError(
      f"dout must be (m, f) = {(m, f)} of {gate_up.dtype}, as gate_up "
      f"{gate_up.shape} is, got {dout.shape} of {dout.dtype}"
    )
  implementation = implementations.choose(
    implementation, checks.unsupported_by_activation(gate_up)
  )
  gate_up, dout = vary_alike(gate_up, dout)
  if implementation == "xla" or gate_up.size == 0:
    gate, up = _halves(gate_up)
    gradients = _activations.gradients(gate, up, dout, activation=activation)
    return jnp.concatenate(gradients, axis=1)
  return _activation_gradient(
    gate_up,
    dout,
    activation=activation,
    interpret=implementation == "interpret",
  )


@functools.partial(jax.jit, static_argnames=("activation", "interpret"))
def _activation_gradient(gate_up, dout, *, activation: str, interpret: bool):
  """activation_gradient, by the kernel."""
  out = backward_kernel.activation_backward(
    gate_up if interpret else implementations.cuda_only(gate_up),
    dout,
    activation=activation,
    interpret=interpret,
  )
  return vary_alike(out, gate_up)[0]


def _halves(gate_up):
  return jnp.split(gate_up, 2, axis=1)


def _check_activation(gate_up, activation: str):
  """Returns gate_up as an array, once it and the activation are known to do."""
  gate_up = jnp.asarray(gate_up)
  checks.check_input_dtype("gate_up", gate_up.dtype)
  if gate_up.ndim != 2 or gate_up.shape[1] % 2:
    raise ValueError(f"gate_up must be (m, 2 f), got {gate_up.shape}")
  if activation not in ACTIVATIONS:
    raise ValueError(
      f"activation must be one of {ACTIVATIONS}, got {activation!r}"
    )
  return gate_up

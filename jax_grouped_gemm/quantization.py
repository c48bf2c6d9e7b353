"""Quantisation: checks the call, then picks what computes it."""

import functools
import math
from collections.abc import Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_grouped_gemm import checks
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import ROW_ALIGN, SCALE_BLOCK
from jax_grouped_gemm.kernels import quantize as quantize_kernel
from jax_grouped_gemm.kernels import quantize_weights as weights_kernel
from jax_grouped_gemm.kernels import reference
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.quantized_weights import (
  QuantizedWeights,
  name_quantized_weights,
)
from jax_grouped_gemm.scaled_array import ScaledArray
from jax_grouped_gemm.undifferentiable import made_beside

_WEIGHTS_DTYPE = jnp.float8_e4m3fn


def quantize(
  x: Float[Array, "..."],
  block_shape: tuple[int, ...],
  *,
  dtype: DTypeLike = jnp.float8_e4m3fn,
  power_of_two_scales: bool = False,
  implementation: str | None = None,
) -> ScaledArray:
  """x = values * scales nearly: one scale for each block of `block_shape`.

  A scale is max(|x| of the block, 1e-4) / the largest value of `dtype`, rounded
  up to a power of two if `power_of_two_scales`. Values are rounded to the
  nearest, ties to even. NaN and Inf stay where they are, Inf as NaN if `dtype`
  has none, and do not enter the scale. No gradient: ragged_dot has one.

  Args:
    x: float32, bfloat16, float16 or float64.
    block_shape: elements along each axis that share a scale.
    dtype: float8_e4m3fn or float8_e5m2.
    power_of_two_scales: rounds scales up, so that they multiply exactly.
    implementation: as in m_grouped_gemm. The kernels quantise float32 and
      bfloat16 x of (m, k) or (g, m, k), k a multiple of 16, in blocks of 128
      along k.
  """
  x, dtype = checks.check_quantize(x, dtype, implementation)
  if not isinstance(block_shape, Sequence) or not all(
    isinstance(block, Integral) for block in block_shape
  ):
    raise TypeError(f"block_shape must be a tuple of ints, got {block_shape!r}")
  block_shape = tuple(block_shape)
  if (
    not block_shape
    or len(block_shape) != x.ndim
    or any(block < 1 for block in block_shape)
  ):
    raise ValueError(
      "x must have axes, and block_shape a positive entry for each, got x "
      f"{x.shape} and block_shape {block_shape}"
    )
  implementation = implementations.choose(
    implementation, checks.unsupported_by_quantize(x, block_shape)
  )
  if implementation == "xla" or x.size == 0:
    out = reference.quantize(
      x,
      block_shape=block_shape,
      dtype=dtype,
      power_of_two_scales=power_of_two_scales,
    )
    return pad_storage(out)
  return _quantize_rows(
    x,
    dtype=dtype,
    power_of_two_scales=power_of_two_scales,
    interpret=implementation == "interpret",
  )


def where_supported(
  implementation: str | None, unsupported: str | None
) -> str | None:
  """Returns the implementation of an operand of a GEMM that runs by another.

  XLA quantises what the quantisation kernels do not, for the reason
  `unsupported`, though the GEMM's kernel takes it.
  """
  return implementation if unsupported is None else "xla"


def quantize_rows(
  x: Float[Array, "m k"], *, implementation: str | None, **options
) -> ScaledArray:
  """quantize of lhs of m_grouped_gemm, by XLA where the kernels cannot."""
  blocks = 1, SCALE_BLOCK
  unsupported = checks.unsupported_by_quantize(x, blocks)
  return quantize(
    x,
    blocks,
    implementation=where_supported(implementation, unsupported),
    **options,
  )


@functools.partial(
  jax.jit, static_argnames=("dtype", "power_of_two_scales", "interpret")
)
def _quantize_rows(x, *, interpret: bool, **static) -> ScaledArray:
  """quantize of (m, k) or (g, m, k) in blocks of 128 along k, by the kernel."""
  *batch, m, k = x.shape
  padding = (*(0 for _ in batch), -m % ROW_ALIGN, -k % SCALE_BLOCK)
  if batch:
    # Each group's rows are padded. Costs a copy, if there is anything to pad.
    x = jnp.pad(x, [(0, 0), (0, padding[-2]), (0, 0)])
  operand = x if interpret else implementations.cuda_only(x)
  values, scales = quantize_kernel.quantize_rows(
    operand.reshape(-1, k), interpret=interpret, **static
  )
  stored = (*batch, m + padding[-2])
  out = rows_of_kernel(values, scales, (math.prod(stored), k), x)
  return ScaledArray(
    out.values.reshape(*stored, k + padding[-1]),
    out.scales.reshape(*stored, -1)[..., :m, :],
    (*(1 for _ in batch), *out.block_shape),
    padding,
  )


def rows_of_kernel(values, scales, shape: tuple[int, int], x) -> ScaledArray:
  """What a kernel that quantises rows returned, of x, as (m, k)."""
  m, k = shape
  # Pallas calls the results of kernels the same on all devices (jax 0.11.2).
  values, scales, _ = vary_alike(values, scales, x)
  padding = -m % ROW_ALIGN, -k % SCALE_BLOCK
  return ScaledArray(values, scales.T[:m], (1, SCALE_BLOCK), padding)


def quantize_weights(
  w: Float[Array, "g k n"],
  *,
  power_of_two_scales: bool = False,
  implementation: str | None = None,
) -> QuantizedWeights:
  """w (g, k, n) -> (g, n, k) and (g, k, n), as quantize in blocks of 128x128.

  Copies to stand beside w, to which ragged_dot's gradient goes: in a function
  that is differentiated, they count as constants.

  Args:
    w: as in quantize.
    power_of_two_scales: as in quantize.
    implementation: as in m_grouped_gemm. The kernel reads bfloat16 weights
      once, k and n multiples of 16.
  """
  floats = jnp.asarray(w)
  w, _ = checks.check_quantize(
    lax.stop_gradient(floats), _WEIGHTS_DTYPE, implementation
  )
  if w.ndim != 3:
    raise ValueError(f"w must be (g, k, n), got shape {w.shape}")
  implementation = implementations.choose(
    implementation, checks.unsupported_by_quantize_weights(w)
  )
  if implementation == "xla" or w.size == 0:
    dgrad = quantize(
      w,
      (1, SCALE_BLOCK, SCALE_BLOCK),
      dtype=_WEIGHTS_DTYPE,
      power_of_two_scales=power_of_two_scales,
      implementation="xla",
    )
    weights = QuantizedWeights(dgrad.mT, dgrad)
  else:
    weights = _quantize_weights(
      w,
      power_of_two_scales=power_of_two_scales,
      interpret=implementation == "interpret",
    )
  weights = made_beside(floats, weights)
  # Only in a trace does jax.checkpoint see a name, and does it cost nothing.
  is_traced = isinstance(floats, jax.core.Tracer)
  return name_quantized_weights(weights) if is_traced else weights


@functools.partial(
  jax.jit, static_argnames=("power_of_two_scales", "interpret")
)
def _quantize_weights(w, *, interpret: bool, **static) -> QuantizedWeights:
  """quantize_weights, by the kernel."""
  operand = w if interpret else implementations.cuda_only(w)
  values, transposed, scales, _ = vary_alike(
    *weights_kernel.quantize_weights(operand, interpret=interpret, **static), w
  )
  dgrad = ScaledArray(
    values,
    scales,
    (1, SCALE_BLOCK, SCALE_BLOCK),
    (0, *(-size % SCALE_BLOCK for size in w.shape[1:])),
  )
  forward = ScaledArray(
    transposed, scales.mT, dgrad.block_shape, dgrad.mT.padding
  )
  return QuantizedWeights(forward, dgrad)


def pad_storage(x: ScaledArray) -> ScaledArray:
  """Pads the values to what the kernels read, so that no call has to."""
  if x.block_shape[-1:] != (SCALE_BLOCK,):
    return x
  aligns = [1] * (x.ndim - 2) + [_row_align(x), SCALE_BLOCK][-x.ndim :]
  padding = tuple(
    -size % align for size, align in zip(x.shape, aligns, strict=True)
  )
  values = jnp.pad(x.values, [(0, count) for count in padding])
  return ScaledArray(values, x.scales, x.block_shape, padding)


def _row_align(x: ScaledArray) -> int:
  """Rows in whole scale blocks too, if they have any, for the sake of x.mT."""
  return max((ROW_ALIGN, *x.block_shape[-2:-1]))

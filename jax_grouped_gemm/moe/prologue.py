"""How lhs of an expert product is made: copied, activated, or as it is."""

import dataclasses
from typing import Protocol

from jaxtyping import Array, Float

from jax_grouped_gemm.fused_quantization import quantize_activation
from jax_grouped_gemm.moe.activation import Activation, activate
from jax_grouped_gemm.moe.permutation import (
  Permutation,
  dispatch_quantized,
  gather_copies,
)
from jax_grouped_gemm.quantization import quantize_rows
from jax_grouped_gemm.scaled_array import ScaledArray


class Prologue(Protocol):
  """How lhs is made; static, hashable. `index` is data of its own."""

  def apply(self, x, index, implementation: str | None) -> Float[Array, "m k"]:
    """Returns lhs, differentiable in x."""

  def quantize(self, x, index, **options) -> ScaledArray:
    """Returns lhs in blocks of (1, 128), with the options of quantize."""


@dataclasses.dataclass(frozen=True)
class Rows:
  """lhs = x; `index` is quantize(x, (1, 128)), where the caller has it."""

  def apply(self, x, index, implementation):
    """Part of the protocol."""
    return x

  def quantize(self, x, index: ScaledArray | None, **options):
    """Part of the protocol; not fused with anything."""
    return quantize_rows(x, **options) if index is None else index


@dataclasses.dataclass(frozen=True)
class Activated:
  """lhs = activation(gate, up), x = [gate, up]."""

  activation: Activation

  def apply(self, x, index, implementation):
    """Part of the protocol."""
    return activate(x, self.activation, implementation=implementation)

  def quantize(self, x, index, **options):
    """Part of the protocol."""
    return quantize_activation(x, self.activation, **options)


@dataclasses.dataclass(frozen=True)
class Dispatched:
  """lhs = copies of the rows of x, as `index`, a Permutation, sorts them."""

  def apply(self, x, index: Permutation, implementation):
    """Part of the protocol."""
    return gather_copies(x, index, implementation)

  def quantize(
    self, x, index: Permutation, *, implementation: str | None, **options
  ):
    """Part of the protocol."""
    # Each token once, and the copies in FP8.
    quantized = quantize_rows(x, implementation=implementation, **options)
    return dispatch_quantized(quantized, index, implementation)

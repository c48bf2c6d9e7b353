"""Products whose lhs is quantised as it is made, without a copy in between.

What makes lhs of its operand, an activation or copies of rows, is its
prologue. Only the quantised rows of lhs are written in the forward pass; the
backward pass makes lhs once more, for the gradient of rhs. Without fusion, a
prologue is applied, and ragged_dot multiplies what it gives.

That is what a forward pass does which a backward one follows, unless it is told
to fuse: to quantise lhs for both products at a time reads it once, and fusion
saves fewer bytes than reading once more costs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_grouped_gemm import checks, manual_axes
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.moe.bias import add_bias
from jax_grouped_gemm.moe.prologue import Activated, Prologue, Rows
from jax_grouped_gemm.ops import m_grouped_gemm
from jax_grouped_gemm.quantization import (
  quantize,
  quantize_weights,
  where_supported,
)
from jax_grouped_gemm.quantized_weights import QuantizedWeights
from jax_grouped_gemm.ragged_dot import ragged_dot
from jax_grouped_gemm.recipe import Recipe, check_recipe
from jax_grouped_gemm.scaled_array import ScaledArray
from jax_grouped_gemm.undifferentiable import undifferentiable


@dataclasses.dataclass(frozen=True)
class Product:
  """out[r] = lhs[r] @ rhs[g] + bias[g], r in g, lhs made of x by the prologue.

  Attributes:
    recipe: as in ragged_dot; with ScaledArrays as rhs, whose products are FP8,
      only its power_of_two_scales counts.
    implementation: as in ragged_dot.
    fuse: whether the prologue is part of the quantisation, and the bias of the
      product.
    fuse_always: whether it is in a forward pass with a backward pass, too.
  """

  recipe: Recipe
  implementation: str | None
  fuse: bool
  fuse_always: bool

  def __call__(
    self,
    prologue: Prologue,
    x: Float[Array, "..."],
    rhs: Float[Array, "g k n"] | ScaledArray,
    group_sizes: Int[Array, "g"],
    index: Any = None,
    quantized: QuantizedWeights | None = None,
    bias: Float[Array, "g n"] | None = None,
  ) -> Float[Array, "m n"]:
    """Returns out in x's dtype; rhs is (g, n, k) if it is a ScaledArray.

    `quantized` is quantize_weights(rhs), where the caller has it.
    """
    is_made = prologue != Rows()
    fuse = self.fuse and (is_made or bias is not None)
    if not fuse and is_made:
      x = _made(prologue, x, index, self.implementation)
      prologue, index = Rows(), None
    x, index, rhs, quantized, bias, group_sizes = vary_alike(
      x, index, rhs, quantized, bias, group_sizes
    )
    call = _Call(self, prologue, rhs.dtype)
    if isinstance(rhs, ScaledArray):
      x, index, rhs, bias = undifferentiable(
        "ScaledArray weights have no gradient, nor has what is multiplied by "
        "them or added to their products; train with float weights, which a "
        "recipe quantises",
        (x, index, rhs, bias),
      )
      return _multiply(call, x, index, rhs, bias, group_sizes)
    if not fuse:
      return self.unfused(x, rhs, bias, group_sizes, index, quantized)
    if quantized is None:
      quantized = quantize_weights(
        lax.stop_gradient(rhs),
        power_of_two_scales=self.recipe.power_of_two_scales,
        implementation=where_supported(
          self.implementation, checks.unsupported_by_quantize_weights(rhs)
        ),
      )
    dot = _fused_dot if self.fuse_always and is_made else _fused_forward
    return dot(call, x, index, rhs, quantized, bias, group_sizes)

  def unfused(self, lhs, rhs, bias, group_sizes, quantized_lhs, quantized_rhs):
    """Returns out of an lhs that has been made."""
    out = ragged_dot(
      lhs,
      rhs,
      group_sizes,
      preferred_element_type=lhs.dtype,
      recipe=self.recipe,
      quantized_lhs=quantized_lhs,
      quantized_rhs=quantized_rhs,
      implementation=self.implementation,
    )
    return add_bias(out, bias, group_sizes, implementation=self.implementation)


def _made(prologue: Prologue, x, index, implementation: str | None):
  """Returns lhs, to be quantised or multiplied next."""
  if isinstance(prologue, Activated):
    implementation = "xla"  # Whose gradient is as fast as the kernel's.
  return prologue.apply(x, index, implementation)


def choose_fusion(
  fuse: bool | None,
  x: Float[Array, "m d"],
  f: int,
  is_scaled: bool,
  recipe: Recipe,
  implementation: str | None,
) -> bool:
  """Returns whether to fuse; NotImplementedError if it must be and cannot."""
  if fuse is not None and not isinstance(fuse, bool):
    raise TypeError(f"fuse must be None, True or False, got {fuse!r}")
  implementations.check(implementation)
  check_recipe(recipe)
  if fuse is False:
    return False
  unsupported = None
  if not is_scaled and recipe.forward != "fp8":
    unsupported = f"needs FP8 products in the forward pass, got {recipe}"
  unsupported = unsupported or checks.unsupported_by_fusion(x, f)
  if unsupported is None:
    chosen = implementations.choose(implementation, None)
    if chosen == "xla":
      unsupported = f"needs the kernels, got {implementation=}"
      if implementation is None:
        unsupported += ", which on this device means 'xla'"
  if fuse and unsupported:
    raise NotImplementedError(f"fuse=True {unsupported}; fuse=None need not")
  return unsupported is None


# ---------------------------------------------------------------- products


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is static in a product."""

  product: Product
  prologue: Prologue
  rhs_dtype: DTypeLike


def _multiply(call: _Call, x, index, weights: ScaledArray, bias, group_sizes):
  """out[r] = lhs[r] @ weights[g].T + bias[g], r in g, weights (g, n, k)."""
  product = call.product
  out_dtype = x.dtype if x.dtype == jnp.bfloat16 else jnp.float32
  lhs = call.prologue.quantize(
    x,
    index,
    power_of_two_scales=product.recipe.power_of_two_scales,
    implementation=product.implementation,
  )
  return m_grouped_gemm(
    lhs,
    weights,
    group_sizes,
    bias=bias,
    preferred_element_type=out_dtype,
    implementation=product.implementation,
  ).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_dot(call: _Call, x, index, rhs, weights, bias, group_sizes):
  return _multiply(call, x, index, weights.forward, bias, group_sizes)


def _fused_dot_fwd(call: _Call, x, index, rhs, weights, bias, group_sizes):
  out = _fused_dot(call, x, index, rhs, weights, bias, group_sizes)
  kept = rhs if call.product.recipe.dgrad == "bf16" else None
  return out, (x, index, kept, weights.dgrad, bias, group_sizes)


def _fused_dot_bwd(call: _Call, residuals, dout):
  dx, drhs, dbias = _gradients(call, *residuals, dout)
  return dx, None, drhs, None, dbias, None


# Of the forward pass it takes part in nothing but lhs: XLA leaves out the rest.
@functools.partial(jax.jit, static_argnums=0)
def _gradients(
  call: _Call, x, index, rhs, dgrad: ScaledArray, bias, sizes, dout
):
  """Those of x, rhs and bias, by the backward passes of what is not fused."""
  product = call.product
  if rhs is None:  # Its FP8 copy is multiplied in its place.
    rhs = manual_axes.zeros(dgrad.shape, call.rhs_dtype, dgrad.values)

  def unfused(x, rhs, bias):
    lhs = call.prologue.apply(x, index, product.implementation)
    # Nor are the rows of lhs quantised: nothing is made of them.
    rows = jax.eval_shape(lambda: quantize(lhs, (1, SCALE_BLOCK)))
    rows = jax.tree.map(jnp.zeros_like, rows)
    weights = QuantizedWeights(dgrad.mT, dgrad)
    return product.unfused(lhs, rhs, bias, sizes, rows, weights)

  return jax.vjp(unfused, x, rhs, bias)[1](dout)


_fused_dot.defvjp(_fused_dot_fwd, _fused_dot_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_forward(call: _Call, x, index, rhs, weights, bias, group_sizes):
  """As _fused_dot, but not fused where it is differentiated."""
  return _multiply(call, x, index, weights.forward, bias, group_sizes)


def _fused_forward_fwd(call: _Call, x, index, rhs, weights, bias, group_sizes):
  def unfused(x, rhs, bias):
    lhs = _made(call.prologue, x, index, call.product.implementation)
    return call.product.unfused(lhs, rhs, bias, group_sizes, rows, weights)

  rows = index if call.prologue == Rows() else None
  return jax.vjp(unfused, x, rhs, bias)


def _fused_forward_bwd(call: _Call, vjp, dout):
  dx, drhs, dbias = vjp(dout)
  return dx, None, drhs, None, dbias, None


_fused_forward.defvjp(_fused_forward_fwd, _fused_forward_bwd)

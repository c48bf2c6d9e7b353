"""A differentiable jax.lax.ragged_dot whose products are quantised."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_grouped_gemm import checks, schedule
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.group_sizes import check_group_sizes
from jax_grouped_gemm.kernels.unquantized import Unquantized
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.ops import k_grouped_gemm, m_grouped_gemm
from jax_grouped_gemm.quantized_weights import (
  QuantizedWeights,
  check_quantized_weights,
)
from jax_grouped_gemm.ragged_dot_call import Call, differentiable_once
from jax_grouped_gemm.recipe import Recipe, check_recipe
from jax_grouped_gemm.scaled_array import ScaledArray

_LHS_DTYPE = jnp.float8_e4m3fn  # Gradients are the recipe's.


def ragged_dot(
  lhs: Float[Array, "m k"],
  rhs: Float[Array, "g k n"],
  group_sizes: Int[Array, "g_all"],
  precision: lax.PrecisionLike = None,
  preferred_element_type: DTypeLike | None = None,
  group_offset: Int[Array, "1"] | None = None,
  out_sharding=None,
  *,
  recipe: Recipe = Recipe(),  # noqa: B008, immutable.
  quantized_lhs: ScaledArray | None = None,
  quantized_rhs: QuantizedWeights | None = None,
  implementation: str | None = None,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[group of r], lhs (m, k), rhs (g, k, n) -> (m, n).

  jax.lax.ragged_dot, quantised as `recipe` says, with reverse-mode gradients in
  which quantisation has derivative 1, of first order. The rows of a group
  follow those of the group before it. Rows at or past the sum of the sizes are
  zero, as are rows of groups that rhs does not hold; what lhs has there changes
  nothing.

  Args:
    lhs: float32, bfloat16, float16 or float64.
    rhs: the same.
    group_sizes: rows of each group. A negative size counts as 0, and what lies
      beyond m is cut off.
    precision: of the products that are not quantised.
    preferred_element_type: dtype of the result; None: that of the operands.
    group_offset: the first of the groups in group_sizes that rhs holds.
    out_sharding: of the result, on a mesh of explicit axes.
    recipe: which products are quantised, and how.
    quantized_lhs: quantize(lhs, (1, 128)), which the FP8 product of the forward
      pass takes in the place of lhs. Gradients are made from lhs, and go to it.
    quantized_rhs: quantize_weights(rhs), to be used for many calls. The FP8
      products take it in the place of rhs, whose gradient it does not change.
      Its power_of_two_scales is not compared with the recipe's.
    implementation: as in m_grouped_gemm. Operands that the quantisation kernels
      do not support are quantised by XLA. Of the products that are not
      quantised, the kernels multiply two bfloat16 or two float16 operands, of
      which the gradient of the result is one in the backward pass; others are
      left to jax.lax.ragged_dot, or on a CPU to what costs less there.
  """
  lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
  check_recipe(recipe)
  implementations.check(implementation)
  _check_operands(lhs, rhs)
  quantized_lhs = checks.check_quantized_lhs(
    "quantized_lhs", quantized_lhs, lhs.shape
  )
  if quantized_lhs is not None and recipe.forward != "fp8":
    raise ValueError(
      f"quantized_lhs needs a recipe whose forward is 'fp8', got {recipe}"
    )
  if quantized_rhs is not None:
    quantized_rhs = check_quantized_weights(
      "quantized_rhs", quantized_rhs, rhs.shape
    )
    if not recipe.quantizes_weights:
      raise ValueError(
        "quantized_rhs needs a recipe whose forward or dgrad is 'fp8', got "
        f"{recipe}"
      )
  group_sizes, group_offset = check_group_sizes(
    group_sizes, lhs.shape[0], rhs.shape[0], group_offset
  )
  out = jax.eval_shape(
    functools.partial(
      lax.ragged_dot,
      precision=precision,
      preferred_element_type=preferred_element_type,
      out_sharding=out_sharding,
    ),
    lhs,
    rhs,
    # jax.lax.ragged_dot has group_offset, but does not implement it.
    jax.ShapeDtypeStruct(rhs.shape[:1], group_sizes.dtype),
  )
  if not jnp.issubdtype(out.dtype, jnp.floating):
    raise TypeError(
      f"preferred_element_type must be a float dtype, got {out.dtype}"
    )
  use_lax = implementations.default_device().platform != "cpu"
  call = Call(
    recipe=recipe,
    implementation=implementation,
    unquantized=Unquantized(
      precision, implementation, use_lax, group_offset is not None
    ),
    out_dtype=out.dtype,
    lhs_dtype=lhs.dtype,
    rhs_dtype=rhs.dtype,
  )
  dot = functools.partial(_ragged_dot, call)
  if out_sharding is not None:
    dot = jax.sharding.auto_axes(dot, out_sharding=out_sharding)
  quantized = quantized_lhs, quantized_rhs
  return dot(*vary_alike(lhs, rhs, quantized, group_sizes, group_offset))


def _check_operands(lhs, rhs):
  for name, x, ndim, layout in (
    ("lhs", lhs, 2, "(m, k)"),
    ("rhs", rhs, 3, "(g, k, n)"),
  ):
    checks.check_input_dtype(name, x.dtype)
    if x.ndim != ndim:
      raise TypeError(f"{name} must be {layout}, got shape {x.shape}")


# ---------------------------------------------------------------- gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_dot(call: Call, lhs, rhs, quantized, group_sizes, group_offset):
  rows, weights = quantized
  if weights is None and call.recipe.forward == "fp8":
    weights = call.quantize_weights(rhs)
  return _forward(call, lhs, rhs, (rows, weights), group_sizes, group_offset)


def _ragged_dot_fwd(call: Call, lhs, rhs, quantized, group_sizes, group_offset):
  (rows, weights), recipe = quantized, call.recipe
  if recipe.quantizes:
    lhs, rhs = differentiable_once(lhs), differentiable_once(rhs)
  dgrad_rhs = rhs
  if weights is None and recipe.quantizes_weights:
    weights = call.quantize_weights(rhs)
  if recipe.dgrad == "fp8":
    dgrad_rhs = weights.dgrad
  wgrad_lhs = lhs
  if recipe.wgrad == "fp8":
    # From the values themselves: forward's copy has its blocks the other way.
    args = lhs, group_sizes, group_offset, rhs.shape[0], _LHS_DTYPE
    if recipe.forward == "fp8" and rows is None:
      rows, wgrad_lhs = call.quantize_both(*args)
    else:
      wgrad_lhs = call.quantize_tokens(*args)
  out = _forward(call, lhs, rhs, (rows, weights), group_sizes, group_offset)
  return out, (dgrad_rhs, wgrad_lhs, group_sizes, group_offset)


def _ragged_dot_bwd(call: Call, residuals, dout):
  rhs, lhs, group_sizes, group_offset = residuals
  recipe = call.recipe
  if recipe.quantizes:
    dout = differentiable_once(dout)
  groups = rhs.shape[0]
  bounds = schedule.group_bounds(
    group_sizes, dout.shape[0], group_offset, groups
  )
  rows = tokens = dout
  args = dout, group_sizes, group_offset, groups, recipe.gradient_dtype
  if recipe.dgrad == recipe.wgrad == "fp8":
    rows, tokens = call.quantize_both(*args)
  elif recipe.wgrad == "fp8":
    tokens = call.quantize_tokens(*args)
  if recipe.dgrad == "fp8":
    dlhs = _m_grouped(
      call,
      rows,
      rhs,
      group_sizes,
      group_offset,
      value_dtype=recipe.gradient_dtype,
      out_dtype=call.lhs_dtype,
    )
  else:
    dlhs = call.unquantized.lhs_gradient(dout, rhs, *bounds, call.lhs_dtype)
  if recipe.wgrad == "fp8":
    drhs = k_grouped_gemm(
      lhs,
      tokens,
      bounds[1] - bounds[0],
      preferred_element_type=_sum_dtype(call.rhs_dtype),
      implementation=call.implementation,
    ).astype(call.rhs_dtype)
  else:
    drhs = call.unquantized.rhs_gradient(lhs, dout, *bounds, call.rhs_dtype)
  return dlhs, drhs, None, None, None


_ragged_dot.defvjp(_ragged_dot_fwd, _ragged_dot_bwd)


def _forward(call: Call, lhs, rhs, quantized, group_sizes, group_offset):
  rows, weights = quantized
  if call.recipe.forward != "fp8":
    bounds = schedule.group_bounds(
      group_sizes, lhs.shape[0], group_offset, rhs.shape[0]
    )
    return call.unquantized.product(lhs, rhs, *bounds, call.out_dtype)
  return _m_grouped(
    call,
    lhs if rows is None else rows,
    weights.forward,
    group_sizes,
    group_offset,
    value_dtype=_LHS_DTYPE,
    out_dtype=call.out_dtype,
  )


def _m_grouped(
  call: Call,
  x: Float[Array, "m k"] | ScaledArray,
  weights: ScaledArray,
  group_sizes,
  group_offset,
  *,
  value_dtype: DTypeLike,
  out_dtype: DTypeLike,
) -> Float[Array, "m n"]:
  """out[r] = x[r] @ weights[group of r].T, weights (g, n, k)."""
  if not isinstance(x, ScaledArray):
    x = call.quantize_rows(x, value_dtype)
  return m_grouped_gemm(
    x,
    weights,
    group_sizes,
    preferred_element_type=_sum_dtype(out_dtype),
    group_offset=group_offset,
    implementation=call.implementation,
  ).astype(out_dtype)


def _sum_dtype(dtype: DTypeLike):
  """The dtype for kernels to give, where `dtype` is wanted."""
  return dtype if dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)

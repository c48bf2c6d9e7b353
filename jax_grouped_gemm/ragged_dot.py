"""A differentiable jax.lax.ragged_dot whose products are quantised."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_grouped_gemm import checks, schedule
from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.group_sizes import check_group_sizes
from jax_grouped_gemm.kernels.unquantized import Unquantized
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.ops import k_grouped_gemm, m_grouped_gemm
from jax_grouped_gemm.quantization import quantize, quantize_for_k_grouped
from jax_grouped_gemm.scaled_array import ScaledArray

_PRODUCTS = ("fp8", "bf16")
# For the policies of jax.checkpoint: to keep the weights' quantised copy.
QUANTIZED_WEIGHTS = "jax_grouped_gemm.quantized_weights"


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the three products of ragged_dot and its gradients are quantised.

  Attributes:
    forward: "fp8", or "bf16": the operands as they are, of whatever dtype.
    dgrad: the same for the gradient of lhs.
    wgrad: the same for the gradient of rhs.
    gradient_dtype: of the quantised gradient of the result, float8_e4m3fn or
      float8_e5m2.
    power_of_two_scales: as in quantize.
  """

  forward: Literal["fp8", "bf16"] = "fp8"
  dgrad: Literal["fp8", "bf16"] = "fp8"
  wgrad: Literal["fp8", "bf16"] = "fp8"
  gradient_dtype: DTypeLike = jnp.float8_e4m3fn
  power_of_two_scales: bool = False

  def __post_init__(self):
    for name in ("forward", "dgrad", "wgrad"):
      if getattr(self, name) not in _PRODUCTS:
        raise ValueError(
          f"{name} must be one of {_PRODUCTS}, got {getattr(self, name)!r}"
        )
    dtype = jnp.dtype(self.gradient_dtype)
    checks.check_value_dtype("gradient_dtype", dtype)
    object.__setattr__(self, "gradient_dtype", dtype)
    if not isinstance(self.power_of_two_scales, bool):
      raise TypeError(
        f"power_of_two_scales must be a bool, got {self.power_of_two_scales!r}"
      )

  @classmethod
  def bf16(cls) -> "Recipe":
    """Nothing is quantised."""
    return cls(forward="bf16", dgrad="bf16", wgrad="bf16")


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
  implementation: str | None = None,
) -> Float[Array, "m n"]:
  """out[r] = lhs[r] @ rhs[group of r], lhs (m, k), rhs (g, k, n) -> (m, n).

  jax.lax.ragged_dot, quantised as `recipe` says, with reverse-mode gradients in
  which quantisation has derivative 1. The rows of a group follow those of the
  group before it. Rows at or past the sum of the sizes are zero, as are rows of
  groups that rhs does not hold; what lhs has there changes nothing.

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
    implementation: as in m_grouped_gemm. Of the products that are not
      quantised, None means jax.lax.ragged_dot or, on a CPU, "xla"; the kernels
      multiply two bfloat16 or two float16 operands, of which the gradient of
      the result is one in the backward pass.
  """
  lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
  if not isinstance(recipe, Recipe):
    raise TypeError(f"recipe must be a Recipe, got {recipe!r}")
  implementations.check(implementation)
  _check_operands(lhs, rhs)
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
  use_lax = implementations.default_device().platform != "cpu"
  call = _Call(
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
  return dot(*vary_alike(lhs, rhs, group_sizes, group_offset))


def _check_operands(lhs, rhs):
  for name, x, ndim, layout in (
    ("lhs", lhs, 2, "(m, k)"),
    ("rhs", rhs, 3, "(g, k, n)"),
  ):
    checks.check_input_dtype(name, x.dtype)
    if x.ndim != ndim:
      raise TypeError(f"{name} must be {layout}, got shape {x.shape}")


# ---------------------------------------------------------------- gradients


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is static in a call of ragged_dot."""

  recipe: Recipe
  implementation: str | None
  unquantized: Unquantized
  out_dtype: jnp.dtype
  lhs_dtype: jnp.dtype
  rhs_dtype: jnp.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_dot(call: _Call, lhs, rhs, group_sizes, group_offset):
  weights = _quantize_weights(call, rhs) if _is_fp8(call, "forward") else None
  return _forward(call, lhs, rhs, weights, group_sizes, group_offset)


def _ragged_dot_fwd(call: _Call, lhs, rhs, group_sizes, group_offset):
  needs_weights = _is_fp8(call, "forward") or _is_fp8(call, "dgrad")
  weights = kept_weights = None
  if needs_weights:
    # As bytes: policies of jax.checkpoint round what they keep as IEEE types,
    # which damages float8_e4m3fn above 240 (jax 0.11.2).
    kept_weights = _bitcast(_quantize_weights(call, rhs), jnp.uint8)
    kept_weights = checkpoint_name(kept_weights, QUANTIZED_WEIGHTS)
    weights = _bitcast(kept_weights, jnp.float8_e4m3fn)
  out = _forward(call, lhs, rhs, weights, group_sizes, group_offset)
  dgrad_rhs = kept_weights if _is_fp8(call, "dgrad") else rhs
  wgrad_lhs = lhs
  if _is_fp8(call, "wgrad"):
    # From the values themselves: forward's copy has its blocks the other way.
    wgrad_lhs = quantize_for_k_grouped(
      lhs,
      group_sizes,
      power_of_two_scales=call.recipe.power_of_two_scales,
      group_offset=group_offset,
      num_groups=None if group_offset is None else rhs.shape[0],
    )
  return out, (dgrad_rhs, wgrad_lhs, group_sizes, group_offset)


def _ragged_dot_bwd(call: _Call, residuals, dout):
  rhs, lhs, group_sizes, group_offset = residuals
  recipe = call.recipe
  groups = rhs.shape[0]
  bounds = schedule.group_bounds(
    group_sizes, dout.shape[0], group_offset, groups
  )
  if recipe.dgrad == "fp8":
    dlhs = _m_grouped(
      call,
      dout,
      _bitcast(rhs, jnp.float8_e4m3fn),
      group_sizes,
      group_offset,
      value_dtype=recipe.gradient_dtype,
      out_dtype=call.lhs_dtype,
    )
  else:
    dlhs = call.unquantized.lhs_gradient(dout, rhs, *bounds, call.lhs_dtype)
  if recipe.wgrad == "fp8":
    dout = quantize_for_k_grouped(
      dout,
      group_sizes,
      dtype=recipe.gradient_dtype,
      power_of_two_scales=recipe.power_of_two_scales,
      group_offset=group_offset,
      num_groups=None if group_offset is None else groups,
    )
    drhs = k_grouped_gemm(
      lhs,
      dout,
      bounds[1] - bounds[0],
      preferred_element_type=_sum_dtype(call.rhs_dtype),
      implementation=call.implementation,
    ).astype(call.rhs_dtype)
  else:
    drhs = call.unquantized.rhs_gradient(lhs, dout, *bounds, call.rhs_dtype)
  return dlhs, drhs, None, None


_ragged_dot.defvjp(_ragged_dot_fwd, _ragged_dot_bwd)


def _is_fp8(call: _Call, product: str) -> bool:
  return getattr(call.recipe, product) == "fp8"


def _quantize_weights(call: _Call, rhs: Float[Array, "g k n"]) -> ScaledArray:
  return quantize(
    rhs,
    (1, SCALE_BLOCK, SCALE_BLOCK),
    power_of_two_scales=call.recipe.power_of_two_scales,
  )


def _bitcast(x: ScaledArray, dtype: DTypeLike) -> ScaledArray:
  values = lax.bitcast_convert_type(x.values, dtype)
  return ScaledArray(values, x.scales, x.block_shape, x.padding)


def _forward(call: _Call, lhs, rhs, weights, group_sizes, group_offset):
  if not _is_fp8(call, "forward"):
    bounds = schedule.group_bounds(
      group_sizes, lhs.shape[0], group_offset, rhs.shape[0]
    )
    return call.unquantized.product(lhs, rhs, *bounds, call.out_dtype)
  return _m_grouped(
    call,
    lhs,
    weights.mT,
    group_sizes,
    group_offset,
    value_dtype=jnp.float8_e4m3fn,
    out_dtype=call.out_dtype,
  )


def _m_grouped(
  call: _Call,
  x: Float[Array, "m k"],
  weights: ScaledArray,
  group_sizes,
  group_offset,
  *,
  value_dtype: DTypeLike,
  out_dtype: DTypeLike,
) -> Float[Array, "m n"]:
  """out[r] = x[r] @ weights[group of r].T, weights (g, n, k)."""
  x = quantize(
    x,
    (1, SCALE_BLOCK),
    dtype=value_dtype,
    power_of_two_scales=call.recipe.power_of_two_scales,
  )
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

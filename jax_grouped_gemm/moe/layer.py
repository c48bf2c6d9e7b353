"""The whole layer: router, dispatch, experts, combine."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from jax_grouped_gemm import checks
from jax_grouped_gemm.moe.activation import Activation
from jax_grouped_gemm.moe.expert_parallel import ExpertParallel
from jax_grouped_gemm.moe.grouped_mlp import (
  Weights,
  check_no_copies,
  grouped_mlp,
)
from jax_grouped_gemm.moe.permutation import combine, sort_by_expert
from jax_grouped_gemm.moe.routing import Routing, Score, route_top_k
from jax_grouped_gemm.quantization import quantize_rows
from jax_grouped_gemm.quantized_weights import QuantizedWeights
from jax_grouped_gemm.recipe import Recipe
from jax_grouped_gemm.scaled_array import ScaledArray


class MoeParams(NamedTuple):
  """Parameters of a layer of `e` experts, a pytree; as grouped_mlp has them.

  Attributes:
    router: (d, e).
    gate_up: (e, d, 2 f) floats, or a ScaledArray (e, 2 f, d).
    down: (e, f, d) floats, or a ScaledArray (e, d, f).
    router_bias: (e,), part of the logits.
    expert_bias: (e,), enters the choice only: route_top_k's expert_bias.
    gate_up_bias: (e, 2 f).
    down_bias: (e, d).
  """

  router: Float[Array, "d e"]
  gate_up: Weights
  down: Weights
  router_bias: Float[Array, "e"] | None = None
  expert_bias: Float[Array, "e"] | None = None
  gate_up_bias: Float[Array, "e 2*f"] | None = None
  down_bias: Float[Array, "e d"] | None = None


class MoeOutput(NamedTuple):
  """What a layer gives, a pytree.

  Attributes:
    out: like x.
    load_balancing_loss: as Routing has it.
    z_loss: the same.
    group_sizes: (e,), token copies that chose each expert.
    dropped: how many of them found no room; 0 without a capacity.

  With `parallel`, all but `out` are those of all devices.
  """

  out: Float[Array, "*tokens d"]
  load_balancing_loss: Float32[Array, ""]
  z_loss: Float32[Array, ""]
  group_sizes: Int32[Array, "e"]
  dropped: Int32[Array, ""]


def moe_layer(
  x: Float[Array, "*tokens d"],
  params: MoeParams,
  top_k: int,
  *,
  score: Score = "softmax",
  normalize: bool = True,
  scale: float = 1.0,
  num_expert_groups: int = 1,
  top_expert_groups: int = 1,
  activation: Activation = "swiglu",
  recipe: Recipe = Recipe(),  # noqa: B008, immutable.
  rematerialize: bool = False,
  quantized_weights: tuple[QuantizedWeights, QuantizedWeights] | None = None,
  fuse: bool | None = None,
  parallel: ExpertParallel | None = None,
  implementation: str | None = None,
) -> MoeOutput:
  """out[t] = sum over t's top_k experts e of weight[t, e] * mlp[e](x[t]).

  x (..., d) -> out (..., d), of x's dtype. The logits are x @ router +
  router_bias, summed in float32; as in jax.numpy.dot, GPUs multiply what is
  wider than bfloat16 as TF32, unless jax.default_matmul_precision("highest")
  has it otherwise. See route_top_k for experts and weights, grouped_mlp for the
  experts, combine for the sum.

  Args:
    x: tokens, of any leading axes.
    params: of the layer.
    top_k: experts per token.
    score: as in route_top_k.
    normalize: the same.
    scale: the same.
    num_expert_groups: the same.
    top_expert_groups: the same.
    activation: as in grouped_mlp.
    recipe: the same.
    rematerialize: the same.
    quantized_weights: the same.
    fuse: the same.
    parallel: how the experts are spread over devices, for calls inside
      jax.shard_map: x and the experts' parameters, quantised or not, are then
      the device's own, router, router_bias and expert_bias those of all
      experts.
    implementation: as in ragged_dot.
  """
  x = jnp.asarray(x)
  if not isinstance(params, tuple):
    raise TypeError(f"params must be MoeParams, got {type(params).__name__}")
  params = MoeParams(*params)
  check_no_copies(gate_up=params.gate_up, down=params.down)
  if x.ndim == 0:
    raise ValueError(f"x must be (..., d), got shape {x.shape}")
  if parallel is not None and not isinstance(parallel, ExpertParallel):
    raise TypeError(
      f"parallel must be an ExpertParallel or None, got {parallel!r}"
    )
  tokens, d = x.shape[:-1], x.shape[-1]
  rows = x.reshape(-1, d)
  if parallel is not None:
    parallel.check_axes()
  logits = _logits(rows, params)
  routing = route_top_k(
    logits,
    top_k,
    score=score,
    normalize=normalize,
    scale=scale,
    expert_bias=params.expert_bias,
    num_expert_groups=num_expert_groups,
    top_expert_groups=top_expert_groups,
    axis_name=() if parallel is None else parallel.token_axes,
  )

  def experts(rows, group_sizes, quantized=None, permutation=None):
    return grouped_mlp(
      rows,
      params.gate_up,
      params.down,
      group_sizes,
      activation=activation,
      gate_up_bias=params.gate_up_bias,
      down_bias=params.down_bias,
      recipe=recipe,
      permutation=permutation,
      rematerialize=rematerialize,
      quantized_x=quantized,
      quantized_weights=quantized_weights,
      fuse=fuse,
      implementation=implementation,
    )

  num_experts = logits.shape[1]
  shape = np.shape(params.gate_up)  # Of a list, or a ScaledArray, too.
  # What else is wrong with the weights says grouped_mlp.
  num_local = shape[0] if shape else num_experts
  if parallel is None:
    if num_experts != num_local:
      raise ValueError(
        f"router chooses among {num_experts} experts, gate_up holds {num_local}"
      )
    # Copied on the way into the first product.
    permutation = sort_by_expert(routing.experts, num_experts)
    group_sizes, dropped = permutation.group_sizes, jnp.zeros((), jnp.int32)
    rows = experts(rows, group_sizes, permutation=permutation)
    out = combine(rows, routing.weights, permutation, x.dtype)
  else:
    is_scaled = isinstance(params.gate_up, ScaledArray)
    quantize = functools.partial(
      quantize_rows,
      power_of_two_scales=recipe.power_of_two_scales,
      implementation=implementation,
    )
    out, group_sizes, dropped = parallel.run(
      experts,
      rows,
      routing,
      num_experts,
      num_local,
      quantize if is_scaled or recipe.forward == "fp8" else None,
      implementation,
    )
  return MoeOutput(
    out.reshape(*tokens, d), *_losses(routing), group_sizes, dropped
  )


def _losses(routing: Routing):
  return routing.load_balancing_loss, routing.z_loss


def _logits(x: Float[Array, "t d"], params: MoeParams) -> Float32[Array, "t e"]:
  if isinstance(params.router, ScaledArray):
    raise TypeError("router must be floats, got a ScaledArray")
  router = jnp.asarray(params.router)
  if router.ndim != 2 or router.shape[0] != x.shape[1]:
    raise ValueError(
      f"router must be (d, e) with the d of x {x.shape}, got {router.shape}"
    )
  logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
  if params.router_bias is None:
    return logits
  e = router.shape[1]
  bias = checks.check_bias("router_bias", params.router_bias, (e,))
  return logits + bias.astype(jnp.float32)[None]


for _type in (MoeParams, MoeOutput):
  jax.export.register_namedtuple_serialization(
    _type, serialized_name=f"jax_grouped_gemm.moe.{_type.__name__}"
  )

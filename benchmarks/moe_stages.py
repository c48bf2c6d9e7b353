"""Times the stages of a layer's forward pass, each on its own."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.timing import measure_us
from jax_grouped_gemm import Recipe, m_grouped_gemm, moe, quantize, ragged_dot
from jax_grouped_gemm.fused_quantization import quantize_activation
from jax_grouped_gemm.moe.prologue import Dispatched

STAGES = (
  "route",
  "dispatch",
  "quantize rows",
  "gate/up",
  "activation",
  "quantize hidden",
  "down",
  "combine",
)
GEMMS = ("gate/up", "down")
_ROWS = 1, 128  # blocks


def route(x, params, routing) -> moe.Routing:
  """The experts of each token; routing are options of route_top_k."""
  logits = jnp.dot(x, params.router, preferred_element_type=jnp.float32)
  if params.router_bias is not None:
    logits = logits + params.router_bias
  return moe.route_top_k(logits, expert_bias=params.expert_bias, **routing)


def _fused_steps(num_experts: int, options):
  """dispatch, quantize rows, quantize hidden; see stage_times."""
  return (
    lambda x, experts: (x, moe.sort_by_expert(experts, num_experts)),
    functools.partial(Dispatched().quantize, implementation=None),
    lambda hidden: quantize_activation(hidden, **options),
  )


def _steps(num_experts: int):
  """The same, where nothing is fused."""
  return (
    lambda x, experts: moe.dispatch(x, experts, num_experts),
    lambda x, permutation: quantize(x, _ROWS),
    lambda hidden: quantize(hidden, _ROWS),
  )


def _product(is_fp8: bool):
  """Returns the product, and what adds to it the bias that it leaves out."""
  if is_fp8:
    return (
      lambda x, w, sizes, bias: m_grouped_gemm(x, w, sizes, bias=bias),
      lambda out, bias, sizes: out,
    )
  return (
    lambda x, w, sizes, bias: ragged_dot(x, w, sizes, recipe=Recipe.bf16()),
    moe.add_bias,
  )


def stage_times(impl: str, x, params, routing, options, iterations: int):
  """Returns {stage: us} of the forward pass, each stage timed on its own.

  What is fused counts as quantisation: then dispatch only sorts, and there is
  no activation. Biases count as FP8 products, and in bf16 as what follows.

  Args:
    impl: "ours", "ours_unfused" or "ours_bf16".
    x: the tokens.
    params: of the layer, quantised unless impl is "ours_bf16".
    routing: options of route_top_k, top_k among them.
    options: of the activation.
    iterations: of each stage.
  """
  is_fp8, is_fused = impl != "ours_bf16", impl == "ours"
  num_experts = params.router.shape[1]
  dispatch, quantize_rows, quantize_hidden = (
    _fused_steps(num_experts, options) if is_fused else _steps(num_experts)
  )
  product, add_bias = _product(is_fp8)
  times = {}

  def timed(name, fn, *args):
    times[name] = round(measure_us(fn, *args, iterations=iterations), 2)
    return jax.jit(fn)(*args)

  routed = timed("route", lambda x, p: route(x, p, routing), x, params)
  rows, permutation = timed("dispatch", dispatch, x, routed.experts)
  sizes, bias = permutation.group_sizes, params.gate_up_bias
  if is_fp8:
    rows = timed("quantize rows", quantize_rows, rows, permutation)
  hidden = timed("gate/up", product, rows, params.gate_up, sizes, bias)
  if not is_fused:
    activate = lambda *args: moe.activate(add_bias(*args), **options)
    hidden = timed("activation", activate, hidden, bias, sizes)
  if is_fp8:
    hidden = timed("quantize hidden", quantize_hidden, hidden)
  out = timed("down", product, hidden, params.down, sizes, params.down_bias)

  def combine(out, bias, weights, permutation):
    out = add_bias(out, bias, permutation.group_sizes)
    return moe.combine(out, weights, permutation)

  timed("combine", combine, out, params.down_bias, routed.weights, permutation)
  return times

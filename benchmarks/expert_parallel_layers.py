"""The layers that the benchmark of expert parallelism times, and their oracle.

Device i of n holds tokens and experts of its own; what device i holds does not
depend on n, but for the router.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.shapes import MODELS
from jax_grouped_gemm import Recipe, moe, quantize

AXIS = "expert"
SPLIT = P(AXIS)
SPECS = moe.MoeParams(P(), SPLIT, SPLIT, P())
# Of the logits: that of Gumbel noise, whose largest k are samples without
# replacement, with probabilities that go as exp(router_bias).
_LOGIT_STD = np.pi / 6**0.5
# Of experts' weights: in bf16 and FP8, or also their gradient and another copy.
_BYTES_PER_WEIGHT = {"forward": 3, "forward_backward": 6}
_BYTES_OF_WEIGHTS = 4e10  # that a device has room for, beside all else.

# What differs between the models, beside their sizes.
_OPTIONS = {
  "deepseek-v3": dict(
    score="sigmoid", scale=2.5, num_expert_groups=8, top_expert_groups=4
  ),
}
_SIZES = {**MODELS, "smoke": (8, 2, 256, 128)}


class Impl(NamedTuple):
  """A way to compute the layer.

  Attributes:
    recipe: of the products.
    options: of ExpertParallel.
    implementation: as in moe_layer.
    compiler_options: for XLA, on GPUs.
    max_row_error: largest |row - row of the oracle| / |row of the oracle|, as
      in benchmarks/moe_layer.py.
  """

  recipe: Recipe
  options: dict
  implementation: str | None = None
  compiler_options: dict | None = None
  max_row_error: float = 2**-2

  @property
  def serves_fp8(self) -> bool:
    """Whether the weights are quantised beforehand, if there is no gradient."""
    return self.recipe.forward == "fp8"


IMPLS = {
  "ours": Impl(Recipe(), {"payload": "fp8"}),
  "ours_bf16_payload": Impl(Recipe(), {"payload": "bf16"}),
  "ours_chunks_2": Impl(
    Recipe(),
    {"payload": "fp8", "chunks": 2},
    compiler_options={"xla_gpu_enable_latency_hiding_scheduler": True},
  ),
  # "ours" gathers few tokens, in the set "decode", and no others.
  "ours_dense": Impl(Recipe(), {"payload": "fp8", "exchange": "dense"}),
  "ours_gather": Impl(Recipe(), {"payload": "fp8", "exchange": "gather"}),
  # "xla" is jax.lax.ragged_dot on GPUs.
  "lax_ragged_dot": Impl(Recipe.bf16(), {}, "xla", max_row_error=2**-6),
}


class Problem(NamedTuple):
  """A layer on some devices, and how many tokens each of them has."""

  set: str
  model: str
  routing: str  # "uniform" or "zipf"
  tokens: int
  devices: int

  @property
  def shape(self) -> str:
    """The problem's label."""
    return f"{self.model} {self.routing} {self.tokens} x{self.devices}"

  @property
  def weak(self) -> tuple:
    """What problems have in common that differ in the number of devices."""
    return self[:4]

  @property
  def sizes(self) -> tuple[int, int, int, int]:
    """experts, top_k, d_model, d_ff: the model's, or as many as fit."""
    experts, top_k, d, f = _SIZES[self.model]
    kind = "forward_backward" if self.has_backward else "forward"
    each = 3 * d * f * _BYTES_PER_WEIGHT[kind]
    while experts // self.devices * each > _BYTES_OF_WEIGHTS:
      experts //= 2
    return experts, top_k, d, f

  @property
  def has_backward(self) -> bool:
    """Whether gradients are computed too."""
    return self.set.endswith("forward_backward")

  @property
  def copies(self) -> int:
    """Rows of all devices' experts."""
    return self.tokens * self.devices * self.sizes[1]

  @property
  def flops(self) -> int:
    """Of the products of the experts, on all devices."""
    _, _, d, f = self.sizes
    return (3 if self.has_backward else 1) * 6 * self.copies * d * f

  @property
  def routing_options(self) -> dict:
    """Of route_top_k and moe_layer."""
    return {"top_k": self.sizes[1], **_OPTIONS.get(self.model, {})}


def make_mesh(problem: Problem) -> Mesh:
  """Returns the devices of a problem."""
  return Mesh(np.array(jax.devices()[: problem.devices]), (AXIS,))


def on_devices(mesh: Mesh, fn, in_specs, out_specs=SPLIT):
  """Returns fn on each device's part of its arguments."""
  return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


# ---------------------------------------------------------------- operands


def make_operands(problem: Problem, mesh: Mesh):
  """Returns (x, gradient of the result, float parameters), spread over mesh."""
  e, _, d, f = problem.sizes
  normal = functools.partial(_normal, mesh)
  bias = np.zeros(e, np.float32)
  if problem.routing == "zipf":
    ranks = np.random.default_rng(0).permutation(np.arange(1, e + 1))
    bias = -np.log(ranks).astype(np.float32)
  router = jax.random.normal(jax.random.key(0), (d, e)) * _LOGIT_STD * d**-0.5
  params = moe.MoeParams(
    router=router.astype(jnp.bfloat16),
    gate_up=normal(1, e, (d, 2 * f), d**-0.5),
    down=normal(2, e, (f, d), f**-0.5),
    router_bias=jnp.asarray(bias),
  )
  tokens = problem.devices, (problem.tokens, d)
  x, dout = (normal(seed, *tokens, 1.0).reshape(-1, d) for seed in (3, 4))
  return x, dout, params


def _normal(mesh: Mesh, seed: int, count: int, shape, scale: float):
  """(count, *shape), the first axis spread over the devices, one at a time."""

  def one(i):
    key = jax.random.fold_in(jax.random.key(seed), i)
    return (scale * jax.random.normal(key, shape)).astype(jnp.bfloat16)

  make = on_devices(mesh, lambda ids: lax.map(one, ids), SPLIT)
  return jax.jit(make)(jnp.arange(count))


def quantized(mesh: Mesh, params: moe.MoeParams) -> moe.MoeParams:
  """One expert at a time: all of them in float32 do not fit."""
  scaled = lambda w: lax.map(lambda w: quantize(w.T, (128, 128)), w)
  scale = jax.jit(on_devices(mesh, scaled, SPLIT))
  return params._replace(gate_up=scale(params.gate_up), down=scale(params.down))


# ---------------------------------------------------------------- layers


def expert_parallel(impl: Impl, capacity: int | None) -> moe.ExpertParallel:
  """Returns how an implementation spreads experts."""
  return moe.ExpertParallel(AXIS, capacity=capacity, **impl.options)


def function(problem: Problem, impl: Impl, mesh: Mesh, capacity: int | None):
  """Returns fn(x, dout, params) -> (dropped, result, gradients if asked)."""
  parallel = None
  if problem.devices > 1:
    parallel = expert_parallel(impl, capacity)

  def local(x, params):
    result = moe.moe_layer(
      x,
      params,
      recipe=impl.recipe,
      parallel=parallel,
      implementation=impl.implementation,
      **problem.routing_options,
    )
    return result.out, result.dropped

  layer = on_devices(mesh, local, (SPLIT, SPECS), (SPLIT, P()))

  def run(x, dout, params):
    if not problem.has_backward:
      out, dropped = layer(x, params)
      return dropped, out
    out, vjp, dropped = jax.vjp(layer, x, params, has_aux=True)
    return dropped, out, *vjp(dout)

  return run


def route(x, params, problem: Problem, axis_name=()) -> moe.Routing:
  """Routed in bf16 as the layer does, or near ties would go elsewhere."""
  logits = jnp.dot(x, params.router, preferred_element_type=jnp.float32)
  return moe.route_top_k(
    logits + params.router_bias, axis_name=axis_name, **problem.routing_options
  )


def expected(problem: Problem, mesh: Mesh, x, dout, params):
  """(result, gradient of x) of a few tokens, one expert at a time, in f32.

  Every device adds what its experts contribute to each token.
  """

  def token(params, x):
    routing = route(x.astype(jnp.bfloat16)[None], params, problem)
    num_local = params.gate_up.shape[0]
    first = lax.axis_index(AXIS) * num_local

    def contribution(expert, weight):
      i = jnp.clip(expert - first, 0, num_local - 1)
      hidden = x @ params.gate_up[i].astype(jnp.float32)
      y = moe.activate(hidden[None])[0] @ params.down[i].astype(jnp.float32)
      return jnp.where(i == expert - first, weight * y, 0)

    parts = map(contribution, routing.experts[0], routing.weights[0])
    return sum(parts)

  def local(x, dout, params):
    def both(args):
      x, dout = args
      out, vjp = jax.vjp(functools.partial(token, params), x)
      return out, vjp(dout)[0]

    # Of tokens that are the same everywhere, gradients would be added up.
    x, dout = lax.pcast((x, dout), AXIS, to="varying")
    wide = x.astype(jnp.float32), dout.astype(jnp.float32)
    return lax.psum(lax.map(both, wide), AXIS)

  run = on_devices(mesh, local, (P(), P(), SPECS), P())
  with jax.default_matmul_precision("highest"):
    return jax.jit(run)(x, dout, params)

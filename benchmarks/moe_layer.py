"""Times whole MoE layers, their stages, and the same layers of peers.

The sets are "forward" (weights already in FP8, as in serving), "decode" (the
same, few tokens) and "forward_backward" (float weights; gradients of tokens and
of all weights). Tokens are normal random numbers, routed by a random router.
"ours_unfused" writes token copies and activations before it quantises them; so
does "ours" in a forward pass that a backward pass follows.
"ours_quantized_weights" gets FP8 copies of the weights beside the floats, as
for one of several microbatches; "ours_bf16_wgrad" computes the gradient of the
weights in bf16.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from tqdm import tqdm

from benchmarks import moe_stages, stage_bars
from benchmarks.moe_stages import route
from benchmarks.operands import Unsupported, check_dense
from benchmarks.run import RESULTS, short_name, versions, write
from benchmarks.shapes import MODELS
from benchmarks.timing import Program
from jax_grouped_gemm import Recipe, moe, quantize, quantize_weights

IMPLS = (
  "ours",
  "ours_unfused",
  "ours_quantized_weights",
  "ours_bf16_wgrad",
  "ours_bf16",
  "lax_ragged_dot",
)
# Without a backward pass they are "ours", whose weights are quantised then.
_ONLY_WITH_BACKWARD = "ours_quantized_weights", "ours_bf16_wgrad"
_CHECKED_TOKENS = 16
# Largest |row - row of the reference| / |row of the reference|. As in
# tests/test_gpu.py, a product of two FP8 factors is off by at most 2^-3 of
# itself, one of bf16 factors by 2^-7, and random signs make less of a sum of
# them; but there are two products one after the other.
_MAX_ROW_ERROR = {
  "ours": 2**-2,
  "ours_unfused": 2**-2,
  "ours_quantized_weights": 2**-2,
  "ours_bf16_wgrad": 2**-2,
  "ours_bf16": 2**-6,
  "lax_ragged_dot": 2**-6,
}
# Kind -> part of a kernel's name; the first that fits. What is left are XLA's.
_KINDS = {
  "GEMMs": r"[mk]_grouped|small_groups",
  "quantisation": r"quantize_\w+_sm90",
  "activation gradient": r"_backward_sm90",
  "others": "",
}
# It multiplies all rows by all groups: seconds a call.
_DENSE_ITERATIONS = 3

# What differs between the models, beside their sizes (benchmarks/shapes.py).
_OPTIONS = {
  "deepseek-v3": dict(
    score="sigmoid", scale=2.5, num_expert_groups=8, top_expert_groups=4
  ),
  "gpt-oss-120b": dict(activation="swiglu_clamped"),
}
_SIZES = {**MODELS, "smoke": (4, 2, 256, 128)}
_LAYERS = ("mixtral-8x7b", "deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b")


class Problem(NamedTuple):
  """A layer and how many tokens it gets."""

  set: str
  model: str
  tokens: int

  @property
  def shape(self) -> str:
    """The problem's label."""
    return f"{self.model} {self.tokens}"

  @property
  def sizes(self) -> tuple[int, int, int, int]:
    """experts, top_k, d_model, d_ff."""
    return _SIZES[self.model]

  @property
  def has_backward(self) -> bool:
    """Whether gradients are computed too."""
    return self.set.endswith("forward_backward")

  @property
  def flops(self) -> int:
    """Of the products of the experts."""
    _, top_k, d, f = self.sizes
    return (3 if self.has_backward else 1) * 6 * self.tokens * top_k * d * f


SETS = {
  "forward": [Problem("forward", model, 16384) for model in _LAYERS],
  "forward_backward": [
    Problem("forward_backward", model, 16384) for model in _LAYERS
  ],
  "decode": [
    Problem("decode", model, tokens)
    for model in _LAYERS
    for tokens in (16, 64, 256)
  ],
  "smoke": [
    Problem("smoke forward", "smoke", 48),
    Problem("smoke forward_backward", "smoke", 48),
  ],
}

# ---------------------------------------------------------------- operands


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, scale):
  return scale * jax.random.normal(key, shape, jnp.bfloat16)


def _make(problem: Problem):
  """Returns (x, gradient of the result, float parameters)."""
  e, _, d, f = problem.sizes
  keys = jax.random.split(jax.random.key(0), 8)
  params = moe.MoeParams(
    router=_normal(keys[0], (d, e), d**-0.5),
    gate_up=_normal(keys[1], (e, d, 2 * f), d**-0.5),
    down=_normal(keys[2], (e, f, d), f**-0.5),
  )
  if problem.model == "deepseek-v3":
    params = params._replace(expert_bias=_normal(keys[3], (e,), 0.01))
  if problem.model == "gpt-oss-120b":
    params = params._replace(
      router_bias=_normal(keys[4], (e,), 0.1),
      gate_up_bias=_normal(keys[5], (e, 2 * f), 0.1),
      down_bias=_normal(keys[6], (e, d), 0.1),
    )
  shape = problem.tokens, d
  return _normal(keys[7], shape, 1.0), _normal(keys[3], shape, 1.0), params


@jax.jit
def _quantized(params):
  """One expert at a time: all of them in float32 do not fit."""
  scaled = lambda w: lax.map(lambda w: quantize(w.T, (128, 128)), w)
  return params._replace(
    gate_up=scaled(params.gate_up), down=scaled(params.down)
  )


# ---------------------------------------------------------------- layers


def _options(problem: Problem):
  """Returns the options of moe_layer: (of the router, others)."""
  options = dict(_OPTIONS.get(problem.model, {}))
  activation = options.pop("activation", "swiglu")
  return {"top_k": problem.sizes[1], **options}, dict(activation=activation)


def _ours(problem: Problem, impl: str):
  routing, others = _options(problem)
  options = {
    "ours": {},
    "ours_unfused": dict(fuse=False),
    "ours_quantized_weights": {},
    "ours_bf16_wgrad": dict(recipe=Recipe(wgrad="bf16")),
    "ours_bf16": dict(recipe=Recipe.bf16()),
  }[impl]

  def layer(x, params, quantized=None):
    return moe.moe_layer(
      x,
      params,
      quantized_weights=quantized,
      **options,
      **routing,
      **others,
    ).out

  return layer


def _lax(problem: Problem):
  """The layer as one writes it around jax.lax.ragged_dot."""
  routing, others = _options(problem)
  top_k = routing["top_k"]

  def layer(x, params):
    routed = route(x, params, routing)
    order = jnp.argsort(routed.experts.reshape(-1))
    sizes = jnp.bincount(
      routed.experts.reshape(-1), length=params.router.shape[1]
    )
    copies = x[order // top_k]
    expert = routed.experts.reshape(-1)[order]
    hidden = lax.ragged_dot(copies, params.gate_up, sizes)
    if params.gate_up_bias is not None:
      hidden = hidden + params.gate_up_bias[expert]
    hidden = moe.activate(hidden, **others)
    out = lax.ragged_dot(hidden, params.down, sizes)
    if params.down_bias is not None:
      out = out + params.down_bias[expert]
    weights = routed.weights.reshape(-1)[order][:, None]
    weighted = out.astype(jnp.float32) * weights
    summed = jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(weighted)
    return summed.astype(x.dtype)

  return layer


def _layer(problem: Problem, impl: str):
  if impl == "lax_ragged_dot":
    return _lax(problem)
  return _ours(problem, impl)


def _function(problem: Problem, impl: str):
  """Returns fn(x, dout, params), of the result and, if asked, the gradients.

  With quantised weights as a last argument where the layer takes them.
  """
  layer = _layer(problem, impl)
  if not problem.has_backward:
    return lambda x, dout, params: (layer(x, params),)

  def run(x, dout, params, *quantized):
    out, vjp = jax.vjp(lambda x, p: layer(x, p, *quantized), x, params)
    return out, *vjp(dout)

  return run


@functools.lru_cache(maxsize=1)  # The implementations come one by one.
def _expected(problem: Problem):
  """(result, gradient of x) of a few tokens, one expert at a time, in f32."""
  routing, others = _options(problem)

  def mlp(params, x, e):
    biases = [
      0.0 if b is None else b[e].astype(jnp.float32)
      for b in (params.gate_up_bias, params.down_bias)
    ]
    hidden = x @ params.gate_up[e].astype(jnp.float32) + biases[0]
    hidden = moe.activate(hidden[None], **others)[0]
    return hidden @ params.down[e].astype(jnp.float32) + biases[1]

  def token(params, x):
    # Routed in bf16 as the layers do, or near ties would go elsewhere.
    routed = route(x.astype(jnp.bfloat16)[None], params, routing)
    results = [mlp(params, x, e) for e in routed.experts[0]]
    return jnp.sum(jnp.stack(results) * routed.weights[0][:, None], axis=0)

  def both(params, args):
    x, dout = args
    token_of = functools.partial(token, params)
    out, vjp = jax.vjp(token_of, x.astype(jnp.float32))
    return out, vjp(dout.astype(jnp.float32))[0]

  @jax.jit
  def of_all(params, *args):
    return lax.map(functools.partial(both, params), args)

  x, dout, params = _make(problem)
  every = _checked(problem)
  with jax.default_matmul_precision("highest"):
    return jax.device_get(of_all(params, x[every], dout[every]))


def _checked(problem: Problem) -> slice:
  """The tokens whose results are checked."""
  return slice(None, None, max(1, problem.tokens // _CHECKED_TOKENS))


# ---------------------------------------------------------------- the run


def _by_kind(kernels_us: dict[str, float]) -> dict[str, float]:
  """{kind: us} of {kernel: us}, of the kinds that there are."""
  times = dict.fromkeys(_KINDS, 0.0)
  for name, us in kernels_us.items():
    kind = next(k for k, pattern in _KINDS.items() if re.search(pattern, name))
    times[kind] += us
  return {kind: round(us, 2) for kind, us in times.items() if us}


def _row_error(got, expected) -> float:
  error = jnp.linalg.norm(got.astype(jnp.float32) - expected, axis=-1)
  return float(jnp.max(error / jnp.linalg.norm(expected, axis=-1)))


def _measure(
  problem: Problem, impl: str, iterations: int, with_stages: bool
) -> dict:
  if impl == "lax_ragged_dot":
    check_dense(problem.sizes[0])
  expected = _expected(problem)
  x, dout, params = _make(problem)
  is_fp8 = impl.startswith("ours") and impl != "ours_bf16"
  if is_fp8 and not problem.has_backward:
    params = _quantized(params)
  args = x, dout, params
  if impl == "ours_quantized_weights":
    weights = params.gate_up, params.down
    args = *args, tuple(map(quantize_weights, weights))
  if impl == "lax_ragged_dot":
    iterations = min(iterations, _DENSE_ITERATIONS)
  program = Program(_function(problem, impl), *args)
  results = program(*args)
  errors = [
    _row_error(got[_checked(problem)], want)
    for got, want in zip(results[:2], expected, strict=False)
  ]
  del results
  us, kernels_us = program.measure(*args, iterations=iterations)
  row = {
    "us": round(us, 2),
    "tflops": round(problem.flops / us / 1e6, 1),
    "max_row_error": max(errors),
    "verified": max(errors) <= _MAX_ROW_ERROR[impl],
    "peak_bytes": program.peak_bytes,
  }
  if kernels_us and impl != "lax_ragged_dot":
    row["kernels"] = _by_kind(kernels_us)
    row["gemm_share"] = round(row["kernels"].get("GEMMs", 0.0) / us, 3)
  if with_stages and not problem.has_backward and impl != "lax_ragged_dot":
    row["stages"] = moe_stages.stage_times(
      impl, x, params, *_options(problem), iterations
    )
  return row


def complete(args, argv, impls):
  """Fills in what the command line leaves out, of whole layers by `impls`."""
  args.argv = argv
  if args.shapes == ["deepgemm"]:  # The default, of the GEMMs.
    args.shapes = ["forward", "forward_backward", "decode"]
  if args.peers == ["all"]:
    args.peers = [impl for impl in impls if impl != "ours"]


def check_names(flag: str, names, known):
  """Exits unless all names are known."""
  if unknown := set(names) - set(known):
    raise SystemExit(f"{flag} must be of {[*known]}, got {sorted(unknown)}")


def main(args, argv) -> int:
  """Times what the command line names; 1 if a result is wrong."""
  complete(args, argv, IMPLS)
  check_names("--shapes", args.shapes, SETS)
  check_names("--peers", args.peers, IMPLS[1:])
  return _run(args)


def _run(args) -> int:
  problems = [
    problem
    for name in args.shapes
    for problem in SETS[name]
    if args.only in problem.shape
  ]
  device, rows = jax.devices()[0].device_kind, []
  print(f"{device}, {versions()}; normal random tokens, random router")
  path = args.json or RESULTS / f"moe_layer-{short_name(device)}.json"
  for problem in tqdm(problems, desc="moe_layer", disable=None):
    e, top_k, d, f = problem.sizes
    for impl in ("ours", *args.peers):
      if impl in _ONLY_WITH_BACKWARD and not problem.has_backward:
        continue
      row = {
        "set": problem.set,
        "shape": problem.shape,
        "impl": impl,
        **dict(g=e, m=problem.tokens * top_k, n=f, k=d),
      }
      try:
        row |= _measure(problem, impl, args.iterations, args.stages)
      except Unsupported as reason:
        row["unavailable"] = str(reason)
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        row["unavailable"] = "out of memory"
      tqdm.write(_line(row))
      rows.append(row)
      # After each: a run that is cut off leaves what it measured.
      write(path, "moe_layer", device, rows, args)
  print(f"{len(rows)} rows: {path}")
  return 0 if all(row.get("verified", True) for row in rows) else 1


def _line(row) -> str:
  head = f"{row['set']:16} {row['shape']:24} {row['impl']:14}"
  if "us" not in row:
    return f"{head} not run: {row['unavailable']}"
  stages = row.get("stages", {})
  shown = ", ".join(
    f"{name} {us:.0f}" for name, us in row.get("kernels", stages).items()
  )
  return (
    f"{head} {row['us']:10.1f} us {row['tflops']:7.1f} TFLOP/s"
    f"{'' if row['verified'] else ' WRONG'} {shown}"
  )


def _parts(row) -> dict[str, float]:
  """{part: us} of the layer: its stages, or its kernels by kind."""
  return row.get("stages") or row.get("kernels", {})


def _gemms_us(row) -> float:
  """What the GEMMs take alone: those inside the layer, where known."""
  if "GEMMs" in row.get("kernels", {}):
    return row["kernels"]["GEMMs"]
  return sum(row.get("stages", {}).get(name, 0.0) for name in moe_stages.GEMMS)


def plot(source: Path, target: Path) -> int:
  """Draws the times of the stages as stacked bars; returns 0."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  result = json.loads(source.read_text())
  rows = [row for row in result["rows"] if _parts(row)]
  figure, axes = plt.subplots(
    figsize=(10, 2 + 0.3 * len(rows)), layout="constrained"
  )
  stage_bars.draw(
    axes,
    rows,
    (*moe_stages.STAGES, *_KINDS),
    time_of=lambda row, part: _parts(row).get(part, 0),
    bound_of=_gemms_us,
    what="time of each stage alone, or of its kernels",
  )
  figure.suptitle(
    f"{result['device']}, {result['date']}; bound: the GEMMs alone", fontsize=9
  )
  figure.savefig(target, dpi=110)
  print(target)
  return 0

"""Times MoE layers whose experts are spread over the GPUs of one host.

The sets are "forward" (weights already in FP8, as in serving), "decode" (the
same, few tokens) and "forward_backward" (float weights; gradients of tokens and
of all weights). Each device has tokens of its own, as many whatever the number
of devices (weak scaling); on one device the layer runs without an exchange. An
expert is as popular as any other, or the i-th with weight 1/i.
"""

import functools

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import expert_parallel_stages as stages
from benchmarks import moe_layer
from benchmarks.expert_parallel_layers import (
  IMPLS,
  Problem,
  expected,
  expert_parallel,
  function,
  make_mesh,
  make_operands,
  quantized,
)
from benchmarks.oracle import row_error
from benchmarks.run import RESULTS, short_name, versions, write
from benchmarks.timing import measure_queued_us

DEVICES = (1, 2, 4, 8)
_MODELS = ("deepseek-v3", "qwen3-235b-a22b", "mixtral-8x7b")
_ROUTINGS = ("uniform", "zipf")
_CHECKED_TOKENS = 16
_WITH_STAGES = "ours", "ours_bf16_payload", "ours_dense"  # If not gathered.
# It multiplies all rows by all groups: seconds a call.
_DENSE_ITERATIONS = 3

# --shapes -> (model, tokens of a device)
SETS = {
  "forward": [(model, 16384) for model in _MODELS],
  "forward_backward": [(model, 16384) for model in _MODELS],
  "decode": [(model, tokens) for model in _MODELS for tokens in (16, 128)],
  "smoke": [("smoke", 24)],
}


def problems(sets, devices) -> list[Problem]:
  """Those of few devices first: they are what others are compared with."""
  result = []
  for name in sets:
    kinds = [name]
    if name == "smoke":
      kinds = ["smoke forward", "smoke forward_backward"]
    result += [
      Problem(kind, model, routing, tokens, count)
      for kind in kinds
      for model, tokens in SETS[name]
      for routing in _ROUTINGS
      for count in devices
    ]
  return result


# ---------------------------------------------------------------- the run


def _verify(impl, results, want, step: int) -> dict:
  dropped, *got = results
  errors = [
    float(row_error(np.asarray(g[::step]), w))
    for g, w in zip(got[:2], want, strict=False)
  ]
  ok = int(dropped) == 0 and max(errors) <= impl.max_row_error
  return {
    "max_row_error": max(errors),
    "dropped": int(dropped),
    "verified": ok,
  }


class _Setting:
  """What the implementations of a problem have in common, each made once."""

  def __init__(self, problem: Problem):
    self.problem, self.mesh = problem, make_mesh(problem)
    self.x, self.dout, self.params = make_operands(problem, self.mesh)
    self.step = max(1, self.x.shape[0] // _CHECKED_TOKENS)
    checked = self.x[:: self.step], self.dout[:: self.step]
    self.want = expected(problem, self.mesh, *checked, self.params)

  @functools.cached_property
  def receivers(self) -> np.ndarray:
    """Of each copy of a token, the device."""
    return stages.receivers(self.problem, self.mesh, self.x, self.params)

  @functools.cached_property
  def quantized(self):
    """The parameters as they are served."""
    return quantized(self.mesh, self.params)


def _measure(setting: _Setting, impl_name: str, iterations: int) -> dict:
  """Returns what a row says of one implementation."""
  problem, impl, mesh = setting.problem, IMPLS[impl_name], setting.mesh
  x, dout, params = setting.x, setting.dout, setting.params
  row, capacity, has_stages = {}, None, False
  if problem.devices > 1:
    traffic = stages.traffic(problem, impl, setting.receivers)
    tokens = traffic.exchanged
    if problem.set != "decode" and impl.options.get("exchange") != "gather":
      capacity = traffic.capacity
    parallel = expert_parallel(impl, capacity)
    exchange = parallel.choose_exchange(problem.tokens, problem.devices)
    if exchange == "gather":
      tokens = problem.tokens * (problem.devices - 1)
    else:
      has_stages = not problem.has_backward and impl_name in _WITH_STAGES
    row = {
      "busiest_rows": traffic.busiest,
      "exchanged_bytes": stages.exchanged_bytes(problem, impl, tokens),
    }
  if impl.serves_fp8 and not problem.has_backward:
    params = setting.quantized
  if impl_name == "lax_ragged_dot":
    iterations = min(iterations, _DENSE_ITERATIONS)
  fn = function(problem, impl, mesh, capacity)
  on_gpu = jax.default_backend() == "gpu"
  compiled = (
    jax.jit(fn)
    .lower(x, dout, params)
    .compile(compiler_options=impl.compiler_options if on_gpu else None)
  )
  row |= _verify(impl, compiled(x, dout, params), setting.want, setting.step)
  us = measure_queued_us(compiled, x, dout, params, iterations=iterations)
  memory = compiled.memory_analysis()
  row |= {
    "us": round(us, 2),
    "tflops": round(problem.flops / us / 1e6, 1),
    "peak_bytes": memory.temp_size_in_bytes  # of a device
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes,
  }
  if has_stages:
    row["stages"] = stages.stages(
      problem, impl, mesh, capacity, x, params, iterations
    )
  return row


def _compare(row, problem: Problem, alone_us, link_gbps, gemms_us) -> dict:
  """Returns what a row says beside others: weak scaling, and the bound."""
  result = {}
  if alone_us is not None:
    result["efficiency"] = round(alone_us / row["us"], 3)
  if problem.devices > 1:
    exchange_us = row["exchanged_bytes"] / link_gbps / 1e3
    result["exchange_bound_us"] = round(exchange_us, 2)
    if gemms_us is not None:
      result["bound_us"] = round(exchange_us + gemms_us, 2)
      result["of_bound"] = round(result["bound_us"] / row["us"], 3)
  return result


def main(args, argv) -> int:
  """Times what the command line names; 1 if a result is wrong."""
  moe_layer.complete(args, argv, IMPLS)
  counts = [count for count in DEVICES if count <= jax.device_count()]
  if args.devices is None:
    args.devices = counts
  moe_layer.check_names("--shapes", args.shapes, SETS)
  moe_layer.check_names("--peers", args.peers, [*IMPLS][1:])
  moe_layer.check_names("--devices", args.devices, counts)
  return _run(args)


def _run(args) -> int:
  todo = [
    problem
    for problem in problems(args.shapes, sorted(set(args.devices)))
    if args.only in problem.shape
  ]
  device, rows = jax.devices()[0].device_kind, []
  print(
    f"{jax.device_count()} x {device}, {versions()}; normal random tokens; "
    "efficiency is the time on one device over that on all"
  )
  path = args.json or RESULTS / f"expert_parallel-{short_name(device)}.json"
  alone_us, gbps = {}, {}

  def report(row):
    tqdm.write(_line(row))
    rows.append(row)
    # After each: a run that is cut off leaves what it measured.
    write(path, "expert_parallel", device, rows, args)

  for problem in tqdm(todo, desc="expert_parallel", disable=None):
    count, gemms_us, setting = problem.devices, None, None
    if count > 1 and count not in gbps:
      link = stages.measure_link(make_mesh(problem), args.iterations)
      gbps[count] = link["gbps"]
      head = {"set": "link", "shape": f"all_to_all x{count}", "impl": "link"}
      report({**head, "devices": count, **link})
    for impl in ("ours", *args.peers):
      if count == 1 and impl not in ("ours", "lax_ragged_dot"):
        continue  # Those exchange tokens in other ways.
      e, _, d, f = problem.sizes
      row = {
        **{"set": problem.set, "shape": problem.shape, "impl": impl},
        **{"g": e, "m": problem.copies, "n": f, "k": d},
        **{"devices": count, "routing": problem.routing},
      }
      try:
        setting = setting or _Setting(problem)
        row |= _measure(setting, impl, args.iterations)
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        report({**row, "unavailable": "out of memory"})
        continue
      of_lax = impl == "lax_ragged_dot"
      key = problem.weak, of_lax
      if count == 1:
        alone_us[key] = row["us"]
      if gemms_us is None and "stages" in row:
        gemms_us = sum(row["stages"][name] for name in stages.GEMMS)
      row |= _compare(
        row,
        problem,
        alone_us.get(key),
        gbps.get(count),
        None if of_lax else gemms_us,
      )
      report(row)
  print(f"{len(rows)} rows: {path}")
  return 0 if all(row.get("verified", True) for row in rows) else 1


def _line(row) -> str:
  head = f"{row['set']:16} {row['shape']:32} {row['impl']:18}"
  if "us" not in row:
    return f"{head} not run: {row['unavailable']}"
  parts = [f"{head} {row['us']:10.1f} us"]
  for name, form in (
    ("tflops", "{:7.1f} TFLOP/s"),
    ("gbps", "{:7.1f} GB/s"),
    ("efficiency", "efficiency {:.2f}"),
    ("of_bound", "of bound {:.2f}"),
  ):
    if name in row:
      parts.append(form.format(row[name]))
  parts += [f"{name} {us:.0f}" for name, us in row.get("stages", {}).items()]
  return " ".join(parts) + ("" if row["verified"] else " WRONG")

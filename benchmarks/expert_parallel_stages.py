"""How long the stages of an expert-parallel layer take, and what bounds it.

The bound is the time of the bytes that the busiest device exchanges, at the
bandwidth of an all-to-all of large buffers, and that of the experts' products
alone, on the device that has most of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from benchmarks.expert_parallel_layers import (
  AXIS,
  SPECS,
  SPLIT,
  Impl,
  Problem,
  on_devices,
  route,
)
from benchmarks.timing import measure_queued_us
from jax_grouped_gemm import m_grouped_gemm, moe, quantize
from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.moe import exchange
from jax_grouped_gemm.moe.permutation import dispatch_quantized

STAGES = (
  "route",
  "dispatch",
  "exchange",
  "quantize",
  "gate/up",
  "activation",
  "down",
  "exchange back",
  "combine",
)
GEMMS = ("gate/up", "down")
_BLOCKS = (1, SCALE_BLOCK)
# Of a device's buffer whose parts go to all devices.
_LINK_BYTES = {"gpu": 2**28, "cpu": 2**20}
_CAPACITY_ALIGN = 128


class Traffic(NamedTuple):
  """Rows that devices exchange, known beforehand: routing is a benchmark's."""

  counts: np.ndarray  # (chunks, sender, receiver)

  @property
  def busiest(self) -> int:
    """Rows of the experts of the device that has most."""
    return int(self.counts.sum(axis=(0, 1)).max())

  @property
  def capacity(self) -> int:
    """Of ExpertParallel, so that nothing is dropped from any chunk."""
    most = int(self.counts.sum(axis=1).max())
    return len(self.counts) * (most + -most % _CAPACITY_ALIGN)

  @property
  def exchanged(self) -> int:
    """Rows that the device sends to others, or gets, which has most of them."""
    pairs = self.counts.sum(axis=0)
    pairs = pairs * (1 - np.eye(len(pairs), dtype=pairs.dtype))
    return int(max(pairs.sum(axis=0).max(), pairs.sum(axis=1).max()))


def traffic(problem: Problem, mesh: Mesh, impl: Impl, x, params) -> Traffic:
  """Returns what is exchanged."""
  choose = on_devices(
    mesh, lambda x, p: route(x, p, problem).experts, (SPLIT, SPECS)
  )
  chosen = np.asarray(jax.jit(choose)(x, params))
  receiver = chosen // (problem.sizes[0] // problem.devices)
  chunks = impl.options.get("chunks", 1)
  ends = [problem.tokens * i // chunks for i in range(1, chunks)]
  by_sender = receiver.reshape(problem.devices, problem.tokens, -1)
  return Traffic(
    np.array(
      [
        [np.bincount(r.ravel(), minlength=problem.devices) for r in chunk]
        for chunk in np.split(by_sender, ends, axis=1)
      ]
    )
  )


def row_bytes(problem: Problem, impl: Impl) -> tuple[int, int]:
  """Returns the bytes of a token on its way to an expert, and of a result."""
  d = problem.sizes[2]
  if impl.options.get("payload") == "fp8":
    return -(-d // SCALE_BLOCK) * (SCALE_BLOCK + 4), 2 * d
  return 2 * d, 2 * d


def exchanged_bytes(problem: Problem, impl: Impl, rows: int) -> int:
  """Of `rows` copies: there and back, and in the backward pass once more."""
  there, back = row_bytes(problem, impl)
  # Gradients are of the results' dtype, both ways.
  return rows * (there + back + (2 * back if problem.has_backward else 0))


def measure_link(mesh: Mesh, iterations: int) -> dict:
  """Returns the part of a row about an all-to-all of large buffers."""
  n, num_bytes = mesh.size, _LINK_BYTES[jax.default_backend()]
  part = num_bytes // n
  send = functools.partial(
    lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True
  )
  ids = jnp.arange(n * n, dtype=jnp.uint8)
  x = jax.jit(
    on_devices(mesh, lambda i: jnp.broadcast_to(i[:, None], (n, part)), SPLIT)
  )(ids)
  compiled = jax.jit(on_devices(mesh, send, SPLIT)).lower(x).compile()
  us = measure_queued_us(compiled, x, iterations=iterations)
  got = np.asarray(compiled(x)[:, 0])
  transposed = np.asarray(ids).reshape(n, n).T.ravel()
  return {
    "us": round(us, 2),
    "gbps": round(part * (n - 1) / us / 1e3, 2),
    "verified": bool((got == transposed).all()),
  }


def stages(problem, impl: Impl, mesh: Mesh, capacity, x, params, iterations):
  """Returns {stage: us} of the forward pass, each stage timed on its own."""
  e, top_k, *_ = problem.sizes
  is_fp8 = impl.options["payload"] == "fp8"
  parallel = moe.ExpertParallel(AXIS, capacity=capacity, **impl.options)
  times = {}

  def timed(name, fn, *args):
    specs = tuple(
      SPECS if isinstance(a, moe.MoeParams) else SPLIT for a in args
    )
    compiled = jax.jit(on_devices(mesh, fn, specs)).lower(*args).compile()
    us = measure_queued_us(compiled, *args, iterations=iterations)
    times[name] = round(us, 2)
    return compiled(*args)

  def routed(x, params):
    routing = route(x, params, problem, (AXIS,))
    losses = routing.load_balancing_loss[None], routing.z_loss[None]
    return routing.experts, routing.weights, losses

  chosen, weights, _ = timed("route", routed, x, params)

  def dispatched(x, chosen):
    rows, permutation = moe.dispatch(x, chosen, e)
    if is_fp8:
      rows = dispatch_quantized(quantize(x, _BLOCKS), permutation)
    return rows, permutation

  rows, permutation = timed("dispatch", dispatched, x, chosen)

  def sent(x, chosen, rows, group_sizes):
    call, plan = parallel.plan(group_sizes, *chosen.shape, e // problem.devices)
    if is_fp8:
      floats = moe.dispatch(x, chosen, e)[0]  # Their dtype is what is read.
      _, received = exchange.send_quantized(call, floats, rows, plan)
    else:
      received = exchange.send(call, rows, plan)
    sizes = plan.kept[:, lax.axis_index(AXIS)].sum(axis=0)
    return received, sizes, plan

  received, sizes, plan = timed(
    "exchange", sent, x, chosen, rows, permutation.group_sizes
  )
  if not is_fp8:
    received = timed("quantize", lambda x: quantize(x, _BLOCKS), received)
  hidden = timed("gate/up", m_grouped_gemm, received, params.gate_up, sizes)
  activate = lambda x: quantize(moe.activate(x), _BLOCKS)
  hidden = timed("activation", activate, hidden)
  out = timed("down", m_grouped_gemm, hidden, params.down, sizes)

  def sent_back(out, group_sizes, chosen, plan):
    call, _ = parallel.plan(group_sizes, *chosen.shape, e // problem.devices)
    return exchange.send_back(call, out, plan)

  out = timed(
    "exchange back", sent_back, out, permutation.group_sizes, chosen, plan
  )
  timed("combine", moe.combine, out, weights, permutation)
  return times

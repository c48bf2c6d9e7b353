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
  expert_parallel,
  on_devices,
  route,
)
from benchmarks.timing import measure_kernels_us, measure_queued_us
from jax_grouped_gemm import m_grouped_gemm, moe, quantize
from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.fused_quantization import quantize_activation
from jax_grouped_gemm.moe import journey as journeys
from jax_grouped_gemm.moe.exchange import send, send_back

STAGES = (
  "route",
  "dispatch",
  "exchange",
  "copy",
  "quantize",
  "gate/up",
  "activation",
  "down",
  "sum",
  "exchange back",
  "combine",
)
GEMMS = ("gate/up", "down")
_BLOCKS = (1, SCALE_BLOCK)
# Of a device's buffer whose parts go to all devices.
_LINK_BYTES = {"gpu": 2**28, "cpu": 2**20}
_CAPACITY_ALIGN = 128


class Traffic(NamedTuple):
  """What devices exchange, known beforehand: routing is a benchmark's."""

  copies: np.ndarray  # of tokens, (chunks, sender, receiver)
  tokens: np.ndarray  # the same; each travels once

  @property
  def busiest(self) -> int:
    """Rows of the experts of the device that has most."""
    return int(self.copies.sum(axis=(0, 1)).max())

  @property
  def capacity(self) -> int:
    """Of ExpertParallel, so that nothing is dropped from any chunk."""
    most = int(self.copies.sum(axis=1).max())
    return len(self.copies) * (most + -most % _CAPACITY_ALIGN)

  @property
  def exchanged(self) -> int:
    """Tokens that the device sends to others, or gets, which has most."""
    pairs = self.tokens.sum(axis=0)
    pairs = pairs * (1 - np.eye(len(pairs), dtype=pairs.dtype))
    return int(max(pairs.sum(axis=0).max(), pairs.sum(axis=1).max()))


def receivers(problem: Problem, mesh: Mesh, x, params) -> np.ndarray:
  """Returns the device of each copy, (tokens of all devices, top_k)."""
  choose = on_devices(
    mesh, lambda x, p: route(x, p, problem).experts, (SPLIT, SPECS)
  )
  chosen = np.asarray(jax.jit(choose)(x, params))
  return chosen // (problem.sizes[0] // problem.devices)


def traffic(problem: Problem, impl: Impl, receiver: np.ndarray) -> Traffic:
  """Returns what is exchanged, given the device of each copy."""
  chunks = impl.options.get("chunks", 1)
  ends = [problem.tokens * i // chunks for i in range(1, chunks)]
  by_sender = receiver.reshape(problem.devices, problem.tokens, -1)
  goes = by_sender[..., None] == np.arange(problem.devices)  # (s, t, k, r)

  def of_chunks(counts):
    return np.array([x.sum(axis=1) for x in np.split(counts, ends, axis=1)])

  return Traffic(of_chunks(goes.sum(axis=2)), of_chunks(goes.any(axis=2)))


def exchanged_bytes(problem: Problem, impl: Impl, tokens: int) -> int:
  """Of so many: there and back, and in the backward pass once more."""
  _, top_k, d, *_ = problem.sizes
  row = there = 2 * d
  if impl.options.get("payload") == "fp8":
    there = -(-d // SCALE_BLOCK) * (SCALE_BLOCK + 4)
  weights = 4 * top_k  # And as many rows of copies.
  token = there + 2 * weights + row
  if problem.has_backward:  # Gradients are of the results' dtype, both ways.
    token += 2 * row + weights
  return tokens * token


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
  parallel = expert_parallel(impl, capacity)
  times = {}

  def timed(name, fn, *args):
    specs = tuple(
      SPECS if isinstance(a, moe.MoeParams) else SPLIT for a in args
    )
    compiled = jax.jit(on_devices(mesh, fn, specs)).lower(*args).compile()
    # Products as the layer, in a queue: at work a GPU's clock is lower. The
    # others are over before the host has started the next.
    measure = measure_queued_us if name in GEMMS else measure_kernels_us
    us = measure(compiled, *args, iterations=iterations)
    times[name] = round(us, 2)
    return compiled(*args)

  def routed(x, params):
    routing = route(x, params, problem, (AXIS,))
    losses = routing.load_balancing_loss[None], routing.z_loss[None]
    return routing.experts, routing.weights, losses

  chosen, weights, _ = timed("route", routed, x, params)

  to_fp8 = functools.partial(quantize, block_shape=_BLOCKS)
  num_local = e // problem.devices
  call = parallel.call(problem.tokens, top_k, num_local, problem.devices)

  def read(tokens):
    """Without the rows that nobody reads where they are quantised."""
    return tokens._replace(rows=tokens.rows[:, :0]) if is_fp8 else tokens

  def dispatched(x, chosen, weights):
    plan, journey = journeys.plan_journey(call, chosen, num_local)
    quantized = to_fp8(x) if is_fp8 else None
    tokens = journeys.by_device(journey, x, weights, quantized, None)
    return plan, journey, read(tokens)

  plan, journey, tokens = timed("dispatch", dispatched, x, chosen, weights)
  sent = lambda tokens, plan: read(send(call, tokens, plan))
  tokens = timed("exchange", sent, tokens, plan)
  copied = functools.partial(journeys.copies_of, call, implementation=None)
  rows, received, local = timed("copy", copied, plan, tokens)
  if not is_fp8:
    received = timed("quantize", to_fp8, rows)
  sizes = local.group_sizes
  hidden = timed("gate/up", m_grouped_gemm, received, params.gate_up, sizes)
  activate = functools.partial(quantize_activation, activation="swiglu")
  hidden = timed("activation", activate, hidden)
  out = timed("down", m_grouped_gemm, hidden, params.down, sizes)
  out = timed("sum", moe.combine, out, tokens.weights, local)
  out = timed("exchange back", functools.partial(send_back, call), out, plan)
  combined = lambda *args: journeys.combine_devices(*args, x.dtype)
  timed("combine", combined, out, journey.tokens)
  return times

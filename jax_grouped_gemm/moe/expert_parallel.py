"""Experts spread over the devices of a mesh axis, inside jax.shard_map.

Each device routes its own tokens and sends each once to every device that holds
any of its experts. There its copies are sorted by expert, and within an expert
by sender, and their weighted results added up, so that one row comes back.
"""

import dataclasses
import itertools
from collections.abc import Callable
from numbers import Integral
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.moe import gathered
from jax_grouped_gemm.moe.exchange import send, send_back
from jax_grouped_gemm.moe.journey import (
  by_device,
  combine_devices,
  copies_of,
  plan_journey,
)
from jax_grouped_gemm.moe.permutation import combine
from jax_grouped_gemm.moe.plan import Call
from jax_grouped_gemm.moe.routing import Routing
from jax_grouped_gemm.scaled_array import ScaledArray

Quantize = Callable[[Float[Array, "t d"]], ScaledArray]

_EXCHANGES = ("ragged", "dense", "gather")
# Of all devices: gathering them is faster. A layer of Mixtral 8x7B, 128 tokens
# on each of two H200s, takes 670 us instead of 870.
_FEW_TOKENS = 256
_PAYLOADS = ("fp8", "bf16")


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
  """How moe_layer spreads its experts over devices.

  Device i of n along the axis holds the experts [i e/n, (i + 1) e/n). Tokens
  are split over that axis too, and over `data_axes`, along which the experts'
  parameters are repeated.

  Attributes:
    axis_name: mesh axis that the experts are split over.
    data_axes: the other mesh axes that the tokens are split over.
    capacity: copies of tokens that a device takes in. None: all there can be,
      n * tokens * min(top_k, e/n), so that nothing is dropped; memory and the
      passes between the GEMMs grow with it, the GEMMs do not. Where more come,
      all senders and experts give way in proportion, later tokens first; what
      is dropped is counted and adds zero to its token's result.
    exchange: "ragged": jax.lax.ragged_all_to_all; "dense": jax.lax.all_to_all
      of buffers that hold the most that two devices can exchange; "gather":
      all devices get all tokens (jax.lax.all_gather), and sums come back by
      jax.lax.all_to_all, for few tokens, without capacity and chunks. None:
      "gather" if all devices have at most 256 tokens together, without capacity
      and chunks; "ragged" where XLA has it without being asked, that is on GPUs
      that belong to one process; else "dense". Of several processes, an axis
      that is no longer than the process has devices is taken to be its own.
    payload: how tokens travel to their experts. "fp8": quantised once, before
      they leave, as the experts' first product would quantise them: its result
      is the same bit for bit. The gradient of gate_up is made from what
      arrived, that is from tokens that were quantised before. "bf16": as they
      are, of whatever dtype. None: "fp8" if the forward products are FP8.
      The sums that come back, and all gradients, are of the tokens' dtype.
    chunks: parts of a device's tokens that travel one after the other, so that
      XLA can exchange one while the experts multiply another; on GPUs it does
      with --xla_gpu_enable_latency_hiding_scheduler=true. Each has an equal
      share of the capacity. Float weights are quantised once for all of them,
      their gradients added up.
  """

  axis_name: str
  data_axes: tuple[str, ...] = ()
  capacity: int | None = None
  exchange: Literal["ragged", "dense", "gather"] | None = None
  payload: Literal["fp8", "bf16"] | None = None
  chunks: int = 1

  def __post_init__(self):
    axes = self.data_axes
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    object.__setattr__(self, "data_axes", axes)
    if not isinstance(self.axis_name, str):
      raise TypeError(f"axis_name must be a str, got {self.axis_name!r}")
    if self.axis_name in self.data_axes:
      raise ValueError(
        f"data_axes {self.data_axes} must not hold axis_name {self.axis_name!r}"
      )
    if self.capacity is not None:
      _check_positive("capacity", self.capacity, " of rows or None")
    _check_positive("chunks", self.chunks)
    for name, known in (("exchange", _EXCHANGES), ("payload", _PAYLOADS)):
      value = getattr(self, name)
      if value not in (None, *known):
        raise ValueError(
          f"{name} must be None or one of {known}, got {value!r}"
        )

    if self.exchange == "gather" and (self.capacity, self.chunks) != (None, 1):
      raise ValueError(
        "exchange 'gather' has neither capacity nor chunks, got "
        f"capacity={self.capacity} and chunks={self.chunks}"
      )

  @property
  def token_axes(self) -> tuple[str, ...]:
    """All mesh axes that the tokens are split over."""
    return (self.axis_name, *self.data_axes)

  def check_axes(self):
    """Raises ValueError unless all axes are those of a jax.shard_map around."""
    for name in self.token_axes:
      try:
        lax.axis_size(name)
      except NameError:
        raise ValueError(
          f"no jax.shard_map around this call has mesh axis {name!r}, which "
          f"{self} needs"
        ) from None

  def run(
    self,
    experts: Callable[[Array, Array, ScaledArray | None], Array],
    x: Float[Array, "t d"],
    routing: Routing,
    num_experts: int,
    num_local: int,
    quantize: Quantize | None,
    implementation: str | None,
  ) -> tuple[Float[Array, "t d"], Int32[Array, "e"], Int32[Array, ""]]:
    """out[t] = sum over i of weights[t, i] * its i-th expert of x[t].

    Args:
      experts: function of rows, sorted by expert, of their group sizes, those
        of this device, and of the quantised rows, or None.
      x: this device's tokens.
      routing: of them.
      num_experts: on all devices along the axis.
      num_local: on each.
      quantize: quantises tokens by row, as the experts' first product does;
        None if it does not.
      implementation: of copying.

    Returns:
      The results, the group sizes of all devices, and how many rows were
      dropped on all of them.
    """
    num_devices = lax.axis_size(self.axis_name)
    if num_experts != num_devices * num_local:
      raise ValueError(
        f"{num_experts} experts over {num_devices} devices of mesh axis "
        f"{self.axis_name!r} are {num_experts / num_devices} on each, but "
        f"gate_up and down hold {num_local}"
      )
    if self.payload == "fp8" and quantize is None:
      raise ValueError(
        "payload 'fp8' needs a recipe whose forward is 'fp8', or ScaledArrays "
        "as weights; got neither"
      )
    tokens = x.shape[0]
    if tokens == 0:
      raise ValueError(f"each device needs tokens, got x of shape {x.shape}")
    if self.chunks > tokens:
      raise ValueError(
        f"chunks must be at most the {tokens} tokens of a device, got "
        f"{self.chunks}"
      )
    if self.payload == "bf16":
      quantize = None
    if self.choose_exchange(tokens, num_devices) == "gather":
      quantized = _quantized(quantize, x)
      out, sizes = gathered.run(
        self.axis_name,
        experts,
        gathered.Tokens(x, routing.weights, quantized, routing.experts),
        num_local,
        implementation,
      )
      return out, lax.psum(sizes, self.token_axes), jnp.zeros((), jnp.int32)
    ends = [tokens * i // self.chunks for i in range(self.chunks + 1)]
    chunks = [
      self._send_chunk(
        x[start:end],
        routing.experts[start:end],
        routing.weights[start:end],
        num_local,
        quantize,
        implementation,
      )
      for start, end in itertools.pairwise(ends)
    ]
    outs, sizes, kept = [], 0, 0
    sums = back = None
    for call, plan, journey, tokens in chunks:
      if sums is not None:  # Awaited only when the chunk before is multiplied.
        tokens, _ = lax.optimization_barrier((tokens, sums))
      rows, quantized, local = copies_of(call, plan, tokens, implementation)
      sums = experts(rows, local.group_sizes, quantized)
      sums = combine(sums, tokens.weights, local)
      if back is not None:  # Awaited only when this chunk is multiplied.
        (back, sorted_tokens), sums = lax.optimization_barrier((back, sums))
        outs.append(combine_devices(back, sorted_tokens, x.dtype))
      back = send_back(call, sums, plan), journey.tokens
      sizes += journey.group_sizes
      of_this = plan.kept[lax.axis_index(self.axis_name)]
      kept += jnp.sum(of_this, dtype=jnp.int32)
    outs.append(combine_devices(*back, x.dtype))
    return (
      jnp.concatenate(outs),
      lax.psum(sizes, self.token_axes),
      lax.psum(jnp.sum(sizes, dtype=jnp.int32) - kept, self.token_axes),
    )

  def choose_exchange(self, tokens: int, num_devices: int) -> str:
    """Returns the exchange of so many tokens of each device."""
    if self.exchange is not None:
      return self.exchange
    is_free = self.capacity is None and self.chunks == 1
    if is_free and tokens * num_devices <= _FEW_TOKENS:
      return "gather"
    return _exchange_of_many(num_devices)

  def call(
    self, tokens: int, top_k: int, num_local: int, num_devices: int
  ) -> Call:
    """Returns what is static where each token goes to its experts' devices.

    Of so many tokens of a device.
    """
    # Copies of a token go to different experts.
    capacity = num_devices * tokens * min(top_k, num_local)
    if self.capacity is not None:
      capacity = -(-self.capacity // self.chunks)
    return Call(
      self.axis_name,
      self.exchange or _exchange_of_many(num_devices),
      tokens=tokens,
      num_sent=tokens * min(top_k, num_devices),
      capacity=capacity,
    )

  def _send_chunk(
    self, x, chosen, weights, num_local: int, quantize, implementation
  ):
    """Returns how some tokens travel, and those that arrive."""
    call = self.call(*chosen.shape, num_local, lax.axis_size(self.axis_name))
    plan, journey = plan_journey(call, chosen, num_local)
    x, weights, plan, journey = vary_alike(x, weights, plan, journey)
    quantized = _quantized(quantize, x)
    tokens = by_device(journey, x, weights, quantized, implementation)
    return call, plan, journey, send(call, *vary_alike(tokens, plan))


def _quantized(quantize: Quantize | None, x) -> ScaledArray | None:
  """The gradient goes to x itself."""
  return None if quantize is None else quantize(lax.stop_gradient(x))


def _exchange_of_many(num_devices: int) -> str:
  is_cpu = implementations.default_device().platform == "cpu"
  # Between processes XLA would use NCCL for it, which it refuses (jax 0.11.2).
  is_local = num_devices <= jax.local_device_count() or jax.process_count() == 1
  return "ragged" if is_local and not is_cpu else "dense"


def _check_positive(name: str, value, what: str = ""):
  if not (isinstance(value, Integral) and value > 0):
    raise ValueError(f"{name} must be a positive number{what}, got {value!r}")

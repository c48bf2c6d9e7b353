"""Experts spread over the devices of a mesh axis, inside jax.shard_map.

Each device routes its own tokens, sends every copy to the device that holds its
expert, and gets the results back. Rows arrive sorted by expert, and within an
expert by sender, so that the experts' GEMMs take them as they are.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import ROW_ALIGN
from jax_grouped_gemm.manual_axes import vary_alike
from jax_grouped_gemm.moe.exchange import (
  Call,
  Plan,
  make_plan,
  send,
  send_back,
  send_quantized,
)
from jax_grouped_gemm.moe.permutation import (
  combine,
  dispatch,
  dispatch_quantized,
)
from jax_grouped_gemm.moe.routing import Routing
from jax_grouped_gemm.scaled_array import ScaledArray

_EXCHANGES = ("ragged", "dense")
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
    capacity: rows that a device takes in. None: as many as there can be,
      n * tokens * min(top_k, e/n), so that nothing is dropped; memory and the
      passes between the GEMMs grow with it, the GEMMs do not. Where more come,
      all senders and experts give way in proportion, later tokens first; what
      is dropped is counted and adds zero to its token's result.
    exchange: "ragged": jax.lax.ragged_all_to_all; "dense": jax.lax.all_to_all
      of buffers that hold the most that two devices can exchange. None:
      "dense" on CPUs, whose XLA has no other, else "ragged".
    payload: how tokens travel to their experts. "fp8": quantised once, before
      they leave, as the experts' first product would quantise them: its result
      is the same bit for bit. The gradient of gate_up is made from what
      arrived, that is from tokens that were quantised before. "bf16": as they
      are, of whatever dtype. None: "fp8" if the forward products are FP8.
      Results, and all gradients, travel as they are.
    chunks: parts of a device's tokens that travel one after the other, so that
      XLA can exchange one while the experts multiply another; on GPUs it does
      with --xla_gpu_enable_latency_hiding_scheduler=true, on the way back at
      least, and on the way there too where nothing is fused. Each has
      an equal share of the capacity. Float weights are quantised once for all
      of them, their gradients added up.
  """

  axis_name: str
  data_axes: tuple[str, ...] = ()
  capacity: int | None = None
  exchange: Literal["ragged", "dense"] | None = None
  payload: Literal["fp8", "bf16"] | None = None
  chunks: int = 1

  def __post_init__(self):
    object.__setattr__(self, "data_axes", tuple(self.data_axes))
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

  @property
  def token_axes(self) -> tuple[str, ...]:
    """All mesh axes that the tokens are split over."""
    return (self.axis_name, *self.data_axes)

  def run(
    self,
    experts: Callable[[Array, Array, ScaledArray | None], Array],
    x: Float[Array, "t d"],
    routing: Routing,
    num_experts: int,
    num_local: int,
    quantize: Callable[[Array], ScaledArray] | None,
  ) -> tuple[Float[Array, "t d"], Int32[Array, "e"], Int32[Array, ""]]:
    """out[t] = sum over i of weights[t, i] * its i-th expert of x[t].

    Args:
      experts: function of rows, sorted by expert, of their group sizes, those
        of this device, and of the quantised rows, or None.
      x: this device's tokens.
      routing: of them.
      num_experts: on all devices along the axis.
      num_local: on each.
      quantize: what the experts' first product does with rows; None if nothing.

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
    if self.chunks > max(tokens, 1):
      raise ValueError(
        f"chunks must be at most the {tokens} tokens of a device, got "
        f"{self.chunks}"
      )
    if self.payload == "bf16":
      quantize = None
    ends = [tokens * i // self.chunks for i in range(self.chunks + 1)]
    outs, sizes, dropped = zip(
      *(
        self._run_chunk(
          experts,
          x[start:end],
          routing.experts[start:end],
          routing.weights[start:end],
          num_local,
          quantize,
        )
        for start, end in itertools.pairwise(ends)
      ),
      strict=True,
    )
    return (
      jnp.concatenate(outs),
      lax.psum(sum(sizes), self.token_axes),
      lax.psum(sum(dropped), self.token_axes),
    )

  def plan(
    self,
    group_sizes: Int32[Array, "e"],
    tokens: int,
    top_k: int,
    num_local: int,
  ) -> tuple[Call, Plan]:
    """Returns how the copies of one chunk's tokens are exchanged.

    Args:
      group_sizes: of all experts, copies of this device's tokens.
      tokens: of this device.
      top_k: copies of each.
      num_local: experts of a device.
    """
    num_devices = lax.axis_size(self.axis_name)
    # Copies of a token go to different experts.
    pair_bound = tokens * min(top_k, num_local)
    capacity = num_devices * pair_bound
    if self.capacity is not None:
      capacity = -(-self.capacity // self.chunks)
    sizes = lax.all_gather(group_sizes, self.axis_name)
    sizes = sizes.reshape(num_devices, num_devices, num_local)
    call = Call(
      self.axis_name,
      self.exchange or _default_exchange(),
      num_rows=tokens * top_k,
      # So many rows the kernels read without a copy.
      capacity=capacity + -capacity % ROW_ALIGN,
      pair_bound=pair_bound,
    )
    return call, make_plan(sizes, capacity)

  def _run_chunk(self, experts, x, chosen, weights, num_local: int, quantize):
    """run of some tokens; sizes and dropped rows are those of this device."""
    num_experts = num_local * lax.axis_size(self.axis_name)
    rows, permutation = dispatch(x, chosen, num_experts)
    group_sizes = permutation.group_sizes
    call, plan = self.plan(group_sizes, *chosen.shape, num_local)
    rows, plan = vary_alike(rows, plan)
    quantized = None
    if quantize is None:
      received = send(call, rows, plan)
    else:
      tokens = quantize(lax.stop_gradient(x))  # rows have the gradient.
      quantized = dispatch_quantized(tokens, permutation)
      received, quantized = send_quantized(
        call, *vary_alike(rows, quantized, plan)
      )
    me = lax.axis_index(self.axis_name)
    out = experts(received, plan.kept[:, me].sum(axis=0), quantized)
    out = send_back(call, out, plan)
    out = combine(out, weights, permutation, x.dtype)
    return out, group_sizes, jnp.sum(group_sizes) - jnp.sum(plan.kept[me])


def _default_exchange() -> str:
  is_cpu = implementations.default_device().platform == "cpu"
  return "dense" if is_cpu else "ragged"


def _check_positive(name: str, value, what: str = ""):
  if not (isinstance(value, int) and value > 0):
    raise ValueError(f"{name} must be a positive number{what}, got {value!r}")

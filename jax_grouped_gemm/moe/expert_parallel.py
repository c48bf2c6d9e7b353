"""Experts spread over the devices of a mesh axis, inside jax.shard_map.

Each device routes its own tokens, sends every copy to the device that holds its
expert, and gets the results back. Rows arrive sorted by expert, and within an
expert by sender, so that the experts' GEMMs take them as they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.manual_axes import vary_alike, zeros

_EXCHANGES = ("ragged", "dense")
# A share of the capacity, rounded in float32, must not exceed it.
_ROUNDING_MARGIN = 1 - 2.0**-20


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
  """

  axis_name: str
  data_axes: tuple[str, ...] = ()
  capacity: int | None = None
  exchange: Literal["ragged", "dense"] | None = None

  def __post_init__(self):
    object.__setattr__(self, "data_axes", tuple(self.data_axes))
    if self.axis_name in self.data_axes:
      raise ValueError(
        f"data_axes {self.data_axes} must not hold axis_name {self.axis_name!r}"
      )
    capacity = self.capacity
    if capacity is not None and not (
      isinstance(capacity, int) and capacity > 0
    ):
      raise ValueError(
        f"capacity must be a positive number of rows or None, got {capacity!r}"
      )
    if self.exchange not in (None, *_EXCHANGES):
      raise ValueError(
        f"exchange must be None or one of {_EXCHANGES}, got {self.exchange!r}"
      )

  @property
  def token_axes(self) -> tuple[str, ...]:
    """All mesh axes that the tokens are split over."""
    return (self.axis_name, *self.data_axes)

  def run(
    self,
    experts: Callable[[Array, Array], Array],
    rows: Float[Array, "t*top_k d"],
    group_sizes: Int32[Array, "e"],
    num_local: int,
    top_k: int,
  ) -> tuple[Float[Array, "t*top_k d"], Int32[Array, "e"], Int32[Array, ""]]:
    """Applies each row's expert, wherever it is.

    Args:
      experts: function of rows and their group sizes, those of this device.
      rows: this device's token copies, sorted by expert.
      group_sizes: of all experts.
      num_local: experts of a device.
      top_k: copies of a token.

    Returns:
      The results in the order of `rows`, the group sizes of all devices, and
      how many rows were dropped on all of them.
    """
    num_devices = lax.axis_size(self.axis_name)
    e = group_sizes.shape[0]
    if e != num_devices * num_local:
      raise ValueError(
        f"{e} experts over {num_devices} devices of mesh axis "
        f"{self.axis_name!r} are {e / num_devices} on each, but gate_up and "
        f"down hold {num_local}"
      )
    # Copies of a token go to different experts.
    pair_bound = rows.shape[0] // top_k * min(top_k, num_local)
    capacity = self.capacity or num_devices * pair_bound
    all_sizes = lax.all_gather(group_sizes, self.axis_name)
    plan = _make_plan(
      all_sizes.reshape(num_devices, num_devices, num_local), capacity
    )
    rows, plan = vary_alike(rows, plan)
    me = lax.axis_index(self.axis_name)
    exchange = self.exchange
    if exchange is None:
      is_cpu = implementations.default_device().platform == "cpu"
      exchange = "dense" if is_cpu else "ragged"
    call = _Call(self.axis_name, exchange, rows.shape[0], capacity, pair_bound)
    received = _send(call, rows, plan)
    out = experts(received, plan.kept[:, me].sum(axis=0))
    out = _send_back(call, out, plan)
    dropped = jnp.sum(group_sizes) - jnp.sum(plan.kept[me])
    return (
      out,
      lax.psum(group_sizes, self.token_axes),
      lax.psum(dropped, self.token_axes),
    )


# ---------------------------------------------------------------- plan


class _Plan(NamedTuple):
  """Slices of rows, one per sender s, receiver r and expert l of the receiver.

  All devices along the axis know all of it.
  """

  kept: Int32[Array, "s r l"]  # rows that are exchanged.
  sent_from: Int32[Array, "s r l"]  # first row of the slice, at the sender.
  received_at: Int32[Array, "s r l"]  # the same, at the receiver.


def _make_plan(sizes: Int32[Array, "s r l"], capacity: int) -> _Plan:
  s, r, l = sizes.shape
  flat = sizes.reshape(s, r * l)
  sent_from = (jnp.cumsum(flat, axis=1) - flat).reshape(sizes.shape)
  # A receiver has its rows by expert, then by sender.
  arriving = sizes.transpose(1, 2, 0).reshape(r, l * s)
  kept = _fit(arriving, capacity)
  received_at = jnp.cumsum(kept, axis=1) - kept

  def sender_first(x):
    return x.reshape(r, l, s).transpose(2, 0, 1)

  return _Plan(sender_first(kept), sent_from, sender_first(received_at))


def _fit(sizes: Int32[Array, "r n"], capacity: int) -> Int32[Array, "r n"]:
  """Cuts the sizes of each row so that they add up to at most the capacity.

  In proportion: all up to any of them keep that share of their sum, rounded.
  """
  ends = jnp.cumsum(sizes, axis=1)
  total = ends[:, -1:]
  share = capacity * _ROUNDING_MARGIN / jnp.maximum(total, 1)
  kept_ends = jnp.floor(ends * share).astype(jnp.int32)
  kept = jnp.diff(kept_ends, axis=1, prepend=0)
  return jnp.where(total > capacity, jnp.minimum(kept, sizes), sizes)


# ---------------------------------------------------------------- exchange


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is static in an exchange."""

  axis_name: str
  exchange: str
  num_rows: int  # that a sender has.
  capacity: int  # rows that a receiver has room for.
  pair_bound: int  # rows that one device can have for one other.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(call: _Call, rows, plan: _Plan) -> Float[Array, "capacity d"]:
  """Rows to the experts' devices; what nobody fills is zero."""
  return (_send_ragged if call.exchange == "ragged" else _send_dense)(
    call, rows, plan
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send_back(call: _Call, rows, plan: _Plan) -> Float[Array, "num_rows d"]:
  """What _send sent, to where it came from; what was not sent is zero."""
  return (_send_back_ragged if call.exchange == "ragged" else _send_back_dense)(
    call, rows, plan
  )


# Each row goes to one place: the transpose of the way there is the way back.
_send.defvjp(
  lambda call, rows, plan: (_send(call, rows, plan), plan),
  lambda call, plan, drows: (_send_back(call, drows, plan), None),
)
_send_back.defvjp(
  lambda call, rows, plan: (_send_back(call, rows, plan), plan),
  lambda call, plan, drows: (_send(call, drows, plan), None),
)


def _send_ragged(call: _Call, rows, plan: _Plan):
  me = lax.axis_index(call.axis_name)
  return lax.ragged_all_to_all(
    rows,
    zeros((call.capacity, *rows.shape[1:]), rows.dtype, rows),
    input_offsets=plan.sent_from[me].reshape(-1),
    send_sizes=plan.kept[me].reshape(-1),
    output_offsets=plan.received_at[me].reshape(-1),
    recv_sizes=plan.kept[:, me].reshape(-1),
    axis_name=call.axis_name,
  )


def _send_back_ragged(call: _Call, rows, plan: _Plan):
  me = lax.axis_index(call.axis_name)
  return lax.ragged_all_to_all(
    rows,
    zeros((call.num_rows, *rows.shape[1:]), rows.dtype, rows),
    input_offsets=plan.received_at[:, me].reshape(-1),
    send_sizes=plan.kept[:, me].reshape(-1),
    output_offsets=plan.sent_from[:, me].reshape(-1),
    recv_sizes=plan.kept[me].reshape(-1),
    axis_name=call.axis_name,
  )


def _send_dense(call: _Call, rows, plan: _Plan):
  """Buffer b of a sender begins with its first row for receiver b."""
  me = lax.axis_index(call.axis_name)
  position = jnp.arange(call.pair_bound, dtype=jnp.int32)
  source = plan.sent_from[me, :, :1] + position
  buffers = _all_to_all(call, _take_rows(rows, source))
  # Of each row of the result: its slice, by expert, then by sender.
  row = jnp.arange(call.capacity, dtype=jnp.int32)
  kept, senders = plan.kept[:, me].T, plan.kept.shape[0]
  ends = jnp.cumsum(kept.reshape(-1))
  index = jnp.searchsorted(ends, row, side="right", method="compare_all")
  index = jnp.minimum(index, ends.shape[0] - 1)
  sender, expert = index % senders, index // senders
  first = plan.sent_from[:, me, :] - plan.sent_from[:, me, :1]
  position = row - plan.received_at[sender, me, expert] + first[sender, expert]
  out = _take_rows(
    buffers.reshape(-1, rows.shape[1]), sender * call.pair_bound + position
  )
  return jnp.where((row < ends[-1])[:, None], out, 0)


def _send_back_dense(call: _Call, rows, plan: _Plan):
  """Row i of a buffer is what row i of the buffer in _send_dense became."""
  me = lax.axis_index(call.axis_name)
  devices, _, experts = plan.kept.shape
  position = jnp.arange(call.pair_bound, dtype=jnp.int32)
  first = plan.sent_from[:, me, :] - plan.sent_from[:, me, :1]  # (s, l)
  expert = jnp.sum(position[:, None] >= first[:, None, 1:], axis=-1)  # (s, i)
  offset = plan.received_at[:, me] - first
  source = jnp.take_along_axis(offset, expert, axis=1) + position
  buffers = _all_to_all(call, _take_rows(rows, source))
  # Of each row of the result: the receiver and expert that it was sent to.
  row = jnp.arange(call.num_rows, dtype=jnp.int32)
  starts = plan.sent_from[me].reshape(-1)
  index = jnp.searchsorted(starts, row, side="right", method="compare_all") - 1
  receiver = index // experts
  position = row - starts[receiver * experts]
  out = _take_rows(
    buffers.reshape(-1, rows.shape[1]), receiver * call.pair_bound + position
  )
  is_kept = row - starts[index] < plan.kept[me].reshape(-1)[index]
  return jnp.where(is_kept[:, None], out, 0)


def _take_rows(rows: Float[Array, "n d"], index: Int32[Array, "..."]):
  """rows[index]; some row where there is none."""
  return rows[jnp.clip(index, 0, rows.shape[0] - 1)]


def _all_to_all(call: _Call, buffers: Float[Array, "devices i d"]):
  return lax.all_to_all(
    buffers, call.axis_name, split_axis=0, concat_axis=0, tiled=True
  )

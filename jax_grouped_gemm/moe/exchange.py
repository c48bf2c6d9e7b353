"""Rows sent to the devices that hold their experts, and back.

jax.lax.ragged_all_to_all where XLA has it, else dense buffers. Each row goes to
one place, so the transpose of the way there is the way back: gradients take the
reverse exchange, in their own dtype. Quantised rows travel as values and
scales, about half of the bytes of bfloat16.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_grouped_gemm.manual_axes import zeros
from jax_grouped_gemm.scaled_array import ScaledArray

# A share of the capacity, rounded in float32, must not exceed it.
_ROUNDING_MARGIN = 1 - 2.0**-20


class Plan(NamedTuple):
  """Slices of rows, one per sender s, receiver r and expert l of the receiver.

  All devices along the axis know all of it.
  """

  kept: Int32[Array, "s r l"]  # rows that are exchanged.
  sent_from: Int32[Array, "s r l"]  # first row of the slice, at the sender.
  received_at: Int32[Array, "s r l"]  # the same, at the receiver.


def make_plan(sizes: Int32[Array, "s r l"], capacity: int) -> Plan:
  """Plans to exchange as many of the rows as each receiver has room for."""
  s, r, l = sizes.shape
  flat = sizes.reshape(s, r * l)
  sent_from = (jnp.cumsum(flat, axis=1) - flat).reshape(sizes.shape)
  # A receiver has its rows by expert, then by sender.
  arriving = sizes.transpose(1, 2, 0).reshape(r, l * s)
  kept = _fit(arriving, capacity)
  received_at = jnp.cumsum(kept, axis=1) - kept

  def sender_first(x):
    return x.reshape(r, l, s).transpose(2, 0, 1)

  return Plan(sender_first(kept), sent_from, sender_first(received_at))


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


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static in an exchange."""

  axis_name: str
  exchange: str
  num_rows: int  # that a sender has.
  capacity: int  # rows that a receiver has room for.
  pair_bound: int  # rows that one device can have for one other.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(call: Call, rows, plan: Plan) -> Float[Array, "capacity d"]:
  """Rows to the experts' devices; what nobody fills is zero."""
  return _send(call, rows, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_back(call: Call, rows, plan: Plan) -> Float[Array, "num_rows d"]:
  """What send sent, to where it came from; what was not sent is zero."""
  return _send_back(call, rows, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_quantized(
  call: Call, rows, quantized: ScaledArray, plan: Plan
) -> tuple[Float[Array, "capacity d"], ScaledArray]:
  """quantize(rows, (1, 128)) to the experts' devices, as send sends rows.

  The rows themselves stay where they are. Returns in their place what arrived,
  dequantised to their dtype, and that as it is; the gradient of the former goes
  back to them, that of the latter is ignored.
  """
  # As bytes, which every collective moves.
  values = lax.bitcast_convert_type(quantized.values, jnp.uint8)
  values = lax.bitcast_convert_type(
    _send(call, values, plan), quantized.values.dtype
  )
  scales = _send(call, quantized.scales, plan)
  padding = 0, quantized.padding[1]  # The rows' is not sent.
  received = ScaledArray(values, scales, quantized.block_shape, padding)
  return received.dequantize(rows.dtype), received


send.defvjp(
  lambda call, rows, plan: (_send(call, rows, plan), plan),
  lambda call, plan, drows: (_send_back(call, drows, plan), None),
)
send_back.defvjp(
  lambda call, rows, plan: (_send_back(call, rows, plan), plan),
  lambda call, plan, drows: (_send(call, drows, plan), None),
)
send_quantized.defvjp(
  lambda call, rows, quantized, plan: (
    send_quantized(call, rows, quantized, plan),
    plan,
  ),
  lambda call, plan, dout: (_send_back(call, dout[0], plan), None, None),
)


def _send(call: Call, rows, plan: Plan):
  is_ragged = call.exchange == "ragged"
  return (_send_ragged if is_ragged else _send_dense)(call, rows, plan)


def _send_back(call: Call, rows, plan: Plan):
  is_ragged = call.exchange == "ragged"
  return (_send_back_ragged if is_ragged else _send_back_dense)(
    call, rows, plan
  )


def _send_ragged(call: Call, rows, plan: Plan):
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


def _send_back_ragged(call: Call, rows, plan: Plan):
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


def _send_dense(call: Call, rows, plan: Plan):
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


def _send_back_dense(call: Call, rows, plan: Plan):
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


def _all_to_all(call: Call, buffers: Float[Array, "devices i d"]):
  return lax.all_to_all(
    buffers, call.axis_name, split_axis=0, concat_axis=0, tiled=True
  )

"""Which tokens go to which devices, and which rows their copies have there."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Int32

from jax_grouped_gemm.config import ROW_ALIGN
from jax_grouped_gemm.manual_axes import zeros
from jax_grouped_gemm.moe.permutation import Permutation


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static in an exchange.

  What arrives from sender s begins in row s * tokens.
  """

  axis_name: str
  exchange: str
  tokens: int  # of a sender.
  num_sent: int  # rows of a sender, sorted by receiver.
  capacity: int  # copies that a receiver takes in.

  @property
  def rows(self) -> int:
    """Of a receiver's experts; the last one at least is nobody's.

    So many the kernels read without a copy.
    """
    return self.capacity + ROW_ALIGN - self.capacity % ROW_ALIGN

  @property
  def no_row(self) -> int:
    """The row of copies that are not there: none, but gathers take the last."""
    return self.rows


class Plan(NamedTuple):
  """What each sender s and receiver r exchange, and its expert l gets of it.

  All devices along the axis know all of it.
  """

  tokens: Int32[Array, "s r"]  # that travel.
  sent_from: Int32[Array, "s r"]  # the first of them, at the sender.
  kept: Int32[Array, "s r l"]  # copies of them that the expert takes.
  first_row: Int32[Array, "s r l"]  # the first of those, at the receiver.


def make_plan(
  tokens: Int32[Array, "s r"], sizes: Int32[Array, "s r l"], capacity: int
) -> Plan:
  """Plans to take as many of the copies as each receiver has room for."""
  s, r, l = sizes.shape
  # A receiver has its copies by expert, then by sender.
  arriving = sizes.transpose(1, 2, 0).reshape(r, l * s)
  kept = _fit(arriving, capacity)
  first_row = jnp.cumsum(kept, axis=1) - kept

  def sender_first(x):
    return x.reshape(r, l, s).transpose(2, 0, 1)

  sent_from = jnp.cumsum(tokens, axis=1) - tokens
  return Plan(tokens, sent_from, sender_first(kept), sender_first(first_row))


def devices_of(
  experts: Int[Array, "t top_k"], num_local: int, num_devices: int
) -> Int32[Array, "t j"]:
  """The devices that hold any of a token's experts, each once.

  Their number, which is that of no device, fills the rest of j.
  """
  device = _device(experts, num_local, num_devices)
  top_k = device.shape[1]
  again = device[:, :, None] == device[:, None, :]
  again = jnp.any(again & jnp.tri(top_k, k=-1, dtype=bool), axis=2)
  # At most so many are left before those of nobody.
  most = min(top_k, num_devices)
  return jnp.sort(jnp.where(again, num_devices, device), axis=1)[:, :most]


def _device(experts, num_local: int, num_devices: int) -> Int32[Array, "t k"]:
  is_expert = (experts >= 0) & (experts < num_local * num_devices)
  device = jnp.where(is_expert, experts // num_local, num_devices)
  return device.astype(jnp.int32)


def rows_of_copies(
  call: Call,
  plan: Plan,
  experts: Int[Array, "t top_k"],
  copies: Permutation,
  devices: Int32[Array, "t j"],
) -> Int32[Array, "t j top_k"]:
  """The row that each copy has at each device of its token: see arrange.

  Args:
    call: of the exchange.
    plan: the same.
    experts: of each token.
    copies: how they are sorted by expert.
    devices: from devices_of.
  """
  me = lax.axis_index(call.axis_name)
  _, num_devices, num_local = plan.kept.shape
  ends = jnp.cumsum(copies.group_sizes)
  expert = jnp.clip(experts, 0, ends.shape[0] - 1)
  rank = copies.inverse - (ends - copies.group_sizes)[expert]
  row = plan.first_row[me].reshape(-1)[expert] + rank
  row = jnp.where(rank < plan.kept[me].reshape(-1)[expert], row, call.no_row)
  device = _device(experts, num_local, num_devices)
  is_there = device[:, None, :] == devices[:, :, None]
  is_there &= devices[:, :, None] < num_devices
  return jnp.where(is_there, row[:, None, :], call.no_row)


def arrange(
  call: Call, plan: Plan, rows_of_copies: Int32[Array, "n*t top_k"]
) -> Permutation:
  """How the copies of tokens that arrived are sorted by expert.

  A copy that is not for this device, or has no room, has no row; gathers take
  the last one for it, which is past the sum of the group sizes always.
  """
  me = lax.axis_index(call.axis_name)
  inverse = jnp.where(arrived(call, plan)[:, None], rows_of_copies, call.no_row)
  flat = inverse.reshape(-1)
  copies = lax.iota(jnp.int32, flat.size)
  # Every row is written once, and those of no copy never.
  target = jnp.where(flat == call.no_row, call.rows + copies, flat)
  order = zeros((call.rows,), jnp.int32, flat)
  order = order.at[target].set(copies, mode="drop", unique_indices=True)
  return Permutation(order, inverse, plan.kept[:, me].sum(axis=0))


def arrived(call: Call, plan: Plan) -> Bool[Array, "n*t"]:
  """Whether there is a token in each row of what arrives."""
  tokens = plan.tokens[:, lax.axis_index(call.axis_name)]
  position = jnp.arange(call.tokens, dtype=jnp.int32)
  return (position < tokens[:, None]).reshape(-1)


def _fit(sizes: Int32[Array, "r n"], capacity: int) -> Int32[Array, "r n"]:
  """Cuts the sizes of each row so that they do not exceed the capacity.

  In proportion: all up to any of them keep that share of their sum, rounded,
  all of them the capacity.
  """
  ends = jnp.cumsum(sizes, axis=1)
  total = ends[:, -1:]
  share = capacity / jnp.maximum(total, 1)
  # Rounded in float32, a share of the capacity may exceed it.
  kept_ends = jnp.floor(ends * share).astype(jnp.int32)
  kept_ends = jnp.where(
    ends == total, capacity, jnp.minimum(kept_ends, capacity)
  )
  kept = jnp.diff(kept_ends, axis=1, prepend=0)
  return jnp.where(total > capacity, jnp.minimum(kept, sizes), sizes)

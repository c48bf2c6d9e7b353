"""Tokens on their way to other devices and back: planned, copied, added up."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from jax_grouped_gemm.moe.exchange import Tokens
from jax_grouped_gemm.moe.permutation import (
  Permutation,
  combine,
  dispatch_quantized,
  gather_copies,
  sort_by_expert,
)
from jax_grouped_gemm.moe.plan import (
  Call,
  Plan,
  arrange,
  devices_of,
  make_plan,
  rows_of_copies,
)
from jax_grouped_gemm.scaled_array import ScaledArray


class Journey(NamedTuple):
  """What of a device's tokens travels.

  Attributes:
    tokens: how they are sorted by the devices that they go to.
    rows_of_copies: of the sorted tokens, the rows of their copies there.
    group_sizes: copies of them for each expert of all devices.
  """

  tokens: Permutation
  rows_of_copies: Int32[Array, "t*j top_k"]
  group_sizes: Int32[Array, "e"]


def plan_journey(
  call: Call, chosen: Int[Array, "t top_k"], num_local: int
) -> tuple[Plan, Journey]:
  """Returns how tokens travel to their experts' devices.

  Args:
    call: of the exchange.
    chosen: the tokens' experts.
    num_local: experts of a device.
  """
  n = lax.axis_size(call.axis_name)
  copies = sort_by_expert(chosen, n * num_local)
  devices = devices_of(chosen, num_local, n)
  tokens = sort_by_expert(devices, n)
  sizes = jnp.concatenate([tokens.group_sizes, copies.group_sizes])
  sizes = lax.all_gather(sizes, call.axis_name)
  of_copies = sizes[:, n:].reshape(n, n, num_local)
  plan = make_plan(sizes[:, :n], of_copies, call.capacity)
  rows = rows_of_copies(call, plan, chosen, copies, devices)
  rows = rows.reshape(-1, chosen.shape[1])[tokens.order]
  return plan, Journey(tokens, rows, copies.group_sizes)


def by_device(
  journey: Journey,
  x: Float[Array, "t d"],
  weights: Float[Array, "t top_k"],
  quantized: ScaledArray | None,
  implementation: str | None,
) -> Tokens:
  """Returns the tokens sorted by the devices that they go to."""
  if quantized is not None:
    quantized = dispatch_quantized(quantized, journey.tokens, implementation)
  rows, weights = (gather_copies(y, journey.tokens) for y in (x, weights))
  weights = weights.astype(jnp.float32)
  return Tokens(rows, quantized, weights, journey.rows_of_copies)


def copies_of(
  call: Call, plan: Plan, tokens: Tokens, implementation: str | None
) -> tuple[Float[Array, "m d"], ScaledArray | None, Permutation]:
  """Returns the copies of tokens that arrived, sorted by expert."""
  local = arrange(call, plan, tokens.rows_of_copies)
  quantized = tokens.quantized
  if quantized is not None:
    quantized = dispatch_quantized(quantized, local, implementation)
  rows = gather_copies(tokens.rows, local, implementation)
  return rows, quantized, local


def combine_devices(
  sums: Float[Array, "t*j d"], sorted_tokens: Permutation, dtype: DTypeLike
) -> Float[Array, "t d"]:
  """Returns the results of this device's tokens, given what came back."""
  once = jnp.ones(sorted_tokens.inverse.shape, jnp.float32)
  return combine(sums, once, sorted_tokens, dtype)

"""Tokens sent to the devices that hold their experts, and results back.

A token travels once to each device that holds any of its experts, with the rows
and weights that its copies have there, and brings back their sum.

jax.lax.ragged_all_to_all where XLA has it, else dense buffers. Each row goes to
one place, so the transpose of the way there is the way back: gradients take the
reverse exchange, in their own dtype. Quantised rows travel as values and
scales, about half of the bytes of bfloat16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.kernels.uninitialized import uninitialized
from jax_grouped_gemm.manual_axes import vary_alike, zeros
from jax_grouped_gemm.moe.plan import Call, Plan, arrived
from jax_grouped_gemm.scaled_array import ScaledArray

# XLA's kernel for GPUs of one host takes time as if each slice had one block of
# threads (H200, jaxlib 0.11.2): so many should keep a GPU busy, of so many rows
# at least.
_SLICES = 1024
_SLICE_ROWS = 32


class Tokens(NamedTuple):
  """Rows of tokens, sorted by the devices that they go to, or from senders."""

  rows: Float[Array, "m d"]
  quantized: ScaledArray | None  # (m, d), of scale blocks (1, 128)
  weights: Float32[Array, "m top_k"]
  rows_of_copies: Int32[Array, "m top_k"]


def send(call: Call, tokens: Tokens, plan: Plan) -> Tokens:
  """Tokens to the devices that they are for.

  What nobody fills is zero, of quantised rows the scales. Those travel in the
  place of the rows, which are what arrived, dequantised to their dtype. The
  gradient of rows and weights goes back to those; that of the quantised rows is
  ignored.
  """
  received = _send_tokens(call, lax.stop_gradient(tokens), plan)
  return received._replace(
    rows=_sent(call, tokens.rows, received.rows, plan),
    weights=_sent(call, tokens.weights, received.weights, plan),
  )


def _send_tokens(call: Call, tokens: Tokens, plan: Plan) -> Tokens:
  rows, quantized, weights, rows_of_copies = tokens
  words = [weights, rows_of_copies]
  if quantized is None:
    words = _send_words(call, words, plan)
    rows = _mask(_send(call, rows, plan), arrived(call, plan))
    return Tokens(rows, None, *words)
  # As bytes, which every collective moves.
  values = lax.bitcast_convert_type(quantized.values, jnp.uint8)
  values = lax.bitcast_convert_type(
    _send(call, values, plan), quantized.values.dtype
  )
  words.append(quantized.scales)
  *words, scales = _send_words(call, words, plan)
  padding = 0, quantized.padding[1]  # The rows' is not sent.
  received = ScaledArray(values, scales, quantized.block_shape, padding)
  rows = _mask(received.dequantize(rows.dtype), arrived(call, plan))
  return Tokens(rows, received, *words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sent(call: Call, x, received, plan: Plan):
  """Returns what was received of x, to which its gradient goes back."""
  del x
  return received


_sent.defvjp(
  lambda call, x, received, plan: (received, plan),
  lambda call, plan, gradient: (_send_back(call, gradient, plan), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_back(call: Call, rows, plan: Plan) -> Float[Array, "num_sent d"]:
  """A row of each token that arrived, to where it came from.

  Rows of num_sent that were not sent are zero.
  """
  return _send_back(call, rows, plan)


send_back.defvjp(
  lambda call, rows, plan: (_send_back(call, rows, plan), plan),
  lambda call, plan, drows: (
    _mask(_send(call, drows, plan), arrived(call, plan)),
    None,
  ),
)


def _send_words(call: Call, arrays, plan: Plan):
  """Sends arrays of 32-bit elements side by side: small exchanges cost too."""
  words = [lax.bitcast_convert_type(x, jnp.uint32) for x in arrays]
  words = _send(call, jnp.concatenate(words, axis=1), plan)
  words = _mask(words, arrived(call, plan))
  parts = jnp.split(words, np.cumsum([x.shape[1] for x in arrays])[:-1], axis=1)
  return [
    lax.bitcast_convert_type(part, x.dtype)
    for part, x in zip(parts, arrays, strict=True)
  ]


def _mask(rows, exist: Bool[Array, "m"]):
  """Zeros in the place of rows that do not exist."""
  return jnp.where(exist[:, None], rows, 0)


def _send(call: Call, rows, plan: Plan):
  """Returns what arrives; what nobody fills is anything."""
  is_ragged = call.exchange == "ragged"
  return (_send_ragged if is_ragged else _send_dense)(call, rows, plan)


def _send_back(call: Call, rows, plan: Plan):
  is_ragged = call.exchange == "ragged"
  rows = (_send_back_ragged if is_ragged else _send_back_dense)(
    call, rows, plan
  )
  row = jnp.arange(call.num_sent, dtype=jnp.int32)
  me = lax.axis_index(call.axis_name)
  return _mask(rows, row < jnp.sum(plan.tokens[me]))


def _send_ragged(call: Call, rows, plan: Plan):
  me = lax.axis_index(call.axis_name)
  n = plan.tokens.shape[0]
  arriving = jnp.full(n, me * call.tokens, jnp.int32)
  return _ragged_all_to_all(
    call,
    rows,
    n * call.tokens,
    (plan.sent_from[me], plan.tokens[me], arriving, plan.tokens[:, me]),
  )


def _send_back_ragged(call: Call, rows, plan: Plan):
  me = lax.axis_index(call.axis_name)
  arrived = jnp.arange(plan.tokens.shape[0], dtype=jnp.int32) * call.tokens
  sent_from = plan.sent_from[:, me]
  return _ragged_all_to_all(
    call,
    rows,
    call.num_sent,
    (arrived, plan.tokens[:, me], sent_from, plan.tokens[me]),
  )


def _ragged_all_to_all(call: Call, rows, num_rows: int, slices):
  """Of one slice to each device and from each, in several pieces.

  slices are input_offsets, send_sizes, output_offsets and recv_sizes.
  """
  starts, sizes, targets, received = slices
  n = sizes.shape[0]
  pieces = max(1, min(_SLICES // n, call.tokens // _SLICE_ROWS))
  i = jnp.arange(pieces, dtype=jnp.int32)

  def cut(size):
    """First rows and sizes of the pieces, which differ by one row at most."""
    size, rest = size[:, None] // pieces, size[:, None] % pieces
    return size * i + jnp.minimum(i, rest), size + (i < rest)

  first, sizes = cut(sizes)
  return lax.ragged_all_to_all(
    rows,
    _buffer((num_rows, *rows.shape[1:]), rows),
    input_offsets=(starts[:, None] + first).reshape(-1),
    send_sizes=sizes.reshape(-1),
    output_offsets=(targets[:, None] + first).reshape(-1),
    recv_sizes=cut(received)[1].reshape(-1),
    axis_name=call.axis_name,
  )


def _buffer(shape: tuple[int, ...], like):
  """An array to write to, of like's dtype."""
  if implementations.choose(None, None) != "mosaic_gpu":
    return zeros(shape, like.dtype, like)
  return vary_alike(uninitialized(shape, like.dtype, like), like)[0]


def _send_dense(call: Call, rows, plan: Plan):
  """Buffer r of a sender begins with its first row for receiver r."""
  me = lax.axis_index(call.axis_name)
  position = jnp.arange(call.tokens, dtype=jnp.int32)
  source = plan.sent_from[me][:, None] + position
  out = _all_to_all(call, _take_rows(rows, source))
  return out.reshape(-1, rows.shape[1])


def _send_back_dense(call: Call, rows, plan: Plan):
  """Row i of a buffer is what row i of the buffer in _send_dense became."""
  me = lax.axis_index(call.axis_name)
  buffers = rows.reshape(-1, call.tokens, rows.shape[1])
  buffers = _all_to_all(call, buffers).reshape(-1, rows.shape[1])
  # Of each row of the result: the receiver that it was sent to.
  row = jnp.arange(call.num_sent, dtype=jnp.int32)
  first = plan.sent_from[me]
  receiver = jnp.sum(row[:, None] >= first[1:], axis=1)
  source = receiver * call.tokens + row - first[receiver]
  return _take_rows(buffers, source)


def _take_rows(rows: Shaped[Array, "n d"], index: Int32[Array, "..."]):
  """rows[index]; some row where there is none."""
  return rows[jnp.clip(index, 0, rows.shape[0] - 1)]


def _all_to_all(call: Call, buffers: Shaped[Array, "devices i d"]):
  return lax.all_to_all(
    buffers, call.axis_name, split_axis=0, concat_axis=0, tiled=True
  )

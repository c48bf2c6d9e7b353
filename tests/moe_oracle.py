"""The MoE layer as plain loops over experts: no sorting, no groups.

In jax.numpy, so that jax.grad gives the gradients to compare with; nothing of
the library is called.
"""

import jax
import jax.numpy as jnp


def activation(name, gate, up):
  if name == "swiglu":
    return gate / (1 + jnp.exp(-gate)) * up
  if name == "geglu":
    return gate * (1 + jax.scipy.special.erf(gate / jnp.sqrt(2.0))) / 2 * up
  gate, up = jnp.minimum(gate, 7), jnp.maximum(jnp.minimum(up, 7), -7)
  return gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)


def mlp(x, gate_up, down, gate_up_bias=0.0, down_bias=0.0, name="swiglu"):
  """One expert on all rows; gate_up (d, 2 f), down (f, d)."""
  f = down.shape[0]
  hidden = jnp.dot(x, gate_up, precision="highest") + gate_up_bias
  hidden = activation(name, hidden[:, :f], hidden[:, f:])
  return jnp.dot(hidden, down, precision="highest") + down_bias


def grouped_mlp(x, gate_up, down, rows, biases=(None, None), name="swiglu"):
  """As the library's; `rows` are the groups' [(start, end)]."""
  out = jnp.zeros_like(x)
  for g, (start, end) in enumerate(rows):
    gate_up_bias, down_bias = (0.0 if b is None else b[g] for b in biases)
    out = out.at[start:end].set(
      mlp(x[start:end], gate_up[g], down[g], gate_up_bias, down_bias, name)
    )
  return out


def weights(
  logits, top_k, score="softmax", normalize=True, scale=1.0, bias=0.0
):
  """(t, e), zero for the experts that a token does not go to."""
  if score == "softmax":
    scores = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    scores = scores / scores.sum(axis=1, keepdims=True)
  else:
    scores = 1 / (1 + jnp.exp(-logits))
  # The same bits below on both sides of the comparison.
  choice = jax.lax.optimization_barrier(jax.lax.stop_gradient(scores + bias))
  threshold = jnp.sort(choice, axis=1)[:, -top_k][:, None]
  chosen = jnp.where(choice >= threshold, scores, 0)
  if normalize:
    chosen = chosen / chosen.sum(axis=1, keepdims=True)
  return chosen * scale


def losses(logits, top_k, score="softmax", bias=0.0):
  """(load-balancing loss, z loss)."""
  e = logits.shape[1]
  scores = jax.nn.softmax(logits)
  if score == "sigmoid":
    scores = jax.nn.sigmoid(logits)
  is_chosen = weights(logits, top_k, score, bias=bias) > 0
  probability = scores / scores.sum(axis=1, keepdims=True)
  share = is_chosen.mean(axis=0) / top_k
  z = jnp.log(jnp.exp(logits).sum(axis=1))
  return e * jnp.sum(share * probability.mean(axis=0)), jnp.mean(z**2)


def layer(x, params, top_k, name="swiglu", **routing):
  """(out, load-balancing loss, z loss) of moe.MoeParams."""
  logits = jnp.dot(x, params.router, precision="highest")
  if params.router_bias is not None:
    logits = logits + params.router_bias
  bias = 0.0 if params.expert_bias is None else params.expert_bias
  w = weights(logits, top_k, bias=bias, **routing)
  out = jnp.zeros_like(x)
  for e in range(logits.shape[1]):
    gate_up_bias, down_bias = (
      0.0 if b is None else b[e]
      for b in (params.gate_up_bias, params.down_bias)
    )
    y = mlp(x, params.gate_up[e], params.down[e], gate_up_bias, down_bias, name)
    out = out + w[:, e, None] * y
  score = routing.get("score", "softmax")
  return out, *losses(logits, top_k, score, bias)

"""Which experts a token goes to, and with what weights."""

from numbers import Integral
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_grouped_gemm.manual_axes import vary_alike

Score = Literal["softmax", "sigmoid"]
_SCORES = get_args(Score)
_BEST_OF_GROUP = 2  # experts whose scores make a group's, as in DeepSeek-V3.
# The best are found by as many reductions, up to so many and of so many scores;
# fewer are sorted as fast (H200).
_MAX_REDUCTIONS, _LEAST_REDUCED = 16, 2**19


class Routing(NamedTuple):
  """Where `t` tokens go, and how uneven that is. A pytree.

  Attributes:
    experts: (t, top_k), the chosen ones, best first.
    weights: (t, top_k), by which the experts' results are to be multiplied.
    load_balancing_loss: 1 if all experts have the same share, at most e; 0 of
      no tokens.
    z_loss: mean of logsumexp(logits)^2 over the tokens; 0 of none.
  """

  experts: Int32[Array, "t top_k"]
  weights: Float32[Array, "t top_k"]
  load_balancing_loss: Float32[Array, ""]
  z_loss: Float32[Array, ""]


def route_top_k(
  logits: Float[Array, "t e"],
  top_k: int,
  *,
  score: Score = "softmax",
  normalize: bool = True,
  scale: float = 1.0,
  expert_bias: Float[Array, "e"] | None = None,
  num_expert_groups: int = 1,
  top_expert_groups: int = 1,
  axis_name: str | tuple[str, ...] = (),
) -> Routing:
  """experts[t] = the top_k of score(logits[t]) + expert_bias, logits (t, e).

  weights[t] = scale * the scores of the chosen experts, without the bias,
  divided by their sum if `normalize`, which leaves 1 of a single one and no
  gradient. All in float32.

  Softmax and normalize is what Mixtral and Qwen3 do, and the same as gpt-oss'
  softmax over the chosen logits. DeepSeek-V3 has sigmoid, normalize, an
  expert_bias, scale 2.5, 8 expert groups of which 4 are kept. Of equal scores
  those of the first experts win. A token with NaN among its logits gets NaN
  weights; both losses are then NaN.

  The load-balancing loss is e * sum(share of the copies that go to an expert *
  its mean probability), the Switch Transformer's (arXiv 2101.03961, equation 4)
  for any top_k; probabilities are the scores divided by their sum over all
  experts (for sigmoid: DeepSeek-V3, arXiv 2412.19437, equation 19). The z loss
  is ST-MoE's (arXiv 2202.08906, equation 5).

  Args:
    logits: of float32, bfloat16, ....
    top_k: experts per token.
    score: of the logits; softmax is over all experts.
    normalize: whether the weights of a token add up to `scale`.
    scale: of the weights.
    expert_bias: enters the choice only. Its gradient is zero: see
      update_expert_bias.
    num_expert_groups: into which the experts are cut, in sequence.
    top_expert_groups: of which only so many are open to a token: those whose
      two best experts (after the bias) have the largest sum of scores.
    axis_name: mesh axes over which the tokens are split, for the losses to be
      those of all tokens.
  """
  logits = jnp.asarray(logits)
  expert_bias = None if expert_bias is None else jnp.asarray(expert_bias)
  _check(logits, top_k, score, expert_bias)
  _check_groups(logits.shape[1], top_k, num_expert_groups, top_expert_groups)
  logits = logits.astype(jnp.float32)
  scores, log_scores, probabilities = _scores(logits, score)
  choice = lax.stop_gradient(scores)
  if expert_bias is not None:
    choice = choice + lax.stop_gradient(expert_bias.astype(jnp.float32))[None]
  if top_expert_groups < num_expert_groups:
    choice = _only_best_groups(choice, num_expert_groups, top_expert_groups)
  experts = _best(choice, top_k)
  weights = _take(*vary_alike(log_scores if normalize else scores, experts))
  if normalize:
    weights = jax.nn.softmax(weights)
  return Routing(
    experts,
    weights * scale,
    _load_balancing_loss(probabilities, experts, axis_name),
    _mean(jax.nn.logsumexp(logits, axis=-1) ** 2, axis_name),
  )


def update_expert_bias(
  expert_bias: Float[Array, "e"],
  group_sizes: Int32[Array, "e"],
  rate: float = 1e-3,
) -> Float[Array, "e"]:
  """expert_bias[e] + rate * sign(mean(group_sizes) - group_sizes[e]).

  What DeepSeek-V3 does after each step in place of a load-balancing loss
  (arXiv 2412.19437, section 2.1.2): experts that got too many tokens become
  less attractive.

  Args:
    expert_bias: of the step before, float32 zeros at first. TypeError if it is
      narrower than that: rounding would swallow the rate, or double it.
    group_sizes: token copies that each expert got, on all devices.
    rate: DeepSeek-V3 has 1e-3.
  """
  expert_bias, group_sizes = jnp.asarray(expert_bias), jnp.asarray(group_sizes)
  if expert_bias.dtype not in (jnp.float32, jnp.float64):
    raise TypeError(
      f"expert_bias must be float32 or float64, got {expert_bias.dtype}"
    )
  sizes = group_sizes.astype(jnp.float32)
  step = rate * jnp.sign(sizes.mean() - sizes)
  return expert_bias + step.astype(expert_bias.dtype)


def count(experts: Int32[Array, "..."], num_experts: int) -> Int32[Array, "e"]:
  """How often each expert occurs; others than those there are do not count."""
  # Not bincount: it is a scatter, which adds with atomics.
  ids = jnp.arange(num_experts, dtype=experts.dtype)
  return jnp.sum(
    experts.reshape(1, -1) == ids[:, None], axis=1, dtype=jnp.int32
  )


def _scores(logits, score: Score):
  """Returns the scores, their logarithms, and them divided by their sum.

  The quotient is taken of logarithms, as the scores may all be too small.
  """
  if score == "softmax":
    scores = jax.nn.softmax(logits)
    return scores, jax.nn.log_softmax(logits), scores
  log_scores = jax.nn.log_sigmoid(logits)
  return jax.nn.sigmoid(logits), log_scores, jax.nn.softmax(log_scores)


def _best(x: Float32[Array, "... e"], k: int) -> Int32[Array, "... k"]:
  """Returns the indices that lax.top_k does, with any NaN the largest number.

  XLA on a GPU would sort all e numbers.
  """
  if k > _MAX_REDUCTIONS or x.size < _LEAST_REDUCED:
    x = jnp.where(jnp.isnan(x), jnp.nan, x)  # Those with a sign sort below.
    return lax.top_k(x, k)[1].astype(jnp.int32)
  # In the order of the numbers, and with one below all of them.
  bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # -0.0 is 0.0.
  least, most = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
  order = jnp.where(bits < 0, bits ^ most, bits)
  order = jnp.where(jnp.isnan(x), most, order)
  ids = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  chosen = []
  for _ in range(k):
    chosen.append(lax.argmax(order, order.ndim - 1, jnp.int32))
    order = jnp.where(ids == chosen[-1][..., None], least, order)
  return jnp.stack(chosen, axis=-1)


def _only_best_groups(choice: Float32[Array, "t e"], groups: int, keep: int):
  """Sets the scores of all but the best groups of experts to -inf."""
  t, e = choice.shape
  grouped = choice.reshape(t, groups, e // groups)
  best = _best(grouped, min(_BEST_OF_GROUP, e // groups))
  best = jnp.take_along_axis(grouped, best, axis=-1).sum(axis=-1)
  kept = _best(best, keep)
  is_kept = kept[:, :, None] == jnp.arange(groups, dtype=jnp.int32)[None, None]
  is_kept = jnp.any(is_kept, axis=1)
  return jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(t, e)


def _mean(x, axis_name):
  """Over the first axis and over the devices; 0 of nothing."""
  mean = x.sum(axis=0) / max(x.shape[0], 1)
  return lax.pmean(mean, axis_name) if axis_name else mean


def _load_balancing_loss(probabilities, experts, axis_name):
  e = probabilities.shape[1]
  share = count(experts, e) / max(experts.size, 1)
  if axis_name:
    share = lax.pmean(share, axis_name)
  return e * jnp.sum(share * _mean(probabilities, axis_name))


@jax.custom_vjp
def _take(scores, experts):
  """scores[t, experts[t]]; its gradient is a sum and no scatter."""
  return jnp.take_along_axis(scores, experts, axis=1)


def _take_fwd(scores, experts):
  # Its body, for gradients to have forward-mode derivatives.
  return _take.__wrapped__(scores, experts), (experts, scores.shape[1])


def _take_bwd(residuals, dweights):
  experts, e = residuals
  is_chosen = experts[:, :, None] == jnp.arange(e, dtype=jnp.int32)[None, None]
  return jnp.where(is_chosen, dweights[:, :, None], 0).sum(axis=1), None


_take.defvjp(_take_fwd, _take_bwd)

# ---------------------------------------------------------------- checks


def _check(logits, top_k, score, expert_bias):
  if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise TypeError(
      f"logits must be floats (tokens, experts), got {logits.dtype} of shape "
      f"{logits.shape}"
    )
  e = logits.shape[1]
  if not isinstance(top_k, Integral):
    raise TypeError(
      f"top_k must be an int that jax does not trace, got {top_k}"
    )
  if not 1 <= top_k <= e:
    raise ValueError(f"top_k must be from 1 to the {e} experts, got {top_k}")
  if score not in _SCORES:
    raise ValueError(f"score must be one of {_SCORES}, got {score!r}")
  if expert_bias is not None and expert_bias.shape != (e,):
    raise ValueError(
      f"expert_bias must have an entry for each of the {e} experts, got shape "
      f"{expert_bias.shape}"
    )


def _check_groups(e, top_k, groups, keep):
  if not 1 <= keep <= groups or e % groups:
    raise ValueError(
      f"the {e} experts must be a multiple of num_expert_groups, and "
      f"top_expert_groups from 1 to that, got {groups} and {keep}"
    )
  if top_k > keep * (e // groups):
    raise ValueError(
      f"top_k must be at most the {keep * (e // groups)} experts of "
      f"{keep} of {groups} groups, got {top_k}"
    )


jax.export.register_namedtuple_serialization(
  Routing, serialized_name="jax_grouped_gemm.moe.Routing"
)

"""The whole layer on one device against a loop over the experts."""

import functools

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest

from jax_grouped_gemm import Recipe, moe, quantize, quantize_weights

T, D, F, E, K = 24, 32, 48, 5, 2
BF16 = Recipe.bf16()
RNG = np.random.default_rng(0)
equal = np.testing.assert_array_equal


def normal(*shape, scale=1.0):
  return jnp.asarray(RNG.standard_normal(shape) * scale, jnp.float32)


X = normal(T, D)
PLAIN = moe.MoeParams(
  router=normal(D, E, scale=0.3),
  gate_up=normal(E, D, 2 * F, scale=0.2),
  down=normal(E, F, D, scale=0.2),
)
BIASED = PLAIN._replace(
  router_bias=normal(E, scale=0.3),
  expert_bias=normal(E, scale=0.1),
  gate_up_bias=normal(E, 2 * F),
  down_bias=normal(E, D),
)
# As the models have it.
MODELS = {
  "mixtral": (PLAIN, "swiglu", {}),
  "gpt-oss": (BIASED._replace(expert_bias=None), "swiglu_clamped", {}),
  "deepseek-v3": (
    PLAIN._replace(expert_bias=BIASED.expert_bias),
    "swiglu",
    dict(score="sigmoid", scale=2.5),
  ),
  "all biases": (BIASED, "geglu", dict(normalize=False)),
}


def close(got, want):
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("model", MODELS)
def test_layer_and_its_gradients(model):
  params, activation, routing = MODELS[model]

  def ours(x, params):
    result = moe.moe_layer(
      x.reshape(2, -1, D),
      params,
      K,
      activation=activation,
      recipe=BF16,
      **routing,
    )
    assert result.out.shape == (2, T // 2, D)
    return result.out.reshape(-1, D), *result[1:3]

  def expected(x, params):
    return moe_oracle.layer(x, params, K, activation, **routing)

  results, vjp = jax.vjp(jax.jit(ours), X, params)
  oracles, oracle_vjp = jax.vjp(jax.jit(expected), X, params)
  jax.tree.map(close, results, oracles)
  cotangents = normal(T, D), jnp.float32(0.7), jnp.float32(-0.3)
  got, want = vjp(cotangents), oracle_vjp(cotangents)
  jax.tree.map(close, got, want)


def test_group_sizes_are_the_router_s():
  result = jax.jit(lambda x: moe.moe_layer(x, PLAIN, K, recipe=BF16))(X)
  chosen = moe_oracle.weights(X @ PLAIN.router, K) > 0
  equal(result.group_sizes, chosen.sum(axis=0))
  assert result.dropped == 0


def test_serving_is_the_forward_pass_of_training():
  scaled = PLAIN._replace(
    gate_up=quantize(PLAIN.gate_up.mT, (1, 128, 128)),
    down=quantize(PLAIN.down.mT, (1, 128, 128)),
  )
  run = jax.jit(functools.partial(moe.moe_layer, top_k=K))
  jax.tree.map(equal, run(X, scaled), run(X, PLAIN))
  # Only the experts have no gradient.
  loss = lambda router: run(X, scaled._replace(router=router)).out.sum()
  assert jnp.abs(jax.grad(loss)(PLAIN.router)).max() > 0


def test_weights_quantised_once():
  """The floats are not read, but theirs is the gradient."""
  quantized = quantize_weights(PLAIN.gate_up), quantize_weights(PLAIN.down)

  def gradients(params, **kwargs):
    loss = lambda params: moe.moe_layer(X, params, K, **kwargs).out.sum()
    return jax.jit(jax.grad(loss))(params)

  zeros = PLAIN._replace(gate_up=0 * PLAIN.gate_up, down=0 * PLAIN.down)
  jax.tree.map(
    np.testing.assert_array_equal,
    gradients(zeros, quantized_weights=quantized),
    gradients(PLAIN),
  )


def test_nan_stays_with_its_token():
  run = jax.jit(lambda x: moe.moe_layer(x, PLAIN, K).out)
  clean, out = run(X), run(X.at[5, 3].set(jnp.nan))
  equal(np.isnan(out).any(axis=1), np.arange(T) == 5)
  others = np.arange(T) != 5
  equal(out[others], clean[others])


def test_one_token():
  """As in decoding; more experts than rows."""
  run = jax.jit(lambda x: moe.moe_layer(x, PLAIN, K, recipe=BF16).out)
  close(run(X[:1]), run(X)[:1])
  assert run(X[:0]).shape == (0, D)


def test_vmap():
  run = jax.jit(lambda x: moe.moe_layer(x, BIASED, K, recipe=BF16))
  xs = X.reshape(2, -1, D)
  result = jax.jit(jax.vmap(run))(xs)
  for i in range(2):
    jax.tree.map(close, jax.tree.map(lambda r: r[i], result), run(xs[i]))  # noqa: B023


def test_export():
  run = functools.partial(moe.moe_layer, top_k=K)
  exported = jax.export.export(jax.jit(run))(X, BIASED)
  reloaded = jax.export.deserialize(exported.serialize())
  result = reloaded.call(X, BIASED)
  assert isinstance(result, moe.MoeOutput)
  jax.tree.map(close, result, run(X, BIASED))


def test_lowers_for_hopper_without_a_gpu():
  """All three products of each GEMM are kernels."""
  x = X.astype(jnp.bfloat16)
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), BIASED)

  def loss(x, params):
    return moe.moe_layer(
      x, params, K, implementation="mosaic_gpu", rematerialize=True
    ).out.sum()

  traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, params)
  lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
  # The second forward product is needed by nobody.
  assert lowered.count("mosaic_gpu_v2") >= 5


@pytest.mark.parametrize(
  "changes, top_k, error, message",
  [
    (dict(router=PLAIN.router.T), K, ValueError, r"got \(5, 32\)"),
    (
      dict(router=PLAIN.router[:, :4]),
      K,
      ValueError,
      "router chooses among 4 experts, gate_up holds 5",
    ),
    (
      dict(gate_up=quantize_weights(PLAIN.gate_up)),
      K,
      TypeError,
      "gate_up must be floats, .*got QuantizedWeights",
    ),
    (
      dict(router_bias=PLAIN.router[0, :1]),
      K,
      ValueError,
      r"router_bias must be \(5,\), got \(1,\)",
    ),
    (
      dict(router=quantize(PLAIN.gate_up, (1, 128, 128))),
      K,
      TypeError,
      "router must be floats, got a ScaledArray",
    ),
    ({}, 9, ValueError, "top_k must be from 1 to the 5 experts, got 9"),
    (dict(down_bias=PLAIN.router), K, ValueError, r"must be \(5, 32\)"),
  ],
)
def test_errors(changes, top_k, error, message):
  with pytest.raises(error, match=message):
    moe.moe_layer(X, PLAIN._replace(**changes), top_k)


def test_parameters_that_are_no_tuple():
  with pytest.raises(TypeError, match="params must be MoeParams, got dict"):
    moe.moe_layer(X, PLAIN._asdict(), K)


def test_lists_are_arrays():
  lists = moe.MoeParams(
    *(None if w is None else np.asarray(w).tolist() for w in BIASED)
  )
  out = moe.moe_layer(np.asarray(X).tolist(), lists, K, recipe=BF16).out
  close(out, moe.moe_layer(X, BIASED, K, recipe=BF16).out)
  bias = moe.update_expert_bias(np.zeros(2, np.float32), [3, 1])
  equal(bias, np.float32([-1e-3, 1e-3]))


def test_hessian_products():
  """Forward over reverse, as reverse over reverse has them."""

  def loss(params):
    return (moe.moe_layer(X, params, K, recipe=BF16).out ** 3).sum()

  gradient = jax.grad(loss)
  _, got = jax.jvp(gradient, (BIASED,), (BIASED,))
  _, vjp = jax.vjp(gradient, BIASED)
  jax.tree.map(close, got, vjp(BIASED)[0])


@pytest.mark.parametrize(
  "x, kwargs, error, message",
  [
    (X[0, 0], {}, ValueError, r"x must be \(..., d\), got shape \(\)"),
    (
      X,
      dict(parallel=moe.ExpertParallel("expert")),
      ValueError,
      "no jax.shard_map around this call has mesh axis 'expert'",
    ),
    (X, dict(parallel="expert"), TypeError, "ExpertParallel .*got 'expert'"),
  ],
)
def test_errors_of_other_arguments(x, kwargs, error, message):
  with pytest.raises(error, match=message):
    moe.moe_layer(x, PLAIN, K, **kwargs)

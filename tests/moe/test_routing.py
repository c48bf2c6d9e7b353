"""Router, sorting and un-sorting, against plain loops."""

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest

from jax_grouped_gemm import moe
from jax_grouped_gemm.moe import routing as routing_module

T, E, K, D = 37, 8, 3, 5
RNG = np.random.default_rng(0)
close = lambda *xs: np.testing.assert_allclose(*xs, rtol=2e-5, atol=2e-6)
equal = np.testing.assert_array_equal


def normal(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


LOGITS = normal(T, E)


def dense(routing):
  """(t, e): the weight of each expert, 0 where it is not chosen."""
  out = np.zeros((T, E))
  for t, experts in enumerate(np.asarray(routing.experts)):
    assert len({*experts.tolist()}) == len(experts)
    out[t, experts] = routing.weights[t]
  return out


# ---------------------------------------------------------------- router


@pytest.fixture(params=["sorted", "reduced"])
def search(request, monkeypatch):
  """How the best experts are found: of many scores by reductions."""
  least = 0 if request.param == "reduced" else 10**9
  monkeypatch.setattr(routing_module, "_LEAST_REDUCED", least)


searches = pytest.mark.usefixtures("search")


@searches
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bias", [0.0, RNG.standard_normal(E)])
def test_route(score, normalize, bias):
  bias = jnp.float32(bias)
  options = dict(score=score, normalize=normalize, scale=2.5)

  def ours(logits):
    routing = moe.route_top_k(
      logits, K, expert_bias=bias + jnp.zeros(E), **options
    )
    weights = jnp.zeros((T, E))
    rows = jnp.arange(T)[:, None]
    return (
      weights.at[rows, routing.experts].set(routing.weights),
      routing.load_balancing_loss,
      routing.z_loss,
    )

  def expected(logits):
    return (
      moe_oracle.weights(logits, K, bias=bias, **options),
      *moe_oracle.losses(logits, K, score, bias),
    )

  results, vjp = jax.vjp(ours, LOGITS)
  oracles, oracle_vjp = jax.vjp(expected, LOGITS)
  jax.tree.map(close, results, oracles)
  cotangents = normal(T, E), jnp.float32(3.0), jnp.float32(-2.0)
  close(*vjp(cotangents), *oracle_vjp(cotangents))


@searches
@pytest.mark.parametrize(
  "score, logits, bias",
  [
    # The sum of the chosen scores is too small: its square, or itself.
    ("sigmoid", [-60.0, -61, -60.5, -62], [0.0, 1, 2, 3]),
    ("sigmoid", [-160.0, -161, -160.5, -162], [0.0, 1, 2, 3]),
    ("softmax", [60.0, 40, 0, 1], [0.0, 0, 2, 3]),
    ("softmax", [160.0, 0, 1, 2], [-5.0, 0, 1, 2]),
  ],
)
def test_improbable_experts(score, logits, bias):
  """As the quotient of the scores in float64, which has room for them."""
  cotangents = np.array([[1.0, -3, 2, 5]]), 3.0

  def ours(logits):
    routing = moe.route_top_k(
      logits, 2, score=score, expert_bias=jnp.array(bias)
    )
    weights = (
      jnp.zeros((1, 4)).at[0, routing.experts[0]].set(routing.weights[0])
    )
    return weights, routing.load_balancing_loss

  def expected(logits):
    return (
      moe_oracle.weights(logits, 2, score, bias=np.array(bias)),
      moe_oracle.losses(logits, 2, score, np.array(bias))[0],
    )

  results, vjp = jax.vjp(ours, jnp.array([logits]))
  gradients = vjp(jax.tree.map(jnp.float32, cotangents))
  with jax.enable_x64(True):
    oracles, oracle_vjp = jax.vjp(expected, jnp.array([logits]))
    jax.tree.map(close, results, oracles)
    close(*gradients, *oracle_vjp(jax.tree.map(jnp.float64, cotangents)))


@searches
def test_best_expert_first_and_first_of_equals():
  logits = jnp.array([[0.0, 3, 1, 3], [2, 2, 2, 2]])
  routing = moe.route_top_k(logits, 3)
  equal(routing.experts, [[1, 3, 2], [0, 1, 2]])
  close(routing.weights[1], [1 / 3] * 3)


def test_the_best_of_equal_infinite_and_missing_numbers(monkeypatch):
  """As lax.top_k, whose NaN is the largest number; each expert once."""
  monkeypatch.setattr(routing_module, "_LEAST_REDUCED", 0)
  x = RNG.integers(-2, 3, (200, 17)).astype(np.float32)
  for value in (np.nan, np.inf, -np.inf, -np.inf, -0.0):
    x[RNG.random(x.shape) < 0.15] = value
  for k in (1, 4, 16):
    found = routing_module._best(jnp.asarray(x), k)
    equal(found, jax.lax.top_k(jnp.asarray(x) + 0.0, k)[1])


def test_even_routing_has_balance_loss_one():
  close(moe.route_top_k(jnp.zeros((T, E)), K).load_balancing_loss, 1)
  one = jnp.full((T, E), -99.0).at[:, 2].set(0)
  close(moe.route_top_k(one, 1).load_balancing_loss, E)


def test_expert_bias_has_no_gradient_and_no_weight():
  def loss(bias):
    routing = moe.route_top_k(LOGITS, K, score="sigmoid", expert_bias=bias)
    return jnp.sum(routing.weights**2) + routing.load_balancing_loss

  equal(jax.grad(loss)(normal(E)), np.zeros(E))
  bias = jnp.zeros(E).at[5].set(100.0)
  routing = moe.route_top_k(LOGITS, K, normalize=False, expert_bias=bias)
  assert (routing.experts[:, 0] == 5).all()
  close(routing.weights[:, 0], jax.nn.softmax(LOGITS)[:, 5])


@searches
def test_expert_groups():
  """As DeepSeek-V3 restricts a token to few nodes, in loops over tokens."""
  bias = jnp.linspace(-0.1, 0.1, E)
  routing = moe.route_top_k(
    LOGITS,
    2,
    score="sigmoid",
    expert_bias=bias,
    num_expert_groups=4,
    top_expert_groups=2,
  )
  choice = np.asarray(jax.nn.sigmoid(LOGITS) + bias)
  groups_used = set()
  for t in range(T):
    of_group = [choice[t, g * 2 : g * 2 + 2].sum() for g in range(4)]
    kept = np.argsort(of_group)[-2:]
    allowed = [e for g in kept for e in (2 * g, 2 * g + 1)]
    best = sorted(allowed, key=lambda e: -choice[t, e])[:2]
    equal(routing.experts[t], best)
    groups_used |= {*kept.tolist()}
  assert groups_used == {0, 1, 2, 3}


def test_expert_bias_update_evens_out_the_load():
  logits, bias = LOGITS + jnp.linspace(0, 2, E), jnp.zeros(E)

  def sizes(bias):
    routing = moe.route_top_k(logits, K, score="sigmoid", expert_bias=bias)
    return moe.dispatch(logits, routing.experts, E)[1].group_sizes

  before = sizes(bias)
  for _ in range(100):
    bias = moe.update_expert_bias(bias, sizes(bias), rate=0.01)
  assert jnp.std(sizes(bias)) < jnp.std(before) / 3
  equal(moe.update_expert_bias(bias, jnp.full(E, 4)), bias)
  with pytest.raises(TypeError, match="float32 or float64, got bfloat16"):
    moe.update_expert_bias(bias.astype(jnp.bfloat16), sizes(bias))


# ---------------------------------------------------------------- permutation


EXPERTS = jnp.asarray(
  np.stack([RNG.permutation(E)[:K] for _ in range(T)]), jnp.int32
)


def loops(experts, num_experts=E):
  """[(token, copy)] sorted by expert, and the group sizes."""
  rows = [
    (t, i)
    for e in range(num_experts)
    for t in range(len(experts))
    for i in range(experts.shape[1])
    if experts[t, i] == e
  ]
  sizes = [int((np.asarray(experts) == e).sum()) for e in range(num_experts)]
  return rows, sizes


def test_dispatch_is_the_stable_sort_by_expert():
  x = normal(T, D)
  rows, permutation = jax.jit(moe.dispatch, static_argnums=2)(x, EXPERTS, E)
  expected, sizes = loops(EXPERTS)
  equal(permutation.group_sizes, sizes)
  for r, (t, i) in enumerate(expected):
    equal(rows[r], x[t])
    assert permutation.order[r] == t * K + i
    assert permutation.inverse[t, i] == r


@pytest.mark.parametrize("dtype, experts", [("uint8", 256), ("int8", 200)])
def test_dispatch_of_narrow_integers(dtype, experts):
  """Even if they cannot hold the number of experts."""
  chosen = EXPERTS.at[0, 0].set(127)
  wide = moe.sort_by_expert(chosen, experts)
  jax.tree.map(equal, moe.sort_by_expert(chosen.astype(dtype), experts), wide)
  assert wide.group_sizes.sum() == EXPERTS.size


def test_dispatch_and_combine_are_differentiable():
  x, weights, scale = normal(T, D), normal(T, K), normal(T * K, 1)

  def ours(x, weights):
    rows, permutation = moe.dispatch(x, EXPERTS, E)
    return moe.combine(rows * scale, weights, permutation)

  row_of = np.zeros((T, K), int)
  for r, copy in enumerate(loops(EXPERTS)[0]):
    row_of[copy] = r

  def expected(x, weights):
    return jnp.sum(weights[:, :, None] * scale[row_of] * x[:, None], axis=1)

  out, vjp = jax.vjp(ours, x, weights)
  ref, oracle_vjp = jax.vjp(expected, x, weights)
  close(out, ref)
  dout = normal(T, D)
  for result, oracle in zip(vjp(dout), oracle_vjp(dout), strict=True):
    close(result, oracle)


@pytest.mark.parametrize("fn", ["forward", "gradient"])
def test_nothing_scatters_floats(fn):
  """No scatter-add, which is in no fixed order on a GPU."""

  def forward(logits, x):
    routing = moe.route_top_k(logits, K)
    rows, permutation = moe.dispatch(x, routing.experts, E)
    return moe.combine(rows, routing.weights, permutation).sum()

  run = forward if fn == "forward" else jax.grad(forward, (0, 1))
  jaxpr = str(jax.make_jaxpr(run)(LOGITS, normal(T, D)))
  assert "scatter-add" not in jaxpr and "scatter_add" not in jaxpr
  # The inverse of the permutation, of integers, once.
  assert jaxpr.count("scatter[") == 1


def test_sums_are_in_float32():
  """Of bf16 rows: rounded once, at the end."""
  rows = jnp.asarray(normal(T * K, D), jnp.bfloat16)
  weights = normal(T, K)
  _, permutation = moe.dispatch(rows[:T], EXPERTS, E)
  out = moe.combine(rows, weights, permutation)
  assert out.dtype == jnp.bfloat16
  wide = moe.combine(rows.astype(jnp.float32), weights, permutation)
  equal(out, wide.astype(jnp.bfloat16))
  equal(moe.combine(rows, weights, permutation, jnp.float32), wide)

  drows = jnp.asarray(normal(T * K, D), jnp.bfloat16)
  _, vjp = jax.vjp(lambda x: moe.dispatch(x, EXPERTS, E)[0], rows[:T])
  gathered = np.float32(drows)[np.asarray(permutation.inverse)]
  equal(vjp(drows)[0], jnp.asarray(gathered.sum(axis=1), jnp.bfloat16))


def test_copies_of_nobody_come_last():
  experts = EXPERTS.at[3, 1].set(-1).at[5, 0].set(E).at[9, 2].set(2**31 - 1)
  x = normal(T, D)
  rows, permutation = moe.dispatch(x, experts, E)
  expected, sizes = loops(experts)
  equal(permutation.group_sizes, sizes)
  assert sum(sizes) == T * K - 3
  equal(rows[: len(expected)], x[jnp.array([t for t, _ in expected])])
  equal(rows[len(expected) :], x[jnp.array([3, 5, 9])])


@searches
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_nan_stays_with_its_token(score):
  def run(logits, x):
    routing = moe.route_top_k(logits, K, score=score)
    rows, permutation = moe.dispatch(x, routing.experts, E)
    return moe.combine(rows, routing.weights, permutation)

  x, bad = normal(T, D), np.isin(np.arange(T), [4, 30])
  for logits, y in (
    (LOGITS.at[4].set(jnp.nan).at[30, 2].set(jnp.nan), x),
    (LOGITS, x.at[4].set(jnp.nan).at[30].set(jnp.inf)),
  ):
    out, vjp = jax.vjp(run, logits, y)
    equal(~np.isfinite(out).all(axis=1), bad)
    expected = jax.vjp(run, LOGITS, x)[0]  # Whose roundings are the same.
    equal(np.asarray(out)[~bad], np.asarray(expected)[~bad])
    for gradient in vjp(jnp.ones_like(out)):
      assert np.isfinite(np.asarray(gradient)[~bad]).all()


@pytest.mark.parametrize("t", [0, 1])
def test_few_tokens(t):
  routing = moe.route_top_k(LOGITS[:t], K)
  rows, permutation = moe.dispatch(normal(T, D)[:t], routing.experts, E)
  assert moe.combine(rows, routing.weights, permutation).shape == (t, D)
  assert permutation.group_sizes.sum() == t * K
  losses = jnp.array([routing.load_balancing_loss, routing.z_loss])
  assert (losses > 0).all() if t else (losses == 0).all()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
  "call, error, message",
  [
    (lambda: moe.route_top_k(LOGITS[0], 2), TypeError, r"shape \(8,\)"),
    (lambda: moe.route_top_k(EXPERTS, 2), TypeError, "int32"),
    (lambda: moe.route_top_k(LOGITS, 9), ValueError, "the 8 experts, got 9"),
    (lambda: moe.route_top_k(LOGITS, 0), ValueError, "got 0"),
    (
      lambda: jax.jit(moe.route_top_k)(LOGITS, 2),
      TypeError,
      "top_k must be an int that jax does not trace",
    ),
    (lambda: moe.route_top_k(LOGITS, 2, score="tanh"), ValueError, "'tanh'"),
    (
      lambda: moe.route_top_k(LOGITS, 2, expert_bias=jnp.zeros(3)),
      ValueError,
      r"8 experts, got shape \(3,\)",
    ),
    (
      lambda: moe.route_top_k(LOGITS, 2, num_expert_groups=3),
      ValueError,
      "got 3 and 1",
    ),
    (
      lambda: moe.route_top_k(LOGITS, 3, num_expert_groups=4),
      ValueError,
      "at most the 2 experts of 1 of 4 groups, got 3",
    ),
    (
      lambda: moe.dispatch(LOGITS, EXPERTS[1:], E),
      ValueError,
      r"\(37, 8\) and \(36, 3\)",
    ),
    (lambda: moe.dispatch(LOGITS, LOGITS, E), TypeError, "float32"),
    (lambda: moe.dispatch(LOGITS, EXPERTS, 0), ValueError, "at least 1, got 0"),
    (
      lambda: moe.combine(LOGITS, LOGITS, moe.dispatch(LOGITS, EXPERTS, E)[1]),
      ValueError,
      r"\(37, 3\)",
    ),
  ],
)
def test_errors(call, error, message):
  with pytest.raises(error, match=message):
    call()

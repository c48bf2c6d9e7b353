"""The experts' MLP against a loop over the experts."""

import functools

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import oracle
import pytest

from jax_grouped_gemm import (
  Recipe,
  moe,
  quantize,
  quantize_weights,
  ragged_dot,
)

M, D, F, G = 60, 32, 48, 4
SIZES = (20, 0, 1, 30)  # 9 rows are nobody's.
ROWS = oracle.group_rows(SIZES, M)
BF16 = Recipe.bf16()
RNG = np.random.default_rng(0)
close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
equal = np.testing.assert_array_equal


def normal(*shape, scale=1.0):
  return jnp.asarray(RNG.standard_normal(shape) * scale, jnp.float32)


X, DOUT = normal(M, D), normal(M, D)
GATE_UP = normal(G, D, 2 * F, scale=0.5)
DOWN = normal(G, F, D, scale=0.2)
BIASES = normal(G, 2 * F), normal(G, D)
QUANTIZED = quantize_weights(GATE_UP), quantize_weights(DOWN)


def ours(x, gate_up, down, gate_up_bias=None, down_bias=None, **kwargs):
  kwargs = {"recipe": BF16, "group_sizes": jnp.array(SIZES), **kwargs}
  return moe.grouped_mlp(
    x,
    gate_up,
    down,
    gate_up_bias=gate_up_bias,
    down_bias=down_bias,
    **kwargs,
  )


@pytest.mark.parametrize(
  "activation, biases, rematerialize",
  [
    ("swiglu", (), False),
    ("swiglu", BIASES, True),
    ("geglu", BIASES, False),
    ("swiglu_clamped", BIASES, False),
  ],
  ids=["plain", "rematerialize", "geglu", "clamped"],
)
def test_is_a_loop_over_experts(activation, biases, rematerialize):
  # Large enough for gpt-oss' clamps.
  x = X * 3
  run = functools.partial(
    ours, activation=activation, rematerialize=rematerialize
  )

  def loop(x, gate_up, down, *biases):
    return moe_oracle.grouped_mlp(
      x, gate_up, down, ROWS, biases or (None, None), activation
    )

  args = x, GATE_UP, DOWN, *biases
  out, vjp = jax.vjp(jax.jit(run), *args)
  expected, oracle_vjp = jax.vjp(jax.jit(loop), *args)
  close(out, expected)
  equal(out[sum(SIZES) :], 0)
  for got, ref in zip(vjp(DOUT), oracle_vjp(DOUT), strict=True):
    close(got, ref, atol=1e-4 * np.abs(ref).max())
  # Clamps are in use, so that they are tested.
  hidden = np.concatenate(
    [np.asarray(x[s:e] @ GATE_UP[g]) for g, (s, e) in enumerate(ROWS)]
  )
  assert (hidden > 7).any() and (hidden < -7).any()


@pytest.mark.parametrize(
  "dtype, rematerialize",
  [(jnp.float32, True), (jnp.bfloat16, False), (jnp.bfloat16, True)],
)
def test_fp8_is_two_ragged_dots(dtype, rematerialize):
  """And their gradients, with nothing between them but the activation."""

  def plain(x, gate_up, down):
    hidden = ragged_dot(x, gate_up, jnp.array(SIZES))
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
    hidden = moe_oracle.activation("swiglu", gate, up).astype(dtype)
    return ragged_dot(hidden, down, jnp.array(SIZES))

  args = [a.astype(dtype) for a in (X, GATE_UP, DOWN)]
  run = functools.partial(ours, recipe=Recipe(), rematerialize=rematerialize)
  out, vjp = jax.vjp(jax.jit(run), *args)
  ref, plain_vjp = jax.vjp(jax.jit(plain), *args)
  # Rounding may differ by one step of the dtype, and then in FP8 by one.
  step = {jnp.float32: 1e-6, jnp.bfloat16: 2**-8}[dtype]
  results = (out, *vjp(DOUT.astype(dtype)))
  expected = (ref, *plain_vjp(DOUT.astype(dtype)))
  for got, want in zip(results, expected, strict=True):
    got, want = np.float64(got), np.float64(want)
    assert np.linalg.norm(got - want) <= 2 * step * np.linalg.norm(want)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(dgrad="bf16")], ids=str)
def test_weights_quantised_once(recipe):
  """The same bits, though float weights that are none of theirs are passed."""
  run = functools.partial(ours, recipe=recipe)
  expected, expected_vjp = jax.vjp(jax.jit(run), X, GATE_UP, DOWN)
  run = jax.jit(functools.partial(run, quantized_weights=QUANTIZED))
  # A product that is not quantised reads the floats.
  others = [w if recipe.dgrad == "bf16" else 0 * w for w in (GATE_UP, DOWN)]
  out, vjp = jax.vjp(run, X, *others)
  for got, want in zip(
    (out, *vjp(DOUT)), (expected, *expected_vjp(DOUT)), strict=True
  ):
    equal(got, want)


# ---------------------------------------------------------------- serving


def test_scaled_weights():
  """Products of what is quantised, in float64."""
  d, f = 160, 144
  x, gate_up = normal(M, d), normal(G, 2 * f, d, scale=0.3)
  down = normal(G, d, f)
  gate_up, down = (quantize(w, (1, 128, 128)) for w in (gate_up, down))
  biases = normal(G, 2 * f), normal(G, d)
  out = jax.jit(ours)(x, gate_up, down, *biases)

  def product(x, weights, bias):
    out = oracle.m_grouped(
      oracle.dequantize(quantize(x, (1, 128))), oracle.dequantize(weights), ROWS
    )
    for g, (start, end) in enumerate(ROWS):
      out[start:end] += np.asarray(bias[g])
    return jnp.asarray(out, jnp.float32)

  hidden = product(x, gate_up, biases[0])
  hidden = moe_oracle.activation("swiglu", hidden[:, :f], hidden[:, f:])
  expected = product(hidden, down, biases[1])
  close(out, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scaled_weights_are_those_of_the_recipe(dtype):
  """Quantised beforehand, the same result as quantised in the forward pass."""
  weights = [w.astype(dtype) for w in (GATE_UP, DOWN)]
  scaled = [quantize(w.mT, (1, 128, 128)) for w in weights]
  x = X.astype(dtype)
  out = ours(x, *scaled)
  assert out.dtype == dtype
  equal(out, ours(x, *weights, recipe=Recipe()))


def test_scaled_weights_have_no_gradient():
  weights = [quantize(w.mT, (1, 128, 128)) for w in (GATE_UP, DOWN)]
  for argument in (0, 1):
    with pytest.raises(NotImplementedError, match="have no gradient"):
      jax.grad(lambda *args: ours(*args).sum(), argument)(X, *weights)


# ---------------------------------------------------------------- transforms


WEIGHTS = {
  "bf16": ((GATE_UP, DOWN), BF16),
  "fp8": ((GATE_UP, DOWN), Recipe()),
  "serving": (
    tuple(quantize(w.mT, (1, 128, 128)) for w in (GATE_UP, DOWN)),
    Recipe(),
  ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_jit_with_traced_sizes(kind):
  weights, recipe = WEIGHTS[kind]
  jitted = jax.jit(
    lambda x, sizes: ours(x, *weights, recipe=recipe, group_sizes=sizes)
  )
  for sizes in [SIZES, (0, 0, 0, 0), (0, 60, 0, 0), (-3, 10, 2**31 - 1, 9)]:
    out = jitted(X, jnp.array(sizes))
    expected = ours(X, *weights, recipe=recipe, group_sizes=jnp.array(sizes))
    close(out, expected)
    end = oracle.group_rows(sizes, M)[-1][1]
    equal(out[end:], 0)
    # A row's result depends on no other row.
    assert end == 0 or not np.isclose(out[:end], 0).all(axis=1).any()


@pytest.mark.parametrize("kind", ["fp8", "serving"])
def test_vmap(kind):
  weights, recipe = WEIGHTS[kind]
  x, sizes = normal(2, M, D), jnp.array([SIZES, (1, 2, 3, 4)])
  run = lambda x, sizes: ours(
    x, *weights, *BIASES, recipe=recipe, group_sizes=sizes
  )
  out = jax.vmap(run)(x, sizes)
  for i in range(2):
    close(out[i], run(x[i], sizes[i]))


@pytest.mark.parametrize("kind", ["fp8", "serving"])
def test_rows_quantised_outside(kind):
  """The same bits, and the floats do not enter the result."""
  weights, recipe = WEIGHTS[kind]
  run = jax.jit(lambda x, q: ours(x, *weights, recipe=recipe, quantized_x=q))
  rows = quantize(X, (1, 128))
  expected = run(X, None)
  equal(run(X, rows), expected)
  equal(run(jnp.zeros_like(X), rows), expected)


def test_scan_over_layers():
  layers = jax.tree.map(lambda w: jnp.stack([w, w * 0.7]), (GATE_UP, DOWN))

  def scanned(x, layers):
    step = lambda x, w: (x + ours(x, *w, rematerialize=True), None)
    return jax.lax.scan(step, x, layers)[0].sum()

  def unrolled(x, layers):
    for i in range(2):
      x = x + ours(x, *jax.tree.map(lambda w: w[i], layers))  # noqa: B023
    return x.sum()

  grads = [
    jax.jit(jax.grad(fn, (0, 1)))(X, layers) for fn in (scanned, unrolled)
  ]
  for got, want in zip(*map(jax.tree.leaves, grads), strict=True):
    close(got, want, atol=1e-4 * np.abs(want).max())


def residual_bytes(run, *args):
  """Of what is kept for the backward pass beside the arguments themselves."""
  _, vjp = jax.vjp(run, *args)
  known = {id(x) for x in args}
  return sum(x.nbytes for x in jax.tree.leaves(vjp) if id(x) not in known)


def test_residuals():
  """FP8 copies and gate/up; with rematerialize not the activation."""
  m, d, f, g = 1024, 256, 384, 2
  args = [
    w.astype(jnp.bfloat16)
    for w in (normal(m, d), normal(g, d, 2 * f), normal(g, f, d))
  ]
  run = functools.partial(
    ours, recipe=Recipe(), group_sizes=jnp.array([512, 512])
  )
  tokens = (m + g * 127) // 128 * 128  # room for groups of whole blocks
  scaled = 1 + 4 / 128
  weights = g * 3 * f * d * (1 + 4 / 128**2)
  gate_up = 2 * m * 2 * f
  expected = tokens * scaled * d + weights + gate_up
  sizes = 64  # at most that many bytes of group sizes
  got = residual_bytes(functools.partial(run, rematerialize=True), *args)
  assert expected <= got <= expected + sizes
  expected += tokens * scaled * f
  assert expected <= residual_bytes(run, *args) <= expected + sizes


# ---------------------------------------------------------------- NaN


@pytest.mark.parametrize("kind", WEIGHTS)
def test_nan_stays_in_its_row(kind):
  weights, recipe = WEIGHTS[kind]
  run = functools.partial(ours, recipe=recipe)
  x = X.at[3, 7].set(jnp.nan).at[25].set(jnp.inf).at[sum(SIZES) :].set(jnp.nan)
  out = run(x, *weights, *BIASES)
  bad = np.isin(np.arange(M), [3, 25])
  equal(~np.isfinite(out).all(axis=1), bad)
  equal(np.asarray(out)[~bad], np.asarray(run(X, *weights, *BIASES))[~bad])


@pytest.mark.parametrize("recipe", [BF16, Recipe()], ids=["bf16", "fp8"])
def test_nan_stays_in_its_group_s_gradient(recipe):
  dout = DOUT.at[3, 7].set(jnp.nan).at[sum(SIZES) :].set(jnp.nan)
  _, vjp = jax.vjp(
    functools.partial(ours, recipe=recipe), X, GATE_UP, DOWN, *BIASES
  )
  dx, *of_groups = vjp(dout)
  equal(np.isnan(dx).any(axis=1), np.arange(M) == 3)
  for gradient in of_groups:
    bad = ~np.isfinite(gradient).reshape(G, -1).all(axis=1)
    equal(bad, [True, False, False, False])
  # Of the last bias: one column.
  equal(np.argwhere(np.isnan(of_groups[-1])), [[0, 7]])


# ---------------------------------------------------------------- errors


def scaled(w, blocks=(1, 128, 128)):
  return quantize(w, blocks)


@pytest.mark.parametrize(
  "call, error, message",
  [
    (
      lambda: ours(X, GATE_UP, scaled(DOWN.mT)),
      TypeError,
      "ArrayImpl and ScaledArray",
    ),
    (lambda: ours(X, GATE_UP, DOWN.mT), ValueError, r"\(4, 32, 48\)"),
    (lambda: ours(X, GATE_UP[0], DOWN), ValueError, r"\(32, 96\)"),
    (lambda: ours(X, GATE_UP[..., 1:], DOWN), ValueError, r"\(4, 32, 95\)"),
    (
      lambda: ours(X, scaled(GATE_UP), scaled(DOWN)),
      ValueError,
      r"gate_up \(g, 2 f, d\).*as ScaledArrays, got \(60, 32\)",
    ),
    (
      lambda: ours(X, scaled(GATE_UP.mT, (1, 1, 128)), scaled(DOWN.mT)),
      ValueError,
      "blocks of",
    ),
    (
      lambda: ours(X, GATE_UP, DOWN, activation="relu"),
      ValueError,
      "swiglu_clamped.*'relu'",
    ),
    (
      lambda: ours(X, GATE_UP, DOWN, BIASES[1]),
      ValueError,
      r"gate_up_bias must be \(4, 96\), got \(4, 32\)",
    ),
    (
      lambda: ours(X, GATE_UP, DOWN, group_sizes=jnp.array([1, 2])),
      ValueError,
      "got 2",
    ),
    (lambda: ours(X.astype(jnp.int32), GATE_UP, DOWN), TypeError, "int32"),
    (
      lambda: ours(X, GATE_UP, DOWN, quantized_weights=QUANTIZED),
      ValueError,
      "forward or dgrad is 'fp8'.*'bf16'",
    ),
    (
      lambda: ours(
        X, scaled(GATE_UP.mT), scaled(DOWN.mT), quantized_weights=QUANTIZED
      ),
      ValueError,
      "need float weights .*ScaledArray",
    ),
    (
      lambda: ours(
        X, GATE_UP, DOWN, recipe=Recipe(), quantized_weights=QUANTIZED[::-1]
      ),
      ValueError,
      r"quantized_weights\[0\].forward must be .*\(4, 96, 32\)",
    ),
    (
      lambda: ours(
        X, GATE_UP, DOWN, recipe=Recipe(), quantized_weights=QUANTIZED[:1]
      ),
      TypeError,
      "those of gate_up and of down",
    ),
  ],
)
def test_errors(call, error, message):
  with pytest.raises(error, match=message):
    call()

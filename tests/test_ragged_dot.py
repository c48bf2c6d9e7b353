"""ragged_dot and its gradients: the products that the recipe says, no others.

What is quantised is quantised here too, with the public `quantize`; products
are float64, and bounds are what rounding float32 sums may cost (oracle.check).
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from unquantized_paths import by_lax_ragged_dot

from jax_grouped_gemm import (
  Config,
  Recipe,
  quantize,
  quantize_for_k_grouped,
  quantize_weights,
  ragged_dot,
)
from jax_grouped_gemm.kernels import tuning

M, K, N, G = 150, 160, 144, 4  # k and n: a whole scale block and a part of one.
SIZES = (135, 0, 1, 9)  # More than a token block, empty, one row; 5 rows over.
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
FP8, BF16 = Recipe(), Recipe.bf16()
RECIPES = [
  FP8,
  BF16,
  Recipe(gradient_dtype=E5M2),
  Recipe(power_of_two_scales=True),
  Recipe(gradient_dtype=E5M2, power_of_two_scales=True),
]


def operands(m=M, k=K, n=N, g=G, dtypes=(jnp.float32,) * 3, seed=0):
  """Returns lhs, rhs and the result's gradient."""
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.standard_normal(shape), dtype)
    for shape, dtype in zip([(m, k), (g, k, n), (m, n)], dtypes, strict=True)
  )


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("implementation", "by_lax")
)
def run(
  recipe,
  lhs,
  rhs,
  dout,
  sizes,
  offset=None,
  quantized_lhs=None,
  quantized_rhs=None,
  implementation=None,
  by_lax=False,
):
  """Returns out, d(lhs) and d(rhs)."""
  dot = functools.partial(
    ragged_dot,
    group_sizes=sizes,
    preferred_element_type=dout.dtype,
    group_offset=offset,
    recipe=recipe,
    quantized_lhs=quantized_lhs,
    quantized_rhs=quantized_rhs,
    implementation=implementation,
  )
  with by_lax_ragged_dot() if by_lax else contextlib.nullcontext():
    out, vjp = jax.vjp(dot, lhs, rhs)
    return out, *vjp(dout)


def straight_through(recipe, lhs, rhs, dout, sizes, offset=None):
  """Returns (ref, magnitude, num_terms) of out, d(lhs) and d(rhs)."""
  m, g = lhs.shape[0], rhs.shape[0]
  rows = oracle.group_rows(sizes, m, offset, g)

  def quantized(product, x, block_shape, dtype=E4M3):
    if getattr(recipe, product) == "bf16":
      return np.asarray(x).astype(np.float64)
    scales = recipe.power_of_two_scales
    return oracle.dequantize(
      quantize(x, block_shape, dtype=dtype, power_of_two_scales=scales)
    )

  def per_group(x, dtype=E4M3):
    """Each group's tokens first, then zeros: blocks start with the group."""
    tokens = np.zeros((g, *x.shape), x.dtype)
    for group, (start, end) in zip(tokens, rows, strict=True):
      group[: end - start] = x[start:end]
    return quantized("wgrad", tokens, (1, oracle.BLOCK, 1), dtype)

  def m_grouped(x, weights):
    ref, magnitude = (
      oracle.m_grouped(abs_(x), abs_(weights), rows)
      for abs_ in (np.asarray, np.abs)
    )
    return ref, magnitude, x.shape[1]

  def k_grouped(x, y):
    return *(abs_(x).mT @ abs_(y) for abs_ in (np.asarray, np.abs)), m

  row, square, grad = (1, oracle.BLOCK), (1, *[oracle.BLOCK] * 2), "dgrad"
  with np.errstate(invalid="ignore"):
    return (
      m_grouped(
        quantized("forward", lhs, row), quantized("forward", rhs, square).mT
      ),
      m_grouped(
        quantized(grad, dout, row, recipe.gradient_dtype),
        quantized(grad, rhs, square),
      ),
      k_grouped(per_group(lhs), per_group(dout, recipe.gradient_dtype)),
    )


def check(recipe, lhs, rhs, dout, sizes, offset=None, **static):
  sizes = jnp.asarray(sizes)
  results = run(recipe, lhs, rhs, dout, sizes, offset, **static)
  expected = straight_through(recipe, lhs, rhs, dout, sizes, offset)
  dtypes = dout.dtype, lhs.dtype, rhs.dtype
  for result, ref, dtype in zip(results, expected, dtypes, strict=True):
    assert result.dtype == dtype
    oracle.check(result, *ref)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_the_quantized_operands(recipe):
  check(recipe, *operands(), SIZES)


@pytest.mark.parametrize("recipe", [FP8, BF16])
@pytest.mark.parametrize("offset", [0, 1, 3, -1, 6, 2**31 - 1])
def test_group_offset(recipe, offset):
  lhs, rhs, dout = operands(g=3)
  sizes = (20, 3, 70, 0, 1, 30)  # of 6 groups, rhs holds 3.
  check(recipe, lhs, rhs, dout, sizes, jnp.array([offset]))


@pytest.mark.parametrize("recipe", [FP8, BF16])
@pytest.mark.parametrize(
  "dtypes",
  list(itertools.product([jnp.bfloat16, jnp.float32], repeat=3)),
  ids=lambda dtypes: "-".join(dtype.__name__ for dtype in dtypes),
)
def test_dtypes(recipe, dtypes):
  """Of lhs and its gradient, rhs and its gradient, and the result."""
  check(recipe, *operands(11, 32, 48, 3, dtypes), (3, 0, 5))


@pytest.mark.parametrize("recipe", [FP8, BF16])
def test_float16(recipe):
  check(recipe, *operands(11, 32, 48, 3, (jnp.float16,) * 3), (3, 0, 5))


@pytest.mark.parametrize("recipe", [FP8, BF16])
def test_every_pattern_of_empty_groups(recipe):
  problem = operands(11, 32, 48, 3)
  for sizes in itertools.product([0, 3], repeat=3):
    check(recipe, *problem, sizes)
  check(recipe, *problem, (1, 1, 1))


sizes_to_cut = st.lists(
  st.one_of(st.integers(0, 40), st.integers(-(2**31), 2**31 - 1)),
  min_size=3,
  max_size=3,
)


@pytest.mark.parametrize("recipe", [FP8, BF16])
@hypothesis.given(sizes=sizes_to_cut)
@hypothesis.example([-1, 11, 0])
@hypothesis.example([4, 2**31 - 1, 2**31 - 1])
def test_any_sizes(recipe, sizes):
  check(recipe, *operands(11, 32, 48, 3), sizes)


@pytest.mark.parametrize(
  "m, k, n, sizes",
  [(0, 32, 16, (0, 0)), (5, 0, 16, (2, 1)), (5, 32, 0, (2, 1))],
)
@pytest.mark.parametrize("recipe", [FP8, BF16])
def test_axes_without_elements(recipe, m, k, n, sizes):
  check(recipe, *operands(m, k, n, 2), sizes)


@pytest.mark.parametrize(
  "recipe",
  [Recipe(*kinds) for kinds in itertools.product(["fp8", "bf16"], repeat=3)],
  ids=lambda r: f"{r.forward}-{r.dgrad}-{r.wgrad}",
)
def test_products_do_not_depend_on_one_another(recipe):
  problem = *operands(), jnp.array(SIZES)
  pure = {"fp8": run(FP8, *problem), "bf16": run(BF16, *problem)}
  kinds = recipe.forward, recipe.dgrad, recipe.wgrad
  results = run(recipe, *problem)
  for i, (kind, result) in enumerate(zip(kinds, results, strict=True)):
    np.testing.assert_array_equal(result, pure[kind][i])


@pytest.mark.parametrize("recipe", [FP8, Recipe(gradient_dtype=E5M2)])
def test_interpreted_kernels(monkeypatch, recipe):
  small = Config(tile_n=64, cluster=1, num_stages=2, num_sms=1)
  for name in ("m_grouped_config", "k_grouped_config"):
    monkeypatch.setattr(tuning, name, lambda *_, **__: small)
  dtypes = jnp.bfloat16, jnp.float32, jnp.bfloat16
  problem = operands(5, 16, 32, 2, dtypes)
  check(recipe, *problem, (3, 1), implementation="interpret")


@pytest.mark.parametrize(
  "dtypes, kernels",
  [
    # Rows together with the tokens.
    ((jnp.bfloat16,) * 3, {"weights": 1, "tokens": 2}),
    # XLA quantises what the kernels do not take.
    ((jnp.bfloat16, jnp.float32, jnp.float32), {"rows": 1, "tokens": 1}),
  ],
)
def test_quantised_by_kernels(monkeypatch, dtypes, kernels):
  """To the bit as XLA does: the GEMMs are XLA's, the quantisation is not."""

  def xla(function):
    return lambda *args, **kwargs: function(
      *args, **{**kwargs, "implementation": "xla"}
    )

  problem = *operands(20, 32, 48, 2, dtypes), jnp.array([13, 5])
  expected = run(FP8, *problem, implementation="xla")
  # The package's name for it is that of the function.
  module = importlib.import_module("jax_grouped_gemm.ragged_dot")
  for name in ("m_grouped_gemm", "k_grouped_gemm"):
    monkeypatch.setattr(module, name, xla(getattr(module, name)))
  # Not `run`, which has traced this already.
  results = jax.jit(
    functools.partial(run.__wrapped__, FP8, implementation="interpret")
  )
  jaxpr = str(jax.make_jaxpr(results)(*problem))
  for kernel in ("rows", "weights", "tokens"):
    count = jaxpr.count(f"name=_quantize_{kernel}")
    assert count == kernels.get(kernel, 0), kernel
  chex.assert_trees_all_equal(results(*problem), expected)


# ---------------------------------------------------------------- jax.lax


def lax_results(lhs, rhs, dout, sizes):
  """(f32 out, d(lhs), d(rhs) of jax.lax.ragged_dot) from the same values."""
  lhs, rhs, dout = (x.astype(jnp.float32) for x in (lhs, rhs, dout))
  dot = lambda lhs, rhs: jax.lax.ragged_dot(lhs, rhs, jnp.asarray(sizes))
  out, vjp = jax.vjp(dot, lhs, rhs)
  return [np.asarray(x, np.float64) for x in (out, *vjp(dout))]


@pytest.mark.parametrize("sizes", [SIZES, (0, 0, 0, 0), (0, 0, 0, M)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unquantized_is_lax_ragged_dot(sizes, dtype):
  problem = operands(dtypes=[dtype] * 3)
  results = run(BF16, *problem, jnp.array(sizes))
  expected = straight_through(BF16, *problem, sizes)
  for result, ref, (_, magnitude, terms) in zip(
    results, lax_results(*problem, sizes), expected, strict=True
  ):
    oracle.check(result, ref, magnitude, 2 * terms)  # Both round their sums.


@pytest.mark.parametrize("dtype, step", [(E4M3, 2.0**-4), (E5M2, 2.0**-3)])
def test_fp8_is_near_lax_ragged_dot(dtype, step):
  """A value is off by half a step of its dtype, or of its least numbers."""
  lhs, rhs, dout = operands()
  results = run(Recipe(gradient_dtype=dtype), lhs, rhs, dout, jnp.array(SIZES))
  exact = [np.abs(np.asarray(x, np.float64)) for x in (lhs, rhs, dout)]
  worst = []
  for x, f8, half_step in zip(
    exact, (E4M3, E4M3, dtype), (2.0**-4, 2.0**-4, step), strict=True
  ):
    info = jnp.finfo(f8)
    least = float(info.smallest_subnormal) / 2 / float(info.max)
    error = half_step * x + least * x.max()
    worst.append((x + error) * (1 + 1e-6))  # float32 scales and quotients.
  bounds = [
    wide[1] - narrow[1]
    for wide, narrow in zip(
      straight_through(BF16, *worst, SIZES),
      straight_through(BF16, *exact, SIZES),
      strict=True,
    )
  ]
  lax = lax_results(lhs, rhs, dout, SIZES)
  for result, ref, bound in zip(results, lax, bounds, strict=True):
    assert np.all(np.abs(np.asarray(result, np.float64) - ref) <= bound)


def test_signature_is_that_of_lax_ragged_dot():
  parameters = inspect.signature(ragged_dot).parameters.values()
  positional = [
    (p.name, p.default)
    for p in parameters
    if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
  ]
  lax = inspect.signature(jax.lax.ragged_dot).parameters.values()
  assert positional == [(p.name, p.default) for p in lax]


@pytest.mark.parametrize("recipe", [FP8, BF16])
@pytest.mark.parametrize(
  "dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32, jnp.uint32]
)
def test_dtypes_of_group_sizes(recipe, dtype):
  lhs, rhs, _ = operands(130, 32, 48, 3)
  sizes = np.array([100, 3, 7])
  dot = functools.partial(ragged_dot, lhs, rhs, recipe=recipe)
  np.testing.assert_array_equal(dot(sizes.astype(dtype)), dot(sizes.tolist()))


def test_positional_arguments():
  lhs, rhs, _ = operands(11, 32, 48, 3)
  args = (lhs, rhs, jnp.array([3, 0, 5]), "highest", jnp.bfloat16)
  out = ragged_dot(*args, recipe=BF16)
  chex.assert_trees_all_equal_shapes_and_dtypes(out, jax.lax.ragged_dot(*args))
  offset = ragged_dot(*args, jnp.array([0]), None, recipe=BF16)
  np.testing.assert_array_equal(out, offset)


@pytest.mark.parametrize("by_lax", [False, True])
def test_precision_reaches_all_products(by_lax):
  lhs, rhs, dout = operands(11, 32, 48, 3)

  def loss(lhs, rhs):
    out = ragged_dot(
      lhs,
      rhs,
      jnp.array([3, 0, 5]),
      "highest",
      recipe=BF16,
    )
    return jnp.sum(out * dout)

  with by_lax_ragged_dot() if by_lax else contextlib.nullcontext():
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(lhs, rhs))
  products = jaxpr.count("dot_general[")
  assert products == 3
  assert jaxpr.count("precision=(Precision.HIGHEST") == products


@pytest.mark.parametrize("offset", [None, 1])
def test_unquantized_by_lax(offset):
  """What GPUs run: jax.lax.ragged_dot, with the same contract."""
  problem = operands(11, 32, 48, 3)
  for sizes in [(3, 0, 5), (0, 0, 0), (2, 9, 4), (-1, 7, 2**31 - 1)]:
    check(
      BF16,
      *problem,
      sizes,
      offset if offset is None else jnp.array([offset]),
      by_lax=True,
    )


@pytest.mark.parametrize("by_lax", [False, True])
@pytest.mark.parametrize("dtypes", ["fbb", "bfb", "fff", "ffb"])
def test_gradients_are_as_wide_as_their_operands(dtypes, by_lax):
  """The gradients of float32 are not rounded on their way."""
  wide = {"f": jnp.float32, "b": jnp.bfloat16}
  dtypes = [wide[name] for name in dtypes]
  lhs, rhs, dout = operands(64, 32, 48, 3, dtypes)
  _, *gradients = run(
    BF16, lhs, rhs, dout, jnp.array([30, 0, 34]), by_lax=by_lax
  )
  for gradient, operand in zip(gradients, (lhs, rhs), strict=True):
    assert gradient.dtype == operand.dtype
    rounded = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    is_rounded = bool((rounded == gradient.astype(jnp.float32)).all())
    assert is_rounded == (operand.dtype == jnp.bfloat16)


@pytest.mark.parametrize(
  "recipe",
  [
    BF16,
    *(
      dataclasses.replace(BF16, **{product: "fp8"})
      for product in ("forward", "dgrad", "wgrad")
    ),
  ],
  ids=str,
)
@pytest.mark.parametrize("argument", [0, 1])
def test_second_order_gradients(recipe, argument):
  """Right, or refused."""
  lhs, rhs, _ = operands(11, 32, 48, 3)
  sizes = jnp.array([3, 0, 8])

  def second(dot):
    loss = lambda *args: jnp.sum(dot(*args) ** 3)
    first = jax.grad(loss, argument)
    return jax.grad(lambda *args: jnp.sum(first(*args) ** 2), argument)

  def dense(lhs, rhs):
    return jnp.einsum("mk,mkn->mn", lhs, rhs[jnp.repeat(jnp.arange(3), sizes)])

  run = second(functools.partial(ragged_dot, group_sizes=sizes, recipe=recipe))
  if recipe.quantizes:
    with pytest.raises(NotImplementedError, match="first-order gradients only"):
      run(lhs, rhs)
  else:
    expected = second(dense)(lhs, rhs)
    scale = jnp.max(jnp.abs(expected))
    np.testing.assert_allclose(run(lhs, rhs), expected, atol=1e-5 * scale)


# ---------------------------------------------------------------- NaN


POISONED = {
  "row of lhs": (0, np.s_[3]),
  "element of lhs": (0, np.s_[3, 7]),
  "row of dout": (2, np.s_[3]),
  "element of dout": (2, np.s_[3, 7]),
  "group's weights": (1, np.s_[2]),
  "element of the weights": (1, np.s_[0, 7, 9]),
  "empty group's weights": (1, np.s_[1]),
  "lhs past the sum": (0, np.s_[8:]),
  "dout past the sum": (2, np.s_[8:]),
}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
  "recipe, by_lax",
  [
    (FP8, False),
    (Recipe(gradient_dtype=E5M2), False),
    (BF16, False),
    (BF16, True),
  ],
)
def test_what_is_not_finite_stays_where_it_is(recipe, by_lax, value):
  """And is seen there: the float64 products are damaged in the same places."""
  for operand, index in POISONED.values():
    # jax.lax.ragged_dot multiplies the weights of all groups by zeros.
    if by_lax and operand == 1:
      continue
    problem = list(operands(11, 32, 48, 3))
    problem[operand] = problem[operand].at[index].set(value)
    check(recipe, *problem, (4, 0, 4), by_lax=by_lax)


# ---------------------------------------------------------------- gradients


def kept(recipe, lhs, rhs, sizes):
  """Returns shapes and dtypes of what is kept for the backward pass."""
  dot = functools.partial(ragged_dot, group_sizes=sizes, recipe=recipe)
  _, vjp = jax.vjp(dot, lhs, rhs)
  return jax.tree.leaves(vjp)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("forward", ["fp8", "bf16"])
def test_residuals(forward, dgrad, wgrad, dtype):
  """One copy of each operand, as its product needs it."""
  lhs, rhs, _ = operands(11, 32, 48, 3, [dtype] * 3)
  sizes = jnp.array([3, 0, 5])
  needed = (
    quantize(rhs, (1, 128, 128)) if dgrad == "fp8" else rhs,
    quantize_for_k_grouped(lhs, sizes) if wgrad == "fp8" else lhs,
    sizes,
  )
  # Weights are kept as bytes.
  as_bytes = lambda x: "uint8" if x.dtype == E4M3 else str(x.dtype)
  spec = lambda tree: sorted(
    (x.shape, as_bytes(x)) for x in jax.tree.leaves(tree)
  )
  recipe = Recipe(forward, dgrad, wgrad)
  assert spec(kept(recipe, lhs, rhs, sizes)) == spec(needed)


def test_residuals_take_a_byte_per_element():
  lhs, rhs, _ = operands(1024, 256, 512, 2, [jnp.bfloat16] * 3)
  residuals = kept(FP8, lhs, rhs, jnp.array([512, 512]))
  # A scale per 128 x 128 weights and per 128 tokens; groups padded by < 128.
  weights = rhs.size + 4 * rhs.size // 128**2
  tokens = (1024 + 2 * 127) * 256 * (1 + 4 / 128)
  assert sum(x.nbytes for x in residuals) <= weights + tokens + 2 * 4


@pytest.mark.parametrize("policy", ["everything", "nothing", "dots"])
def test_checkpoint_policies(policy):
  """What they keep comes back as it was, FP8 values above 240 included."""
  lhs, rhs, dout = operands(11, 32, 48, 3)

  def loss(lhs, rhs):
    return jnp.sum(dout * ragged_dot(lhs, rhs, jnp.array([3, 0, 5])))

  policy = getattr(jax.checkpoint_policies, f"{policy}_saveable")
  checkpointed = jax.checkpoint(loss, policy=policy)
  results = jax.jit(jax.grad(checkpointed, (0, 1)))(lhs, rhs)
  chex.assert_trees_all_equal(
    results, jax.jit(jax.grad(loss, (0, 1)))(lhs, rhs)
  )


@pytest.mark.parametrize("recipe", [FP8, BF16])
def test_gradient_of_one_operand(recipe):
  lhs, rhs, dout = operands(11, 32, 48, 3)
  sizes = jnp.array([3, 0, 5])
  out, *expected = run(recipe, lhs, rhs, dout, sizes)

  def loss(lhs, rhs, sizes):
    return jnp.sum(dout * ragged_dot(lhs, rhs, sizes, recipe=recipe))

  for argnum, gradient in enumerate(expected):
    value, result = jax.jit(jax.value_and_grad(loss, argnum))(lhs, rhs, sizes)
    np.testing.assert_array_equal(result, gradient)
    np.testing.assert_allclose(value, jnp.sum(dout * out), rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_quantised_outside(recipe):
  """The same bits; what the forward pass multiplies comes from there alone."""
  lhs, rhs, dout = operands()
  sizes = jnp.array(SIZES)
  scales = recipe.power_of_two_scales
  rows = quantize(lhs, (1, 128), power_of_two_scales=scales)
  step = functools.partial(run, recipe, rhs=rhs, dout=dout, sizes=sizes)
  if recipe.forward == "bf16":
    with pytest.raises(ValueError, match="forward is 'fp8'"):
      step(lhs, quantized_lhs=rows)
    return
  expected = step(lhs)
  chex.assert_trees_all_equal(step(lhs, quantized_lhs=rows), expected)
  # The floats enter the gradient of rhs, and nothing else.
  out, dlhs, drhs = step(2 * lhs, quantized_lhs=rows)
  chex.assert_trees_all_equal((out, dlhs), expected[:2])
  np.testing.assert_allclose(drhs, 2 * expected[2], rtol=1e-6)


def test_wrong_quantised_rows():
  lhs, rhs, _ = operands()
  rows = quantize(lhs, (1, 128))
  for error, message, wrong in (
    (TypeError, "ScaledArray", lhs),
    (ValueError, r"\(m, k\) = \(150, 160\)", quantize(lhs[:-1], (1, 128))),
    (ValueError, "blocks", quantize(lhs, (1, 64))),
    (ValueError, "blocks", rows.mT),
  ):
    with pytest.raises(error, match=message):
      ragged_dot(lhs, rhs, jnp.array(SIZES), quantized_lhs=wrong)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_quantised_outside(recipe):
  """The same bits; what the weights become in FP8 comes from there alone."""
  lhs, rhs, dout = operands()
  sizes = jnp.array(SIZES)
  weights = quantize_weights(
    rhs, power_of_two_scales=recipe.power_of_two_scales
  )
  if recipe == BF16:
    with pytest.raises(ValueError, match="forward or dgrad"):
      run(recipe, lhs, rhs, dout, sizes, quantized_rhs=weights)
    return
  expected = run(recipe, lhs, rhs, dout, sizes)
  # The floats do not enter: they only receive the gradient.
  poison = jnp.full_like(rhs, jnp.nan)
  results = run(recipe, lhs, poison, dout, sizes, quantized_rhs=weights)
  chex.assert_trees_all_equal(results, expected)


def test_weights_quantised_outside_are_not_quantised_again():
  lhs, rhs, dout = operands(32, 32, 48, 2, (jnp.bfloat16,) * 3)
  sizes = jnp.array([20, 9])
  step = functools.partial(run.__wrapped__, FP8, implementation="mosaic_gpu")
  trace = lambda weights: str(
    jax.make_jaxpr(step)(lhs, rhs, dout, sizes, quantized_rhs=weights)
  )
  kernel = "name=_quantize_weights"
  assert trace(None).count(kernel) == 1
  assert trace(quantize_weights(rhs)).count(kernel) == 0


def test_wrong_quantised_weights():
  lhs, rhs, _ = operands()
  weights = quantize_weights(rhs)
  e5m2 = quantize(rhs, (1, 128, 128), dtype=E5M2)
  rows = quantize(rhs, (1, 1, 128))
  for error, message, wrong in (
    (TypeError, "QuantizedWeights", weights.dgrad),
    (
      ValueError,
      r"forward must be \(g, n, k\)",
      weights._replace(forward=weights.dgrad),
    ),
    (
      ValueError,
      r"dgrad must be \(g, k, n\)",
      quantize_weights(rhs[:2])._replace(forward=weights.forward),
    ),
    (TypeError, "float8_e4m3fn", weights._replace(dgrad=e5m2)),
    (ValueError, "blocks", weights._replace(dgrad=rows)),
  ):
    with pytest.raises(error, match=message):
      ragged_dot(lhs, rhs, jnp.array(SIZES), quantized_rhs=wrong)


def test_recipe():
  assert Recipe("bf16", "bf16", "bf16") == Recipe.bf16()
  assert hash(Recipe(gradient_dtype="float8_e5m2")) == hash(
    Recipe(gradient_dtype=E5M2)
  )
  with pytest.raises(AttributeError):
    Recipe().forward = "bf16"

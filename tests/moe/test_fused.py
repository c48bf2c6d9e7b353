"""The fused MLP and layer against the unfused ones, kernels interpreted."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import compile_for_hopper

from jax_grouped_gemm import Recipe, moe, quantize, quantize_weights
from jax_grouped_gemm.kernels import (
  _tile_loop,
  activation_backward,
  copy_rows,
)
from jax_grouped_gemm.kernels import quantize as quantize_rows
from jax_grouped_gemm.kernels.unquantized import Unquantized
from jax_grouped_gemm.moe import fused
from jax_grouped_gemm.quantized_weights import QUANTIZED_WEIGHTS

T, D, F, E, K = 24, 32, 48, 3, 2
BF16 = jnp.bfloat16
RNG = np.random.default_rng(0)
interpreted = lambda test: pytest.mark.slow(
  pytest.mark.usefixtures("small")(test)
)


def normal(*shape, scale=1.0):
  return jnp.asarray(RNG.standard_normal(shape) * scale, BF16)


X, DOUT = normal(T, D), normal(T * K, D)
WEIGHTS = normal(E, D, 2 * F, scale=0.5), normal(E, F, D, scale=0.2)
BIASES = normal(E, 2 * F), normal(E, D)
# Expert 1 has no token, and four copies go to nobody.
EXPERTS = jnp.asarray(RNG.choice([0, 2], (T, K))).at[3:5].set(E)
PERMUTATION = moe.sort_by_expert(EXPERTS, E)


@pytest.fixture
def small(monkeypatch):
  """What fuses is interpreted, by one warpgroup; the rest is XLA's.

  It has tests of its own, and the interpreter takes seconds for each kernel.
  """

  def by_xla(fn):
    return lambda *args, **kw: fn(*args, **{**kw, "implementation": "xla"})

  names = ("m_grouped_gemm", "k_grouped_gemm", "quantize", "quantize_weights")
  names += ("quantize_for_k_grouped", "quantize_rows_and_tokens")
  for module in (fused, sys.modules["jax_grouped_gemm.ragged_dot"]):
    for name in names:
      if hasattr(module, name):
        monkeypatch.setattr(module, name, by_xla(getattr(module, name)))
  monkeypatch.setattr(Unquantized, "_choose", lambda *_: "xla")
  monkeypatch.setattr(_tile_loop, "num_sms", lambda: 1)
  for kernel in (activation_backward, copy_rows, quantize_rows):
    monkeypatch.setattr(kernel, "_WGS", 1)


def mlp(
  x,
  gate_up,
  down,
  gate_up_bias=None,
  down_bias=None,
  permutation=PERMUTATION,
  **kwargs,
):
  kwargs = {"fuse": True, **kwargs}
  kwargs.setdefault("implementation", "interpret" if kwargs["fuse"] else "xla")
  return moe.grouped_mlp(
    x,
    gate_up,
    down,
    PERMUTATION.group_sizes,
    gate_up_bias=gate_up_bias,
    down_bias=down_bias,
    permutation=permutation,
    **kwargs,
  )


def equal(got, want):
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(np.float32(x), np.float32(y)),
    got,
    want,
  )


def near(got, want):
  """Where roundings to bfloat16 differ, now and then, and then FP8's too."""
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    x, y = np.float64(x), np.float64(y)
    assert np.linalg.norm(x - y) <= 2**-8 * np.linalg.norm(y)


def with_gradients(run, *args):
  out, vjp = jax.vjp(jax.jit(run), *args)
  return out, vjp(DOUT[: len(out)].astype(out.dtype))


# ---------------------------------------------------------------- the MLP


@interpreted
@pytest.mark.parametrize(
  "recipe, activation, biases",
  [
    (Recipe(), "swiglu", ()),
    (Recipe(), "geglu", BIASES),
    (Recipe(), "swiglu_clamped", BIASES),
    (Recipe(wgrad="bf16"), "swiglu", ()),
    (Recipe(dgrad="bf16"), "swiglu", BIASES),
    (
      Recipe(gradient_dtype=jnp.float8_e5m2, power_of_two_scales=True),
      "swiglu",
      (),
    ),
  ],
  ids=["fp8", "geglu", "clamped", "bf16 wgrad", "bf16 dgrad", "e5m2"],
)
def test_is_the_unfused_mlp(recipe, activation, biases, rounded_once):
  run = functools.partial(mlp, recipe=recipe, activation=activation)
  args = X, *WEIGHTS, *biases
  got = with_gradients(run, *args)
  unfused = with_gradients(functools.partial(run, fuse=False), *args)
  assert len(got[1]) == len(args)
  (equal if activation == "swiglu" else near)(got, unfused)
  equal(got[0][int(PERMUTATION.group_sizes.sum()) :], 0)


@interpreted
@pytest.mark.parametrize("biases", [(), BIASES], ids=["", "biases"])
def test_without_a_permutation(biases, rounded_once):
  """x is sorted already: only the activation is fused, and biases."""
  rows, permutation = moe.dispatch(X, EXPERTS, E)
  equal(permutation, PERMUTATION)
  run = functools.partial(mlp, permutation=None)
  args = rows, *WEIGHTS, *biases
  got = with_gradients(run, *args)
  equal(got, with_gradients(functools.partial(run, fuse=False), *args))
  equal(got[0], jax.jit(mlp)(X, *WEIGHTS, *biases))
  # Quantised already, too, which is read instead.
  quantized = functools.partial(run, quantized_x=quantize(rows, (1, 128)))
  equal(jax.jit(quantized)(0 * rows, *args[1:]), got[0])
  equal(with_gradients(quantized, *args), got)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.bf16()])
def test_permutation_of_the_unfused_mlp(recipe):
  """Runs anywhere: what dispatch and then the MLP give."""
  run = functools.partial(mlp, implementation=None, fuse=None, recipe=recipe)

  def two_steps(x, *weights):
    rows, _ = moe.dispatch(x, EXPERTS, E)
    return run(rows, *weights, permutation=None)

  equal(*(with_gradients(f, X, *WEIGHTS) for f in (run, two_steps)))


@interpreted
def test_serving():
  scaled = [quantize(w.mT, (1, 128, 128)) for w in WEIGHTS]
  out = jax.jit(mlp)(X, *scaled, *BIASES)
  equal(out, jax.jit(functools.partial(mlp, fuse=False))(X, *scaled, *BIASES))
  equal(out, jax.jit(mlp)(X, *WEIGHTS, *BIASES))
  by_default = functools.partial(mlp, fuse=None, implementation="interpret")
  equal(out, jax.jit(by_default)(X, *WEIGHTS, *BIASES))
  with pytest.raises(NotImplementedError, match="have no gradient"):
    jax.grad(lambda x: mlp(x, *scaled).sum())(X)


@interpreted
def test_nan_stays_with_its_token():
  x = X.at[7, 3].set(jnp.nan).at[9].set(jnp.inf)
  (out, (dx, *_)), (clean, _) = (
    with_gradients(mlp, x, *WEIGHTS) for x in (x, X)
  )
  bad = np.isin(PERMUTATION.order // K, [7, 9])
  bad &= np.arange(T * K) < int(PERMUTATION.group_sizes.sum())
  np.testing.assert_array_equal(~np.isfinite(out).all(axis=1), bad)
  equal(out[~bad], clean[~bad])
  damaged = ~np.isfinite(dx).all(axis=1)
  np.testing.assert_array_equal(damaged, np.isin(np.arange(T), [7, 9]))


def test_residuals():
  """Beside the arguments: gate/up, and the weights in FP8, once."""
  t, d, f, e = 512, 256, 384, 2
  args = normal(t, d), normal(e, d, 2 * f), normal(e, f, d)
  permutation = moe.sort_by_expert(jnp.arange(t * K).reshape(t, K) % e, e)

  def kept(recipe):
    run = lambda *args: moe.grouped_mlp(
      *args,
      permutation.group_sizes,
      permutation=permutation,
      recipe=recipe,
      fuse=True,
      implementation="mosaic_gpu",
    )
    # Traced only: the kernels need no GPU for that.
    residuals = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *args)
    return sum(
      x.size * x.dtype.itemsize
      for x in jax.tree.leaves(residuals)
      if x.dtype != jnp.int32
    )

  weights = e * 3 * f * d * (1 + 4 / 128**2)
  expected = 2 * t * d + 2 * t * K * 2 * f + weights
  assert kept(Recipe()) == expected
  assert kept(Recipe(dgrad="bf16")) == expected + 2 * e * 3 * f * d


# ---------------------------------------------------------------- transforms


@interpreted
def test_vmap():
  x = normal(2, T, D)
  experts = jnp.stack([EXPERTS, (EXPERTS + 1) % (E + 1)])

  def run(x, experts, fuse=True):
    permutation = moe.sort_by_expert(experts, E)
    return moe.grouped_mlp(
      x,
      *WEIGHTS,
      permutation.group_sizes,
      permutation=permutation,
      fuse=fuse,
      implementation="interpret" if fuse else "xla",
    )

  out = jax.vmap(run)(x, experts)
  near(out, jnp.stack([run(x[i], experts[i], False) for i in range(2)]))


@pytest.fixture
def fused_by_xla(monkeypatch):
  """For what cannot be interpreted: the fused form, computed by XLA."""
  module = sys.modules["jax_grouped_gemm.moe.grouped_mlp"]
  monkeypatch.setattr(module, "choose_fusion", lambda fuse, *_: fuse)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(dgrad="bf16")], ids=str)
def test_checkpoint_and_scan(fused_by_xla, rounded_once, recipe):
  """Two layers, all of it computed once more but the weights' copies."""
  params = *WEIGHTS, *BIASES
  layers = jax.tree.map(lambda w: jnp.stack([w, w * 0.5]), params)
  policy = jax.checkpoint_policies.save_only_these_names(QUANTIZED_WEIGHTS)

  def loss(x, layers, fuse, checkpoint):
    def step(x, weights):
      rows = mlp(x, *weights, fuse=fuse, recipe=recipe, implementation="xla")
      return moe.combine(rows, jnp.ones((T, K), BF16), PERMUTATION), None

    step = jax.checkpoint(step, policy=policy) if checkpoint else step
    return jax.lax.scan(step, x, layers)[0].astype(jnp.float32).sum()

  grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=(2, 3))
  unfused = grad(X, layers, False, False)
  for checkpoint in (False, True):
    near(grad(X, layers, True, checkpoint), unfused)


def test_weights_quantised_once(fused_by_xla):
  quantized = tuple(map(quantize_weights, WEIGHTS))
  run = functools.partial(mlp, implementation="xla")
  expected = with_gradients(run, X, *WEIGHTS)
  run = functools.partial(run, quantized_weights=quantized)
  equal(with_gradients(run, X, *(0 * w for w in WEIGHTS)), expected)


def test_shard_map(fused_by_xla, rounded_once):
  """Tokens over devices, weights on all: their gradient is a sum."""
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

  def run(fuse):
    def out(x, experts, weights, biases):
      permutation = moe.sort_by_expert(experts, E)
      rows = moe.grouped_mlp(
        x,
        *weights,
        permutation.group_sizes,
        gate_up_bias=biases[0],
        down_bias=biases[1],
        permutation=permutation,
        fuse=fuse,
      )
      return moe.combine(rows, jnp.ones(experts.shape, BF16), permutation)

    sharded = jax.shard_map(
      out,
      mesh=mesh,
      in_specs=(jax.P("d"), jax.P("d"), jax.P(), jax.P()),
      out_specs=jax.P("d"),
    )
    loss = lambda x, *params: (
      (sharded(x, EXPERTS, *params) * DOUT[:T]).astype(jnp.float32).sum()
    )
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(X, WEIGHTS, BIASES)

  near(run(True), run(False))


def test_shard_map_lowers_for_hopper():
  """Tokens over devices, weights on all: their gradient is summed."""
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

  def loss(x, weights):
    permutation = moe.sort_by_expert(EXPERTS[: T // 2], E)
    out = moe.grouped_mlp(
      x,
      *weights,
      permutation.group_sizes,
      permutation=permutation,
      fuse=True,
      implementation="mosaic_gpu",
    )
    return jax.lax.psum(out.astype(jnp.float32).sum(), "d")

  sharded = jax.shard_map(
    loss, mesh=mesh, in_specs=(jax.P("d"), jax.P()), out_specs=jax.P()
  )
  grad = jax.jit(jax.grad(sharded, (0, 1)))
  shapes = jax.eval_shape(grad, X, WEIGHTS)
  assert jax.tree.map(jnp.shape, shapes) == (
    X.shape,
    (*map(jnp.shape, WEIGHTS),),
  )
  text = grad.trace(X, WEIGHTS).lower(lowering_platforms=("cuda",)).as_text()
  assert "copy_rows_sm90" in text and "swiglu_backward_sm90" in text


# ---------------------------------------------------------------- the layer


def layer(x, params, **kwargs):
  return moe.moe_layer(x, params, K, **kwargs).out


@interpreted
def test_layer():
  """None means the fused form, as the kernels compute."""
  params = moe.MoeParams(normal(D, E), *WEIGHTS)
  params = params._replace(gate_up_bias=BIASES[0], down_bias=BIASES[1])
  forms = dict(implementation="interpret"), dict(implementation="xla")
  got, unfused = (
    with_gradients(functools.partial(layer, **form), X, params)
    for form in forms
  )
  equal(got, unfused)


def kernels_of(fn, *args):
  """How often each kernel is launched, compiled for an H100."""
  names = re.findall(
    r'custom_call_target="mosaic_gpu_v2".*?op_name="[^"]*/(\w+)_sm90/',
    compile_for_hopper(fn, *args).as_text(),
  )
  return {name: names.count(name) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("is_scaled", [False, True])
def test_kernels_add_the_biases(is_scaled):
  """Nothing else reads the products to write them once more."""
  e, d, f = 4, 128, 192
  shape = jax.ShapeDtypeStruct
  params = moe.MoeParams(
    shape((d, e), BF16),
    shape((e, d, 2 * f), BF16),
    shape((e, f, d), BF16),
    gate_up_bias=shape((e, 2 * f), BF16),
    down_bias=shape((e, d), BF16),
  )

  def run(x, params):
    if is_scaled:
      weights = (params.gate_up.mT, params.down.mT)
      weights = [quantize(w, (1, 128, 128)) for w in weights]
      params = params._replace(gate_up=weights[0], down=weights[1])
    return layer(x, params, implementation="mosaic_gpu")

  text = compile_for_hopper(run, shape((256, d), BF16), params).as_text()
  made = re.findall(rf"= bf16\[{256 * K},{2 * f}\]\S* (\S+)\(", text)
  assert set(made) <= {"custom-call", "get-tuple-element", "bitcast"}, made


@pytest.mark.slow
def test_kernels_of_the_layer():
  """Nothing is multiplied twice, and no copy is quantised on its own.

  By default no more than that in a forward pass; with a backward pass what is
  quantised for both is read once, the activation by XLA.
  """
  x = jax.ShapeDtypeStruct((256, 128), BF16)
  params = moe.MoeParams(
    *(
      jax.ShapeDtypeStruct(shape, BF16)
      for shape in [(128, 4), (4, 128, 256), (4, 128, 128)]
    )
  )
  run = functools.partial(layer, fuse=True, implementation="mosaic_gpu")
  loss = lambda *args: run(*args).astype(jnp.float32).sum()
  by_default = functools.partial(run, fuse=None)
  assert kernels_of(by_default, x, params) == {
    "quantize_weights": 2,
    "quantize_rows": 1,  # Of tokens.
    "copy_rows": 1,
    "quantize_swiglu": 1,
    "m_grouped_gemm": 2,
  }
  default_loss = lambda *args: by_default(*args).astype(jnp.float32).sum()
  assert kernels_of(jax.value_and_grad(default_loss, (0, 1)), x, params) == {
    "quantize_weights": 2,
    "copy_rows": 1,
    "m_grouped_gemm": 4,
    "quantize_rows_and_tokens": 4,  # Of both operands and their gradients.
    "k_grouped_gemm": 2,
  }
  assert kernels_of(jax.value_and_grad(loss, (0, 1)), x, params) == {
    "quantize_weights": 2,
    "quantize_rows": 1,
    "copy_rows": 2,  # In FP8, and for the gradient of the weights.
    "quantize_swiglu": 1,
    "m_grouped_gemm": 4,
    "quantize_rows_and_tokens": 2,  # Of gradients.
    "quantize_tokens": 2,
    "swiglu_backward": 1,
    "k_grouped_gemm": 2,
  }


# ---------------------------------------------------------------- the choice


def test_none_fuses_where_the_kernels_compute():
  def chosen(x=X, f=F, is_scaled=False, recipe=None, implementation=None):
    return fused.choose_fusion(
      None, x, f, is_scaled, recipe or Recipe(), implementation
    )

  for implementation in ("interpret", "mosaic_gpu"):
    pick = functools.partial(chosen, implementation=implementation)
    assert pick()
    assert pick(is_scaled=True, recipe=Recipe.bf16())
    assert not pick(recipe=Recipe.bf16())
    assert not pick(recipe=Recipe(forward="bf16"))
    assert not pick(x=X.astype(jnp.float32))
    assert not pick(f=40)
    assert not pick(x=X[:, 1:])
  # On this device.
  assert not chosen() and not chosen(implementation="xla")


@pytest.mark.parametrize(
  "kwargs, error, message",
  [
    (dict(fuse=0), TypeError, "fuse must be .* got 0"),
    (
      dict(implementation=None),
      NotImplementedError,
      "implementation=None, which on this device",
    ),
    (
      dict(implementation="xla"),
      NotImplementedError,
      "needs the kernels, got implementation='xla'",
    ),
    (
      dict(recipe=Recipe(forward="bf16")),
      NotImplementedError,
      "FP8 products in the forward pass, got .*forward='bf16'",
    ),
    (dict(recipe="fp8"), TypeError, "must be a Recipe, got 'fp8'"),
    (
      dict(permutation=PERMUTATION._replace(order=PERMUTATION.order[1:])),
      ValueError,
      r"t = 24 as x, got \(24, 2\) and \(47,\)",
    ),
  ],
)
def test_errors(kwargs, error, message):
  with pytest.raises(error, match=message):
    mlp(X, *WEIGHTS, **kwargs)


def test_operands_that_cannot_be_fused():
  with pytest.raises(NotImplementedError, match="x of bfloat16, got float32"):
    mlp(X.astype(jnp.float32), *WEIGHTS)
  with pytest.raises(NotImplementedError, match="f to be a mul.* got f=24"):
    mlp(X, WEIGHTS[0][..., :F], WEIGHTS[1][:, : F // 2])

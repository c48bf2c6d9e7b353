"""Fused quantisation and the fused layer on a Hopper GPU: pytest -m gpu.

What they must give is computed on the CPU, to the bit where there is no
exponential function, which is the hardware's own on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_gpu_quantize import bits, check, hostile

from jax_grouped_gemm import Recipe, ScaledArray, moe, quantize
from jax_grouped_gemm.fused_quantization import (
  ACTIVATIONS,
  activation_gradient,
  quantize_activation,
)
from jax_grouped_gemm.kernels import copy_rows
from jax_grouped_gemm.moe.prologue import Dispatched
from jax_grouped_gemm.scaled_array import expand_scales

pytestmark = pytest.mark.gpu

BF16, F32 = jnp.bfloat16, jnp.float32
E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
powers = pytest.mark.parametrize("power_of_two", [False, True])
dtypes = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
SHAPES = [(1, 16), (7, 128), (9, 144), (5003, 2880), (16384, 4096)]


def gates(m, f):
  """Gate and up: ordinary rows, and of all magnitudes, NaN and Inf."""
  x = 3 * oracle.random_floats((m, 2 * f))
  if m > 100:
    x[: m // 2] = hostile(m // 2, 2 * f)
  return jnp.asarray(x).astype(BF16)


def run(fn, *args):
  """Returns what the kernel and what the CPU give."""
  out = jax.jit(functools.partial(fn, implementation="mosaic_gpu"))(*args)
  args = jax.device_put(args, jax.devices("cpu")[0])
  expected = jax.jit(functools.partial(fn, implementation="xla"))(*args)
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  return out, expected


def check_near(out, expected, relative, absolute):
  """Asserts that NaN and Inf are where they should be, the rest nearly right.

  And that hardly anything differs at all.
  """
  x, y = np.float64(out), np.float64(expected)
  finite = np.isfinite(y)
  np.testing.assert_array_equal(x[~finite], y[~finite])
  y = np.where(finite, y, 0)
  error = np.abs(np.where(finite, x, 0) - y)
  wrong = np.argwhere(~(error <= relative * np.abs(y) + absolute))
  assert not wrong.size, (x.shape, len(wrong), wrong[:4])
  # Of small arrays one element may be more than that share.
  assert (bits(out) != bits(expected)).sum() <= 1 + 0.01 * x.size


def check_scaled(out: ScaledArray, expected: ScaledArray):
  """At most a step of FP8 off, and padding is zero."""
  assert not np.float32(out.values)[out.shape[0] :].any()
  assert not np.float32(out.values)[:, out.shape[1] :].any()
  # A step of values and of subnormal ones.
  relative, least = {E4M3: (2**-3, 2**-9), E5M2: (2**-2, 2**-16)}[out.dtype]
  scales = expand_scales(expected.scales, expected.block_shape, out.shape)
  check_near(out.dequantize(), expected.dequantize(), relative, least * scales)


def check_scales(out, expected):
  """Those of a row's largest number: a step of bfloat16, or to a power of 2."""
  ratio = np.asarray(out.scales) / np.asarray(expected.scales)
  assert ((ratio >= 0.5) & (ratio <= 2)).all()
  assert (np.abs(ratio - 1) > 2.0**-7).mean() <= 0.01


@activations
@dtypes
@powers
def test_activation(activation, dtype, power_of_two):
  fn = functools.partial(
    quantize_activation,
    activation=activation,
    dtype=dtype,
    power_of_two_scales=power_of_two,
  )
  out, expected = run(fn, gates(5003, 2880))
  check_scales(out, expected)
  if not power_of_two:  # Else a scale may be twice the other.
    check_scaled(out, expected)


@pytest.mark.parametrize("m, f", SHAPES)
def test_shapes_of_activation(m, f):
  fn = functools.partial(quantize_activation, activation="swiglu")
  out, expected = run(fn, gates(m, f))
  check_scales(out, expected)
  check_scaled(out, expected)


@activations
@pytest.mark.parametrize("m, f", SHAPES)
def test_gradient(activation, m, f):
  gate_up = 3 * jnp.asarray(oracle.random_floats((m, 2 * f))).astype(BF16)
  dout = jnp.asarray(oracle.random_floats((m, f))).astype(BF16)
  dout = dout.at[-1, 3].set(jnp.nan)
  out, expected = run(
    lambda x, dout, implementation: activation_gradient(
      x, dout, activation, implementation=implementation
    ),
    gate_up,
    dout,
  )
  assert np.isnan(np.float32(expected)).any()
  # Sums of float32 products of up to 100 or so, which may cancel.
  check_near(out, expected, 2**-7, 1e-4)


@powers
@dtypes
@pytest.mark.parametrize("x_dtype", [BF16, F32])
@pytest.mark.parametrize(
  "t, k, top_k", [(1, 16, 1), (3, 128, 9), (300, 400, 3), (4096, 7168, 8)]
)
def test_copies(t, k, top_k, x_dtype, dtype, power_of_two):
  x = jnp.asarray(hostile(t, k)).astype(x_dtype)
  experts = np.random.default_rng(0).integers(0, 17, (t, top_k))
  permutation = moe.sort_by_expert(experts, 16)  # Some go to nobody.
  static = dict(dtype=dtype, power_of_two_scales=power_of_two)
  quantize = functools.partial(Dispatched().quantize, index=permutation)
  check(lambda x, **kw: quantize(x, **static, **kw), x)


@pytest.mark.parametrize("dtype", [jnp.uint8, BF16, F32])
@pytest.mark.parametrize("t, k, copies", [(5, 720, 3), (16384, 4096, 4)])
def test_copies_that_go_nowhere(t, k, copies, dtype):
  """Nothing is written for them; other rows are theirs."""
  x = jnp.asarray(np.random.default_rng(0).integers(0, 200, (t, k)), dtype)
  m = t * copies // 2
  places = np.random.default_rng(1).permutation(t * copies)
  rows = np.where(places < m, places, m + places % 2).astype(np.int32)
  out = copy_rows.copy_rows(x, rows.reshape(t, copies), m)
  source = np.argsort(places)[:m] // copies
  assert bool((out == x[source]).all())


# ---------------------------------------------------------------- the layer

T, D, F, E, K = 2048, 1024, 768, 16, 4


def normal(*shape, scale=1.0):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.standard_normal(shape) * scale, BF16)


PARAMS = moe.MoeParams(
  router=normal(D, E, scale=D**-0.5),
  gate_up=normal(E, D, 2 * F, scale=D**-0.5),
  down=normal(E, F, D, scale=F**-0.5),
  gate_up_bias=normal(E, 2 * F, scale=0.1),
  down_bias=normal(E, D, scale=0.1),
)


@activations
@pytest.mark.parametrize(
  "recipe",
  [Recipe(), Recipe(wgrad="bf16"), Recipe(gradient_dtype=E5M2)],
  ids=["fp8", "bf16 wgrad", "e5m2"],
)
def test_layer_and_its_gradients(recipe, activation, rounded_once):
  """As of the unfused layer, but for a step of FP8 here and there."""

  @functools.partial(jax.jit, static_argnames="fuse")
  def layer(x, params, fuse):
    run = lambda x, params: moe.moe_layer(
      x, params, K, recipe=recipe, activation=activation, fuse=fuse
    )
    out, vjp = jax.vjp(lambda *args: run(*args).out, x, params)
    return out, *vjp(x)

  x = normal(T, D)
  got, want = (layer(x, PARAMS, fuse) for fuse in (True, False))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.float64(a), np.float64(b)
    assert np.linalg.norm(a - b) <= 2**-7 * np.linalg.norm(b)


@activations
@pytest.mark.parametrize("tokens", [5, T])
def test_forward_pass_with_biases(tokens, activation, rounded_once):
  """By default fused where nothing is differentiated, few tokens or many."""
  layer = jax.jit(
    lambda x, params, fuse: (
      moe.moe_layer(x, params, K, activation=activation, fuse=fuse).out
    ),
    static_argnums=2,
  )
  x = normal(T, D)[:tokens]
  params = PARAMS._replace(  # As large as the products.
    gate_up_bias=normal(E, 2 * F), down_bias=normal(E, D)
  )
  got, want = (np.float64(layer(x, params, fuse)) for fuse in (None, False))
  assert np.linalg.norm(got - want) <= 2**-7 * np.linalg.norm(want)
  without = np.float64(layer(x, params._replace(down_bias=None), None))
  assert np.linalg.norm(got - without) >= 2**-2 * np.linalg.norm(want)


def test_serving():
  params = PARAMS._replace(
    gate_up=quantize(PARAMS.gate_up.mT, (1, 128, 128)),
    down=quantize(PARAMS.down.mT, (1, 128, 128)),
  )
  layer = jax.jit(
    lambda x, params, fuse: moe.moe_layer(x, params, K, fuse=fuse).out,
    static_argnums=2,
  )
  x = normal(T, D)
  for tokens in (x, x[:5]):
    got, want = (np.float64(layer(tokens, params, f)) for f in (True, False))
    assert np.linalg.norm(got - want) <= 2**-7 * np.linalg.norm(want)
  bad = np.asarray(layer(x.at[77, 3].set(jnp.nan), params, True))
  np.testing.assert_array_equal(np.isnan(bad).any(axis=1), np.arange(T) == 77)

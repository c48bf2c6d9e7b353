"""The quantisation kernels on a Hopper GPU: pytest -m gpu.

What they must give is computed on the CPU: on a GPU XLA's division is not to
the nearest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_grouped_gemm import (
  m_grouped_gemm,
  quantize,
  quantize_for_k_grouped,
  quantize_weights,
)
from jax_grouped_gemm.token_quantization import quantize_rows_and_tokens

pytestmark = pytest.mark.gpu

BF16, F32 = jnp.bfloat16, jnp.float32
E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
powers = pytest.mark.parametrize("power_of_two", [False, True])


def hostile(*shape):
  """Rows of all magnitudes, ties, -0, tiny numbers, NaN and Inf."""
  x = oracle.random_floats(shape)
  rows = x.reshape(-1, shape[-1])
  ties = (8 + np.arange(shape[-1]) % 8 + 0.5) * np.exp2(
    np.arange(shape[-1]) % 24 - 17
  )
  for i, amax in enumerate([1e-45, 9e-5, 1e-4, 1.0, 448.0, 57344.0, 3e38]):
    row = np.minimum(ties, 448) / 448 * amax
    row[0], row[1::9] = amax, -0.0
    rows[(5 * i + 3) % len(rows)] = row
  rows[len(rows) // 2, ::7] = np.nan
  rows[len(rows) // 3, 1::5] = np.inf
  rows[len(rows) // 4, 2::5] = -np.inf
  return x


def bits(x):
  """Bits of FP8 and float32 numbers; those of every NaN are the same."""
  x = np.asarray(x)
  return np.where(
    np.isnan(x.astype(np.float32)), -1, x.view(f"i{x.dtype.itemsize}")
  )


def check(fn, x):
  """Asserts that the kernel gives what the CPU does, to the bit."""
  jnp.full((x.size,), jnp.nan, BF16).block_until_ready().delete()
  out = jax.jit(functools.partial(fn, implementation="mosaic_gpu"))(x)
  x = jax.device_put(x, jax.devices("cpu")[0])
  expected = jax.jit(functools.partial(fn, implementation="xla"))(x)
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  leaves = zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True)
  for leaf, right in leaves:
    wrong = np.argwhere(bits(leaf) != bits(right))
    assert not wrong.size, (leaf.shape, len(wrong), wrong[:4])


@powers
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("x_dtype", [BF16, F32])
def test_rows(x_dtype, dtype, power_of_two):
  x = jnp.asarray(hostile(5003, 2880)).astype(x_dtype)
  fn = functools.partial(
    quantize,
    block_shape=(1, 128),
    dtype=dtype,
    power_of_two_scales=power_of_two,
  )
  check(fn, x)


@pytest.mark.parametrize("x_dtype", [BF16, F32])
@pytest.mark.parametrize(
  "shape", [(1, 16), (7, 128), (8, 144), (100, 7168), (33, 77, 400)]
)
def test_shapes_of_rows(shape, x_dtype):
  x = jnp.asarray(hostile(*shape)).astype(x_dtype)
  blocks = (*(1 for _ in shape[1:]), 128)
  check(functools.partial(quantize, block_shape=blocks), x)


@pytest.mark.parametrize("shape", [(32768, 7168), (65536, 2048)])
def test_large_rows(shape):
  x = jax.random.normal(jax.random.key(0), shape, BF16)
  check(functools.partial(quantize, block_shape=(1, 128)), x)


@powers
@pytest.mark.parametrize(
  "shape", [(1, 16, 16), (3, 144, 80), (2, 400, 2880), (5, 1024, 768)]
)
def test_weights(shape, power_of_two):
  w = jnp.asarray(hostile(*shape)).astype(BF16)
  check(
    functools.partial(quantize_weights, power_of_two_scales=power_of_two), w
  )


TOKEN_SIZES = np.array([0, 1, 127, 128, 129, 0, 3001, 5])


def tokens_of_groups(f):
  """(5003, f), rows of no group NaN."""
  x = hostile(5003, f)
  x[4000:] = np.nan
  return jnp.asarray(x).astype(BF16)


@powers
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("f", [16, 144, 2880])
def test_tokens(f, dtype, power_of_two):
  check(
    functools.partial(
      quantize_for_k_grouped,
      group_sizes=TOKEN_SIZES,
      dtype=dtype,
      power_of_two_scales=power_of_two,
    ),
    tokens_of_groups(f),
  )


@powers
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("f", [16, 144, 2880])
def test_rows_and_tokens(f, dtype, power_of_two):
  def fn(x, implementation):
    rows, tokens = quantize_rows_and_tokens(
      x,
      TOKEN_SIZES,
      dtype=dtype,
      power_of_two_scales=power_of_two,
      implementation=implementation,
    )
    # Rows of no group are unspecified.
    m = sum(TOKEN_SIZES)
    return rows.values[:m], rows.scales[:m], tokens

  check(fn, tokens_of_groups(f))


def test_gemm_of_what_the_kernels_quantise():
  """In one jit, so that XLA cancels the transpositions of the scales."""
  sizes, n, k = (0, 1, 127, 300, 129), 1152, 2880
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((sum(sizes), k), np.float32), BF16)
  w = jnp.asarray(rng.standard_normal((len(sizes), k, n), np.float32), BF16)

  @jax.jit
  def run(x, w):
    quantized = functools.partial(quantize, implementation="mosaic_gpu")
    lhs = quantized(x, (1, 128))
    rhs = quantize_weights(w, implementation="mosaic_gpu").forward
    out = m_grouped_gemm(
      lhs, rhs, jnp.array(sizes), implementation="mosaic_gpu"
    )
    return out, lhs, rhs

  oracle.check_m_grouped(*run(x, w), sizes, row_error=4e-3)

"""m_grouped_gemm against the oracle."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jax_grouped_gemm import (
  Config,
  ScaledArray,
  SmallGroupsConfig,
  m_grouped_gemm,
  quantize,
)

BIG, SMALL = 2**31 - 1, -(2**31)
F32 = jnp.float32


@pytest.fixture
def gemm_options(implementation):
  """An implementation, and few and small tiles to interpret."""
  config = Config(tile_n=64, cluster=1, num_stages=2, num_sms=2)
  return {"implementation": implementation, "config": config}


def make(m, n, k, g):
  """Returns lhs and rhs, whose scales differ from block to block."""
  lhs = quantize(oracle.random_floats((m, k), seed=1), (1, 128))
  rhs = oracle.random_floats((g, n, k), seed=2)
  return lhs, quantize(rhs, (1, 128, 128))


def run(lhs, rhs, sizes, **options):
  """Returns m_grouped_gemm's result, checked."""
  sizes = jnp.array(sizes, jnp.int32)
  out = m_grouped_gemm(lhs, rhs, sizes, **options)
  dtype = options.get("preferred_element_type", jnp.bfloat16)
  assert out.dtype == dtype
  oracle.check_m_grouped(
    out, lhs, rhs, sizes, options.get("group_offset"), bias=options.get("bias")
  )
  return np.asarray(out)


@pytest.mark.parametrize(
  "n, k, dtype",
  [
    (16, 128, jnp.bfloat16),
    (48, 16, F32),
    (64, 80, jnp.bfloat16),
    (144, 400, F32),
    (272, 256, jnp.bfloat16),
  ],
)
def test_ragged(gemm_options, n, k, dtype):
  run(
    *make(45, n, k, 4),
    [21, 0, 7, 12],
    preferred_element_type=dtype,
    **gemm_options,
  )


@pytest.mark.parametrize("g", [1, 2, 3, 4])
def test_every_pattern_of_empty_groups(gemm_options, g):
  operands = make(13, 16, 16, g)
  for sizes in itertools.product([0, 3], repeat=g):
    out = run(*operands, sizes, **gemm_options)
    assert not out[sum(sizes) :].any()


@pytest.mark.parametrize(
  "sizes",
  [
    [1, 1, 1, 1, 1, 1],
    [0, 0, 150, 0, 0, 0],
    [150, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [0, 127, 1, 0, 3, 5],
    [129, 3, 5, 0, 0, 13],
    [4, BIG, BIG, BIG, 4, 0],
    [-7, 20, SMALL, 1, 1, -1],
    [SMALL, BIG, SMALL, BIG, 0, 1],
  ],
)
def test_sizes(gemm_options, sizes):
  run(*make(150, 32, 144, 6), sizes, **gemm_options)


@pytest.mark.parametrize("m", [1, 9])
def test_few_rows(gemm_options, m):
  run(*make(m, 16, 16, 2), [0, m], **gemm_options)


def test_several_tiles_of_a_group(gemm_options):
  run(*make(300, 16, 128, 2), [3, 290], **gemm_options)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_sizes_of_any_integers(gemm_options, dtype):
  operands, sizes = make(30, 16, 16, 2), [3, 20]
  expected = run(*operands, sizes, **gemm_options)
  out = m_grouped_gemm(*operands, jnp.array(sizes, dtype), **gemm_options)
  np.testing.assert_array_equal(out, expected)


def test_group_offset(gemm_options):
  """Rows of groups that rhs does not hold are zeros."""
  operands, sizes = make(30, 16, 16, 2), [3, 5, 0, 9, 6]
  for offset in [-1, 0, 1, 3, 4, 5, SMALL, BIG]:
    offset = jnp.array([offset], jnp.int32)
    run(*operands, sizes, group_offset=offset, **gemm_options)


# ---------------------------------------------------------------- bias


@pytest.mark.parametrize("bias_dtype", [jnp.bfloat16, jnp.float16, F32])
def test_bias(gemm_options, bias_dtype):
  """Rounded once, of rows of no group none."""
  bias = jnp.asarray(oracle.random_floats((4, 144), seed=3), bias_dtype)
  for dtype in (jnp.bfloat16, F32):
    out = run(
      *make(45, 144, 80, 4),
      [21, 0, 7, 12],
      bias=bias,
      preferred_element_type=dtype,
      **gemm_options,
    )
    assert not out[40:].any()


def test_bias_and_group_offset(gemm_options):
  """It is of the groups that rhs holds."""
  bias = oracle.random_floats((2, 16), seed=3)
  for offset in [-1, 1, 4, SMALL, BIG]:
    run(
      *make(30, 16, 16, 2),
      [3, 5, 0, 9, 6],
      bias=bias,
      group_offset=jnp.array([offset], jnp.int32),
      **gemm_options,
    )


@pytest.mark.parametrize("split_k", [1, 2])
def test_bias_of_small_groups(split_k):
  config = SmallGroupsConfig(
    tile_m=8, tile_n=64, num_stages=2, split_k=split_k, num_sms=2
  )
  bias = oracle.random_floats((4, 80), seed=3)
  options = dict(config=config, implementation="interpret", bias=bias)
  run(*make(40, 80, 272, 4), [3, 0, 9, 17], **options)


def test_bias_of_no_products(gemm_options):
  bias = oracle.random_floats((2, 16), seed=3)
  out = run(*make(5, 16, 0, 2), [2, 1], bias=bias, **gemm_options)
  assert out[:3].all()


# ---------------------------------------------------------------- NaN


def test_nan_stays_in_its_row(gemm_options):
  x = oracle.random_floats((20, 144))
  x[5, 130] = np.nan
  _, rhs = make(20, 32, 144, 3)
  out = run(quantize(x, (1, 128)), rhs, [4, 6, 7], **gemm_options)
  assert np.flatnonzero(np.isnan(out).any(1)).tolist() == [5]
  assert np.isnan(out[5]).all()


@pytest.mark.parametrize("group", [0, 1, 2])
def test_nan_stays_in_its_group(gemm_options, group):
  weights = oracle.random_floats((3, 32, 144))
  weights[group, 17] = np.nan
  lhs, _ = make(20, 32, 144, 3)
  rhs = quantize(weights, (1, 128, 128))
  out = run(lhs, rhs, [5, 0, 9], **gemm_options)
  rows = slice(*oracle.group_rows([5, 0, 9], 20)[group])
  expected = np.zeros((20, 32), bool)
  expected[rows, 17] = True
  np.testing.assert_array_equal(np.isnan(out), expected)


def test_rows_of_no_group_may_hold_anything(gemm_options):
  x = oracle.random_floats((45, 144))
  _, rhs = make(45, 32, 144, 2)
  for sizes, offset, rows in [
    ([10, 17], None, slice(27, None)),
    ([9, 10, 12, 14], 1, np.r_[:9, 31:45]),
  ]:
    if offset is not None:
      offset = jnp.array([offset])
    clean = run(
      quantize(x, (1, 128)), rhs, sizes, group_offset=offset, **gemm_options
    )
    garbage = x.copy()
    garbage[rows] = np.nan
    lhs = quantize(garbage, (1, 128))
    scales = lhs.scales.at[rows].set(np.nan)
    lhs = ScaledArray(lhs.values, scales, lhs.block_shape, lhs.padding)
    sizes = jnp.array(sizes)
    out = m_grouped_gemm(lhs, rhs, sizes, group_offset=offset, **gemm_options)
    np.testing.assert_array_equal(out, clean)
    assert not out[rows].any()


def test_inf_in_e5m2():
  """Inf stays Inf, and Inf - Inf is NaN."""
  x, weights = np.ones((4, 16), np.float32), np.ones((2, 16, 16), np.float32)
  x[0, 3], x[2, 5], weights[1, 7, 5] = np.inf, -np.inf, -1
  weights[1, 8] = 0
  quantized = [
    quantize(array, blocks, dtype=jnp.float8_e5m2)
    for array, blocks in ((x, (1, 128)), (weights, (1, 128, 128)))
  ]
  out = run(*quantized, [1, 3], preferred_element_type=F32).astype(F32)
  assert (out[0] == np.inf).all()
  assert (out[2, 7], out[2, 9]) == (np.inf, -np.inf)
  assert np.isnan(out[2, 8])  # -Inf * 0
  assert np.isfinite(out[[1, 3]]).all()


# ---------------------------------------------------------------- storage


def unpadded(x):
  values = x.values[tuple(slice(size) for size in x.shape)]
  return ScaledArray(values, x.scales, x.block_shape)


@pytest.mark.parametrize("n, k", [(16, 16), (80, 144)])
def test_operands_without_padding(gemm_options, n, k):
  lhs, rhs = make(21, n, k, 3)
  expected = run(lhs, rhs, [4, 6, 7], **gemm_options)
  out = run(unpadded(lhs), unpadded(rhs), [4, 6, 7], **gemm_options)
  np.testing.assert_array_equal(out, expected)


def test_transposed_weights(gemm_options):
  """One quantised copy of the weights serves both directions."""
  weights = quantize(oracle.random_floats((3, 144, 80)), (1, 128, 128))
  lhs, _ = make(21, 80, 144, 3)
  run(lhs, weights.mT, [4, 6, 7], **gemm_options)


@pytest.mark.parametrize("m, n, k", [(0, 16, 16), (5, 0, 16), (5, 16, 0)])
def test_empty_problems(gemm_options, m, n, k):
  out = run(*make(m, n, k, 2), [2, 1], **gemm_options)
  assert out.shape == (m, n)
  assert not out.any()


# ---------------------------------------------------------------- any problem

SHAPES = [(60, 48, 80, 5), (9, 5, 130, 3), (200, 130, 33, 2)]
SIZES = st.integers(-2, 70) | st.sampled_from([SMALL, BIG])


@example((60, 48, 80, 5), [12, 12, 12, 12, 12])
@given(st.sampled_from(SHAPES), st.lists(SIZES, min_size=5, max_size=5))
def test_any_sizes(shape, sizes):
  """Shapes that kernels do not support too."""
  lhs, rhs = make(*shape)
  run(lhs, rhs, sizes[: shape[-1]], implementation="xla")


def test_traced_sizes_compile_once():
  lhs, rhs = make(20, 16, 16, 2)
  gemm = jax.jit(lambda sizes: m_grouped_gemm(lhs, rhs, sizes))
  for sizes in ([3, 4], [0, 20], [-1, BIG]):
    oracle.check_m_grouped(gemm(jnp.array(sizes)), lhs, rhs, sizes)
  assert gemm._cache_size() == 1

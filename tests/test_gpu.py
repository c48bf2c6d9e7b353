"""The kernels on a Hopper GPU, at real sizes: pytest -m gpu."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_grouped_gemm import (
  Config,
  Recipe,
  SmallGroupsConfig,
  k_grouped_gemm,
  m_grouped_gemm,
  quantize,
  quantize_for_k_grouped,
  ragged_dot,
)

pytestmark = pytest.mark.gpu

BF16, F32 = jnp.bfloat16, jnp.float32
# Largest |row of out - row of the oracle| / |row of the oracle|. One rounding
# to bf16 costs at most 2^-8, 3.9e-3; the sums in f32 far less than 1e-3.
ROW_ERROR = {BF16: 4e-3, F32: 1e-3}
SIZES = (0, 1, 127, 128, 129, 5000)
RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.standard_normal(shape, np.float32)


def operands(m, n, k, g):
  lhs = quantize(normal(m, k), (1, 128))
  return lhs, quantize(normal(g, n, k), (1, 128, 128))


def gemm(fn, **kwargs):
  fn = functools.partial(fn, implementation="mosaic_gpu", **kwargs)
  return jax.jit(fn)


def poison(shape, dtype):
  """Leaves NaN in memory that the next result is likely to get."""
  jnp.full(shape, jnp.nan, dtype).block_until_ready().delete()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("k", [2880, 7168])
def test_m_grouped_rows(k, dtype):
  """Every row is right, and the rows past the groups are zero."""
  m, n = sum(SIZES) + 75, 1152
  lhs, rhs = operands(m, n, k, len(SIZES))
  poison((m, n), dtype)
  out = gemm(m_grouped_gemm, preferred_element_type=dtype)(
    lhs, rhs, jnp.array(SIZES)
  )
  oracle.check_m_grouped(out, lhs, rhs, SIZES, row_error=ROW_ERROR[dtype])


@pytest.mark.parametrize("multicast", ["lhs", "rhs"])
def test_m_grouped_is_deterministic(multicast):
  """The same bits from run to run, with clusters of rows of two groups."""
  sizes, n, k = (700, 0, 1, 1300, 130, 900), 6144, 2048
  lhs, rhs = operands(sum(sizes), n, k, len(sizes))
  run = gemm(m_grouped_gemm, config=Config(multicast=multicast))
  first = np.asarray(run(lhs, rhs, jnp.array(sizes)))
  oracle.check_m_grouped(first, lhs, rhs, sizes, row_error=ROW_ERROR[BF16])
  for _ in range(20):
    again = np.asarray(run(lhs, rhs, jnp.array(sizes)))
    np.testing.assert_array_equal(first.view(np.uint16), again.view(np.uint16))


@pytest.mark.parametrize("k", [16, 2048])
@pytest.mark.parametrize(
  "config",
  [
    Config(dynamic=True),
    Config(dynamic=True, cluster=1),
    Config(dynamic=True, multicast="rhs"),
    Config(dynamic=True, compute_wgs=3, tile_n=128),
    Config(dynamic=True, tile_n=64, num_sms=4),
  ],
)
def test_m_grouped_dynamic(config, k):
  """Whoever computes a tile, the result has the bits of every n-th tile."""
  sizes, n = RNG.integers(0, 700, 40), 2304
  lhs, rhs = operands(int(sizes.sum()) + 9, n, k, len(sizes))
  static = dataclasses.replace(config, dynamic=False)
  expected = gemm(m_grouped_gemm, config=static)(lhs, rhs, jnp.asarray(sizes))
  oracle.check_m_grouped(expected, lhs, rhs, sizes, row_error=ROW_ERROR[BF16])
  expected = np.asarray(expected).view(np.uint16)
  run = gemm(m_grouped_gemm, config=config)
  for _ in range(5):
    poison((lhs.shape[0], n), BF16)
    out = np.asarray(run(lhs, rhs, jnp.asarray(sizes)))
    np.testing.assert_array_equal(out.view(np.uint16), expected)


def test_m_grouped_dynamic_under_vmap():
  """No problem of the batch takes the tiles of another."""
  sizes = jnp.array([[300, 0, 1000, 41], [1, 600, 40, 700]])
  lhs, rhs = operands(2 * 1344, 1152, 2048, 4)
  lhs = jax.tree.map(lambda x: x.reshape(2, 1344, -1), lhs)
  run = gemm(m_grouped_gemm, config=Config(dynamic=True))
  out = jax.jit(jax.vmap(run, (0, None, 0)))(lhs, rhs, sizes)
  for i in range(2):
    expected = run(jax.tree.map(lambda x, i=i: x[i], lhs), rhs, sizes[i])
    np.testing.assert_array_equal(
      np.asarray(out[i]).view(np.uint16), np.asarray(expected).view(np.uint16)
    )


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("n", [16, 80, 192, 400, 2064])
def test_m_grouped_any_n_and_any_sizes(n, dtype):
  m, k = 600, 400
  lhs, rhs = operands(m, n, k, 6)
  run = gemm(m_grouped_gemm, preferred_element_type=dtype)
  for sizes in [
    (0, 0, 0, 0, 0, 0),
    (0, 0, 600, 0, 0, 0),
    (1, 1, 1, 1, 1, 1),
    (3, 126, 7, 0, 255, 64),
    (100, 100, 100, 100, 100, 100),
    (5, 2**31 - 1, 2**31 - 1, 2**31 - 1, 3, 1),
    (-8, 130, -(2**31), 129, 1, -1),
  ]:
    poison((m, n), dtype)
    out = run(lhs, rhs, jnp.array(sizes))
    oracle.check_m_grouped(out, lhs, rhs, sizes, row_error=ROW_ERROR[dtype])


@pytest.mark.parametrize("m", [1, 7, 130])
def test_m_grouped_any_m(m):
  lhs, rhs = operands(m, 256, 272, 3)
  sizes = (m // 3, 0, m - m // 3)
  out = gemm(m_grouped_gemm)(lhs, rhs, jnp.array(sizes))
  oracle.check_m_grouped(out, lhs, rhs, sizes, row_error=ROW_ERROR[BF16])


def test_m_grouped_many_groups():
  sizes = RNG.integers(0, 20, 512)
  lhs, rhs = operands(int(sizes.sum()), 256, 384, len(sizes))
  out = gemm(m_grouped_gemm)(lhs, rhs, jnp.asarray(sizes))
  oracle.check_m_grouped(out, lhs, rhs, sizes, row_error=ROW_ERROR[BF16])


def test_m_grouped_group_offset():
  sizes = (30, 100, 0, 171, 60, 9)
  lhs, rhs = operands(400, 384, 512, 3)
  run = gemm(m_grouped_gemm)
  for offset in range(-1, 6):
    poison((400, 384), BF16)
    out = run(lhs, rhs, jnp.array(sizes), group_offset=jnp.array([offset]))
    oracle.check_m_grouped(
      out, lhs, rhs, sizes, offset, row_error=ROW_ERROR[BF16]
    )


@pytest.mark.parametrize(
  "config, dtype",
  [
    (None, BF16),
    (None, F32),
    (Config(tile_n=128, compute_wgs=3, turns=True, dynamic=True), BF16),
    (Config(multicast="rhs", dynamic=True), BF16),
    (Config(tile_n=64, cluster=1, num_sms=4), F32),
    (SmallGroupsConfig(), BF16),
    (SmallGroupsConfig(tile_m=64, num_stages=6, split_k=2), F32),
  ],
)
def test_m_grouped_bias(config, dtype):
  """Of each row's group, as large as the products; as XLA adds it."""
  n, k = 1104, 2880
  run = gemm(m_grouped_gemm, preferred_element_type=dtype, config=config)
  by_xla = functools.partial(
    m_grouped_gemm, preferred_element_type=dtype, implementation="xla"
  )
  for sizes, m, offset in [
    (SIZES, sum(SIZES) + 75, None),
    ((3, 126, 7, 0, 255, 64), 600, None),
    ((5, 2**31 - 1, 2**31 - 1, 3, 1, 1), 600, None),
    ((30, 100, 0, 171, 60, 9, 11, 12), 400, 1),
    ((0,) * 6, 600, None),
  ]:
    lhs, rhs = operands(m, n, k, 6)
    bias = jnp.asarray(50 * normal(6, n), BF16)
    options = dict(bias=bias)
    if offset is not None:
      options["group_offset"] = jnp.array([offset])
    poison((m, n), dtype)
    out = run(lhs, rhs, jnp.array(sizes), **options)
    oracle.check_m_grouped(
      out, lhs, rhs, sizes, offset, row_error=ROW_ERROR[dtype], bias=bias
    )
    expected = jax.jit(by_xla)(lhs, rhs, jnp.array(sizes), **options)
    error = np.float64(out) - np.float64(expected)
    assert np.linalg.norm(error) <= 2 * ROW_ERROR[dtype] * np.linalg.norm(
      expected
    )
    # Without it the kernel still multiplies, and adds nothing.
    del options["bias"]
    out = run(lhs, rhs, jnp.array(sizes), **options)
    oracle.check_m_grouped(
      out, lhs, rhs, sizes, offset, row_error=ROW_ERROR[dtype]
    )


def test_m_grouped_bias_of_gpt_oss():
  """Experts of many sizes; the same bits from run to run."""
  g, n, k = 32, 5760, 2880  # On each of four devices.
  sizes = RNG.multinomial(8192, RNG.dirichlet(np.ones(g)))
  lhs, rhs = operands(8200, n, k, g)
  bias = jnp.asarray(normal(g, n), BF16)
  run = gemm(m_grouped_gemm, bias=bias)
  first = np.asarray(run(lhs, rhs, jnp.asarray(sizes)))
  oracle.check_m_grouped(
    first, lhs, rhs, sizes, row_error=ROW_ERROR[BF16], bias=bias
  )
  for _ in range(5):
    poison(first.shape, BF16)
    again = np.asarray(run(lhs, rhs, jnp.asarray(sizes)))
    np.testing.assert_array_equal(first.view(np.uint16), again.view(np.uint16))


def test_m_grouped_nan_stays_where_it_is():
  sizes = (130, 0, 200, 70)
  lhs, rhs = normal(450, 512), normal(4, 384, 512)
  lhs[5, 300] = lhs[400:] = np.nan
  rhs[2, 77, 1] = np.nan
  lhs = quantize(lhs, (1, 128))
  rhs = quantize(rhs, (1, 128, 128))
  out = gemm(m_grouped_gemm)(lhs, rhs, jnp.array(sizes))
  nan = np.zeros(out.shape, bool)
  nan[5] = nan[130:330, 77] = True
  np.testing.assert_array_equal(np.isnan(out), nan)


@pytest.mark.parametrize(
  "with_accumulator, dtype", [(False, F32), (True, F32), (False, BF16)]
)
@pytest.mark.parametrize(
  ("m", "n"), [(1152, 1408), (16, 16), (400, 80), (144, 2064)]
)
def test_k_grouped(m, n, with_accumulator, dtype):
  t = sum(SIZES) + 75
  tokens = normal(t, m), normal(t, n)
  for x in tokens:
    x[sum(SIZES) :] = np.nan  # Nobody's tokens.
  lhs, rhs = (quantize_for_k_grouped(x, jnp.array(SIZES)) for x in tokens)
  shape = len(SIZES), m, n
  accumulator = normal(*shape) if with_accumulator else None
  poison(shape, dtype)
  out = gemm(k_grouped_gemm, preferred_element_type=dtype)(
    lhs, rhs, jnp.array(SIZES), accumulator=accumulator
  )
  oracle.check_k_grouped(
    out, lhs, rhs, SIZES, accumulator, row_error=ROW_ERROR[dtype]
  )


def test_k_grouped_any_sizes():
  t, m, n = 500, 192, 320
  tokens = normal(t, m), normal(t, n)
  quantized = jax.jit(quantize_for_k_grouped)
  run = gemm(k_grouped_gemm)
  for sizes in [
    (0, 0, 0, 0),
    (0, 500, 0, 0),
    (1, 1, 1, 1),
    (127, 128, 129, 0),
    (5, 2**31 - 1, 2**31 - 1, 3),
    (-8, 130, -(2**31), 129),
  ]:
    group_sizes = jnp.array(sizes)
    lhs, rhs = (quantized(x, group_sizes) for x in tokens)
    poison((4, m, n), F32)
    out = run(lhs, rhs, group_sizes)
    oracle.check_k_grouped(out, lhs, rhs, sizes, row_error=ROW_ERROR[F32])


def test_k_grouped_nan_stays_in_its_group():
  sizes = (130, 0, 200, 70)
  tokens = normal(400, 256), normal(400, 192)
  tokens[0][140, 3] = np.nan  # A token of group 2.
  lhs, rhs = (quantize_for_k_grouped(x, jnp.array(sizes)) for x in tokens)
  out = gemm(k_grouped_gemm)(lhs, rhs, jnp.array(sizes))
  nan = np.zeros(out.shape, bool)
  nan[2, 3] = True
  np.testing.assert_array_equal(np.isnan(out), nan)


def test_kernel_is_the_default():
  lhs, rhs = operands(256, 256, 256, 2)
  lowered = jax.jit(m_grouped_gemm).lower(lhs, rhs, jnp.array([100, 156]))
  assert "mosaic_gpu" in lowered.as_text()
  # What the kernels do not support still works.
  lhs, rhs = operands(40, 24, 256, 2)
  out = m_grouped_gemm(lhs, rhs, jnp.array([10, 20]))
  oracle.check_m_grouped(out, lhs, rhs, (10, 20), row_error=ROW_ERROR[BF16])


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.bf16()])
def test_ragged_dot_and_its_gradients(recipe):
  """Against float64: FP8 has 3 bits of mantissa, bf16 has 7.

  A product of two rounded factors is off by 2 half steps, at most 2^-3 (FP8)
  or 2^-7 (bf16) of itself; signs are random, so a row of the sum is off by
  less than that of its norm.
  """
  sizes, m, k, n = (0, 700, 1, 129, 1000), 1900, 768, 1024
  group_sizes = jnp.array(sizes)
  lhs, rhs, dout = normal(m, k), normal(len(sizes), k, n), normal(m, n)
  args = jax.tree.map(lambda x: jnp.asarray(x, BF16), (lhs, rhs))
  dot = jax.checkpoint(
    lambda lhs, rhs: ragged_dot(lhs, rhs, group_sizes, recipe=recipe)
  )
  out, vjp = jax.vjp(jax.jit(dot), *args)
  gradients = vjp(jnp.asarray(dout, BF16))
  lhs, rhs, dout = (np.float64(x) for x in (lhs, rhs, dout))
  expected = np.zeros((m, n)), np.zeros((m, k)), np.zeros_like(rhs)
  for g, (start, end) in enumerate(oracle.group_rows(sizes, m)):
    expected[0][start:end] = lhs[start:end] @ rhs[g]
    expected[1][start:end] = dout[start:end] @ rhs[g].T
    expected[2][g] = lhs[start:end].T @ dout[start:end]
  bound = 2**-3 if recipe == Recipe() else 2**-7
  for got, exact in zip((out, *gradients), expected, strict=True):
    oracle.check(got, exact, np.abs(exact), k, row_error=bound)

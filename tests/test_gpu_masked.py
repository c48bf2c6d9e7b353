"""The masked layout and the kernel for small groups on a Hopper GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_grouped_gemm import (
  Config,
  SmallGroupsConfig,
  m_grouped_gemm,
  m_grouped_gemm_masked,
  quantize,
)

pytestmark = pytest.mark.gpu

BF16, F32 = jnp.bfloat16, jnp.float32
# Largest |row of out - row of the oracle| / |row of the oracle|, as in
# test_gpu.py.
ROW_ERROR = {BF16: 4e-3, F32: 1e-3}
RNG = np.random.default_rng(0)
CONFIGS = {
  "m_grouped": Config(),
  "m_grouped_rhs": Config(multicast="rhs"),
  "m_grouped_dynamic": Config(dynamic=True),
  "small_groups": SmallGroupsConfig(tile_m=32),
  "small_groups_split_k": SmallGroupsConfig(tile_m=32, split_k=2),
  "chosen": None,
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
SIZES = (0, 1, 7, 8, 65, 128, 129, 200)
BIG, SMALL = 2**31 - 1, -(2**31)


def normal(*shape):
  return RNG.standard_normal(shape, np.float32)


def masked_operands(g, max_m, n, k):
  lhs = quantize(normal(g, max_m, k), (1, 1, 128))
  return lhs, quantize(normal(g, n, k), (1, 128, 128))


def contiguous_operands(m, n, k, g):
  lhs = quantize(normal(m, k), (1, 128))
  return lhs, quantize(normal(g, n, k), (1, 128, 128))


def jitted(fn, **kwargs):
  kwargs = {"implementation": "mosaic_gpu", **kwargs}
  return jax.jit(functools.partial(fn, **kwargs))


def in_use(sizes, max_m):
  sizes = np.array(sizes, np.int64)[:, None, None]
  return np.arange(max_m)[:, None] < sizes


def check_masked(out, lhs, rhs, sizes, row_error):
  """Rows that are not in use must be zeros."""
  inside = in_use(sizes, lhs.shape[1])
  lhs, rhs = oracle.dequantize(lhs), oracle.dequantize(rhs)
  ref = np.where(inside, lhs @ rhs.swapaxes(1, 2), 0)
  oracle.check(out, ref, np.abs(ref), lhs.shape[2], row_error)


def poison(shape, dtype):
  """Leaves NaN in memory that the next result of this shape gets."""
  # In one jit: a scalar NaN in memory of its own might lie before that memory,
  # and the result start there.
  make = jax.jit(lambda: jnp.full(shape, jnp.nan, dtype))
  make().block_until_ready().delete()


def that_fits(config, dtype):
  """Wide tiles of f32 leave room for two slots."""
  if isinstance(config, Config) and dtype == F32:
    return dataclasses.replace(config, num_stages=2)
  return config


@configs
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("n, k", [(1152, 2880), (400, 7168), (16, 16)])
def test_masked_rows(n, k, dtype, config):
  g, max_m = len(SIZES), max(SIZES)
  lhs, rhs = masked_operands(g, max_m, n, k)
  poison((g, max_m, n), dtype)
  run = jitted(
    m_grouped_gemm_masked,
    preferred_element_type=dtype,
    zero_padding=True,
    config=that_fits(config, dtype),
  )
  for sizes in (
    SIZES,
    SIZES[::-1],
    (0,) * g,
    (BIG, SMALL, -1, 3, BIG, 0, 9, 1),
  ):
    out = run(lhs, rhs, jnp.array(sizes))
    check_masked(out, lhs, rhs, sizes, ROW_ERROR[dtype])


@configs
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_masked_writes_nothing_else(dtype, config):
  """Where rows are not in use, out keeps the NaN that its memory held."""
  g, max_m, n = len(SIZES), max(SIZES), 1152
  lhs, rhs = masked_operands(g, max_m, n, 512)
  run = jitted(
    m_grouped_gemm_masked,
    preferred_element_type=dtype,
    config=that_fits(config, dtype),
  )
  sizes = jnp.array(SIZES)
  jax.block_until_ready(run(lhs, rhs, sizes))  # Compiles.
  poison((g, max_m, n), dtype)
  out = np.asarray(run(lhs, rhs, sizes))
  inside = np.broadcast_to(in_use(SIZES, max_m), out.shape)
  np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), ~inside)
  check_masked(np.where(inside, out, 0), lhs, rhs, SIZES, ROW_ERROR[dtype])


@pytest.mark.parametrize("expected_m", [1, 5, 10, 20, 64, 200])
def test_masked_expected_m_is_but_a_hint(expected_m):
  lhs, rhs = masked_operands(len(SIZES), max(SIZES), 2048, 1024)
  out = jitted(m_grouped_gemm_masked, expected_m=expected_m, zero_padding=True)(
    lhs, rhs, jnp.array(SIZES)
  )
  check_masked(out, lhs, rhs, SIZES, ROW_ERROR[BF16])


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("tile_n", [64, 128])
@pytest.mark.parametrize("tile_m", [8, 16, 32, 64])
@pytest.mark.parametrize("split_k", [1, 2])
def test_small_groups(split_k, tile_m, tile_n, dtype):
  """Contiguous: 200 groups that start at any row, many of them empty."""
  config = SmallGroupsConfig(
    tile_m=tile_m, tile_n=tile_n, num_stages=6, split_k=split_k
  )
  sizes = RNG.integers(0, 9, 200) * RNG.integers(0, 2, 200)
  sizes[[3, 50]] = 70, tile_m
  m, n, k = int(sizes.sum()) + 30, 336, 1040
  lhs, rhs = contiguous_operands(m, n, k, len(sizes))
  poison((m, n), dtype)
  run = jitted(m_grouped_gemm, preferred_element_type=dtype, config=config)
  for _ in range(3):
    out = run(lhs, rhs, jnp.asarray(sizes))
    oracle.check_m_grouped(out, lhs, rhs, sizes, row_error=ROW_ERROR[dtype])
    sizes = np.roll(sizes, 7)


@pytest.mark.parametrize("n", [16, 80, 400, 2064])
def test_small_groups_any_n_and_any_sizes(n):
  m, k = 90, 400
  lhs, rhs = contiguous_operands(m, n, k, 6)
  run = jitted(m_grouped_gemm, config=SmallGroupsConfig())
  for sizes in [
    (0, 0, 0, 0, 0, 0),
    (0, 0, 90, 0, 0, 0),
    (1, 1, 1, 1, 1, 1),
    (3, 26, 7, 0, 25, 8),
    (5, BIG, BIG, BIG, 3, 1),
    (-8, 30, SMALL, 29, 1, -1),
  ]:
    poison((m, n), BF16)
    out = run(lhs, rhs, jnp.array(sizes))
    oracle.check_m_grouped(out, lhs, rhs, sizes, row_error=ROW_ERROR[BF16])


@pytest.mark.parametrize("split_k", [1, 2])
def test_small_groups_are_deterministic(split_k):
  sizes = RNG.integers(0, 9, 64)
  lhs, rhs = contiguous_operands(int(sizes.sum()), 4096, 2048, 64)
  config = SmallGroupsConfig(split_k=split_k)
  run = jitted(m_grouped_gemm, config=config)
  first = np.asarray(run(lhs, rhs, jnp.asarray(sizes))).view(np.uint16)
  for _ in range(20):
    again = np.asarray(run(lhs, rhs, jnp.asarray(sizes))).view(np.uint16)
    np.testing.assert_array_equal(first, again)


def test_small_groups_nan_stays_where_it_is():
  sizes = (13, 0, 20, 7)
  lhs, rhs = normal(50, 512), normal(4, 384, 512)
  lhs[5, 300] = lhs[40:] = np.nan
  rhs[2, 77, 1] = np.nan
  lhs, rhs = quantize(lhs, (1, 128)), quantize(rhs, (1, 128, 128))
  run = jitted(m_grouped_gemm, config=SmallGroupsConfig())
  out = run(lhs, rhs, jnp.array(sizes))
  nan = np.zeros(out.shape, bool)
  nan[5] = nan[13:33, 77] = True
  np.testing.assert_array_equal(np.isnan(out), nan)


def test_decode_loop_stays_on_the_device():
  g, max_m, d = 8, 32, 1024
  rhs = quantize(normal(g, d, d) / 32, (1, 128, 128))

  def step(i, x, sizes, implementation):
    out = m_grouped_gemm_masked(
      quantize(x, (1, 1, 128)),
      rhs,
      sizes,
      expected_m=8,
      zero_padding=True,
      implementation=implementation,
    )
    return jnp.tanh(out), (sizes * 3 + i) % (max_m + 1)

  @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=3)
  def decode(x, sizes, steps, implementation):
    _, *state = jax.lax.while_loop(
      lambda state: state[0] < steps,
      lambda state: (state[0] + 1, *step(*state, implementation)),
      (jnp.int32(0), x, sizes),
    )
    return state

  x = jnp.asarray(normal(g, max_m, d), BF16)
  starts = [RNG.integers(0, max_m + 1, g) for _ in range(3)]
  starts = [jnp.asarray(sizes, jnp.int32) for sizes in starts]
  steps = jnp.int32(3)
  expected = [
    decode(jnp.copy(x), jnp.copy(sizes), steps, "xla") for sizes in starts
  ]
  copies = [(jnp.copy(x), jnp.copy(sizes)) for sizes in starts]
  with jax.transfer_guard("disallow"):
    results = [decode(*state, steps, "mosaic_gpu") for state in copies]
    jax.block_until_ready(results)
  for (out, sizes), (ref, ref_sizes) in zip(results, expected, strict=True):
    np.testing.assert_array_equal(sizes, ref_sizes)
    # A last bit of bf16 may make the next FP8 value another one.
    np.testing.assert_allclose(
      out.astype(F32), ref.astype(F32), rtol=0.1, atol=0.1
    )
  assert decode._cache_size() == 2  # One for each implementation.

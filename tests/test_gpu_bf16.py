"""The kernels of 16-bit operands on a Hopper GPU: pytest -m gpu.

Against float64, element by element: products of 16-bit numbers are exact, and
the tensor cores cut sums off where float32 would round, twice the error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_grouped_gemm import Config, Recipe, ragged_dot
from jax_grouped_gemm.kernels.k_grouped_bf16 import k_grouped_bf16
from jax_grouped_gemm.kernels.m_grouped_bf16 import m_grouped_bf16

pytestmark = pytest.mark.gpu

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
IMPLEMENTATION = "mosaic_gpu"
SIZES = (0, 1, 127, 128, 129, 3000)
RNG = np.random.default_rng(0)


def normal(*shape, dtype=BF16):
  return np.asarray(RNG.standard_normal(shape, np.float32), dtype)


def products(lhs, rhs, dout, rows):
  """Returns out, d(lhs) and d(rhs) in float64, of absolute values too."""
  results = []
  for fn in (np.asarray, np.abs):
    x, w, dy = (fn(operand.astype(np.float64)) for operand in (lhs, rhs, dout))
    out, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    with np.errstate(invalid="ignore"):
      for g, (start, end) in enumerate(rows):
        out[start:end] = x[start:end] @ w[g]
        dx[start:end] = dy[start:end] @ w[g].T
        dw[g] = x[start:end].T @ dy[start:end]
    results.append((out, dx, dw))
  return zip(*results, strict=True)


@jax.jit
def run(lhs, rhs, dout, sizes, offset):
  dot = lambda lhs, rhs: ragged_dot(
    lhs,
    rhs,
    sizes,
    group_offset=offset,
    recipe=Recipe.bf16(),
    implementation=IMPLEMENTATION,
  )
  out, vjp = jax.vjp(dot, lhs, rhs)
  return out, *vjp(dout)


def check(lhs, rhs, dout, sizes, offset=None):
  """Of ragged_dot and both gradients; memory for them has NaN before."""
  m, (g, k, n) = lhs.shape[0], rhs.shape
  for shape in ((m, n), (m, k), (g, k, n)):
    jnp.full(shape, jnp.nan, lhs.dtype).block_until_ready().delete()
  offset = None if offset is None else jnp.array([offset])
  results = run(lhs, rhs, dout, jnp.array(sizes), offset)
  expected = products(
    lhs,
    rhs,
    dout,
    oracle.group_rows(sizes, m, offset, None if offset is None else g),
  )
  for out, (ref, magnitude), terms in zip(
    results, expected, (k, n, m), strict=True
  ):
    oracle.check(out, ref, magnitude, 2 * terms)


def operands(m, k, n, g, dtype=BF16):
  return (
    normal(m, k, dtype=dtype),
    normal(g, k, n, dtype=dtype),
    normal(m, n, dtype=dtype),
  )


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rows_and_gradients(dtype):
  check(*operands(sum(SIZES) + 75, 1152, 1408, len(SIZES), dtype), SIZES)


@pytest.mark.parametrize("k, n", [(1, 1), (24, 16), (80, 192), (400, 2064)])
def test_any_widths_and_sizes(k, n):
  problem = operands(601, k, n, 6)
  for sizes in [
    (0, 0, 0, 0, 0, 0),
    (0, 0, 601, 0, 0, 0),
    (1, 1, 1, 1, 1, 1),
    (3, 126, 7, 0, 255, 64),
    (5, 2**31 - 1, 2**31 - 1, 2**31 - 1, 3, 1),
    (-8, 130, -(2**31), 129, 1, -1),
  ]:
    check(*problem, sizes)


@pytest.mark.parametrize("m", [1, 7, 130])
def test_any_m(m):
  check(*operands(m, 256, 272, 3), (m // 3, 0, m - m // 3))


def test_many_groups():
  sizes = RNG.integers(0, 20, 512)
  check(*operands(int(sizes.sum()), 384, 256, len(sizes)), sizes)


def test_group_offset():
  problem = operands(400, 512, 384, 3)
  for offset in range(-1, 6):
    check(*problem, (30, 100, 0, 171, 60, 9), offset)


def test_nan_stays_where_it_is():
  """In rows, weights and beyond the groups; groups do not start at 8 rows."""
  lhs, rhs, dout = operands(450, 512, 384, 4)
  lhs[5, 300] = lhs[400:] = dout[131, 7] = dout[400:] = np.nan
  rhs[2, 1, 77] = np.nan
  check(lhs, rhs, dout, (130, 0, 203, 67))


def test_is_deterministic():
  """Clusters share what they load: the same bits from run to run."""
  problem = operands(3001, 2048, 1536, 6)
  sizes = jnp.array([700, 0, 1, 1300, 130, 870])
  first = run(*problem, sizes, None)
  for _ in range(20):
    again = run(*problem, sizes, None)
    for x, y in zip(first, again, strict=True):
      np.testing.assert_array_equal(
        np.asarray(x).view(np.uint16), np.asarray(y).view(np.uint16)
      )


CONFIGS = [
  (Config(tile_n=64, cluster=1, num_stages=5), F32),
  (Config(tile_n=128, num_stages=4), F32),
  (Config(tile_n=192, num_stages=4), BF16),
  (Config(tile_n=192, num_stages=3), F32),
  (Config(tile_n=256, num_stages=3), BF16),
  (Config(tile_n=256, cluster=1, num_stages=3), F16),
]
M_GROUPED_CONFIGS = [
  (Config(tile_n=256, num_stages=3, multicast="rhs"), BF16),
  (Config(tile_n=128, compute_wgs=3, num_stages=4, multicast="rhs"), BF16),
  (Config(tile_n=256, num_stages=3, dynamic=True), BF16),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("config, out_dtype", CONFIGS + M_GROUPED_CONFIGS)
def test_m_grouped_configs(config, out_dtype, transposed):
  """Each tile, with columns in vain; every slice of columns of it."""
  k, n, sizes = 448, 1088, (300, 0, 77, 513)
  lhs, rhs, dout = operands(sum(sizes) + 6, k, n, len(sizes))
  gemm = functools.partial(
    m_grouped_bf16,
    transposed=transposed,
    m=len(lhs),
    n=n,
    out_dtype=out_dtype,
    config=config,
  )
  stored = rhs.mT.copy() if transposed else rhs
  out = jax.jit(gemm)(lhs, stored, jnp.array(sizes, jnp.int32), None)
  rows = oracle.group_rows(sizes, len(lhs))
  (ref, magnitude), *_ = products(lhs, rhs, dout, rows)
  oracle.check(out, ref, magnitude, 2 * k)


@pytest.mark.parametrize("config, out_dtype", CONFIGS)
def test_k_grouped_configs(config, out_dtype):
  """Each tile, with rows and columns in vain; other groups' rows are NaN."""
  t, m, n, rows = 1048, 448, 1088, [(3, 67), (67, 67), (68, 1043)]
  lhs, rhs, dout = operands(t, m, n, len(rows))
  lhs[[0, 1, 2, 67, -1]] = np.nan
  dout[[0, 1, 2, 67, -1]] = np.nan
  gemm = functools.partial(
    k_grouped_bf16, m=m, n=n, out_dtype=out_dtype, config=config
  )
  starts, ends = jnp.array(rows, jnp.int32).T
  out = jax.jit(gemm)(lhs, dout, starts, ends)
  *_, (ref, magnitude) = products(lhs, rhs, dout, rows)
  oracle.check(out, ref, magnitude, 2 * t)

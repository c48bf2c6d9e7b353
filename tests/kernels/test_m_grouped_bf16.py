"""The M-grouped kernel of 16-bit operands, in the interpreter, with races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import check
from problems_bf16 import m_grouped

from jax_grouped_gemm.config import Config
from jax_grouped_gemm.kernels.m_grouped_bf16 import m_grouped_bf16

pytestmark = pytest.mark.slow

SMALL = Config(tile_n=64, cluster=1, num_stages=2, num_sms=2)
SHARED_RHS = Config(tile_n=64, multicast="rhs", num_stages=2, num_sms=4)
TRANSPOSED = pytest.mark.parametrize("transposed", [False, True])


def jitted(**static):
  return jax.jit(functools.partial(m_grouped_bf16, interpret=True, **static))


def run(
  sizes, m, n, k, config, transposed, dtype=jnp.bfloat16, out=jnp.bfloat16
):
  operands, *expected = m_grouped(sizes, m, n, k, transposed, dtype)
  gemm = jitted(m=m, n=n, transposed=transposed, out_dtype=out, config=config)
  check(gemm(*operands), *expected)


@pytest.mark.parametrize(
  "tile_n, compute_wgs, cluster, multicast, transposed",
  [
    (128, 3, 2, "rhs", True),
    (192, 2, 1, "lhs", True),
    (256, 2, 2, "lhs", False),
  ],
)
def test_every_tile(
  interpreter, tile_n, compute_wgs, cluster, multicast, transposed
):
  """Columns: of a tile and 16 more, not a whole 128 bytes."""
  config = Config(
    tile_n=tile_n,
    compute_wgs=compute_wgs,
    cluster=cluster,
    multicast=multicast,
    num_stages=3,
    num_sms=4,
  )
  with interpreter():
    run([100, 0, 37, 130], 275, tile_n + 16, 208, config, transposed)


@pytest.mark.parametrize(
  "config, transposed", [(SMALL, True), (SHARED_RHS, False)]
)
def test_ragged_and_hostile_sizes(interpreter, config, transposed):
  gemm = jitted(
    m=300, n=64, transposed=transposed, out_dtype=jnp.bfloat16, config=config
  )
  for sizes in [
    [1, 1, 1, 1, 1, 1],  # One row each, all among 8 rows of a SMEM tile.
    [0, 0, 0, 0, 0, 0],
    [0, 130, 0, 0, 137, 0],  # Clusters of rows of two groups.
    [-7, 20, -(2**31), 1, 2**31 - 1, 2**31 - 1],  # Empty; cut off.
  ]:
    operands, *expected = m_grouped(sizes, 300, 64, 144, transposed)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


@pytest.mark.parametrize("k", [16, 128])
def test_every_number_of_slices(interpreter, k):
  """Of one, the first is the last; of two, none is amid."""
  with interpreter():
    run([9, 4], 13, 64, k, SMALL, transposed=False)


@pytest.mark.parametrize(
  "dtype, out", [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float16)]
)
def test_dtypes(interpreter, dtype, out):
  with interpreter():
    run([9, 4], 13, 40, 64, SMALL, False, dtype, out)


@pytest.mark.parametrize("offset", [-1, 1])
def test_group_offset(interpreter, offset):
  """rhs holds 2 of 4 groups, from the offset on; rows of others are zero."""
  m, sizes = 200, [20, 140, 0, 37]
  (lhs, rhs, *_), *expected = m_grouped(sizes, m, 64, 64, False)
  held = [i for i in (offset, offset + 1) if 0 <= i < 4]
  kept = np.isin(
    np.searchsorted(np.cumsum(sizes), np.arange(m), side="right"), held
  )
  gemm = jitted(
    m=m, n=64, transposed=False, out_dtype=jnp.bfloat16, config=SHARED_RHS
  )
  with interpreter():
    out = gemm(
      lhs,
      rhs[np.clip(np.arange(2) + offset, 0, 3)],
      jnp.asarray(sizes, jnp.int32),
      jnp.asarray([offset], jnp.int32),
    )
  check(out, *(np.where(kept[:, None], x, 0) for x in expected))


@TRANSPOSED
def test_garbage_stays_where_it_is(interpreter, transposed):
  """NaN in a row, a group's weights or beyond the groups reaches no other."""
  m, sizes = 90, [21, 30, 17]
  operands, expected, magnitude = m_grouped(sizes, m, 64, 128, transposed)
  lhs, rhs, *sizes = operands
  lhs = lhs.at[5].set(jnp.nan).at[68:].set(jnp.nan)
  rhs = rhs.at[(1, 3) if transposed else (1, slice(None), 3)].set(jnp.nan)
  gemm = jitted(
    m=m, n=64, transposed=transposed, out_dtype=jnp.bfloat16, config=SMALL
  )
  with interpreter():
    out = gemm(lhs, rhs, *sizes)
  nan = np.zeros((m, 64), bool)
  nan[5], nan[21:51, 3] = True, True
  np.testing.assert_array_equal(np.isnan(out), nan)
  check(jnp.where(nan, 0, out), np.where(nan, 0, expected), magnitude)

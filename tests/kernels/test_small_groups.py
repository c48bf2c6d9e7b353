"""The kernel for small groups itself, in the interpreter, races included."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import check, m_grouped

from jax_grouped_gemm.config import SmallGroupsConfig
from jax_grouped_gemm.kernels.small_groups import small_groups_gemm

pytestmark = pytest.mark.slow

BF16, F32 = jnp.bfloat16, jnp.float32
SMALL = SmallGroupsConfig(tile_m=8, tile_n=64, num_stages=2, num_sms=2)


def jitted(**static):
  return jax.jit(functools.partial(small_groups_gemm, interpret=True, **static))


def run(sizes, m, n, k, config, dtype=BF16, bias=False):
  operands, *expected = m_grouped(sizes, m, n, k, bias=bias)
  gemm = jitted(m=m, n=n, out_dtype=dtype, config=config)
  check(gemm(*operands), *expected)


@pytest.mark.parametrize(
  "tile_m, tile_n, dtype",
  [
    (8, 64, BF16),
    (8, 128, F32),
    (16, 128, BF16),
    (32, 64, BF16),
    (64, 64, F32),
    (64, 128, BF16),
  ],
)
def test_every_tile(interpreter, tile_m, tile_n, dtype):
  config = SmallGroupsConfig(
    tile_m=tile_m, tile_n=tile_n, num_stages=2, num_sms=3
  )
  sizes = [5, 0, tile_m, tile_m + 7, 1]
  with interpreter():
    run(sizes, sum(sizes) + 9, tile_n + 16, 272, config, dtype)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize(
  "tile_m, tile_n, k, dtype", [(8, 128, 400, BF16), (16, 64, 144, F32)]
)
def test_bias(interpreter, tile_m, tile_n, k, dtype, split_k):
  """Once, however many CTAs work on a tile."""
  config = SmallGroupsConfig(
    tile_m=tile_m, tile_n=tile_n, num_stages=3, split_k=split_k, num_sms=2
  )
  with interpreter():
    run([5, 0, 8, 19, 1], 38, tile_n + 16, k, config, dtype, bias=True)


@pytest.mark.parametrize("k", [16, 144, 400, 1040])  # 1, 2, 4 and 9 slices
@pytest.mark.parametrize("tile_n, dtype", [(64, BF16), (128, F32)])
def test_two_ctas_split_k(interpreter, tile_n, dtype, k):
  """Several tiles for each cluster, so that what it passes on is reused."""
  config = SmallGroupsConfig(
    tile_m=8, tile_n=tile_n, num_stages=3, split_k=2, num_sms=4
  )
  with interpreter():
    run([5, 0, 8, 15, 1], 38, 2 * tile_n + 16, k, config, dtype)


def test_every_pattern_of_empty_groups(interpreter):
  gemm = jitted(m=11, n=64, out_dtype=BF16, config=SMALL)
  for sizes in itertools.product([0, 3], repeat=3):
    operands, *expected = m_grouped(sizes, 11, 64, 16)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


def test_ragged_and_hostile_sizes(interpreter):
  gemm = jitted(m=45, n=64, out_dtype=BF16, config=SMALL)
  for sizes in [
    [1, 1, 1, 1, 1, 1],  # One row each, all among 8 rows of a SMEM tile.
    [7, 8, 9, 0, 1, 20],
    [0, 0, 0, 0, 0, 0],
    [4, 2**31 - 1, 2**31 - 1, 2**31 - 1, 4, 0],  # Beyond m: cut off.
    [-7, 20, -(2**31), 1, 1, -1],  # Negative: empty.
  ]:
    operands, *expected = m_grouped(sizes, 45, 64, 144)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


@pytest.mark.parametrize("offset", [-(2**31), -1, 1])
def test_group_offset(interpreter, offset):
  """rhs holds 2 of 4 groups, from the offset on; rows of others are zero."""
  m, sizes = 40, [20, 3, 0, 9]
  (lhs, lhs_scales, rhs, rhs_scales, *_), *expected = m_grouped(
    sizes, m, 64, 144
  )
  held = [i for i in (offset, offset + 1) if 0 <= i < 4]
  ends = np.cumsum(sizes)
  kept = np.isin(np.searchsorted(ends, np.arange(m), side="right"), held)
  indices = np.clip(np.arange(2) + offset, 0, 3)
  with interpreter():
    out = jitted(m=m, n=64, out_dtype=BF16, config=SMALL)(
      lhs,
      lhs_scales,
      rhs[indices],
      rhs_scales[indices],
      jnp.asarray(sizes, jnp.int32),
      jnp.asarray([offset], jnp.int32),
    )
  check(out, *(np.where(kept[:, None], x, 0) for x in expected))


def test_garbage_stays_where_it_is(interpreter):
  """NaN in a row, a group's weights or beyond the groups reaches no other."""
  m, sizes = 40, [11, 12, 7]
  operands, expected, magnitude = m_grouped(sizes, m, 64, 256)
  lhs, lhs_scales, rhs, rhs_scales, *sizes = operands
  lhs = lhs.at[5].set(jnp.nan).at[30:].set(jnp.nan)
  lhs_scales = lhs_scales.at[30:].set(jnp.nan)
  rhs = rhs.at[1, 3].set(jnp.nan)
  operands = (lhs, lhs_scales, rhs, rhs_scales, *sizes)
  with interpreter():
    out = jitted(m=m, n=64, out_dtype=BF16, config=SMALL)(*operands)
  nan = np.zeros((m, 64), bool)
  nan[5], nan[11:23, 3] = True, True
  np.testing.assert_array_equal(np.isnan(out), nan)
  check(jnp.where(nan, 0, out), np.where(nan, 0, expected), magnitude)


def test_race_detection_works(capfd, monkeypatch):
  """Without its fence the kernel races, and the detector says so."""
  monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
  params = plgpu.InterpretGPUParams(detect_races=True)
  with plgpu.force_gpu_interpret_mode(params):
    run([20], 20, 64, 512, SMALL)
  assert "RACE DETECTED" in capfd.readouterr().out

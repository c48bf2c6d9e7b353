"""The M-grouped kernel itself, in the interpreter, races included."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import check, m_grouped

from jax_grouped_gemm.config import Config
from jax_grouped_gemm.kernels.m_grouped import m_grouped_gemm

pytestmark = pytest.mark.slow

SMALL = Config(tile_n=64, cluster=1, num_stages=2, num_sms=2)
SHARED_RHS = Config(tile_n=64, multicast="rhs", num_stages=2, num_sms=4)


def jitted(**static):
  return jax.jit(functools.partial(m_grouped_gemm, interpret=True, **static))


def run(sizes, m, n, k, config, dtype=jnp.bfloat16, bias=False):
  operands, *expected = m_grouped(sizes, m, n, k, bias=bias)
  gemm = jitted(m=m, n=n, out_dtype=dtype, config=config)
  check(gemm(*operands), *expected)


@pytest.mark.parametrize(
  "tile_n, cluster, multicast, dtype",
  [
    (64, 1, "lhs", jnp.float32),
    (64, 2, "rhs", jnp.bfloat16),
    (128, 2, "lhs", jnp.bfloat16),
    (128, 2, "rhs", jnp.float32),
    (192, 1, "lhs", jnp.bfloat16),
    (192, 2, "lhs", jnp.float32),
    (192, 2, "rhs", jnp.bfloat16),
  ],
)
def test_every_tile(interpreter, tile_n, cluster, multicast, dtype):
  config = Config(
    tile_n=tile_n,
    cluster=cluster,
    multicast=multicast,
    num_stages=2,
    num_sms=2,
  )
  with interpreter():
    run([100, 0, 37, 130], 275, tile_n + 16, 272, config, dtype)


def test_every_pattern_of_empty_groups(interpreter):
  gemm = jitted(m=11, n=64, out_dtype=jnp.bfloat16, config=SMALL)
  for sizes in itertools.product([0, 3], repeat=3):
    operands, *expected = m_grouped(sizes, 11, 64, 16)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


@pytest.mark.parametrize("tile_n, multicast", [(64, "rhs"), (128, "lhs")])
def test_three_compute_warpgroups(interpreter, tile_n, multicast):
  config = Config(
    tile_n=tile_n,
    compute_wgs=3,
    multicast=multicast,
    num_stages=3,
    num_sms=2,
  )
  with interpreter():
    run([100, 0, 37, 200], 345, tile_n + 16, 400, config)


@pytest.mark.parametrize(
  "config, k, dtype",
  [
    (SMALL, 272, jnp.bfloat16),
    (SHARED_RHS, 16, jnp.float32),  # One slice: no loop.
    (dataclasses.replace(SMALL, tile_n=192), 144, jnp.float32),
    (Config(num_stages=2, num_sms=2), 144, jnp.bfloat16),  # A tile beyond n.
    (
      Config(tile_n=128, compute_wgs=3, turns=True, num_stages=2, num_sms=2),
      400,
      jnp.bfloat16,
    ),
  ],
)
def test_bias(interpreter, config, k, dtype):
  """Of the group of each row, also among rows of others; none, no bias."""
  with interpreter():
    sizes = [100, 0, 37, 3, 130, 0]
    run(sizes, 295, config.tile_n + 16, k, config, dtype, bias=True)


def test_bias_of_bfloat16(interpreter):
  """As parameters are; it is exact in float32, and added in that."""
  *operands, bias = m_grouped([9, 4], 16, 80, 144, bias=True)[0]
  gemm = jitted(m=16, n=80, out_dtype=jnp.bfloat16, config=SMALL)
  bias = bias.astype(jnp.bfloat16)
  with interpreter():
    out = gemm(*operands, bias)
    expected = gemm(*operands, bias.astype(jnp.float32))
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("config", [SMALL, SHARED_RHS])
def test_ragged_and_hostile_sizes(interpreter, config):
  gemm = jitted(m=300, n=64, out_dtype=jnp.bfloat16, config=config)
  for sizes in [
    [1, 1, 1, 1, 1, 1],  # One row each, all among 8 rows of a SMEM tile.
    [0, 0, 0, 0, 0, 0],
    [0, 129, 3, 0, 5, 9],
    [0, 130, 0, 0, 137, 0],  # Clusters of rows of two groups.
    [4, 2**31 - 1, 2**31 - 1, 2**31 - 1, 4, 0],  # Beyond m: cut off.
    [-7, 20, -(2**31), 1, 1, -1],  # Negative: empty.
  ]:
    operands, *expected = m_grouped(sizes, 300, 64, 144)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("k", [128, 400])
def test_every_order_of_the_warpgroups(interpreter, k, turns):
  """Fewer slices than slots, and more."""
  config = Config(
    tile_n=64,
    compute_wgs=3,
    cluster=1,
    num_stages=3,
    turns=turns,
    num_sms=2,
  )
  with interpreter():
    run([9, 200, 0, 1], 220, 80, k, config)


@pytest.mark.parametrize(
  "config, offset",
  [(SMALL, offset) for offset in (-(2**31), -1, 0, 2, 4)]
  + [(SHARED_RHS, offset) for offset in (-1, 1, 2**31 - 1)],
)
def test_group_offset(interpreter, config, offset):
  """rhs holds 2 of 4 groups, from the offset on; rows of others are zero."""
  m, sizes = 200, [20, 140, 0, 37]
  (lhs, lhs_scales, rhs, rhs_scales, *_, bias), *expected = m_grouped(
    sizes, m, 64, 144, bias=True
  )
  held = [i for i in (offset, offset + 1) if 0 <= i < 4]
  ends = np.cumsum(sizes)
  kept = np.isin(np.searchsorted(ends, np.arange(m), side="right"), held)
  indices = np.clip(np.arange(2) + offset, 0, 3)
  with interpreter():
    out = jitted(m=m, n=64, out_dtype=jnp.bfloat16, config=config)(
      lhs,
      lhs_scales,
      rhs[indices],
      rhs_scales[indices],
      jnp.asarray(sizes, jnp.int32),
      jnp.asarray([offset], jnp.int32),
      bias[indices],
    )
  check(out, *(np.where(kept[:, None], x, 0) for x in expected))


def test_narrow_out(interpreter):
  """Columns beyond a narrow out, whole CTAs of them, are not stored."""
  with interpreter():
    run([3, 0, 6], 10, 16, 16, Config(num_sms=2))


def test_garbage_stays_where_it_is(interpreter):
  """NaN in a row, a group's weights or beyond the groups reaches no other."""
  m, sizes = 90, [21, 30, 17]
  operands, expected, magnitude = m_grouped(sizes, m, 64, 256, bias=True)
  lhs, lhs_scales, rhs, rhs_scales, *sizes, bias = operands
  lhs = lhs.at[5].set(jnp.nan).at[68:].set(jnp.nan)
  lhs_scales = lhs_scales.at[68:].set(jnp.nan)
  rhs = rhs.at[1, 3].set(jnp.nan)
  bias = bias.at[2, 60].set(jnp.nan)
  operands = (lhs, lhs_scales, rhs, rhs_scales, *sizes, bias)
  with interpreter():
    out = m_grouped_gemm(
      *operands,
      m=m,
      n=64,
      out_dtype=jnp.bfloat16,
      config=SMALL,
      interpret=True,
    )
  nan = np.zeros((m, 64), bool)
  nan[5] = nan[21:51, 3] = nan[51:68, 60] = True
  np.testing.assert_array_equal(np.isnan(out), nan)
  check(jnp.where(nan, 0, out), np.where(nan, 0, expected), magnitude)


def test_race_detection_works(capfd, monkeypatch):
  """Without its fence the kernel races, and the detector says so."""
  monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
  params = plgpu.InterpretGPUParams(detect_races=True)
  with plgpu.force_gpu_interpret_mode(params):
    run([100], 100, 64, 512, SMALL)
  assert "RACE DETECTED" in capfd.readouterr().out


def test_interpret_argument():
  """`interpret=True` is what implementation="interpret" asks for."""
  operands, expected, magnitude = m_grouped([9, 4], 13, 64, 128)
  out = m_grouped_gemm(
    *operands,
    m=13,
    n=64,
    out_dtype=jnp.float32,
    config=SMALL,
    interpret=True,
  )
  check(out, expected, magnitude)

"""The M-grouped kernel itself, in the interpreter, races included."""

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


def jitted(**static):
  return jax.jit(functools.partial(m_grouped_gemm, **static))


def run(sizes, m, n, k, config, dtype=jnp.bfloat16):
  operands, *expected = m_grouped(sizes, m, n, k)
  gemm = jitted(m=m, n=n, out_dtype=dtype, config=config)
  check(gemm(*operands), *expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile_n", [64, 128, 192])
def test_every_tile(interpreter, tile_n, cluster, dtype):
  config = Config(tile_n=tile_n, cluster=cluster, num_stages=3, num_sms=4)
  with interpreter():
    run([100, 0, 37, 200], 345, 2 * tile_n + 16, 400, config, dtype)


def test_every_pattern_of_empty_groups(interpreter):
  gemm = jitted(m=11, n=64, out_dtype=jnp.bfloat16, config=SMALL)
  for sizes in itertools.product([0, 3], repeat=3):
    operands, *expected = m_grouped(sizes, 11, 64, 16)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


def test_ragged_and_hostile_sizes(interpreter):
  gemm = jitted(m=300, n=64, out_dtype=jnp.bfloat16, config=SMALL)
  for sizes in [
    [1, 1, 1, 1, 1, 1],  # One row each, all among 8 rows of a SMEM tile.
    [0, 127, 1, 128, 0, 44],
    [0, 0, 300, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [0, 129, 3, 0, 5, 9],
    [4, 2**31 - 1, 2**31 - 1, 2**31 - 1, 4, 0],  # Beyond m: cut off.
    [-7, 20, -(2**31), 1, 1, -1],  # Negative: empty.
  ]:
    operands, *expected = m_grouped(sizes, 300, 64, 144)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


def test_narrow_out(interpreter):
  """Columns beyond a narrow out, whole CTAs of them, are not stored."""
  with interpreter():
    run([3, 0, 6], 10, 16, 16, Config(num_sms=2))


def test_garbage_stays_where_it_is(interpreter):
  """NaN in a row, a group's weights or beyond the groups reaches no other."""
  m, sizes = 90, [21, 30, 17]
  operands, expected, magnitude = m_grouped(sizes, m, 64, 256)
  lhs, lhs_scales, rhs, rhs_scales, *bounds = operands
  lhs = lhs.at[5].set(jnp.nan).at[68:].set(jnp.nan)
  lhs_scales = lhs_scales.at[68:].set(jnp.nan)
  rhs = rhs.at[1, 3].set(jnp.nan)
  operands = (lhs, lhs_scales, rhs, rhs_scales, *bounds)
  with interpreter():
    out = m_grouped_gemm(
      *operands, m=m, n=64, out_dtype=jnp.bfloat16, config=SMALL
    )
  nan = np.zeros((m, 64), bool)
  nan[5], nan[21:51, 3] = True, True
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

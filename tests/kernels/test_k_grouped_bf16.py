"""The K-grouped kernel of 16-bit operands, in the interpreter, races included.

Rows of no group are NaN in all problems.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from problems import check
from problems_bf16 import k_grouped

from jax_grouped_gemm.config import Config
from jax_grouped_gemm.kernels.k_grouped_bf16 import k_grouped_bf16

pytestmark = pytest.mark.slow

SMALL = Config(tile_n=64, cluster=1, num_stages=2, num_sms=2)


def jitted(**static):
  return jax.jit(functools.partial(k_grouped_bf16, interpret=True, **static))


def run(
  starts, ends, t, m, n, config, dtype=jnp.bfloat16, out_dtype=jnp.float32
):
  operands, *expected = k_grouped(starts, ends, t, m, n, dtype)
  gemm = jitted(m=m, n=n, out_dtype=out_dtype, config=config)
  check(gemm(*operands), *expected)


@pytest.mark.parametrize(
  "tile_n, cluster, out_dtype",
  [
    (128, 1, jnp.bfloat16),
    (192, 2, jnp.float32),
    (256, 2, jnp.bfloat16),
  ],
)
def test_every_tile(interpreter, tile_n, cluster, out_dtype):
  config = Config(tile_n=tile_n, cluster=cluster, num_stages=3, num_sms=4)
  with interpreter():
    run(
      [5, 155, 155],
      [155, 155, 180],
      187,
      136,
      tile_n + 24,
      config,
      out_dtype=out_dtype,
    )


@pytest.mark.parametrize(
  "starts, ends",
  [
    # One row each, among 8 rows of a SMEM tile; none; all but the last row.
    ([0, 1, 2, 3], [1, 2, 2, 150]),
    # Whole slices; a slice and a row; a row that starts one; a gap.
    ([0, 64, 129, 140], [64, 129, 130, 151]),
    # Nothing is anybody's.
    ([0, 0, 151, 151], [0, 0, 151, 151]),
    # The last of 8 rows, and three slices.
    ([7, 8, 136, 136], [8, 136, 136, 151]),
  ],
)
def test_ragged_groups(interpreter, starts, ends):
  with interpreter():
    run(starts, ends, 151, 72, 64, SMALL)


def test_float16(interpreter):
  with interpreter():
    run([0, 9], [9, 13], 13, 40, 24, SMALL, jnp.float16)


def test_nan_stays_in_its_group(interpreter):
  """As a token's feature, on either side: its row or column of its group."""
  bounds = [0, 21, 30], [21, 30, 50]
  operands, expected, magnitude = k_grouped(*bounds, 50, 64, 64)
  lhs, rhs, *bounds = operands
  lhs, rhs = lhs.at[20, 3].set(jnp.nan), rhs.at[30, 5].set(jnp.nan)
  gemm = jitted(m=64, n=64, out_dtype=jnp.float32, config=SMALL)
  with interpreter():
    out = gemm(lhs, rhs, *bounds)
  nan = np.zeros(out.shape, bool)
  nan[0, 3] = nan[2, :, 5] = True
  np.testing.assert_array_equal(np.isnan(out), nan)
  check(jnp.where(nan, 0, out), np.where(nan, 0, expected), magnitude)


def test_race_detection_works(capfd, caplog, monkeypatch):
  """Without its fences the kernel races, and the detector says so."""
  monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
  params = plgpu.InterpretGPUParams(detect_races=True)
  with plgpu.force_gpu_interpret_mode(params):
    with contextlib.suppress(RuntimeError):  # Newer jax logs and raises it.
      run([3], [60], 64, 64, 64, SMALL)
  assert "RACE DETECTED" in capfd.readouterr().out + caplog.text

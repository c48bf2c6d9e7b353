"""The K-grouped kernel itself, in the interpreter, races included."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import check, k_grouped

from jax_grouped_gemm.config import Config
from jax_grouped_gemm.kernels.k_grouped import k_grouped_gemm

pytestmark = pytest.mark.slow

SMALL = Config(tile_n=64, cluster=1, num_stages=2, num_sms=2)
SMALL_TURNS = dataclasses.replace(SMALL, turns=True)


def jitted(**static):
  return jax.jit(functools.partial(k_grouped_gemm, interpret=True, **static))


def run(sizes, t, m, n, config, accumulator=False, dtype=jnp.float32):
  operands, *expected = k_grouped(sizes, t, m, n, accumulator)
  gemm = jitted(m=m, n=n, out_dtype=dtype, config=config)
  check(gemm(*operands), *expected)


@pytest.mark.parametrize(
  "tile_n, cluster, accumulator",
  [
    (64, 1, True),
    (64, 2, False),
    (128, 1, False),
    (128, 2, True),
    (192, 1, True),
    (192, 2, False),
  ],
)
def test_every_tile(interpreter, tile_n, cluster, accumulator):
  config = Config(tile_n=tile_n, cluster=cluster, num_stages=2, num_sms=2)
  with interpreter():
    run([100, 0, 300], 400, 144, tile_n + 16, config, accumulator)


@pytest.mark.parametrize(
  "config, accumulator", [(SMALL, True), (SMALL_TURNS, False)]
)
def test_every_pattern_of_empty_groups(interpreter, accumulator, config):
  gemm = jitted(m=16, n=16, out_dtype=jnp.float32, config=config)
  for sizes in itertools.product([0, 3], repeat=3):
    operands, *expected = k_grouped(sizes, 11, 16, 16, accumulator)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


def test_ragged_and_hostile_sizes(interpreter):
  gemm = jitted(m=80, n=48, out_dtype=jnp.float32, config=SMALL)
  for sizes in [
    [1, 1, 1, 1, 1, 1],
    [0, 0, 300, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [0, 129, 3, 0, 5, 9],
    [4, 2**31 - 1, 2**31 - 1, 2**31 - 1, 4, 0],  # Beyond t: cut off.
    [-7, 20, -(2**31), 1, 1, -1],  # Negative: empty.
  ]:
    operands, *expected = k_grouped(sizes, 300, 80, 48, False)
    with interpreter():
      check(gemm(*operands), *expected, label=sizes)


def test_every_number_of_blocks(interpreter):
  """Fewer than there are slots, as many, more."""
  with interpreter():
    sizes = [128 * blocks for blocks in range(1, 5)]
    run(sizes, sum(sizes), 16, 16, SMALL)


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_adds_to_each_accumulator(interpreter, shared):
  """Also where all problems of the batch start from the same one."""
  sizes = [3, 0, 140]
  operands, expected, magnitude = k_grouped(sizes, 143, 16, 16, True)
  scales, accumulator = operands[1], operands[-1]
  in_axes = [None] * len(operands)
  in_axes[1], in_axes[-1] = 0, None if shared else 0
  batch = list(operands)
  batch[1] = jnp.stack([scales, 2 * scales])
  if not shared:
    batch[-1] = jnp.stack([accumulator, -accumulator])
  gemm = functools.partial(
    k_grouped_gemm,
    interpret=True,
    m=16,
    n=16,
    out_dtype=jnp.float32,
    config=SMALL,
  )
  with interpreter():
    first, second = jax.jit(jax.vmap(gemm, in_axes))(*batch)
  check(first, expected, magnitude)
  added = 2 * (expected - np.asarray(accumulator, np.float64))
  sign = 1 if shared else -1
  check(second, added + sign * np.asarray(accumulator), 2 * magnitude)


def test_bf16_out(interpreter):
  with interpreter():
    run([130, 200], 330, 128, 192, SMALL, dtype=jnp.bfloat16)


def test_garbage_stays_where_it_is(interpreter):
  """NaN in the blocks of a group, or of none, reaches no other group."""
  sizes, t = [100, 200, 50], 500
  operands, expected, magnitude = k_grouped(sizes, t, 64, 64, False)
  lhs, lhs_scales, *rest = operands
  lhs = lhs.at[:, 128:384].set(jnp.nan).at[:, 512:].set(jnp.nan)
  lhs_scales = lhs_scales.at[:, 4:].set(jnp.nan)
  with interpreter():
    gemm = jitted(m=64, n=64, out_dtype=jnp.float32, config=SMALL)
    out = gemm(lhs, lhs_scales, *rest)
  assert np.isnan(out[1]).all()
  others = np.array([0, 2])
  check(out[others], expected[others], magnitude[others])

"""k_grouped_gemm against the float64 oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_grouped_gemm import (
  Config,
  ScaledArray,
  k_grouped_gemm,
  quantize_for_k_grouped,
)

# Few and small: the interpreter runs one thread for each warpgroup of a CTA.
SMALL = Config(tile_n=64, cluster=1, num_stages=2, num_sms=2)
quantized = jax.jit(quantize_for_k_grouped)


def operands(t, m, n, sizes, seed=0):
  return tuple(
    quantized(oracle.random_floats((t, features), seed + i), jnp.array(sizes))
    for i, features in enumerate((m, n))
  )


@functools.partial(
  jax.jit, static_argnames=("implementation", "preferred_element_type")
)
def run(lhs, rhs, sizes, accumulator=None, **kwargs):
  return k_grouped_gemm(
    lhs, rhs, sizes, accumulator=accumulator, config=SMALL, **kwargs
  )


def check(lhs, rhs, sizes, accumulator=None, **kwargs):
  out = run(lhs, rhs, jnp.array(sizes), accumulator, **kwargs)
  oracle.check_k_grouped(out, lhs, rhs, sizes, accumulator)
  return out


@pytest.mark.parametrize("with_accumulator", [False, True])
@pytest.mark.parametrize(
  ("t", "m", "n"), [(1, 16, 16), (45, 80, 144), (300, 16, 80)]
)
def test_shapes(t, m, n, with_accumulator, implementation):
  sizes = (t // 3, 0, t // 2)
  accumulator = oracle.random_floats((3, m, n)) if with_accumulator else None
  check(
    *operands(t, m, n, sizes),
    sizes,
    accumulator,
    implementation=implementation,
  )


@pytest.mark.parametrize("g", [1, 2, 3])
def test_every_pattern_of_empty_groups(g, implementation):
  accumulator = oracle.random_floats((g, 16, 16))
  for sizes in itertools.product((0, 3), repeat=g):
    lhs, rhs = operands(11, 16, 16, sizes)
    out = check(lhs, rhs, sizes, implementation=implementation)
    assert (out[np.array(sizes) == 0] == 0).all()
    out = check(lhs, rhs, sizes, accumulator, implementation=implementation)
    empty = np.array(sizes) == 0
    np.testing.assert_array_equal(out[empty], accumulator[empty])


@pytest.mark.parametrize(
  "sizes",
  [
    (1, 1, 1, 1),
    (0, 0, 300, 0),
    (0, 0, 0, 0),
    (127, 128, 1, 20),
    (129, 0, 5, 128),
    (-7, 20, -(2**31), 1),
    (4, 2**31 - 1, 2**31 - 1, 3),
  ],
)
def test_sizes(sizes, implementation):
  lhs, rhs = operands(300, 48, 32, sizes)
  check(lhs, rhs, sizes, implementation=implementation)


def test_sizes_beyond_the_operands(implementation):
  """Sizes other than those the operands were made with are cut off."""
  lhs, rhs = operands(300, 16, 32, (100, 150, 50))
  for sizes in [(2**31 - 1, 5, 0), (640, 640, 640), (-1, 200, 2**30)]:
    check(lhs, rhs, sizes, implementation=implementation)


def test_bf16_results(implementation):
  sizes = (30, 0, 70)
  out = check(
    *operands(100, 32, 48, sizes),
    sizes,
    preferred_element_type=jnp.bfloat16,
    implementation=implementation,
  )
  assert out.dtype == jnp.bfloat16


def test_nan_stays_in_its_group(implementation):
  sizes = (20, 0, 130, 30)
  tokens = [oracle.random_floats((200, size)) for size in (32, 48)]
  tokens[0][25, 3] = np.nan  # A token of group 2.
  tokens[1][180:] = np.nan  # Tokens of no group.
  lhs, rhs = (quantized(x, jnp.array(sizes)) for x in tokens)
  out = check(lhs, rhs, sizes, implementation=implementation)
  nan = np.zeros(out.shape, bool)
  nan[2, 3] = True
  np.testing.assert_array_equal(np.isnan(out), nan)


def test_storage_without_padding(implementation):
  """Values as a user would build them give the same."""
  sizes = (6, 5)
  padded = operands(13, 48, 32, sizes)
  bare = [
    ScaledArray(x.values[: x.shape[0]], x.scales, (1, 128)) for x in padded
  ]
  np.testing.assert_array_equal(
    run(*bare, jnp.array(sizes), implementation=implementation),
    run(*padded, jnp.array(sizes), implementation=implementation),
  )


@pytest.mark.parametrize(
  "accumulator", [None, np.ones((2, 16, 32), np.float32)]
)
def test_no_tokens(accumulator):
  lhs, rhs = operands(0, 16, 32, (0, 0))
  out = k_grouped_gemm(lhs, rhs, jnp.array([0, 0]), accumulator=accumulator)
  np.testing.assert_array_equal(
    out, np.zeros((2, 16, 32)) if accumulator is None else accumulator
  )


@given(
  shape=st.sampled_from([(50, 24, 40, 3), (300, 16, 8, 5), (7, 40, 8, 2)]),
  sizes=st.lists(st.integers(-3, 150), min_size=5, max_size=5),
)
def test_any_sizes(shape, sizes):
  *shape, g = shape
  sizes = tuple(sizes[:g])
  check(*operands(*shape, sizes), sizes)

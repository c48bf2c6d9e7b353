"""Which rows and token blocks groups own, and the tiles they are cut into."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jax_grouped_gemm import schedule

BIG, SMALL = 2**31 - 1, -(2**31)
HOSTILE = [
  [5, -3, 7, -1],
  [-1, -1, -1, -1],
  [200, 200, 200, 200],
  [BIG, BIG, BIG, BIG],
  [SMALL, BIG, SMALL, BIG],
  [0, BIG, 1, SMALL],
]
# Of any size, and most often of one that matters.
SIZES = st.integers(-3, 60) | st.sampled_from([SMALL, BIG, 127, 128, 129])


def lists(count):
  return st.lists(SIZES, min_size=count, max_size=count)


def pairs(bounds):
  return list(zip(*(np.asarray(x).tolist() for x in bounds), strict=True))


def check_bounds(bounds, expected, limit):
  """The right rows, in order and without a gap or an overlap."""
  bounds = pairs(bounds)
  for actual, wanted in zip(bounds, expected, strict=True):
    if wanted[0] != wanted[1]:
      assert actual == wanted
    assert 0 <= actual[0] <= actual[1] <= limit
    assert actual[1] - actual[0] == wanted[1] - wanted[0]
  for (_, end), (start, _) in zip(bounds, bounds[1:], strict=False):
    assert end == start


# ---------------------------------------------------------------- groups

group_bounds = jax.jit(schedule.group_bounds, static_argnums=(1, 3))


@pytest.mark.parametrize("m", [0, 1, 300, 2**30 - 1])
@pytest.mark.parametrize("sizes", HOSTILE)
def test_group_bounds_of_hostile_sizes(sizes, m):
  bounds = group_bounds(jnp.array(sizes, jnp.int32), m)
  check_bounds(bounds, oracle.group_rows(sizes, m), m)


@pytest.mark.parametrize(
  "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"]
)
@pytest.mark.parametrize("m", [100, 70_000])
def test_group_bounds_of_any_integers(dtype, m):
  limits = jnp.iinfo(dtype)
  for sizes in ([3, 0, 100, 90], [int(limits.max)] * 4, [int(limits.min)] * 4):
    sizes = np.array(sizes, dtype)
    check_bounds(group_bounds(sizes, m), oracle.group_rows(sizes, m), m)
    offset = np.array([1], dtype)
    check_bounds(
      group_bounds(sizes, m, offset, 2),
      oracle.group_rows(sizes, m, offset, 2),
      m,
    )


def test_group_bounds_of_64_bits():
  with jax.enable_x64(True):
    sizes = jnp.array([3, 2**40 + 1, -(2**40) - 1, 5], jnp.int64)
    offset = jnp.array([-(2**40) - 1], jnp.int64)
    bounds = group_bounds(sizes, 10), group_bounds(sizes, 10, offset, 2)
  check_bounds(bounds[0], oracle.group_rows(sizes, 10), 10)
  check_bounds(bounds[1], [(0, 0), (0, 0)], 10)


@pytest.mark.parametrize("offset", [*range(-5, 7), SMALL, BIG])
@pytest.mark.parametrize("num_groups", [1, 3, 4])
def test_group_bounds_with_offset(offset, num_groups):
  sizes, m = jnp.array([5, 0, 7, 9]), 19
  offset = jnp.array([offset], jnp.int32)
  bounds = group_bounds(sizes, m, offset, num_groups)
  expected = oracle.group_rows(sizes, m, offset, num_groups)
  check_bounds(bounds, expected, m)


@given(st.sampled_from([0, 1, 40, 300]), lists(6))
def test_group_bounds(m, sizes):
  bounds = group_bounds(jnp.array(sizes, jnp.int32), m)
  check_bounds(bounds, oracle.group_rows(sizes, m), m)


# ---------------------------------------------------------------- tiles


@functools.partial(jax.jit, static_argnums=(1, 2, 4))
def make_tiles(sizes, m, tile_m, offset=None, num_groups=None):
  bounds = schedule.group_bounds(sizes, m, offset, num_groups)
  return schedule.make_tiles(*bounds, m, tile_m)


def check_tiles(tiles, rows, m, tile_m):
  group, row, size, (count,) = map(np.asarray, tiles)
  assert len(row) == max(1, schedule.max_tiles(m, len(rows), tile_m))
  assert count <= len(row)
  owner, tiles_of_row = np.full(m, -2), np.zeros(m, int)
  for i in range(count):
    assert 1 <= size[i] <= tile_m
    own = slice(row[i], row[i] + size[i])
    assert own.stop <= m
    owner[own] = group[i]
    tiles_of_row[own] += 1
  expected = np.full(m, -1)
  for i, (first, last) in enumerate(rows):
    expected[first:last] = i
  np.testing.assert_array_equal(tiles_of_row, 1)
  np.testing.assert_array_equal(owner, expected)
  assert (np.diff(row[:count]) > 0).all()


@given(st.sampled_from([(1, 8), (11, 8), (300, 16), (300, 128)]), lists(5))
@example((300, 16), [59, 61, 60, 61, 58])
@example((300, 128), [0, 0, 300, 0, 0])
@example((11, 8), [1, 1, 1, 1, 1])
def test_each_row_is_in_one_tile(problem, sizes):
  m, tile_m = problem
  tiles = make_tiles(jnp.array(sizes, jnp.int32), m, tile_m)
  check_tiles(tiles, oracle.group_rows(sizes, m), m, tile_m)


@pytest.mark.parametrize("offset", range(-3, 6))
def test_rows_of_other_groups_are_in_tiles_of_no_group(offset):
  sizes, m, offset = jnp.array([9, 0, 30, 21]), 77, jnp.array([offset])
  rows = oracle.group_rows(sizes, m, offset, 2)
  check_tiles(make_tiles(sizes, m, 16, offset, 2), rows, m, 16)


def test_no_rows_no_tiles():
  assert make_tiles(jnp.array([0, 3]), 0, 8).count[0] == 0


def test_max_tiles_can_be_reached():
  """By a tile before, three groups, and a tile after them."""
  tiles = make_tiles(jnp.ones(4, jnp.int32), 100, 128, jnp.array([1]), 3)
  assert tiles.count[0] == schedule.max_tiles(100, 3, 128) == 5


# ---------------------------------------------------------------- K-grouped

token_block_bounds = jax.jit(schedule.token_block_bounds, static_argnums=1)


def check_blocks(sizes, num_blocks):
  blocks = [math.ceil(max(int(size), 0) / 128) for size in sizes]
  expected = oracle.group_rows(blocks, num_blocks)
  check_bounds(token_block_bounds(sizes, num_blocks), expected, num_blocks)


@pytest.mark.parametrize("num_blocks", [0, 4, 2**24 - 1])
@pytest.mark.parametrize("sizes", HOSTILE)
def test_token_blocks_of_hostile_sizes(sizes, num_blocks):
  check_blocks(np.array(sizes, np.int32), num_blocks)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
@pytest.mark.parametrize("num_blocks", [4, 600])
def test_token_blocks_of_any_integers(dtype, num_blocks):
  limit = int(jnp.iinfo(dtype).max)
  check_blocks(np.array([3, 0, 100, limit], dtype), num_blocks)


@given(st.sampled_from([1, 4, 7]), lists(5))
def test_token_blocks(num_blocks, sizes):
  check_blocks(np.array(sizes, np.int32), num_blocks)


@pytest.mark.parametrize("t", [0, 1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("groups", [1, 2, 5, 200])
def test_max_token_blocks_is_the_worst_case(t, groups):
  """One token in each group but one, which has the rest, needs the most."""
  sizes = [1] * (min(groups, t) - 1)
  sizes.append(t - len(sizes))
  worst = sum(math.ceil(size / 128) for size in sizes)
  assert schedule.max_token_blocks(t, groups) == worst

"""Which tiles the CTAs visit, outside of a kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_grouped_gemm.config import Config, SmallGroupsConfig
from jax_grouped_gemm.kernels._groups import MaskedWalk, Walk
from jax_grouped_gemm.schedule import Masked

N, GROUPS = 400, 7
CONFIGS = [
  Config(tile_n=64, cluster=1),
  SmallGroupsConfig(tile_m=8, tile_n=64),
  SmallGroupsConfig(tile_m=32, tile_n=128),
]
SIZES = [
  [3, 0, 9, 0, 0, 40, 0],
  [0, 0, 0, 0, 0, 0, 64],
  [0, 0, 0, 0, 0, 0, 0],
  [8, 8, 8, 8, 8, 8, 8],
]


def make_visited(kind, m, config, in_rhs):
  """Returns a function from sizes to {(group, column tile): rows, sorted}."""

  @jax.jit
  def tiles_of(sizes):
    walk = kind(sizes, jnp.array([0]), (m, N, GROUPS), config, in_rhs=in_rhs)

    def tile(index):
      group = walk.find_group(index, walk.first_group(jnp.int32(0)))
      return walk.is_left(group), walk.tile(index, group)[0]

    indices = jnp.arange(GROUPS * 8 * -(-N // config.tile_n) + 1)
    # One CTA in a cluster.
    one_cta = jax.vmap(lambda _: jax.vmap(tile)(indices), axis_name="cta")
    return jax.tree.map(lambda x: x[0], one_cta(indices[:1]))

  def visited(sizes):
    is_tile, tiles = jax.tree.map(np.asarray, tiles_of(jnp.array(sizes)))
    count = is_tile.sum()
    assert is_tile[:count].all() and not is_tile[-1]
    rows = {}
    for group, ni, row, offset, size in np.stack(tiles, 1)[:count].tolist():
      assert row % 8 == 0 and size > 0 and offset + size <= config.tile_m
      first = row + offset
      rows.setdefault((group, ni), []).extend(range(first, first + size))
    return {key: sorted(found) for key, found in rows.items()}

  return visited


def expected(bounds, config):
  """Every group that has rows, and no other: all of its rows, once."""
  return {
    (group, ni): list(range(start, end))
    for group, (start, end) in enumerate(bounds)
    for ni in range(-(-N // config.tile_n))
    if end > start
  }


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_contiguous(config):
  visited = make_visited(Walk, 64, config, in_rhs=True)
  for sizes in SIZES:
    ends = np.cumsum(sizes)
    bounds = zip(ends - sizes, ends, strict=True)
    assert visited(sizes) == expected(bounds, config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_masked(config):
  """Rows in use, and those that are not, of 64 rows per group."""
  kind = functools.partial(MaskedWalk, masked=Masked(64, 60, True))
  m, starts = 64 * GROUPS, 64 * np.arange(GROUPS)
  visited_used = make_visited(kind, m, config, in_rhs=True)
  visited_others = make_visited(kind, m, config, in_rhs=False)
  for sizes in SIZES:
    used = starts + np.minimum(sizes, 60)
    bounds = zip(starts, used, strict=True)
    assert visited_used(sizes) == expected(bounds, config)
    others = visited_others(sizes)
    assert len({str(rows) for rows in others.values()}) == 1  # In all columns.
    assert others[0, 0] == [
      row
      for end, start in zip(used, starts, strict=True)
      for row in range(end, start + 64)
    ]


@pytest.mark.parametrize(
  "rows, heights",
  [(64, [64]), (200, [128, 72]), (449, [128, 192, 129]), (576, [192] * 3)],
)
def test_tiles_of_a_group_are_alike(rows, heights):
  """Of 64 rows per warpgroup, but for the last; as alike as they can be."""
  config = Config(tile_n=128, compute_wgs=3, cluster=1)
  sizes, shape = jnp.array([rows]), (rows, 128, 1)

  def tile(index):
    walk = Walk(sizes, jnp.array([0]), shape, config, in_rhs=True)
    group = walk.find_group(index, walk.first_group(jnp.int32(0)))
    return walk.tile(index, group)[0]

  indices = jnp.arange(len(heights))
  tiles = jax.vmap(lambda _: jax.vmap(tile)(indices), axis_name="cta")(
    indices[:1]
  )
  order = np.argsort(tiles.row[0])
  assert tiles.size[0][order].tolist() == heights
  np.testing.assert_array_equal(
    tiles.row[0][order], np.cumsum([0, *heights[:-1]])
  )

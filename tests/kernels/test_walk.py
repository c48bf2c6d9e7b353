"""Which tiles the CTAs visit, outside of a kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_grouped_gemm.config import Config, SmallGroupsConfig
from jax_grouped_gemm.kernels._walk import MaskedWalk, Walk
from jax_grouped_gemm.schedule import Masked

N = 400
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


def visited(walk, config):
  """Returns {(group, column tile): its rows, sorted} of the walk's tiles."""

  def tile(index):
    group = walk.find_group(index, walk.first_group(jnp.int32(0)))
    return walk.is_left(group), walk.tile(index, group)[0]

  indices = jnp.arange(7 * 8 * -(-N // config.tile_n) + 1)
  # One CTA in a cluster.
  one_cta = jax.vmap(lambda _: jax.vmap(tile)(indices), axis_name="cta")
  is_tile, tiles = jax.tree.map(
    lambda x: np.asarray(x[0]), one_cta(indices[:1])
  )
  count = is_tile.sum()
  assert is_tile[:count].all() and not is_tile[-1]
  rows = {}
  for group, ni, row, offset, size in np.stack(tiles, 1)[:count].tolist():
    assert row % 8 == 0 and size > 0 and offset + size <= config.tile_m
    first = row + offset
    rows.setdefault((group, ni), []).extend(range(first, first + size))
  return {key: sorted(found) for key, found in rows.items()}


def expected(bounds, config):
  """Every group that has rows, and no other: all of its rows, once."""
  return {
    (group, ni): list(range(start, end))
    for group, (start, end) in enumerate(bounds)
    for ni in range(-(-N // config.tile_n))
    if end > start
  }


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_contiguous(config, sizes):
  shape = 64, N, len(sizes)
  walk = Walk(jnp.array(sizes), jnp.array([0]), shape, config, in_rhs=True)
  ends = np.cumsum(sizes)
  bounds = zip(ends - sizes, ends, strict=True)
  assert visited(walk, config) == expected(bounds, config)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_masked(config, sizes):
  """Rows in use, and those that are not, of 64 rows per group."""
  shape = 64 * len(sizes), N, len(sizes)
  kind = functools.partial(MaskedWalk, masked=Masked(64, 60, True))
  sizes = np.array(sizes)
  starts = 64 * np.arange(len(sizes))
  used = starts + np.minimum(sizes, 60)
  walk = kind(jnp.array(sizes), jnp.array([0]), shape, config, in_rhs=True)
  bounds = zip(starts, used, strict=True)
  assert visited(walk, config) == expected(bounds, config)
  walk = kind(jnp.array(sizes), jnp.array([0]), shape, config, in_rhs=False)
  others = visited(walk, config)
  rows = [row for (_, ni), found in others.items() if ni == 0 for row in found]
  assert sorted(rows) == [
    row
    for end, start in zip(used, starts, strict=True)
    for row in range(end, start + 64)
  ]

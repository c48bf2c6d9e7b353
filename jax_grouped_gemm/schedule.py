"""Which rows a group owns, and how they are cut into tiles.

Group sizes are data, so nothing here trusts them: a negative size counts as 0
and what lies beyond the last row is cut off, before any size becomes an
address.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32

# Rows that one scale of a K-grouped operand covers; groups are padded to it.
TOKEN_BLOCK = 128


def _clip(x: Int[Array, "..."], low: int, high: int) -> Int32[Array, "..."]:
  """clip(x, low, high) for low <= 0 <= high, whatever x can represent."""
  limits = jnp.iinfo(x.dtype)
  x = jnp.clip(x, max(low, int(limits.min)), min(high, int(limits.max)))
  return x.astype(jnp.int32)


def as_int32(x: Int[Array, "..."]) -> Int32[Array, "..."]:
  """Returns x, cut off at the limits of int32. Nothing to do for int32."""
  limits = jnp.iinfo(jnp.int32)
  return x if x.dtype == jnp.int32 else _clip(x, limits.min, limits.max)


def _saturating_cumsum(sizes: Int[Array, "g"], limit: int) -> Int32[Array, "g"]:
  """cumsum(sizes) cut off at `limit`, free of overflow for any sizes."""
  sizes = _clip(sizes, 0, limit)  # Two such sizes add up within int32.
  return lax.associative_scan(lambda a, b: jnp.minimum(a + b, limit), sizes)


def group_bounds(
  group_sizes: Int[Array, "g_all"],
  m: int,
  group_offset: Int[Array, "1"] | None = None,
  num_groups: int | None = None,
) -> tuple[Int32[Array, "g"], Int32[Array, "g"]]:
  """Returns (starts, ends), the rows [start, end) of each group, within [0, m].

  With `group_offset`, the groups are the `num_groups` ones from there on; those
  that would lie outside `group_sizes` are empty.
  """
  ends = _saturating_cumsum(group_sizes, m)
  starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]])
  if group_offset is None:
    return starts, ends
  groups = ends.shape[0]
  offset = _clip(group_offset.reshape(()), -num_groups, groups)
  index = offset + jnp.arange(num_groups, dtype=jnp.int32)
  inside = (index >= 0) & (index < groups)
  # Of those outside: empty, and without a gap to the groups inside.
  edge = jnp.where(index < 0, 0, ends[-1])
  index = jnp.clip(index, 0, groups - 1)
  return (
    jnp.where(inside, starts[index], edge),
    jnp.where(inside, ends[index], edge),
  )


class Masked(NamedTuple):
  """Groups that each have rows of their own, of which the first are in use.

  Static: how many are in use is data.
  """

  rows: int  # of a group, a multiple of 8
  max_m: int  # most that may be in use
  zero_padding: bool  # whether the others are zeros, or left alone


class Tiles(NamedTuple):
  """The row tiles of an M-grouped GEMM, in ascending order of their rows.

  Every row in [0, m) belongs to one tile. Entries past `count` are not tiles.
  """

  group: Int32[Array, "t"]  # group whose rows these are; -1: rows of no group.
  row: Int32[Array, "t"]  # first row.
  size: Int32[Array, "t"]  # rows that belong to the tile; >= 1.
  count: Int32[Array, "1"]  # number of tiles.


def max_tiles(m: int, num_groups: int, tile_m: int) -> int:
  """Upper bound of the number of tiles, whatever the group sizes."""
  # The groups, the rows before the first one and those after the last one.
  ranges = min(num_groups + 2, m)
  return (m + ranges * (tile_m - 1)) // tile_m


def make_tiles(
  starts: Int32[Array, "g"],
  ends: Int32[Array, "g"],
  m: int,
  tile_m: int,
) -> Tiles:
  """Cuts each group's rows, and the rows of no group, into tiles."""
  first = jnp.concatenate([jnp.zeros((1,), jnp.int32), starts, ends[-1:]])
  last = jnp.concatenate([starts[:1], ends, jnp.full((1,), m, jnp.int32)])
  tiles = jnp.where(last > first, _ceil_div(last - first, tile_m), 0)
  tile_ends = jnp.cumsum(tiles)
  index = jnp.arange(
    max(1, max_tiles(m, starts.shape[0], tile_m)), dtype=jnp.int32
  )
  group = jnp.minimum(range_of(tile_ends, index), first.shape[0] - 1)
  row = first[group] + (index - (tile_ends - tiles)[group]) * tile_m
  size = jnp.minimum(last[group] - row, tile_m)
  is_group = (group > 0) & (group <= starts.shape[0])
  return Tiles(
    group=jnp.where(is_group, group - 1, -1),
    row=row,
    size=size,
    count=tile_ends[-1:].astype(jnp.int32),
  )


def range_of(
  ends: Int32[Array, "g"], index: Int32[Array, "n"]
) -> Int32[Array, "n"]:
  """Returns in which of the ranges that end there each index is; g if in none.

  jnp.searchsorted fails in a jax.shard_map over some of the mesh's axes (jax
  0.11.2).
  """
  return jnp.sum(ends[:, None] <= index[None], axis=0, dtype=jnp.int32)


def _ceil_div(a: jax.Array, b: int) -> jax.Array:
  """ceil(a / b) for a >= 0, without the overflow of (a + b - 1)."""
  b = jnp.asarray(b, a.dtype)  # Of a Python number, 64-bit mode makes int64.
  return lax.div(a, b) + (lax.rem(a, b) != 0).astype(a.dtype)


# ---------------------------------------------------------------- K-grouped


def max_token_blocks(t: int, num_groups: int) -> int:
  """Upper bound of the token blocks that groups of `t` tokens in all fill."""
  return (t + min(num_groups, t) * (TOKEN_BLOCK - 1)) // TOKEN_BLOCK


def token_block_bounds(
  sizes: Int[Array, "g"], num_blocks: int
) -> tuple[Int32[Array, "g"], Int32[Array, "g"]]:
  """Returns (starts, ends), the token blocks of each group, within num_blocks.

  Each group starts at a block of its own.
  """
  sizes = _clip(sizes, 0, num_blocks * TOKEN_BLOCK)
  ends = _saturating_cumsum(_ceil_div(sizes, TOKEN_BLOCK), num_blocks)
  return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]]), ends


def token_blocks(
  starts: Int32[Array, "g"], ends: Int32[Array, "g"], num_tokens: int
) -> tuple[Int32[Array, "b"], Int32[Array, "b"]]:
  """Returns (first, sizes), the tokens of each of max_token_blocks blocks.

  Those past the last group's have none.
  """
  groups = starts.shape[0]
  num_blocks = max_token_blocks(num_tokens, groups)
  block_starts, block_ends = token_block_bounds(ends - starts, num_blocks)
  block = jnp.arange(num_blocks, dtype=jnp.int32)
  # The last blocks may be nobody's: past all tokens of the last group.
  group = jnp.minimum(range_of(block_ends, block), groups - 1)
  first = starts[group] + (block - block_starts[group]) * TOKEN_BLOCK
  return first, jnp.clip(ends[group] - first, 0, TOKEN_BLOCK)

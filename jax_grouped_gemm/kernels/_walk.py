"""Finds, loads and stores a CTA's tiles of an M-grouped GEMM."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.kernels import _pipeline, _queue, _staging
from jax_grouped_gemm.kernels._groups import MaskedWalk, Tile, Walk
from jax_grouped_gemm.schedule import Masked


def load_tiles(
  refs,
  config,
  masked: Masked | None,
  k_iters: int,
  load_tile,
  store_rows,
  has_rows=_staging.has_rows,
):
  """Announces this CTA's tiles, loads and stores them.

  Returns the slots that were filled. First come the tiles of groups that rhs
  holds, by load_tile(i, tile, one_group, k_iters, step, beside), which returns
  the step after the tile and meanwhile runs beside() on a second warp: it
  stores the tile before, by store_rows(tile, wg) of each warpgroup that
  has_rows(tile, wg). At last the tiles of other rows, which are zeros.
  """
  shape = (*refs.out_gmem.shape, refs.rhs_gmem.shape[0])
  kind = functools.partial(MaskedWalk, masked=masked) if masked else Walk
  walk = functools.partial(
    kind, refs.group_sizes_gmem, refs.group_offset_gmem, shape, config
  )
  storing = _staging.Storing(refs, config.compute_wgs, has_rows, store_rows)

  def find_tile(walk: Walk, index, group):
    group = walk.find_group(index, group)
    tile, one_group = walk.tile(index, group)
    return group, tile, walk.is_left(group), one_group

  def load_next(i, tile: Tile, one_group, step, last: Tile):
    return load_tile(
      i,
      tile,
      one_group,
      lax.select(tile.group == _queue.END, 0, k_iters),
      step,
      lambda: pl.when(i > 0)(lambda: storing.store(last)),
    )

  def store_next(state):
    i, group, _ = state
    index = _queue.nth_index(i)
    group, tile, is_tile, _ = find_tile(of_others, index, group)
    store = lambda: storing.store_zeros(tile)
    pl.when(is_tile)(lambda: _pipeline.on_second_warp(store))
    return i + 1, group, is_tile

  zero = jnp.int32(0)
  of_rhs, of_others = walk(in_rhs=True), walk(in_rhs=False)
  end, step = _queue.load_tiles(
    refs,
    functools.partial(find_tile, of_rhs),
    load_next,
    of_rhs.first_group(zero),
    none=Tile(*[zero] * len(Tile._fields)),
  )
  # Spares a second walk if there are no other rows to be zeros.
  has_others = end.rows < of_others.m
  if masked:
    has_others &= masked.zero_padding
  index = lax.select(has_others, zero, end.index)
  _pipeline.on_second_warp(storing.wait_zeros)
  lax.while_loop(
    lambda state: state[-1],
    store_next,
    (zero, of_others.first_group(index), True),
  )
  _pipeline.on_second_warp(
    lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  )
  return step

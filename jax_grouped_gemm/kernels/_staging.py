"""Out_smem between the warpgroups that compute and the warp that stores.

A TMA store takes the warps that issue it hundreds of cycles, in which they
start no products. So a warp beside the loading one issues them all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import WGMMA_M
from jax_grouped_gemm.kernels._groups import Tile


def scratch_types(wgs: int):
  """The scratch that the functions below expect in refs, beside out_smem."""
  return dict(
    staged=plgpu.Barrier(num_barriers=wgs),
    stored=plgpu.Barrier(num_barriers=wgs),
  )


def has_rows(tile: Tile, wg):
  """Whether the warpgroup has any; in a group's last tile it may not."""
  return (tile.size > 0) & (wg * WGMMA_M < tile.offset + tile.size)


# ---------------------------------------------------------------- compute


def stage(refs, count, write):
  """Runs write(), which fills this warpgroup's out_smem.

  If count > 0, it has staged before: once the storing warp has read that.
  """
  wait_stored(refs, count)
  write()
  plgpu.commit_smem()
  plgpu.barrier_arrive(refs.staged.at[lax.axis_index("wg")])


def wait_stored(refs, count):
  """Waits until what was staged last has been read, if anything was."""
  wg = lax.axis_index("wg")
  pl.when(count > 0)(lambda: plgpu.barrier_wait(refs.stored.at[wg]))


# ---------------------------------------------------------------- store


def store(refs, wg, store_rows):
  """Runs store_rows(), which issues the copies, when the warpgroup has staged.

  Returns when they have read, so that it may stage again.
  """
  plgpu.barrier_wait(refs.staged.at[wg])
  store_rows()
  plgpu.commit_smem_to_gmem_group()
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  plgpu.barrier_arrive(refs.stored.at[wg])


class Storing(NamedTuple):
  """What the storing warp does for M-grouped tiles."""

  refs: Any
  wgs: int
  has_rows: Callable  # (tile, wg): whether it stages any
  store_rows: Callable  # (tile, wg): issues the copies

  def store(self, tile: Tile):
    """Stores the tile, one warpgroup's rows after the other's."""

    @pl.loop(0, self.wgs)
    def store_next(wg):
      pl.when(self.has_rows(tile, wg))(
        lambda: store(self.refs, wg, lambda: self.store_rows(tile, wg))
      )

  def wait_zeros(self):
    """Waits for what all warpgroups stage at last: zeros."""

    @pl.loop(0, self.wgs)
    def wait(wg):
      plgpu.barrier_wait(self.refs.staged.at[wg])

  def store_zeros(self, tile: Tile):
    """Stores a tile of the zeros."""

    @pl.loop(0, self.wgs)
    def store_next(wg):
      has_rows = self.has_rows(tile, wg)
      pl.when(has_rows)(lambda: self.store_rows(tile, wg))

    plgpu.commit_smem_to_gmem_group()

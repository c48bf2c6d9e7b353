"""The main loop over the k slices of a tile: multiply, promote with scales."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_grouped_gemm.config import WGMMA_M, Config
from jax_grouped_gemm.kernels import _order, _pipeline
from jax_grouped_gemm.kernels._pipeline import Ref


def load_row_scales(scales_smem: Ref, slot, rows):
  """Returns the scale of each of the slot's rows."""
  return plgpu.load(
    scales_smem.at[slot, rows], layout=plgpu.Layout.WGMMA.reduce(1)
  )


def start_products(refs, tile_n: int, slot, rows):
  """Starts the products of 64 of the slot's rows, (64, tile_n), unscaled.

  What it returns is right only after the next wgmma_wait.
  """

  def wgmma(acc):
    plgpu.wgmma(acc, refs.lhs_smem.at[slot, rows], refs.rhs_smem.at[slot].T)
    return plgpu.wgmma_accumulator_load(acc, wait_n=None)

  return pl.run_scoped(wgmma, plgpu.ACC((WGMMA_M, tile_n)))


class _Slices(NamedTuple):
  """What a warpgroup does to one k slice of a tile after the other.

  A carry is (slot, sums, products): the slice's products run when it is passed.
  """

  refs: Any
  config: Config
  rows: Any
  turns: Any
  load_scales: Callable
  promote: Callable
  settle: Callable

  def start(self, slot):
    return start_products(self.refs, self.config.tile_n, slot, self.rows)

  def compute(self, ki, carry):
    """Starts the next slice as soon as this one has been promoted."""
    slot, sums, products = carry
    is_last_slot = slot == self.config.num_stages - 1
    next_slot = lax.select(is_last_slot, 0, slot + 1)
    sums = self.settle(sums)
    # Before the scales are loaded: it ends a basic block. What ptxas moves on
    # from one before it stands between the FFMA and spoils their operand cache.
    plgpu.barrier_wait(self.refs.full.at[next_slot])
    sums = self._promote(ki, slot, sums, products)
    products = self.start(next_slot)
    self._release(slot)
    return next_slot, sums, products

  def compute_last(self, ki, carry):
    slot, sums, products = carry
    sums = self._promote(ki, slot, self.settle(sums), products)
    self._release(slot)
    return self.settle(sums)

  def _promote(self, ki, slot, sums, products):
    # Multiplied here, beneath the products.
    scales = self.load_scales(slot, ki, self.rows)
    sums, scales = lax.optimization_barrier((sums, scales))
    self.turns.start()
    plgpu.wgmma_wait(0)
    products = lax.optimization_barrier(products)  # No use before the wait.
    return lax.optimization_barrier(self.promote(sums, products, scales))

  def _release(self, slot):
    self.turns.end()
    # All threads arrive, but one alone where CTAs share slots.
    if self.config.cluster > 1:
      _order.meet_warps(self.refs.interpret)
    plgpu.barrier_arrive(self.refs.empty.at[slot])

  def compute_all(self, k_iters, carry):
    """Not unrolled: in one body, the sums stay in their registers.

    Then ptxas multiplies by one scale after the other and keeps it in the
    operand cache, which leaves register bandwidth to the tensor cores.
    """
    carry = lax.fori_loop(0, k_iters - 1, self.compute, carry)
    return self.compute_last(k_iters - 1, carry)


def accumulate(
  refs,
  config: Config,
  k_iters,
  step,
  *,
  load_scales,
  promote,
  init,
  settle=lambda sums: sums,
):
  """Returns promote(... promote(init(), products, scales) ...) of k_iters >= 1.

  With `settle`, each promote() is followed by sums = settle(sums): what is left
  of the promotion, to be done beneath the next products. What init() does is
  beneath the first ones.

  The products are the warpgroup's (64, tile_n) of one k slice, whose scales
  load_scales(slot, ki, rows) returns. While they run on the tensor cores, their
  scales are loaded and the next slice is awaited. So little more than the
  promotion stands between the end of a slice's products and the start of the
  next ones, and the address arithmetic of those hides beneath it.
  """
  first_slot = lax.rem(step, config.num_stages)
  turns = Turns(refs.turn, config)
  # Here: in the loop, which warpgroup it is would be found out anew each time.
  rows = _pipeline.warpgroup_rows()
  slices = _Slices(refs, config, rows, turns, load_scales, promote, settle)
  plgpu.barrier_wait(refs.full.at[first_slot])
  products = slices.start(first_slot)
  return slices.compute_all(k_iters, (first_slot, init(), products))


def skip(refs, config: Config, k_iters, step):
  """Releases the slots of a tile in which the warpgroup has nothing to do."""
  turns = Turns(refs.turn, config)

  @pl.loop(0, k_iters)
  def skip_slice(ki):
    slot = lax.rem(step + ki, config.num_stages)
    plgpu.barrier_wait(refs.full.at[slot])
    turns.start()
    # No warp is to fall a round behind the one that releases.
    _order.meet_warps(refs.interpret)
    plgpu.barrier_arrive(refs.empty.at[slot])
    turns.end()


class Turns(NamedTuple):
  """The warpgroups of a CTA promote one after the other, slice by slice.

  The tensor cores are busy as long as the products of one warpgroup run while
  another promotes. Warpgroups whose products start together share the tensor
  cores, end together and stay so; with turns, the one that promotes last is
  late ever after.
  """

  barriers: Ref  # (compute_wgs,): one phase a turn
  config: Config

  def start_kernel(self):
    """Gives the first warpgroup its first turn."""
    last = self.config.compute_wgs - 1
    pl.when(lax.axis_index("wg") == last)(self.end)

  def start(self):
    if self.config.turns:
      plgpu.barrier_wait(self.barriers.at[lax.axis_index("wg")])

  def end(self):
    if self.config.turns:
      wg = lax.axis_index("wg")
      is_last = wg == self.config.compute_wgs - 1
      plgpu.barrier_arrive(self.barriers.at[lax.select(is_last, 0, wg + 1)])

  def end_kernel(self):
    """Takes the turn that nobody needs any more."""
    pl.when(lax.axis_index("wg") == 0)(self.start)


def turn_barriers(config: Config):
  """The barriers of Turns."""
  return plgpu.Barrier(num_barriers=config.compute_wgs)

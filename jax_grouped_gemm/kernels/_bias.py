"""The bias of an M-grouped tile's group, as what the sums of the tile start as.

So it takes no registers but theirs, and is loaded beneath the first products.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float


def add_operand(bias: Float[Array, "g n"] | None, config, refs_type, operands):
  """Returns refs_type and operands, whose first is to be the bias, if any."""
  if bias is None:
    return functools.partial(refs_type, None), operands
  # CTAs of a cluster may have columns beyond those of out.
  missing = -bias.shape[1] % (config.tile_n * config.cluster_shape[1])
  bias = jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, missing)))
  return refs_type, (bias, *operands)


def load(refs, group, cols, shape, axis: int):
  """Returns sums of `shape` whose `axis` has these columns of out."""
  bias = plgpu.load(
    refs.bias_gmem.at[group, cols],
    layout=plgpu.Layout.WGMMA.reduce(1 - axis),
    optimized=False,  # Which only loads from SMEM can be.
  )
  return lax.broadcast_in_dim(bias, shape, (axis,))

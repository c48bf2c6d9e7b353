"""From a tile of x in registers to FP8 values and their scales."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jax_grouped_gemm.kernels.reference import MIN_AMAX, next_power_of_two

# Half a warp has a row of 128 columns, each thread 8 neighbours: without
# swizzling, reads and writes of SMEM touch every bank once.
ROWS = plgpu.Layout.TILED(
  plgpu.Tiling(((8, 128), (2, 128), (8,))),
  warp_dims=(-5,),
  lane_dims=(-3, -2),
  vector_dim=-1,
)


def quantize_rows(x, dtype: DTypeLike, power_of_two_scales: bool):
  """Returns values (rows, 128) and scales (rows,), as reference.quantize."""
  x = x.astype(jnp.float32)
  largest = float(jnp.finfo(dtype).max)
  magnitude = jnp.abs(x)
  finite = magnitude < jnp.inf  # False for NaN.
  amax = jnp.max(jnp.where(finite, magnitude, 0.0), axis=1)
  scales = jnp.maximum(amax, MIN_AMAX) * jnp.float32(1 / largest)
  if power_of_two_scales:
    scales = next_power_of_two(scales)
  divisor = lax.broadcast_in_dim(scales, x.shape, (0,))
  # Nothing to clip: at most largest * (1 + 2^-22), which rounds to largest.
  values = jnp.where(finite, x / divisor, jnp.nan)
  return values.astype(dtype), scales

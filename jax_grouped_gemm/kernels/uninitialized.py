"""An array that nobody has written to."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped


def uninitialized(
  shape: tuple[int, ...], dtype: DTypeLike, like: Shaped[Array, "..."]
) -> Shaped[Array, "..."]:
  """Returns an array of what its memory held, for a collective to write to.

  jax.lax.empty writes zeros (jax 0.11.2), XLA's loop for bytes at a sixth of
  the bandwidth. The kernel reads nothing of `like`, which makes it another
  array than one of the same shape for something else.
  """
  run = plgpu.kernel(
    lambda *refs: None,
    out_type=jax.ShapeDtypeStruct(shape, dtype),
    kernel_name="uninitialized_sm90",
  )
  return run(like)

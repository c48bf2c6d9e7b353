"""What the GEMMs' results are compared with: plain float32 products."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_grouped_gemm import ScaledArray

_CHUNK = 512  # rows of one group that are multiplied at a time.


@jax.jit
def row_error(out, expected):
  """|row of out - row of expected| / |row of expected|, the largest.

  Inf where a row that should be zero is not.
  """
  out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
  error = jnp.linalg.norm(out - expected, axis=-1)
  norm = jnp.linalg.norm(expected, axis=-1)
  return jnp.max(jnp.where(error == 0, 0, error / norm))


def max_row_error(
  out, lhs: ScaledArray, rhs: ScaledArray, sizes, starts
) -> jax.Array:
  """The largest row_error of out[r] = lhs[r] @ rhs[g].T, r in group g.

  Args:
    out: (m, n).
    lhs: (m, k).
    rhs: (g, n, k).
    sizes: the rows of each group, known beforehand.
    starts: the first row of each group.
  """
  chunks = [
    (group, first, start + size)
    for group, (start, size) in enumerate(zip(starts, sizes, strict=True))
    for first in range(start, start + size, _CHUNK)
  ]
  lhs, rhs = _without_padding(lhs), _without_padding(rhs)
  take = lambda x, rows: jax.tree.map(
    lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), x
  )

  def error(chunk):
    group, first, end = chunk[0], chunk[1], chunk[2]
    # Past its end, the last row of the chunk once more.
    rows = jnp.minimum(first + jnp.arange(_CHUNK), end - 1)
    # A group's blocks are a ScaledArray without the leading axis.
    weights = jax.tree.map(lambda leaf: leaf[group], rhs).dequantize()
    expected = jnp.dot(
      take(lhs, rows).dequantize(), weights.T, precision="highest"
    )
    return row_error(take(out, rows), expected)

  return jnp.max(jax.lax.map(error, np.array(chunks, np.int32)))


def _without_padding(x: ScaledArray) -> ScaledArray:
  values = x.values[tuple(slice(size) for size in x.shape)]
  return ScaledArray(values, x.scales, x.block_shape)

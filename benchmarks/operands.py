"""Quantised random operands of the grouped GEMMs.

A GPU draws less power, and so runs faster, on zeros or constants.
"""

import jax
import jax.numpy as jnp

from benchmarks.shapes import Problem
from jax_grouped_gemm import ScaledArray, quantize

# jax.lax.ragged_dot multiplies all rows by all groups.
_MAX_DENSE_GROUPS = 8


class Unsupported(Exception):
  """The implementation cannot run the problem."""


def check_dense(groups: int):
  """Raises Unsupported if jax.lax.ragged_dot is not to be tried."""
  if groups > _MAX_DENSE_GROUPS:
    raise Unsupported(f"multiplies densely: > {_MAX_DENSE_GROUPS} groups")


def _normal(key, shape, block_shape) -> ScaledArray:
  return quantize(jax.random.normal(key, shape, jnp.bfloat16), block_shape)


def random_rows(*shape: int) -> ScaledArray:
  """Returns (..., k), one scale per 128 elements of a row."""
  blocks = (1,) * (len(shape) - 1) + (128,)
  return _normal(jax.random.key(0), shape, blocks)


def random_weights(p: Problem) -> ScaledArray:
  """Returns (g, n, k), one scale per 128x128 elements."""
  keys = jax.random.split(jax.random.key(1), len(p.sizes))
  # One group at a time: all of them in bf16 may not fit.
  quantize_next = lambda key: _normal(key, (p.n, p.k), (128, 128))
  return jax.lax.map(quantize_next, keys)

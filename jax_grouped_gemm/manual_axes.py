"""Operands of one call inside jax.shard_map, where each may vary differently.

An array that differs between devices along a mesh axis "varies" over it, and
scan, cond and kernels want operands and results that vary over the same axes.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array


def _varying(x: Array) -> frozenset:
  return jax.typeof(x).manual_axis_type.varying


def vary_alike(*trees):
  """Returns the trees, all their arrays varying over all axes that any does."""
  axes = frozenset().union(*map(_varying, jax.tree.leaves(trees)))

  def vary(x):
    missing = tuple(sorted(axes - _varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, trees)


def zeros(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
  """Zeros that vary over the same axes as `like`."""
  axes = tuple(sorted(_varying(like)))
  out = jnp.zeros(shape, dtype)
  return lax.pcast(out, axes, to="varying") if axes else out

"""Low-precision values with one scale per block."""

import json
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32


@jax.tree_util.register_pytree_with_keys_class
class ScaledArray:
  """x[i] = values[i] * scales[i // block_shape], a pytree of two arrays.

  `block_shape` has 1 for every axis that is not blocked, e.g. (1, 128). At the
  end of each axis `values` may hold zeros that are not part of x: `padding` of
  them, which `shape` and `dequantize` leave out.

  Both belong to the last axes, so that what adds or removes leading axes
  (vmap, scan, indexing through jax.tree.map) leaves a valid ScaledArray.
  """

  __slots__ = ("values", "scales", "_block_shape", "_padding")

  values: Float[Array, "..."]  # float8_e4m3fn or float8_e5m2
  scales: Float32[Array, "..."]  # ceil(shape / block_shape)

  def __init__(
    self,
    values: Float[Array, "..."],
    scales: Float32[Array, "..."],
    block_shape: tuple[int, ...],
    padding: tuple[int, ...] = (),
  ):
    set_field = super().__setattr__
    set_field("values", values)
    set_field("scales", scales)
    set_field("_block_shape", _strip(block_shape, 1))
    set_field("_padding", _strip(padding, 0))

  def __setattr__(self, name, value):
    raise AttributeError(f"ScaledArray is immutable, cannot set {name!r}")

  def __reduce__(self):
    """For copy and pickle, which would set the fields."""
    fields = self.values, self.scales, self._block_shape, self._padding
    return ScaledArray, fields

  def __repr__(self) -> str:
    return (
      f"ScaledArray(values={self.values}, scales={self.scales}, "
      f"block_shape={self._block_shape}, padding={self._padding})"
    )

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return self.values.ndim

  @property
  def dtype(self):
    """Type of the quantised values."""
    return self.values.dtype

  @property
  def block_shape(self) -> tuple[int, ...]:
    """Elements along each axis that share a scale."""
    return _align(self._block_shape, self.ndim, 1)

  @property
  def padding(self) -> tuple[int, ...]:
    """Zeros stored at the end of each axis of `values`."""
    return _align(self._padding, self.ndim, 0)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of what was quantised: that of `values` without its padding."""
    stored = self.values.shape
    return tuple(s - p for s, p in zip(stored, self.padding, strict=True))

  @property
  def mT(self) -> "ScaledArray":  # noqa: N802, the name arrays have.
    """The last two axes swapped, exactly."""
    *blocks, rows, cols = self.block_shape
    *padding, row_padding, col_padding = self.padding
    return ScaledArray(
      self.values.mT,
      self.scales.mT,
      (*blocks, cols, rows),
      (*padding, col_padding, row_padding),
    )

  def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """Returns values * scales, of `shape`; rounded once, to f32 or wider."""
    wide = wide_dtype(dtype)
    values = self.values[tuple(slice(size) for size in self.shape)]
    scales = expand_scales(self.scales, self.block_shape, self.shape)
    return (values.astype(wide) * scales.astype(wide)).astype(dtype)

  def tree_flatten_with_keys(self):
    """Part of jax's pytree protocol."""
    key = jax.tree_util.GetAttrKey
    children = (key("values"), self.values), (key("scales"), self.scales)
    return children, (self._block_shape, self._padding)

  @classmethod
  def tree_unflatten(cls, static, children) -> "ScaledArray":
    """Part of jax's pytree protocol; children may be any objects."""
    return cls(*children, *static)


def wide_dtype(*dtypes: DTypeLike):
  """float64 if any of the dtypes is, else float32, however JAX promotes."""
  is_wide = jnp.dtype(jnp.float64) in map(jnp.dtype, dtypes)
  return jnp.dtype(jnp.float64 if is_wide else jnp.float32)


def scales_shape(
  shape: tuple[int, ...], block_shape: tuple[int, ...]
) -> tuple[int, ...]:
  """Returns ceil(shape / block_shape)."""
  return tuple(
    math.ceil(size / block)
    for size, block in zip(shape, block_shape, strict=True)
  )


def expand_scales(
  scales: Float32[Array, "..."],
  block_shape: tuple[int, ...],
  shape: tuple[int, ...],
) -> Float32[Array, "..."]:
  """Returns the scale of every element of an array of `shape`."""
  for axis, (block, size) in enumerate(zip(block_shape, shape, strict=True)):
    if block != 1:
      scales = jnp.repeat(scales, block, axis=axis)
      scales = jax.lax.slice_in_dim(scales, 0, size, axis=axis)
  return scales


def _strip(entries: tuple[int, ...], fill: int) -> tuple[int, ...]:
  """Drops leading `fill`s: the same whatever the number of leading axes."""
  entries = tuple(entries)
  while entries and entries[0] == fill:
    entries = entries[1:]
  return entries


def _align(entries: tuple[int, ...], ndim: int, fill: int) -> tuple[int, ...]:
  if len(entries) > ndim:
    raise ValueError(
      f"blocks or padding {entries} of the last {len(entries)} axes need as "
      f"many axes, got an array of {ndim}"
    )
  return (fill,) * (ndim - len(entries)) + entries


jax.export.register_pytree_node_serialization(
  ScaledArray,
  serialized_name="jax_grouped_gemm.ScaledArray",
  serialize_auxdata=lambda static: json.dumps(static).encode(),
  deserialize_auxdata=lambda data: tuple(map(tuple, json.loads(data))),
)

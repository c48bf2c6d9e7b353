"""ScaledArray: what it says of itself, and that transformations keep it."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_grouped_gemm import ScaledArray, quantize


def make(shape=(3, 130, 300), block_shape=(1, 128, 128)):
  return quantize(jax.random.normal(jax.random.key(0), shape), block_shape)


def assert_same(x: ScaledArray, y: ScaledArray):
  assert jax.tree.structure(x) == jax.tree.structure(y)
  assert (x.shape, x.block_shape) == (y.shape, y.block_shape)
  np.testing.assert_array_equal(x.dequantize(), y.dequantize())


def test_attributes():
  x = make()
  assert x.shape == (3, 130, 300)
  assert x.ndim == 3
  assert x.dtype == jnp.float8_e4m3fn
  assert x.block_shape == (1, 128, 128)
  assert x.scales.shape == (3, 2, 3)


@pytest.mark.parametrize(
  "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies(copied):
  assert_same(copied(make()), make())


def test_dequantize_is_values_times_scales():
  x = make()
  np.testing.assert_array_equal(
    x.dequantize(), oracle.dequantize(x).astype(np.float32)
  )
  assert x.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "shape, block_shape",
  [
    ((5, 300), (1, 128)),
    ((130, 300), (128, 128)),
    ((3, 128, 256), (1, 128, 128)),
    ((300,), (128,)),
    ((300, 5), (128, 1)),
    ((7, 9), (2, 3)),
  ],
)
def test_padding_is_invisible(shape, block_shape):
  x = make(shape, block_shape)
  assert x.shape == shape
  assert x.dequantize().shape == shape
  values = np.asarray(x.values).astype(np.float32)
  values[tuple(slice(size) for size in shape)] = 0
  np.testing.assert_array_equal(values, 0)


def test_storage_is_what_tma_reads():
  assert make((5, 300), (1, 128)).values.shape == (8, 384)
  assert make((2, 80, 100), (1, 128, 128)).values.shape == (2, 128, 128)
  assert make((64, 256), (1, 128)).values.shape == (64, 256)


def test_transpose_is_exact():
  x = make()
  assert x.mT.shape == (3, 300, 130)
  np.testing.assert_array_equal(x.mT.dequantize(), x.dequantize().mT)
  assert_same(x.mT.mT, x)
  tokens = make((5, 300), (1, 128)).mT
  assert tokens.block_shape == (128, 1)


def test_is_immutable():
  x = make()
  with pytest.raises(AttributeError, match="immutable"):
    x.values = x.scales


def test_pytree_of_anything():
  x = make()
  leaves, treedef = jax.tree.flatten(x)
  placeholders = jax.tree.unflatten(treedef, [object(), None])
  assert isinstance(placeholders, ScaledArray)
  assert_same(jax.tree.unflatten(treedef, leaves), x)
  paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(x)]
  assert paths == [".values", ".scales"]


def test_repr_names_blocks():
  assert "block_shape=(128, 128)" in repr(make())


def test_leading_axes_come_and_go():
  stack = make()
  one = jax.tree.map(lambda leaf: leaf[1], stack)
  assert (one.shape, one.block_shape) == ((130, 300), (128, 128))
  np.testing.assert_array_equal(one.dequantize(), stack.dequantize()[1])

  def check_inside(x):
    assert (x.shape, x.block_shape) == ((130, 300), (128, 128))
    return x, x.dequantize()

  mapped, dense = jax.vmap(check_inside)(stack)
  assert_same(mapped, stack)
  np.testing.assert_array_equal(dense, stack.dequantize())

  _, scanned = jax.lax.scan(lambda _, x: (None, check_inside(x)), None, stack)
  assert_same(scanned[0], stack)

  requantized = jax.vmap(lambda x: quantize(x, (128, 128)))(stack.dequantize())
  assert requantized.block_shape == (1, 128, 128)
  assert jax.tree.structure(requantized) == jax.tree.structure(stack)


def test_carry_of_a_scan():
  x = make((5, 300), (1, 128))
  step = lambda x, _: (quantize(x.dequantize(), (1, 128)), None)
  out, _ = jax.lax.scan(step, x, None, length=2)
  assert jax.tree.structure(out) == jax.tree.structure(x)
  # What is quantised stays what it is, but for the rounding of its scales.
  np.testing.assert_allclose(out.dequantize(), x.dequantize(), rtol=2**-21)


def test_more_blocks_than_axes():
  x = make((130, 300), (128, 128))
  with pytest.raises(ValueError, match=r"\(128, 128\) of the last 2 axes"):
    _ = jax.tree.map(lambda leaf: leaf[0], x).block_shape


def test_export_round_trip():
  x = make()
  double = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x))
  exported = jax.export.export(double)(x)
  again = jax.export.deserialize(exported.serialize())
  assert_same(again.call(x), double(x))

"""A bias per group: values, gradients, and wrong calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_grouped_gemm import moe

X, BIAS = jnp.ones((5, 3)), jnp.arange(6.0).reshape(2, 3)
SIZES = jnp.array([1, 3])  # The last row is nobody's.


def test_rows_get_the_bias_of_their_group():
  group = [0, 1, 1, 1]
  out, vjp = jax.vjp(lambda x, bias: moe.add_bias(x, bias, SIZES), X, BIAS)
  np.testing.assert_array_equal(out[:4], 1 + BIAS[np.array(group)])
  np.testing.assert_array_equal(out[4], X[4])
  dx, dbias = vjp(X)
  np.testing.assert_array_equal(dx, X)
  np.testing.assert_array_equal(dbias, [[1] * 3, [3] * 3])
  assert moe.add_bias(X, None, SIZES) is X


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradient_of_the_bias_is_the_sum_of_its_group(dtype, implementation):
  sizes, n = np.array([3, 0, 70, 20]), 192
  rng = np.random.default_rng(0)
  dout = rng.standard_normal((sizes.sum() + 7, n)).astype(dtype)
  dout[1, 5] = dout[80, 6] = jnp.nan
  bias = jnp.zeros((len(sizes), n))

  def fn(bias):
    return moe.add_bias(
      jnp.zeros_like(dout), bias, sizes, implementation=implementation
    )

  (dbias,) = jax.vjp(fn, bias)[1](jnp.asarray(dout))
  ends = np.cumsum(sizes)
  groups = np.split(dout.astype(np.float64), ends)[:-1]
  expected = np.stack([group.sum(axis=0) for group in groups])
  np.testing.assert_allclose(dbias, expected, rtol=1e-5, atol=1e-5)
  assert np.argwhere(~np.isfinite(dbias)).tolist() == [[0, 5], [3, 6]]


@pytest.mark.parametrize(
  "args, error, message",
  [
    ((X, BIAS, jnp.ones(4, int)), ValueError, r"\(4, 3\), got \(2, 3\)"),
    ((X, BIAS[0], SIZES), ValueError, r"\(2, 3\), got \(3,\)"),
    ((X, BIAS[:, :1], SIZES), ValueError, r"\(2, 3\), got \(2, 1\)"),
    ((X, BIAS.astype(int), SIZES), TypeError, "bias must be .*got int32"),
    ((X[0], BIAS, SIZES), ValueError, r"x must be \(m, n\), got \(3,\)"),
    ((X, BIAS, SIZES[None]), ValueError, r"one axis, got shape \(1, 2\)"),
    ((X, BIAS, jnp.ones(2)), TypeError, "integers, got float32"),
  ],
)
def test_errors(args, error, message):
  with pytest.raises(error, match=message):
    moe.add_bias(*args)

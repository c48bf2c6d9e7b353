"""Quantised values and scales, bit for bit."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_grouped_gemm import quantize, quantize_for_k_grouped

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
F16, BF16, F32 = np.float16, ml_dtypes.bfloat16, np.float32
BLOCKS = [
  ((5, 400), (1, 128)),
  ((3, 16), (1, 128)),
  ((200, 144), (128, 128)),
  ((2, 130, 80), (1, 128, 128)),
]
dtypes = pytest.mark.parametrize("dtype", [E4M3, E5M2])
powers = pytest.mark.parametrize("power_of_two", [False, True])


def bits(x):
  """The bits of FP8 numbers; those of every NaN are the same."""
  x = np.asarray(x)
  return np.where(np.isnan(x.astype(F32)), 0x7F, x.view(np.uint8))


def stored(x):
  """The values of a ScaledArray without their padding, which must be zeros."""
  values = np.array(x.values)
  inside = tuple(slice(size) for size in x.shape)
  kept = values[inside].copy()
  values[inside] = 0
  assert not bits(values).any()
  return kept


def check(out, x, block_shape, dtype=E4M3, power_of_two=False):
  values, scales = oracle.quantize(x, block_shape, dtype, power_of_two)
  assert out.shape == x.shape
  assert out.block_shape == block_shape
  assert out.dtype == dtype
  assert out.scales.dtype == F32
  np.testing.assert_array_equal(out.scales, scales)
  np.testing.assert_array_equal(bits(stored(out)), bits(values))


def run(x, block_shape, dtype=E4M3, power_of_two=False):
  out = quantize(x, block_shape, dtype=dtype, power_of_two_scales=power_of_two)
  check(out, x, block_shape, dtype, power_of_two)
  return out


@powers
@dtypes
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape, block_shape", BLOCKS)
def test_quantize(shape, block_shape, x_dtype, dtype, power_of_two):
  x = oracle.random_floats(shape).astype(x_dtype)
  out = run(x, block_shape, dtype, power_of_two)
  if power_of_two:
    assert (np.frexp(out.scales)[0] == 0.5).all()


@powers
@dtypes
@pytest.mark.parametrize("shape, block_shape", BLOCKS)
def test_round_trip(shape, block_shape, dtype, power_of_two):
  """Rounding costs half a step, relative or, near zero, of the subnormals."""
  x = oracle.random_floats(shape).astype(np.float64)
  out = quantize(x, block_shape, dtype=dtype, power_of_two_scales=power_of_two)
  info = ml_dtypes.finfo(dtype)
  scales = np.asarray(out.scales, np.float64)
  for axis, (block, size) in enumerate(zip(block_shape, shape, strict=True)):
    scales = np.repeat(scales, block, axis).take(range(size), axis)
  bound = np.maximum(
    np.abs(x) * float(info.eps) / 2, scales * float(info.smallest_subnormal) / 2
  )
  bound *= 1 + 2**-20  # x / scale is rounded in f32, and so is the scale.
  assert (np.abs(oracle.dequantize(out) - x) <= bound).all()


# In units of the largest number of a block: what is rounded to subnormals, to
# zero, halfway between two numbers of either type, or saturates.
EDGES = [
  *(2.0**-i for i in range(36)),
  *(1.5 * 2.0**-i for i in range(1, 36)),
  *(1 - 2.0**-i for i in range(1, 8)),
  *((8 + i) / 448 + 0.5 / 448 for i in range(8)),
  0.0,
]


@powers
@dtypes
@pytest.mark.parametrize(
  "amax", [1e-45, 1e-30, 9.9e-5, 1e-4, 1.1e-4, 1.0, 448.0, 57344.0, 3.4e38]
)
def test_edges(amax, dtype, power_of_two):
  edges = np.array([EDGES[: len(EDGES) // 2], EDGES[-(len(EDGES) // 2) :]])
  x = (np.concatenate([edges, -edges], -1) * amax).astype(F32)
  x[:, 0] = amax
  run(x, (1, 128), dtype, power_of_two)


def test_zeros_keep_their_sign():
  values = stored(run(np.array([[0.0, -0.0, 1.0, -1e-9]], F32), (1, 128)))
  np.testing.assert_array_equal(
    np.signbit(values), [[False, True, False, True]]
  )


def test_tiny_blocks_have_the_least_scale():
  out = run(np.array([[0.0, 0.0], [1e-30, 5e-5]], F32), (1, 128))
  np.testing.assert_array_equal(out.scales, F32(1e-4) * F32(1 / 448))


@dtypes
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape, block_shape", BLOCKS)
def test_nan_and_inf_stay_alone(shape, block_shape, bad, dtype):
  x = oracle.random_floats(shape)
  index = tuple(size // 2 for size in shape)
  x[index] = 0
  clean = run(x, block_shape, dtype)
  x[index] = bad
  out = run(x, block_shape, dtype)
  np.testing.assert_array_equal(out.scales, clean.scales)
  difference = bits(stored(out)) != bits(stored(clean))
  assert np.argwhere(difference).tolist() == [list(index)]
  damaged = stored(out)[index].astype(F32)
  assert np.isnan(damaged) or (dtype == E5M2 and damaged == bad)


def test_nothing_but_nan():
  out = run(np.full((2, 200), np.nan, F32), (1, 128))
  assert np.isnan(stored(out).astype(F32)).all()


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
def test_no_elements(shape):
  run(np.zeros(shape, F32), (1, 128))


F32_ROWS = hnp.arrays(F32, (2, 130), elements=st.floats(width=32))


@given(F32_ROWS, st.sampled_from([E4M3, E5M2]), st.booleans())
def test_quantize_anything(x, dtype, power_of_two):
  run(x, (1, 128), dtype, power_of_two)


# ---------------------------------------------------------------- K-grouped


def run_k_grouped(
  x, sizes, dtype=E4M3, power_of_two=False, group_offset=None, num_groups=None
):
  out = quantize_for_k_grouped(
    x,
    sizes,
    dtype=dtype,
    power_of_two_scales=power_of_two,
    group_offset=group_offset,
    num_groups=num_groups,
  )
  rows = oracle.group_rows(sizes, len(x), group_offset, num_groups)
  # The scales show too that no block mixes groups.
  padded = oracle.pad_tokens(np.asarray(x).astype(F32), rows, out.shape[1])
  check(out, padded, (1, 128), dtype, power_of_two)
  return out


@powers
@dtypes
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
def test_k_grouped(x_dtype, dtype, power_of_two):
  sizes = np.array([0, 1, 127, 0, 128, 129, 0])
  x = oracle.random_floats((385, 20)).astype(x_dtype)
  out = run_k_grouped(x, sizes, dtype, power_of_two)
  assert out.shape[1] % 128 == 0


def test_k_grouped_every_order_of_groups():
  x = oracle.random_floats((258, 3))
  for sizes in itertools.permutations([0, 1, 128, 129]):
    run_k_grouped(x, np.array(sizes))


@pytest.mark.parametrize(
  "sizes",
  [
    [0, 0, 0],
    [300, 0, 0],
    [-5, 90, 40],
    [200, 200, 200],
    [2**31 - 1, 2**31 - 1, 2**31 - 1],
    [-(2**31), 2**31 - 1, 1],
  ],
)
def test_k_grouped_hostile_sizes(sizes):
  run_k_grouped(oracle.random_floats((300, 3)), np.array(sizes, np.int32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_k_grouped_leaves_rows_of_no_group_out(bad):
  sizes = np.array([100, 30])
  x = oracle.random_floats((300, 3))
  clean = run_k_grouped(x, sizes)
  x[130:] = bad
  out = run_k_grouped(x, sizes)
  np.testing.assert_array_equal(out.scales, clean.scales)
  np.testing.assert_array_equal(bits(out.values), bits(clean.values))


def test_k_grouped_nan_stays_in_its_group():
  x = oracle.random_floats((300, 3))
  x[150, 1] = np.nan
  values = stored(run_k_grouped(x, np.array([150, 150]))).astype(F32)
  assert np.argwhere(np.isnan(values)).tolist() == [[1, 256]]


@pytest.mark.parametrize("offset", [-1, 0, 1, 2, 4])
def test_k_grouped_with_offset(offset):
  sizes, offset = np.array([90, 10, 130, 60]), np.array([offset])
  x = oracle.random_floats((300, 3))
  run_k_grouped(x, sizes, group_offset=offset, num_groups=2)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (7, 0)])
def test_k_grouped_few_elements(shape):
  x = oracle.random_floats(shape)
  run_k_grouped(x, np.array([0, shape[0], 0]))


@given(st.lists(st.integers(-3, 140), min_size=4, max_size=4))
@example([127, 1, 129, 128])
def test_k_grouped_any_sizes(sizes):
  run_k_grouped(oracle.random_floats((400, 2)), np.array(sizes))


def test_traced_sizes_need_one_compilation():
  """The shape of the result is a bound for all sizes."""
  x = jnp.zeros((300, 3))
  shapes = {
    run_k_grouped(x, np.array(sizes)).values.shape
    for sizes in ([300, 0, 0], [1, 1, 298], [0, 0, 0])
  }
  assert len(shapes) == 1

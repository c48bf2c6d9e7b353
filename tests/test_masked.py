"""m_grouped_gemm_masked against the oracle."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jax_grouped_gemm import (
  Config,
  ScaledArray,
  SmallGroupsConfig,
  m_grouped_gemm,
  m_grouped_gemm_masked,
  quantize,
)
from jax_grouped_gemm.kernels import tuning

BIG, SMALL = 2**31 - 1, -(2**31)
F32 = jnp.float32
CONFIGS = {
  "xla": None,
  "m_grouped": Config(tile_n=64, cluster=1, num_stages=2, num_sms=2),
  "small_groups": SmallGroupsConfig(
    tile_m=8, tile_n=64, num_stages=2, num_sms=2
  ),
}


def options_of(name):
  config = CONFIGS[name]
  implementation = "interpret" if config else "xla"
  return {"implementation": implementation, "config": config}


@pytest.fixture(params=CONFIGS)
def gemm_options(request):
  """XLA, and each kernel with few and small tiles to interpret."""
  return options_of(request.param)


@pytest.fixture(params=["xla", "small_groups"])
def either_option(request):
  """XLA, and the faster one to interpret."""
  return options_of(request.param)


def make(g, max_m, n, k):
  """Returns lhs and rhs, whose scales differ from block to block."""
  lhs = quantize(oracle.random_floats((g, max_m, k), seed=1), (1, 1, 128))
  rhs = oracle.random_floats((g, n, k), seed=2)
  return lhs, quantize(rhs, (1, 128, 128))


def in_use(sizes, max_m):
  """Returns (g, max_m), true where a row is in use."""
  sizes = np.array(sizes, np.int64)[:, None]
  return np.arange(max_m) < sizes


def run(lhs, rhs, sizes, **options):
  """Returns m_grouped_gemm_masked's result, checked where rows are in use."""
  out = m_grouped_gemm_masked(lhs, rhs, jnp.array(sizes, jnp.int32), **options)
  assert out.dtype == options.get("preferred_element_type", jnp.bfloat16)
  check(out, lhs, rhs, sizes, options.get("zero_padding", False))
  return np.asarray(out)


def check(out, lhs, rhs, sizes, zero_padding):
  lhs, rhs = oracle.dequantize(lhs), oracle.dequantize(rhs)
  inside = in_use(sizes, lhs.shape[1])[..., None]
  lhs = np.where(inside, lhs, 0)
  out = np.asarray(out)
  if not zero_padding:  # Then they may be anything.
    out = np.where(inside, out, np.zeros((), out.dtype))
  with np.errstate(invalid="ignore"):
    ref = np.einsum("gmk,gnk->gmn", lhs, rhs)
    magnitude = np.einsum("gmk,gnk->gmn", np.abs(lhs), np.abs(rhs))
  # 0 * NaN is NaN, but no row in use.
  ref, magnitude = (np.where(inside, x, 0) for x in (ref, magnitude))
  oracle.check(out, ref, magnitude, lhs.shape[2])


@pytest.mark.parametrize(
  "max_m, n, k, dtype, zero_padding",
  [(16, 16, 128, jnp.bfloat16, False), (21, 144, 400, F32, True)],
)
def test_ragged(gemm_options, max_m, n, k, dtype, zero_padding):
  run(
    *make(4, max_m, n, k),
    [max_m, 0, 7, 12],
    preferred_element_type=dtype,
    zero_padding=zero_padding,
    **gemm_options,
  )


def test_every_pattern_of_empty_groups(either_option):
  operands = make(3, 8, 16, 16)
  for sizes in itertools.product([0, 3], repeat=3):
    run(*operands, sizes, zero_padding=True, **either_option)


def test_hostile_sizes(gemm_options):
  operands = make(4, 24, 32, 144)
  for sizes in ([4, BIG, BIG, 1], [-7, 20, SMALL, 24], [25, 0, -1, 1]):
    run(*operands, sizes, zero_padding=True, **gemm_options)


@pytest.mark.parametrize("kernel", ["m_grouped", "small_groups"])
def test_nothing_else_is_written(kernel):
  """The interpreter fills out with NaN, and no product is NaN."""
  options = options_of(kernel)
  for max_m, sizes in ((24, [5, 0, BIG, 17]), (13, [13, 9, 1, -3])):
    out = run(*make(4, max_m, 80, 144), sizes, **options)
    written = ~np.isnan(out.astype(np.float32))
    expected = np.broadcast_to(in_use(sizes, max_m)[..., None], out.shape)
    np.testing.assert_array_equal(written, expected)


def test_unused_rows_may_hold_anything(either_option):
  max_m, sizes = 16, [3, 0, 16, 9]
  x = oracle.random_floats((4, max_m, 144))
  _, rhs = make(4, max_m, 32, 144)
  options = {"zero_padding": True, **either_option}
  clean = run(quantize(x, (1, 1, 128)), rhs, sizes, **options)
  unused = ~in_use(sizes, max_m)
  x[unused] = np.nan
  lhs = quantize(x, (1, 1, 128))
  scales = jnp.where(unused[..., None], np.nan, lhs.scales)
  lhs = ScaledArray(lhs.values, scales, lhs.block_shape, lhs.padding)
  out = m_grouped_gemm_masked(lhs, rhs, jnp.array(sizes), **options)
  np.testing.assert_array_equal(out, clean)


def test_nan_stays_where_it_is(either_option):
  x, weights = (oracle.random_floats((3, n, 144)) for n in (16, 32))
  x[0, 5, 130] = weights[2, 17, 3] = np.nan
  lhs, rhs = quantize(x, (1, 1, 128)), quantize(weights, (1, 128, 128))
  out = run(lhs, rhs, [7, 16, 4], zero_padding=True, **either_option)
  expected = np.zeros((3, 16, 32), bool)
  expected[0, 5] = expected[2, :4, 17] = True
  np.testing.assert_array_equal(np.isnan(out), expected)


def test_operands_without_padding(either_option):
  lhs, rhs = make(3, 13, 16, 144)
  unpadded = [
    ScaledArray(
      x.values[tuple(slice(size) for size in x.shape)], x.scales, x.block_shape
    )
    for x in (lhs, rhs)
  ]
  options = {"zero_padding": True, **either_option}
  np.testing.assert_array_equal(
    run(*unpadded, [4, 13, 7], **options), run(lhs, rhs, [4, 13, 7], **options)
  )


def test_sizes_of_any_integers(either_option):
  operands, sizes = make(2, 16, 16, 16), [3, 16]
  expected = run(*operands, sizes, zero_padding=True, **either_option)
  for dtype in (jnp.int8, jnp.uint32):
    out = m_grouped_gemm_masked(
      *operands, jnp.array(sizes, dtype), zero_padding=True, **either_option
    )
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("max_m, n, k", [(0, 16, 16), (5, 0, 16), (5, 16, 0)])
def test_empty_problems(max_m, n, k):
  out = run(*make(3, max_m, n, k), [2, 1, 0])
  assert out.shape == (3, max_m, n)
  assert not out.any()


@example((4, 24, 48, 80), [24, 0, 3, 25])
@given(
  st.sampled_from([(4, 24, 48, 80), (4, 9, 5, 130), (4, 130, 33, 33)]),
  st.lists(
    st.integers(-2, 70) | st.sampled_from([SMALL, BIG]), min_size=4, max_size=4
  ),
)
def test_any_sizes(shape, sizes):
  """Shapes that kernels do not support too."""
  run(*make(*shape), sizes, zero_padding=True)


def test_small_groups_of_the_contiguous_layout():
  """The same kernel serves m_grouped_gemm, if it is asked for."""
  lhs = quantize(oracle.random_floats((45, 144)), (1, 128))
  rhs = quantize(oracle.random_floats((6, 80, 144)), (1, 128, 128))
  options = options_of("small_groups")
  sizes = [3, 0, 8, 1, 1, 20]
  out = m_grouped_gemm(lhs, rhs, jnp.array(sizes), **options)
  oracle.check_m_grouped(out, lhs, rhs, sizes)
  sizes, offset = [4, 9, 0, 9, 1, 2, 8], jnp.array([2])
  out = m_grouped_gemm(
    lhs, rhs, jnp.array(sizes), group_offset=offset, **options
  )
  oracle.check_m_grouped(out, lhs, rhs, sizes, offset)


# ---------------------------------------------------------------- decoding


def test_decode_loop():
  """Sizes change from step to step: nothing compiles or leaves the device."""
  g, max_m, d = 4, 16, 32
  weights = oracle.random_floats((g, d, d)) / 100
  rhs = quantize(weights, (1, 128, 128))
  traces = []

  def step(state):
    i, x, sizes = state
    traces.append(i)
    out = m_grouped_gemm_masked(
      quantize(x, (1, 1, 128)),
      rhs,
      sizes,
      expected_m=np.int64(4),
      zero_padding=True,
    )
    return i + 1, jnp.tanh(out), (sizes * 3 + i) % (max_m + 1)

  @jax.jit
  def copy(x):
    return jax.tree.map(jnp.copy, x)

  def decode(x, sizes, steps):
    start = jnp.int32(0), x, sizes
    loop = jax.lax.while_loop(lambda state: state[0] < steps, step, start)
    return loop[1:]

  jitted = jax.jit(decode, donate_argnums=(0, 1))
  x = jnp.asarray(oracle.random_floats((g, max_m, d)), jnp.bfloat16)
  starts = [(x, jnp.array(sizes)) for sizes in ([1, 0, 16, 5], [3, 2, 0, 1])]
  steps = [jnp.int32(1), jnp.int32(4)]
  jax.block_until_ready(jitted(*copy(starts[0]), steps[0]))
  compiled = len(traces)
  for start, n in itertools.product(starts, steps):
    with jax.transfer_guard("disallow"):
      donated = copy(start)
      out, sizes = jax.block_until_ready(jitted(*donated, n))
    assert all(buffer.is_deleted() for buffer in donated)
    state = (0, *start)
    for _ in range(int(n)):
      state = step(state)
    np.testing.assert_array_equal(sizes, state[2])
    np.testing.assert_allclose(
      out.astype(F32), state[1].astype(F32), rtol=2**-6, atol=2**-6
    )
    compiled += int(n)  # The steps of this check are no traces.
    assert len(traces) == compiled
  assert jitted._cache_size() == 1


# ---------------------------------------------------------------- choices


def masked_config(rows, n=4096, k=4096, g=32):
  return tuning.masked_config(rows, n, k, g, jnp.bfloat16)


def test_small_groups_get_their_kernel():
  assert isinstance(masked_config(65), Config)
  configs = [masked_config(rows) for rows in (1, 6, 9, 20, 64)]
  assert [config.tile_m for config in configs] == [8, 16, 16, 32, 64]
  assert {config.tile_n for config in configs} == {128}
  assert {config.split_k for config in configs} == {1}
  # Fewer tiles than processors: two of them for each.
  assert masked_config(1, n=4096, g=2).split_k == 2


def test_small_groups_of_the_contiguous_layout_get_it_too():
  problem = 512, 4096, 7168, 256, jnp.bfloat16
  config = tuning.m_grouped_config(*problem)
  # 2 rows of a group, and up to 7 before them.
  assert isinstance(config, SmallGroupsConfig) and config.tile_m == 16
  assert isinstance(tuning.m_grouped_config(2**15, *problem[1:]), Config)
  # One token: all of its rows are in one tile, of at most 8 groups.
  config = tuning.m_grouped_config(8, 2048, *problem[2:])
  assert config.tile_m == 8 and config.split_k == 2

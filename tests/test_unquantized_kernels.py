"""ragged_dot through the kernels of 16-bit operands, interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

from jax_grouped_gemm import Config, Recipe, ragged_dot
from jax_grouped_gemm.kernels import tuning, unquantized

ALL_BF16 = Recipe.bf16()
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
M, K, N, G = 11, 16, 48, 3
SIZES = (3, 0, 5)


@pytest.fixture(autouse=True)
def small_configs(monkeypatch):
  small = Config(tile_n=64, cluster=1, num_stages=2, num_sms=1)
  for name in (
    "k_grouped_config",
    "m_grouped_config",
    "k_grouped_bf16_config",
    "m_grouped_bf16_config",
  ):
    monkeypatch.setattr(tuning, name, lambda *_, **__: small)


def integers(*shape, dtype=BF16):
  """Products and sums are exact in any order."""
  rng = np.random.default_rng(shape)
  return jnp.asarray(rng.integers(-2, 3, shape), dtype)


def operands(*batch, dtype=BF16):
  lhs, rhs = integers(*batch, M, K), integers(*batch, G, K, N)
  return lhs.astype(dtype), rhs.astype(dtype)


@functools.partial(jax.jit, static_argnames=("recipe", "implementation"))
def run(lhs, rhs, sizes, offset=None, *, recipe=ALL_BF16, implementation=None):
  """Returns out, d(lhs) and d(rhs)."""
  dot = functools.partial(
    ragged_dot,
    group_sizes=sizes,
    group_offset=offset,
    recipe=recipe,
    implementation=implementation,
  )
  out, vjp = jax.vjp(dot, lhs, rhs)
  return out, *vjp(jnp.clip(out, -2, 2))


interpreted = functools.partial(run, implementation="interpret")


@pytest.mark.parametrize("argument", [0, 1])
def test_second_order_gradients_are_refused(argument):
  first = lambda *args: interpreted(*args, jnp.array(SIZES))[1 + argument]
  loss = lambda *args: jnp.sum(first(*args), dtype=jnp.float32)
  with pytest.raises(NotImplementedError, match="first-order gradients only"):
    jax.eval_shape(jax.grad(loss, argument), *operands())


def expected(lhs, rhs, sizes, offset=None):
  """In float64."""
  dtype = lhs.dtype
  lhs, rhs = (np.asarray(x, np.float64) for x in (lhs, rhs))
  rows = oracle.group_rows(sizes, M, offset, G)
  out, dlhs, drhs = np.zeros((M, N)), np.zeros((M, K)), np.zeros_like(rhs)
  for g, (start, end) in enumerate(rows):
    out[start:end] = lhs[start:end] @ rhs[g]
  out = out.astype(dtype).astype(np.float64)
  dout = np.clip(out, -2, 2)
  for g, (start, end) in enumerate(rows):
    dlhs[start:end] = dout[start:end] @ rhs[g].T
    drhs[g] = lhs[start:end].T @ dout[start:end]
  return tuple(np.asarray(x.astype(dtype)) for x in (out, dlhs, drhs))


def equal(results, references):
  for result, reference in zip(results, references, strict=True):
    assert result.dtype == reference.dtype
    np.testing.assert_array_equal(result, reference)


def test_products_of_some_of_the_groups():
  sizes, offset = jnp.array([2, 4, 0, 3]), jnp.array([1])
  args = *operands(dtype=F16), sizes, offset
  equal(interpreted(*args), expected(*args))


def test_vmap_of_tokens():
  """The weights have no batch axis, but their gradient has."""
  (lhs, _), (_, rhs) = operands(2), operands()
  sizes = jnp.array([SIZES, (0, 11, 0)])
  results = jax.vmap(interpreted, (0, None, 0))(lhs, rhs, sizes)
  for i in range(2):
    equal([x[i] for x in results], expected(lhs[i], rhs, sizes[i]))


def test_shard_map_of_tokens():
  """With its checks: the weights are the same on all devices."""
  (lhs, _), (_, rhs) = operands(2), operands()
  sizes = jnp.array([SIZES, (0, 11, 0)])
  mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
  shard = jax.shard_map(
    lambda lhs, rhs, sizes: ragged_dot(
      lhs[0],
      rhs,
      sizes[0],
      recipe=Recipe.bf16(),
      implementation="mosaic_gpu",
    )[None],
    mesh=mesh,
    in_specs=(P("x"), P(), P("x")),
    out_specs=P("x"),
  )
  traced = jax.jit(jax.grad(lambda *args: shard(*args).sum(), (0, 1))).trace(
    lhs, rhs.astype(BF16), sizes
  )
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu_v2") == 2  # out itself is not needed.


def test_mixed_recipe():
  """d(rhs) is that of unquantised operands; the others are quantised."""
  args = *operands(), jnp.array(SIZES)
  mixed = interpreted(*args, recipe=Recipe(wgrad="bf16"))
  quantised = interpreted(*args, recipe=Recipe())
  equal(mixed[:2], quantised[:2])
  dout = np.clip(np.asarray(mixed[0], np.float64), -2, 2)
  lhs = np.asarray(args[0], np.float64)
  for g, (start, end) in enumerate(oracle.group_rows(SIZES, M)):
    ref = lhs[start:end].T @ dout[start:end]
    magnitude = np.abs(lhs[start:end]).T @ np.abs(dout[start:end])
    oracle.check(mixed[2][g], ref, magnitude, M)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "interpret"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (BF16, F16)])
def test_operands_that_the_kernels_do_not_multiply(implementation, dtypes):
  lhs, rhs = (x.astype(d) for x, d in zip(operands(), dtypes, strict=True))
  names = f"got {lhs.dtype} and {rhs.dtype}"
  with pytest.raises(NotImplementedError, match=f"two bfloat16.*{names}"):
    run(lhs, rhs, jnp.array(SIZES), implementation=implementation)


def test_axes_without_elements():
  lhs, rhs = integers(0, K), integers(G, K, N)
  out, dlhs, drhs = interpreted(lhs, rhs, jnp.array(SIZES))
  assert out.shape == (0, N) and dlhs.shape == (0, K)
  np.testing.assert_array_equal(drhs, np.zeros_like(rhs))


def test_kernels_are_the_default(monkeypatch):
  """On a Hopper GPU, for what they multiply."""
  args = *operands(), jnp.array(SIZES)

  def kernels(lhs, rhs, sizes):
    dot = functools.partial(ragged_dot, recipe=Recipe.bf16())
    traced = jax.jit(lambda *args: dot(*args)).trace(lhs, rhs, sizes)
    return str(traced.jaxpr).count("cuda_only")

  hopper = type("Hopper", (), {"platform": "gpu", "compute_capability": "9.0"})
  monkeypatch.setattr(
    unquantized.implementations, "default_device", lambda: hopper
  )
  assert kernels(*args) == 1
  assert kernels(*(x.astype(F32) for x in args[:2]), args[2]) == 0

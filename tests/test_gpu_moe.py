"""The MoE layer on Hopper GPUs, as many as there are: pytest -m gpu."""

import functools

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_grouped_gemm import Recipe, moe, quantize

pytestmark = pytest.mark.gpu

T, D, F, E, K = 1024, 256, 384, 8, 2
BF16 = Recipe.bf16()
# Of a row: a product of two FP8 factors is off by at most 2^-3 of itself, one
# of bf16 factors by 2^-7, and signs are random; there are two products, one
# after the other.
ROW_ERROR = {Recipe(): 2**-2, BF16: 2**-6}
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0, dtype=jnp.bfloat16):
  return jnp.asarray(RNG.standard_normal(shape) * scale, dtype)


X, DOUT = normal(T, D), normal(T, D)
PARAMS = moe.MoeParams(
  router=normal(D, E, scale=D**-0.5),
  gate_up=normal(E, D, 2 * F, scale=D**-0.5),
  down=normal(E, F, D, scale=F**-0.5),
  router_bias=normal(E, scale=0.1),
  gate_up_bias=normal(E, 2 * F, scale=0.1),
  down_bias=normal(E, D, scale=0.1),
)
F32_PARAMS = jax.tree.map(lambda w: w.astype(jnp.float32), PARAMS)
SCALED = PARAMS._replace(
  gate_up=quantize(PARAMS.gate_up.mT, (1, 128, 128)),
  down=quantize(PARAMS.down.mT, (1, 128, 128)),
)


def run(recipe, x, params, **kwargs):
  """Returns out and the gradients of x and params."""

  def out(x, params):
    return moe.moe_layer(x, params, K, recipe=recipe, **kwargs).out

  result, vjp = jax.vjp(out, x, params)
  return result, *vjp(DOUT)


def check_near(got, want):
  """Of the same operands: sums in another order, then other roundings.

  To bf16, 2^-9 each, and FP8 steps that this moves here and there.
  """
  got, want = np.float64(got), np.float64(want)
  assert np.linalg.norm(got - want) <= 2**-7 * np.linalg.norm(want)


def check_rows(got, want, bound):
  got, want = (np.float64(x).reshape(-1, x.shape[-1]) for x in (got, want))
  error = np.linalg.norm(got - want, axis=1)
  assert (error <= bound * np.linalg.norm(want, axis=1)).all(), error.max()


@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("recipe", [Recipe(), BF16], ids=["fp8", "bf16"])
def test_layer_and_its_gradients(recipe, rematerialize):
  fn = jax.jit(functools.partial(run, recipe, rematerialize=rematerialize))
  out, dx, dparams = fn(X, PARAMS)
  with jax.default_matmul_precision("highest"):
    want, vjp = jax.vjp(
      lambda x, params: moe_oracle.layer(x, params, K)[0],
      X.astype(jnp.float32),
      F32_PARAMS,
    )
    want_dx, want_dparams = vjp(DOUT.astype(jnp.float32))
  bound = ROW_ERROR[recipe]
  check_rows(out, want, bound)
  check_rows(dx, want_dx, bound)
  for name in ("gate_up", "down"):
    # Of whole experts: a row may be a sum that nearly cancels.
    got, exact = (
      getattr(d, name).reshape(E, -1) for d in (dparams, want_dparams)
    )
    check_rows(got, exact, bound)


def test_the_kernels_are_the_reference():
  """The same quantised operands: nearly the same sums, then roundings."""
  fn = jax.jit(
    functools.partial(run, Recipe()), static_argnames="implementation"
  )
  kernels = fn(X, PARAMS, implementation="mosaic_gpu")
  plain = fn(X, PARAMS, implementation="xla")
  jax.tree.map(check_near, kernels, plain)


def test_serving():
  fn = jax.jit(lambda x, params: moe.moe_layer(x, params, K).out)
  check_near(fn(X, SCALED), fn(X, PARAMS))
  # In decoding: few tokens, most experts without any.
  check_near(fn(X[:3], SCALED), fn(X, SCALED)[:3])


@pytest.mark.parametrize("recipe", [Recipe(), BF16], ids=["fp8", "bf16"])
def test_is_deterministic(recipe):
  fn = jax.jit(functools.partial(run, recipe))
  first = jax.tree.map(np.asarray, fn(X, PARAMS))
  for _ in range(10):
    again = fn(X, PARAMS)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(
        a.view(np.uint16), np.asarray(b).view(np.uint16)
      ),
      first,
      again,
    )


def test_nan_stays_with_its_token():
  fn = jax.jit(functools.partial(run, Recipe()))
  x = X.at[77, 3].set(jnp.nan)
  (out, dx, _), (clean, clean_dx, _) = fn(x, PARAMS), fn(X, PARAMS)
  bad = np.arange(T) == 77
  for got, want in ((out, clean), (dx, clean_dx)):
    np.testing.assert_array_equal(np.isnan(got).any(axis=1), bad)
    np.testing.assert_array_equal(got[~bad], want[~bad])


@pytest.mark.parametrize("exchange", ["ragged", "dense", "gather"])
@pytest.mark.parametrize("skewed", [False, True])
def test_expert_parallel(exchange, skewed):
  """On all GPUs, up to 8; on one the exchange is with itself."""
  count = min(8, 1 << (jax.device_count().bit_length() - 1))
  params = PARAMS
  if skewed:  # All tokens to the first device.
    params = params._replace(
      expert_bias=jnp.zeros(E).at[0].set(99.0).at[1].set(98.0)
    )
  mesh = Mesh(np.array(jax.devices()[:count]), ("expert",))
  specs = moe.MoeParams(
    P(), P("expert"), P("expert"), P(), P(), P("expert"), P("expert")
  )
  if not skewed:
    specs = specs._replace(expert_bias=None)
  parallel = moe.ExpertParallel("expert", exchange=exchange)

  def on_all(recipe):
    return jax.shard_map(
      lambda x, params: moe.moe_layer(
        x, params, K, recipe=recipe, parallel=parallel
      ),
      mesh=mesh,
      in_specs=(P("expert"), specs),
      out_specs=moe.MoeOutput(P("expert"), P(), P(), P(), P()),
    )

  fp8 = jax.jit(on_all(Recipe()))(X, params)
  assert fp8.dropped == 0 and fp8.group_sizes.sum() == T * K
  one = jax.jit(lambda x, params: moe.moe_layer(x, params, K))(X, params)
  check_near(fp8.out, one.out)

  grad = lambda fn: jax.jit(
    jax.grad(lambda x, p: jnp.sum(fn(x, p).out * DOUT), (0, 1))
  )
  got = grad(on_all(BF16))(X, params)
  want = grad(lambda x, p: moe.moe_layer(x, p, K, recipe=BF16))(X, params)
  jax.tree.map(check_near, got, want)

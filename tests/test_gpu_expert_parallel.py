"""Experts on two GPUs or more, as many as there are: pytest -m gpu."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_processes import finish, start, start_together
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_grouped_gemm import Recipe, ScaledArray, moe, quantize
from jax_grouped_gemm.moe import journey as journeys
from jax_grouped_gemm.moe.exchange import send, send_back
from jax_grouped_gemm.moe.plan import arrived

COUNT = min(8, 1 << (jax.device_count().bit_length() - 1))
pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(COUNT < 2, reason=f"needs 2 devices, has {COUNT}"),
]

T, D, F, E, K = 2048, 256, 384, 16, 4
FP8, BF16 = Recipe(), Recipe.bf16()
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
  return jnp.asarray(RNG.standard_normal(shape) * scale, jnp.bfloat16)


X, DOUT = normal(T, D), normal(T, D)
CHOSEN = jnp.asarray(
  RNG.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :K], jnp.int32
)
PARAMS = moe.MoeParams(
  router=normal(D, E, scale=D**-0.5),
  gate_up=normal(E, D, 2 * F, scale=D**-0.5),
  down=normal(E, F, D, scale=F**-0.5),
  expert_bias=jnp.zeros(E),
  gate_up_bias=normal(E, 2 * F, scale=0.1),
  down_bias=normal(E, D, scale=0.1),
)
SPECS = moe.MoeParams(
  P(), P("expert"), P("expert"), None, P(), P("expert"), P("expert")
)
TOKENS = P(("expert", "data"))
ROUTINGS = {
  "as it comes": PARAMS.expert_bias,
  "one device": jnp.zeros(E).at[:K].set(99.0),
}
# A mesh of one axis, and one whose data axis has two devices.
MESHES = {"experts": (COUNT, 1), "experts and data": (COUNT // 2, 2)}


# Compiled once for all tests: most of their time goes there.
@functools.cache
def run_on(shape, recipe, **options):
  """Returns fn(params, x): the result, (d(params), d(x)) on COUNT devices."""
  parallel = moe.ExpertParallel("expert", ("data",), **options)
  devices = np.array(jax.devices()[:COUNT]).reshape(shape)
  layer = jax.shard_map(
    lambda params, x: moe.moe_layer(
      x, params, K, recipe=recipe, parallel=parallel
    ),
    mesh=Mesh(devices, ("expert", "data")),
    in_specs=(SPECS, TOKENS),
    out_specs=moe.MoeOutput(TOKENS, P(), P(), P(), P()),
  )
  return with_gradients(layer)


@functools.cache
def run_on_one(recipe):
  return with_gradients(
    lambda params, x: moe.moe_layer(x, params, K, recipe=recipe)
  )


def with_gradients(layer):
  def loss(params, x):
    result = layer(params, x)
    return jnp.sum(result.out.astype(jnp.float32) * DOUT), result

  return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def check_near(got, want, bound=2**-7):
  """Of the same operands: other orders of sums, and roundings to bf16.

  2^-9 each, and the FP8 steps that this moves here and there.
  """
  got, want = np.float64(got), np.float64(want)
  assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def check(results, expected, *, wgrad_bound=2**-7):
  (dparams, dx), got = results
  (expected_dparams, expected_dx), want = expected
  assert got.dropped == 0
  np.testing.assert_array_equal(got.group_sizes, want.group_sizes)
  check_near(got.out, want.out)
  check_near(dx, expected_dx)
  for name in ("router", "down", "gate_up", "down_bias", "gate_up_bias"):
    bound = wgrad_bound if name in ("down", "gate_up") else 2**-7
    check_near(getattr(dparams, name), getattr(expected_dparams, name), bound)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("exchange", ["ragged", "dense", "gather"])
def test_unquantised_layer_is_that_of_one_gpu(exchange, mesh, routing):
  params = PARAMS._replace(expert_bias=ROUTINGS[routing])
  got = run_on(MESHES[mesh], BF16, exchange=exchange)(params, X)
  check(got, run_on_one(BF16)(params, X))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
  "options",
  [{}, {"chunks": 2}, {"payload": "bf16"}, {"exchange": "gather"}],
)
def test_fp8_layer_is_that_of_one_gpu(options, routing):
  params = PARAMS._replace(expert_bias=ROUTINGS[routing])
  got = run_on((COUNT, 1), FP8, **options)(params, X)
  # Weights' gradients: a factor that was quantised twice, or whose scales are
  # of other tokens, is off by 2^-4 of itself and less; signs are random.
  check(got, run_on_one(FP8)(params, X), wgrad_bound=2**-4)


@pytest.mark.parametrize("payload", ["fp8", "bf16"])
@pytest.mark.parametrize("mesh", MESHES)
def test_ragged_exchange_is_the_dense_one(mesh, payload):
  """The bytes of tokens and of what belongs to them, there and back."""
  devices = np.array(jax.devices()[:COUNT]).reshape(MESHES[mesh])
  num_local = E // devices.shape[0]

  def local(x, chosen, exchange):
    parallel = moe.ExpertParallel("expert", ("data",), exchange=exchange)
    call = parallel.call(*chosen.shape, num_local, devices.shape[0])
    plan, journey = journeys.plan_journey(call, chosen, num_local)
    quantized = quantize(x, (1, 128)) if payload == "fp8" else None
    tokens = journeys.by_device(
      journey, x, jnp.float32(chosen), quantized, None
    )
    tokens = send(call, tokens, plan)
    if payload == "fp8":  # Their scales are zero where nobody's are anything.
      q = tokens.quantized
      values = jnp.where(arrived(call, plan)[:, None], q.values, 0)
      q = ScaledArray(values, q.scales, q.block_shape, q.padding)
      tokens = tokens._replace(quantized=q)
    back = send_back(call, tokens.rows, plan)
    sent = plan.tokens[jax.lax.axis_index("expert")].sum()[None]
    # What is nobody's is zero, the rows of its copies too.
    return tokens, back, sent

  def run(exchange):
    fn = functools.partial(local, exchange=exchange)
    mesh_ = Mesh(devices, ("expert", "data"))
    sharded = jax.shard_map(
      fn, mesh=mesh_, in_specs=(TOKENS, TOKENS), out_specs=TOKENS
    )
    return jax.tree.map(np.asarray, jax.jit(sharded)(X, CHOSEN))

  dense, ragged = run("dense"), run("ragged")
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), b.view("u1")),
    ragged,
    dense,
  )
  *_, back, sent = ragged
  # What was sent came back, a row of zeros for each other one.
  assert (np.float32(back) != 0).any(axis=1).sum() == sent.sum()


def test_quantised_tokens_give_the_same_bits():
  """Whether they are quantised before they travel or after."""
  fp8, bf16 = (
    run_on((COUNT, 1), FP8, payload=payload)(PARAMS, X)[1].out
    for payload in ("fp8", "bf16")
  )
  np.testing.assert_array_equal(np.float32(fp8), np.float32(bf16))


def test_one_process_per_gpu():
  """jax.distributed on this host; the same losses as of one process."""
  # This process holds most of the memory.
  env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  flags = ["--simulate=1"]
  if jax.default_backend() != "gpu":
    env["JAX_PLATFORMS"] = "cpu"
  together = start_together(
    [[*flags, f"--local-devices={i}"] for i in range(COUNT)], env=env
  )
  (stdout, rows), *others = map(finish, together)
  assert f"{COUNT} x" in stdout and f"of {COUNT} processes" in stdout
  assert all(silent == [] for _, silent in others)
  alone = finish(start(f"--simulate={COUNT}", env=env))[1]
  for got, want in zip(rows, alone, strict=True):
    assert got == pytest.approx(want, rel=1e-2)

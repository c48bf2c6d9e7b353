"""Experts on several devices: what one device gives, wherever tokens go."""

import functools
import re
import types

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from unquantized_paths import by_lax_ragged_dot

from jax_grouped_gemm import Recipe, implementation, moe, quantize
from jax_grouped_gemm.manual_axes import zeros
from jax_grouped_gemm.moe import exchange
from jax_grouped_gemm.moe.permutation import dispatch_quantized
from jax_grouped_gemm.moe.plan import _fit

D, F, E, K = 32, 16, 16, 2
T = 64  # of all devices
BF16 = Recipe.bf16()
RNG = np.random.default_rng(0)
MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}
SPECS = moe.MoeParams(
  router=P(),
  gate_up=P("expert"),
  down=P("expert"),
  router_bias=P(),
  expert_bias=P(),
  gate_up_bias=P("expert"),
  down_bias=P("expert"),
)
TOKENS = P(("expert", "data"))
OUT_SPECS = moe.MoeOutput(TOKENS, P(), P(), P(), P())


def normal(*shape, scale=1.0):
  return jnp.asarray(RNG.standard_normal(shape) * scale, jnp.float32)


X, DOUT = normal(T, D), normal(T, D)
PARAMS = moe.MoeParams(
  router=normal(D, E, scale=0.3),
  gate_up=normal(E, D, 2 * F, scale=0.2),
  down=normal(E, F, D, scale=0.2),
  router_bias=normal(E, scale=0.3),
  expert_bias=normal(E, scale=0.1),
  gate_up_bias=normal(E, 2 * F),
  down_bias=normal(E, D),
)
# Expert biases that decide alone: all tokens to two experts of one device, to
# experts of the first and of the last device, and as the router likes.
ROUTINGS = {
  "as it comes": PARAMS.expert_bias,
  "one device": jnp.zeros(E).at[2:4].set(99.0).at[3].set(100.0),
  "two devices": jnp.zeros(E).at[0].set(99.0).at[E - 1].set(98.0),
}


def mesh(shape):
  return Mesh(np.array(jax.devices()[:8]).reshape(shape), ("expert", "data"))


def layer(params, x, recipe=BF16, **kwargs):
  return moe.moe_layer(x, params, K, recipe=recipe, **kwargs)


def sharded(shape, recipe=BF16, params=SPECS, exchange="dense", **options):
  parallel = moe.ExpertParallel(
    "expert", ("data",), exchange=exchange, **options
  )
  return jax.shard_map(
    functools.partial(layer, recipe=recipe, parallel=parallel),
    mesh=mesh(shape),
    in_specs=(params, TOKENS),
    out_specs=OUT_SPECS,
  )


def value_and_gradients(run):
  """Function of (params, x): of out, and of both losses."""

  def loss(params, x):
    result = run(params, x)
    value = jnp.sum(result.out * DOUT)
    value += 2 * result.load_balancing_loss - 3 * result.z_loss
    return value, result

  return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


# Compiled once for all routings.
on_devices = functools.cache(lambda shape: value_and_gradients(sharded(shape)))
on_one_device = value_and_gradients(layer)


def close(got, want):
  np.testing.assert_allclose(
    got, want, rtol=2e-4, atol=2e-5 * max(np.abs(want).max(), 1e-3)
  )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_results_and_gradients_are_those_of_one_device(shape, routing):
  params = PARAMS._replace(expert_bias=ROUTINGS[routing])
  grads, result = on_devices(shape)(params, X)
  expected_grads, expected = on_one_device(params, X)
  assert result.dropped == 0
  jax.tree.map(close, result, expected)
  jax.tree.map(close, grads, expected_grads)
  if routing == "one device":
    np.testing.assert_array_equal(
      result.group_sizes, T * np.isin(np.arange(E), [2, 3])
    )


def test_fp8_forward_is_that_of_one_device():
  """But for roundings: a row's result depends on no other row."""
  result = jax.jit(sharded((4, 2), Recipe()))(PARAMS, X)
  expected = jax.jit(functools.partial(layer, recipe=Recipe()))(PARAMS, X)
  # Few elements are quantised to the next FP8 value, if any.
  error = np.linalg.norm(result.out - expected.out)
  assert error <= 1e-3 * np.linalg.norm(expected.out)


@functools.cache
def with_payload(payload, shape=(4, 2), **options):
  return value_and_gradients(
    sharded(shape, Recipe(), payload=payload, **options)
  )


def test_quantised_tokens_give_the_same_bits():
  """Whether they are quantised before they travel or after."""
  fp8, unquantised = (
    with_payload(payload)(PARAMS, X) for payload in ("fp8", "bf16")
  )
  np.testing.assert_array_equal(fp8[1].out, unquantised[1].out)
  # The gradient of gate_up alone is made from what arrived.
  for name, got in fp8[0][0]._asdict().items():
    want = getattr(unquantised[0][0], name)
    if name == "gate_up":
      assert np.linalg.norm(got - want) > 0
      assert np.linalg.norm(got - want) < 2**-4 * np.linalg.norm(want)
    else:
      np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(fp8[0][1], unquantised[0][1])


def quantised_on_one_device(params, x):
  """The layer of tokens that are quantised as they are for a journey."""
  logits = x @ params.router + params.router_bias
  routing = moe.route_top_k(logits, K, expert_bias=params.expert_bias)
  rows, permutation = moe.dispatch(x, routing.experts, E)
  quantized = dispatch_quantized(
    quantize(lax.stop_gradient(x), (1, 128)), permutation, None
  )
  # Their values, and the gradient of the rows.
  rows = rows - lax.stop_gradient(rows) + quantized.dequantize()
  out = moe.grouped_mlp(
    rows,
    params.gate_up,
    params.down,
    permutation.group_sizes,
    gate_up_bias=params.gate_up_bias,
    down_bias=params.down_bias,
    quantized_x=quantized,
  )
  return moe.MoeOutput(
    moe.combine(out, routing.weights, permutation),
    routing.load_balancing_loss,
    routing.z_loss,
    permutation.group_sizes,
    jnp.zeros((), jnp.int32),
  )


def test_gradients_of_quantised_tokens_are_those_of_one_device():
  # Experts that are held once: their tokens are in the same scale blocks.
  grads, result = with_payload("fp8", (8, 1))(PARAMS, X)
  expected_grads, expected = value_and_gradients(quantised_on_one_device)(
    PARAMS, X
  )

  def near(got, want):
    # Few elements are quantised to the next FP8 value, if any.
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)

  jax.tree.map(near, (grads, result), (expected_grads, expected))


def test_with_the_products_of_gpus():
  """By jax.lax.ragged_dot, with shard_map's checks on."""
  with by_lax_ragged_dot():
    run = value_and_gradients(sharded((4, 2), exchange="dense"))
    got = run(PARAMS, X)
  jax.tree.map(close, got, on_devices((4, 2))(PARAMS, X))


# ---------------------------------------------------------------- chunks


def test_chunks_change_nothing():
  run = value_and_gradients(sharded((4, 2), chunks=3))  # of 8 tokens
  for bias in ROUTINGS.values():
    params = PARAMS._replace(expert_bias=bias)
    jax.tree.map(close, run(params, X), on_devices((4, 2))(params, X))


def test_chunks_of_quantised_tokens():
  grads, result = with_payload("fp8", chunks=2)(PARAMS, X)
  expected_grads, expected = with_payload("fp8")(PARAMS, X)
  np.testing.assert_array_equal(result.out, expected.out)
  np.testing.assert_array_equal(grads[1], expected_grads[1])
  for name, got in grads[0]._asdict().items():
    # Those of the weights are made from tokens in other scale blocks.
    want = getattr(expected_grads[0], name)
    assert np.linalg.norm(got - want) <= 2**-4 * np.linalg.norm(want)


def test_chunks_share_the_capacity():
  params = PARAMS._replace(expert_bias=ROUTINGS["one device"])
  run = jax.jit(sharded((8, 1), chunks=2, capacity=20))
  result = run(params, X)
  # One device takes in 10 rows of each chunk, or 9, of 128 rows in all.
  assert 2 * T - 20 <= result.dropped <= 2 * T - 18
  assert ((np.asarray(result.out) != 0).any(axis=1)).sum() <= 20


FROZEN = PARAMS._replace(
  gate_up=quantize(PARAMS.gate_up.mT, (1, 128, 128)),
  down=quantize(PARAMS.down.mT, (1, 128, 128)),
)


def test_serving():
  result = jax.jit(sharded((8, 1)))(FROZEN, X)
  close(result.out, jax.jit(layer)(FROZEN, X).out)


@pytest.mark.parametrize(
  "options",
  [dict(), dict(payload="bf16", chunks=2), dict(exchange="gather")],
  ids=["dense", "chunks", "gather"],
)
def test_router_of_experts_that_have_no_gradient(options):
  def gradient(run):
    def loss(router):
      return jnp.sum(run(FROZEN._replace(router=router), X).out * DOUT)

    return jax.jit(jax.grad(loss))(FROZEN.router)

  got = gradient(sharded((4, 2), **options))
  close(got, gradient(layer))


def test_nan_stays_with_its_token():
  x = X.at[11, 3].set(jnp.nan)
  out = jax.jit(sharded((4, 2)))(PARAMS, x).out
  np.testing.assert_array_equal(np.isnan(out).any(axis=1), np.arange(T) == 11)


def test_explicit_mesh():
  """Arrays whose types tell how they are sharded."""
  explicit = jax.make_mesh(
    (4, 2), ("expert", "data"), axis_types=(AxisType.Explicit,) * 2
  )
  run = jax.shard_map(
    functools.partial(layer, parallel=moe.ExpertParallel("expert", ("data",))),
    mesh=explicit,
    in_specs=(SPECS, TOKENS),
    out_specs=OUT_SPECS,
  )
  with jax.set_mesh(explicit):
    params, x = jax.tree.map(
      lambda spec, x: jax.device_put(x, NamedSharding(explicit, spec)),
      (SPECS, TOKENS),
      (PARAMS, X),
    )
    out = jax.jit(run)(params, x).out
  close(np.asarray(out), jax.jit(layer)(PARAMS, X).out)


@pytest.mark.parametrize("exchange", ["dense", "gather"])
def test_mesh_of_which_one_axis_is_manual(exchange):
  parallel = moe.ExpertParallel("expert", exchange=exchange)
  run = jax.shard_map(
    functools.partial(layer, parallel=parallel),
    mesh=mesh((4, 2)),
    in_specs=(SPECS, P("expert")),
    out_specs=OUT_SPECS._replace(out=P("expert")),
    axis_names={"expert"},
  )
  got = value_and_gradients(run)(PARAMS, X)
  jax.tree.map(close, got, on_one_device(PARAMS, X))


# ---------------------------------------------------------------- gathered


gathered = functools.cache(
  lambda shape: value_and_gradients(sharded(shape, exchange="gather"))
)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_gathered_tokens(shape, routing):
  params = PARAMS._replace(expert_bias=ROUTINGS[routing])
  got, want = (run(shape)(params, X) for run in (gathered, on_devices))
  jax.tree.map(close, got, want)


def test_gathered_tokens_that_are_quantised():
  grads, result = with_payload("fp8", exchange="gather")(PARAMS, X)
  expected_grads, expected = with_payload("fp8")(PARAMS, X)
  np.testing.assert_array_equal(result.out, expected.out)
  jax.tree.map(close, grads, expected_grads)


def test_gathered_tokens_of_few_experts():
  """Fewer on a device than a token has."""
  params = PARAMS._replace(expert_bias=ROUTINGS["two devices"])
  run = functools.partial(moe.moe_layer, top_k=4, recipe=BF16, score="sigmoid")
  parallel = moe.ExpertParallel("expert", exchange="gather")
  out = jax.shard_map(
    lambda x, params: run(x, params, parallel=parallel).out,
    mesh=Mesh(np.array(jax.devices()[:8]), "expert"),
    in_specs=(P("expert"), SPECS),
    out_specs=P("expert"),
  )
  close(jax.jit(out)(X, params), jax.jit(run)(X, params).out)


def test_gathered_tokens_take_two_collectives():
  """Beside the sums of what the layer counts."""
  params = PARAMS._replace(
    gate_up=quantize(PARAMS.gate_up.mT, (1, 128, 128)),
    down=quantize(PARAMS.down.mT, (1, 128, 128)),
  )
  run = jax.jit(lambda *args: sharded((8, 1), exchange="gather")(*args).out)
  compiled = run.lower(params, X).compile()
  text = compiled.as_text()
  collectives = re.findall(r" (all-[a-z-]+)\(", text)
  assert sorted(set(collectives)) == ["all-gather", "all-to-all"]
  assert len(collectives) == 2
  close(compiled(params, X), jax.jit(layer)(params, X).out)


# ---------------------------------------------------------------- capacity


@functools.cache
def with_capacity(capacity):
  return jax.jit(sharded((4, 2), capacity=capacity))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("capacity", [1, 7, 40])
def test_capacity(capacity, routing):
  """What is dropped is counted, adds zero, and nothing else changes."""
  params = PARAMS._replace(expert_bias=ROUTINGS[routing])
  # Every expert's result is its number: which copies count is to be seen.
  params = params._replace(
    down=jnp.zeros_like(PARAMS.down),
    down_bias=jnp.arange(1.0, E + 1)[:, None] * jnp.ones(D),
  )
  run = jax.jit(sharded((4, 2), capacity=capacity))
  result, routes = (
    run(params, X),
    moe.route_top_k(
      X @ params.router + params.router_bias, K, expert_bias=params.expert_bias
    ),
  )
  values = np.asarray((routes.experts + 1) * routes.weights)
  possible = np.stack(
    [values * keep for keep in ((1, 1), (1, 0), (0, 1), (0, 0))]
  ).sum(axis=-1)  # Of a token: what its two copies can add up to.
  got = np.asarray(result.out[:, 0])
  match = np.isclose(got, possible, rtol=1e-5)
  assert match.any(axis=0).all()
  lost = np.array([0, 1, 1, 2])[match.argmax(axis=0)]
  assert result.dropped == lost.sum()
  # Two data shards with four devices of four experts each.
  shard = np.arange(T) // (T // 8) % 2
  fits = 0
  for data in range(2):
    device = np.asarray(routes.experts)[shard == data] // 4
    wanted = np.bincount(device.ravel(), minlength=4)
    fits += np.minimum(wanted, capacity).sum()
  kept = T * K - int(result.dropped)
  assert fits - 8 <= kept <= fits
  np.testing.assert_array_equal(
    result.group_sizes, np.bincount(np.ravel(routes.experts), minlength=E)
  )


def test_gradient_of_what_is_dropped_is_zero():
  params = PARAMS._replace(expert_bias=ROUTINGS["one device"])
  run = sharded((8, 1), capacity=T)

  def loss(x):
    result = run(params, x)
    return jnp.sum(result.out * DOUT), result.out

  gradient, out = jax.jit(jax.grad(loss, has_aux=True))(X)
  dropped = (np.asarray(out) == 0).all(axis=1)
  assert 0 < dropped.sum() < T
  np.testing.assert_array_equal((gradient == 0).all(axis=1), dropped)


def test_capacity_is_shared_evenly():
  """Of senders and experts none goes short, however unlucky its place."""
  sizes = jnp.asarray(RNG.integers(0, 100, (3, 40)), jnp.int32)
  for capacity in (1, 100, 1500, 10**6):
    kept = np.asarray(_fit(sizes, capacity))
    total = np.asarray(sizes.sum(axis=1))
    assert (kept >= 0).all() and (kept <= sizes).all()
    np.testing.assert_array_equal(kept.sum(axis=1), np.minimum(capacity, total))
    share = np.minimum(capacity / total, 1)[:, None]
    assert (np.abs(kept - sizes * share) <= 1.01).all()
  big = jnp.full((1, 1024), 2**20, jnp.int32)
  assert _fit(big, 2**29).sum() <= 2**29


# ---------------------------------------------------------------- ragged


def emulated_ragged_all_to_all(
  operand,
  output,
  input_offsets,
  send_sizes,
  output_offsets,
  recv_sizes,
  *,
  axis_name,
):
  """Slice by slice, as jax.lax.ragged_all_to_all's documentation says.

  It has no implementation on CPUs.
  """
  me, n = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
  gather = lambda x: jax.lax.all_gather(x, axis_name)
  operands, sizes = gather(operand), gather(send_sizes)
  starts, targets = gather(input_offsets), gather(output_offsets)
  per_device = len(input_offsets) // n
  row = jnp.arange(output.shape[0])
  for sender in range(n):
    for i in range(per_device):
      slot = me * per_device + i
      size, target = sizes[sender, slot], targets[sender, slot]
      index = starts[sender, slot] + row - target
      rows = operands[sender][jnp.clip(index, 0, operand.shape[0] - 1)]
      inside = (row >= target) & (row < target + size)
      # The receiver must know how much comes.
      inside &= recv_sizes[sender * per_device + i] == size
      output = jnp.where(inside[:, None], rows, output)
  return output


def poisoned(shape, like):
  """What nobody writes to stays NaN, also in the bytes of another dtype."""
  is_float = jnp.issubdtype(like.dtype, jnp.floating)
  fill = jnp.nan if is_float else jnp.iinfo(like.dtype).max
  return zeros(shape, like.dtype, like) + jnp.asarray(fill, like.dtype)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("recipe", [Recipe(), BF16], ids=["fp8", "bf16"])
def test_ragged_exchange_is_the_dense_one(recipe, pieces, monkeypatch):
  monkeypatch.setattr(exchange, "_SLICE_ROWS", T // 8 // pieces)
  options = dict(recipe=recipe, capacity=np.int64(20))  # Not all is sent.
  dense_grads, dense = value_and_gradients(sharded((4, 2), **options))(
    PARAMS, X
  )
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
  monkeypatch.setattr(exchange, "_buffer", poisoned)
  grads, ragged = value_and_gradients(
    sharded((4, 2), exchange="ragged", **options)
  )(PARAMS, X)
  assert ragged.dropped > 0
  jax.tree.map(close, ragged, dense)
  jax.tree.map(close, grads, dense_grads)


@pytest.mark.parametrize(
  ("platform", "processes", "local", "tokens", "expected"),
  [
    ("cpu", 1, 4, 4096, "dense"),
    ("gpu", 1, 4, 4096, "ragged"),
    ("gpu", 2, 4, 4096, "ragged"),  # The axis is within a process.
    ("gpu", 2, 2, 4096, "dense"),
    ("gpu", 4, 1, 4096, "dense"),
    ("gpu", 1, 4, 64, "gather"),  # So few are exchanged faster.
    ("cpu", 1, 4, 64, "gather"),
    ("gpu", 1, 4, 65, "ragged"),
  ],
)
def test_exchange_that_xla_has(
  platform, processes, local, tokens, expected, monkeypatch
):
  device = types.SimpleNamespace(platform=platform)
  monkeypatch.setattr(implementation, "default_device", lambda: device)
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  monkeypatch.setattr(jax, "local_device_count", lambda: local)
  parallel = moe.ExpertParallel("expert")
  assert parallel.choose_exchange(tokens, num_devices=4) == expected
  if expected != "gather":
    assert parallel.call(tokens, K, E // 4, 4).exchange == expected
  for options in (dict(capacity=64), dict(chunks=2), dict(exchange="dense")):
    parallel = moe.ExpertParallel("expert", **options)
    assert parallel.choose_exchange(tokens, 4) in ("ragged", "dense")


@pytest.mark.slow
def test_ragged_exchange_compiles_for_four_gpus():
  devices = np.array(hopper.devices(4)).reshape(2, 2)
  gpus = Mesh(devices, ("expert", "data"))
  parallel = moe.ExpertParallel(
    "expert", ("data",), exchange="ragged", chunks=2
  )
  run = jax.shard_map(
    functools.partial(
      layer, recipe=Recipe(), parallel=parallel, implementation="mosaic_gpu"
    ),
    mesh=gpus,
    in_specs=(SPECS, TOKENS),
    out_specs=OUT_SPECS,
  )
  specs = jax.tree.map(
    lambda spec, x: jax.ShapeDtypeStruct(
      x.shape, jnp.bfloat16, sharding=NamedSharding(gpus, spec)
    ),
    (SPECS, TOKENS),
    (PARAMS, X),
  )
  loss = lambda params, x: run(params, x).out.astype(jnp.float32).sum()
  traced = jax.jit(jax.grad(loss, (0, 1))).trace(*specs)
  compiled = traced.lower(lowering_platforms=("cuda",)).compile()
  text = compiled.as_text()
  exchanges = re.findall(r"ragged-all-to-all(?:-start)?\(", text)
  assert len(exchanges) == 2 * 5
  # Though each of the chunks multiplies them.
  copies = r"= \(f8e4m3fn\[8,128,128\]\S* f8e4m3fn\[8,128,128\]\S* "
  weights = re.findall(copies + r".* custom-call\(", text)
  assert len(weights) == 2


@pytest.mark.slow
def test_a_chunk_travels_while_another_is_multiplied():
  """As XLA's latency-hiding scheduler orders it for two GPUs."""
  gpus = Mesh(np.array(hopper.devices(2)), ("expert",))
  d, f, tokens = 1024, 768, 4096
  parallel = moe.ExpertParallel("expert", exchange="ragged", chunks=2)
  specs = moe.MoeParams(P(), P("expert"), P("expert"))
  run = jax.shard_map(
    lambda params, x: (
      moe.moe_layer(
        x,
        params,
        K,
        parallel=parallel,
        implementation="mosaic_gpu",
      ).out
    ),
    mesh=gpus,
    in_specs=(specs, P("expert")),
    out_specs=P("expert"),
  )
  weights = lambda *shape: quantize(jnp.zeros(shape), (1, 128, 128))
  shapes = jax.eval_shape(
    lambda: (
      moe.MoeParams(jnp.zeros((d, E)), weights(E, 2 * f, d), weights(E, d, f)),
      jnp.zeros((tokens, d), jnp.bfloat16),
    )
  )
  args = jax.tree.map(
    lambda spec, tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(gpus, spec)
      ),
      tree,
    ),
    (specs, P("expert")),
    shapes,
  )
  traced = jax.jit(run).trace(*args)
  compiled = traced.lower(lowering_platforms=("cuda",)).compile(
    compiler_options={"xla_gpu_enable_latency_hiding_scheduler": True}
  )
  text = compiled.as_text()
  schedule = text[text.index("ENTRY") :]
  # That a chunk brings a device at most, and some that nothing comes to.
  rows = 2 * (tokens // 2 // 2) * K + 8

  def first(pattern):
    return [m.start() for m in re.finditer(pattern, schedule)]

  products = first(rf"= bf16\[{rows},{2 * f}\]\S* custom-call")
  products += first(rf"= bf16\[{rows},{d}\]\S* custom-call")
  assert len(products) == 4
  for kind in ("u8", "bf16"):  # There, and back.
    beside = 0
    for name in re.findall(
      rf"%(ragged-all-to-all-start\S*) = \(\({kind}", schedule
    ):
      start = schedule.index(f"%{name} = ")
      done = first(rf"ragged-all-to-all-done\(%{re.escape(name)}\)")[0]
      beside += any(start < product < done for product in products)
    assert beside == 1


@pytest.mark.parametrize("payload", ["fp8", "bf16"])
def test_ragged_exchange_lowers_for_gpus(payload):
  run = sharded((4, 2), Recipe(), exchange="ragged", payload=payload)
  loss = lambda params, x: run(params, x).out.sum()
  traced = jax.jit(jax.grad(loss, (0, 1))).trace(PARAMS, X)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  exchanged = re.findall(
    r"custom_call @ragged_all_to_all.*: \(tensor<\d+x(\w+)>", text
  )
  # There: values of 128 columns, or rows; and weights, rows of copies and, if
  # quantised, a scale. Gradients: of sums there, of the others back; the sums
  # themselves nobody wants.
  rows, weights = f"{D}xf32", f"{K}xf32"
  there = ["128xui8", f"{2 * K + 1}xui32"]
  if payload == "bf16":
    there = [rows, f"{2 * K}xui32"]
  assert sorted(exchanged) == sorted([*there, rows, rows, weights])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: moe.ExpertParallel("x", ("x",)), "must not hold axis_name 'x'"),
    (lambda: moe.ExpertParallel("x", "x"), "must not hold axis_name 'x'"),
    (lambda: moe.ExpertParallel("x", capacity=0), "got 0"),
    (lambda: moe.ExpertParallel("x", exchange="sparse"), "'sparse'"),
    (lambda: moe.ExpertParallel("x", payload="int8"), "'bf16'.*'int8'"),
    *(
      (
        functools.partial(
          moe.ExpertParallel, "x", exchange="gather", **options
        ),
        "neither capacity nor chunks",
      )
      for options in (dict(capacity=9), dict(chunks=2))
    ),
    (lambda: moe.ExpertParallel("x", chunks=0), "chunks.*positive.*got 0"),
    (
      lambda: jax.eval_shape(sharded((4, 2), chunks=9), PARAMS, X),
      "at most the 8 tokens of a device, got 9",
    ),
    (
      lambda: jax.eval_shape(sharded((4, 2)), PARAMS, X[:0]),
      r"needs tokens, got x of shape \(0, 32\)",
    ),
    (
      lambda: jax.eval_shape(sharded((4, 2), payload="fp8"), PARAMS, X),
      "forward is 'fp8'",
    ),
    (
      lambda: jax.eval_shape(
        sharded((4, 2), params=SPECS._replace(gate_up=P(), down=P())), PARAMS, X
      ),
      "16 experts over 4 devices.*4.0 on each.*hold 16",
    ),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()

"""Every public function under every transformation of JAX.

Operands are small integers and scales powers of two: quantisation loses
nothing, products and sums are exact in any order, so results must be equal.
"""

import collections
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hopper import compile_for_hopper
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from unquantized_paths import by_lax_ragged_dot

import jax_grouped_gemm
from jax_grouped_gemm import (
  Recipe,
  k_grouped_gemm,
  m_grouped_gemm,
  m_grouped_gemm_masked,
  quantize,
  quantize_for_k_grouped,
  ragged_dot,
)
from jax_grouped_gemm.fused_quantization import quantize_activation
from jax_grouped_gemm.moe import MoeParams, moe_layer

M, K, N, G = 12, 32, 48, 4
BATCH = 2
RECIPES = {"fp8": Recipe(power_of_two_scales=True), "bf16": Recipe.bf16()}
SIZES = jnp.array([[5, 0, 3, 1], [0, 1, 1, 10]])
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)

quantize = functools.partial(quantize, power_of_two_scales=True)
quantize_for_k_grouped = functools.partial(
  quantize_for_k_grouped, power_of_two_scales=True
)


def integers(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return jnp.asarray(rng.integers(-4, 5, shape), jnp.float32)


def quantize_tokens(x):
  return quantize(x, (1, 128))


def quantize_weights(x):
  return quantize(x, (1, 128, 128))


def gradients(recipe, implementation=None):
  """Returns fn(lhs, rhs, sizes) -> (out, d(lhs), d(rhs)) of ragged_dot."""

  def run(lhs, rhs, sizes, group_offset=None):
    dot = functools.partial(
      ragged_dot,
      group_sizes=sizes,
      group_offset=group_offset,
      recipe=recipe,
      implementation=implementation,
    )
    out, vjp = jax.vjp(dot, lhs, rhs)
    return out, *vjp(out % 7 - 3)  # Small integers too.

  return run


def by_lax(fn):
  def run(*args):
    with by_lax_ragged_dot():
      return fn(*args)

  return run


def k_grouped(lhs, rhs, sizes):
  return k_grouped_gemm(
    quantize_for_k_grouped(lhs, sizes),
    quantize_for_k_grouped(rhs, sizes),
    sizes,
  )


def m_grouped(lhs, rhs, sizes):
  return m_grouped_gemm(quantize_tokens(lhs), quantize_weights(rhs), sizes)


def biased(lhs, rhs, bias, sizes, implementation=None):
  lhs, rhs = quantize_tokens(lhs), quantize_weights(rhs)
  return m_grouped_gemm(
    lhs, rhs, sizes, bias=bias, implementation=implementation
  )


def masked(lhs, rhs, sizes):
  lhs = quantize(lhs, (1, 1, 128))
  return m_grouped_gemm_masked(
    lhs, quantize_weights(rhs), sizes, zero_padding=True
  )


# (function, arguments with a batch axis in front) for jax.vmap and others.
FUNCTIONS = {
  "ragged_dot": (
    gradients(RECIPES["fp8"]),
    (integers(BATCH, M, K), integers(BATCH, G, K, N), SIZES),
  ),
  "ragged_dot-bf16": (
    gradients(RECIPES["bf16"]),
    (integers(BATCH, M, K), integers(BATCH, G, K, N), SIZES),
  ),
  "ragged_dot-lax": (
    by_lax(gradients(RECIPES["bf16"])),
    (integers(BATCH, M, K), integers(BATCH, G, K, N), SIZES),
  ),
  "m_grouped_gemm": (
    m_grouped,
    (integers(BATCH, M, K), integers(BATCH, G, N, K), SIZES),
  ),
  "m_grouped_gemm-bias": (
    biased,
    (
      integers(BATCH, M, K),
      integers(BATCH, G, N, K),
      integers(BATCH, G, N),
      SIZES,
    ),
  ),
  "m_grouped_gemm_masked": (
    masked,
    (integers(BATCH, G, M, K), integers(BATCH, G, N, K), SIZES),
  ),
  "k_grouped_gemm": (
    k_grouped,
    (integers(BATCH, M, K), integers(BATCH, M, N), SIZES),
  ),
  "quantize": (quantize_tokens, (integers(BATCH, M, K),)),
  "quantize_for_k_grouped": (
    quantize_for_k_grouped,
    (integers(BATCH, M, K), SIZES),
  ),
}
functions = pytest.mark.parametrize(
  "fn, args", FUNCTIONS.values(), ids=FUNCTIONS
)


def at(args, *index):
  return jax.tree.map(lambda x: x[index], args)


@recipes
def test_operands_are_exact(recipe):
  """Integers come out of both recipes as NumPy multiplies them."""
  lhs, rhs, sizes = integers(M, K), integers(G, K, N), SIZES[0]
  rows = oracle.group_rows(sizes, M)
  out, dlhs, drhs = gradients(recipe)(lhs, rhs, sizes)
  dout = np.asarray(out) % 7 - 3
  np.testing.assert_array_equal(out, oracle.m_grouped(lhs, rhs.mT, rows))
  np.testing.assert_array_equal(dlhs, oracle.m_grouped(dout, rhs, rows))
  np.testing.assert_array_equal(drhs, oracle.k_grouped(lhs.T, dout.T, rows))


@functions
def test_jit(fn, args):
  """Sizes are data: traced once for all, and never moved to the host."""
  traces = []

  @jax.jit
  def jitted(*args):
    traces.append(args)
    return fn(*args)

  first, second = at(args, 0), at(args, 1)
  equal(jitted(*first), fn(*first))
  with jax.transfer_guard("disallow"):
    results = jax.block_until_ready(jitted(*second))
  equal(results, fn(*second))
  assert len(traces) == 1


@functions
def test_64_bit_mode(fn, args):
  """It changes nothing where operands are narrower."""
  args = at(args, 0)
  expected = fn(*args)
  with jax.enable_x64(True):
    got = fn(*args)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
  equal(got, expected)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("recipe", [Recipe(), RECIPES["bf16"]], ids=RECIPES)
def test_strict_promotion(recipe, x64):
  """Nothing relies on JAX's promotion of dtypes or ranks."""
  args = [
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), operands)
    for operands in (
      (integers(K, G), integers(G, K, 2 * N), integers(G, N, K)),
      integers(M, K),
    )
  ]
  biases = integers(G), integers(G), integers(G, 2 * N), integers(G, K)
  args_of_masked = integers(G, M, K), integers(G, N, K), SIZES[0]

  def run(params, x):
    params = MoeParams(*params, *biases)
    return jax.value_and_grad(
      lambda x: moe_layer(x, params, 2, recipe=recipe).out.sum()
    )(x)

  expected = run(*args)
  with (
    jax.enable_x64(x64),
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    got = run(*args)
    masked(*args_of_masked)
  equal(got, expected)


def test_64_bit_mode_of_layers():
  weights = integers(K, G), integers(G, K, 2 * N), integers(G, N, K)
  run = jax.value_and_grad(
    lambda params, x: (lambda out: (out.out.sum(), out))(
      moe_layer(x, MoeParams(*params), 2)
    ),
    has_aux=True,
  )
  expected = run(weights, integers(M, K))
  with jax.enable_x64(True):
    got = run(weights, integers(M, K))
  chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
  equal(got, expected)


def test_float64_is_not_rounded():
  with jax.enable_x64(True):
    lhs = integers(M, K).astype(jnp.float64) * (1 + 2.0**-40)
    rhs = integers(G, K, N).astype(jnp.float64)
    out = ragged_dot(lhs, rhs, SIZES[0], recipe=RECIPES["bf16"])
  lhs, rhs = np.asarray(lhs), np.asarray(rhs)
  expected = oracle.m_grouped(lhs, rhs.mT, oracle.group_rows(SIZES[0], M))
  assert out.dtype == jnp.float64
  np.testing.assert_array_equal(out, expected)


@functions
def test_vmap(fn, args):
  """Over any of the operands, the others being shared."""
  loop = functools.cache(lambda *index: fn(*map(at, args, index)))
  for mapped in itertools.product([True, False], repeat=len(args)):
    if not any(mapped):
      continue
    in_axes = [0 if axis else None for axis in mapped]
    operands = [
      x if axis else x[0] for x, axis in zip(args, mapped, strict=True)
    ]
    results = jax.jit(jax.vmap(fn, in_axes))(*operands)
    for i in range(BATCH):
      equal(at(results, i), loop(*(i if axis else 0 for axis in mapped)))


@recipes
def test_vmap_over_other_axes(recipe):
  args = FUNCTIONS["ragged_dot"][1]
  dot = functools.partial(ragged_dot, recipe=recipe)
  in_axes = 2, 3, 1
  moved = [jnp.moveaxis(x, 0, i) for x, i in zip(args, in_axes, strict=True)]
  out = jax.vmap(dot, in_axes, out_axes=1)(*moved)
  for i in range(BATCH):
    equal(out[:, i], dot(*at(args, i)))


@recipes
def test_vmap_of_vmap(recipe):
  lhs, rhs, sizes = integers(2, 3, M, K), integers(3, G, K, N), SIZES
  run = gradients(recipe)
  inner = jax.vmap(run, in_axes=(0, 0, None))
  results = jax.jit(jax.vmap(inner, in_axes=(0, None, 0)))(lhs, rhs, sizes)
  for i, j in itertools.product(range(2), range(3)):
    equal(at(results, i, j), run(lhs[i, j], rhs[j], sizes[i]))


@recipes
def test_checkpoint(recipe):
  lhs, rhs, sizes = at(FUNCTIONS["ragged_dot"][1], 0)

  def loss(wrap, lhs, rhs):
    dot = wrap(functools.partial(ragged_dot, recipe=recipe))
    return jnp.sum(dot(lhs, rhs, sizes) * (integers(M, N)))

  grad = jax.grad(loss, (1, 2))
  rematerialized = jax.jit(grad, static_argnums=0)(jax.checkpoint, lhs, rhs)
  equal(rematerialized, grad(lambda fn: fn, lhs, rhs))


def test_checkpoint_of_quantised_weights():
  """Policies that keep the copies do not round them."""
  lhs, rhs = (
    jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype)
    for x in (integers(M, K), integers(G, K, N))
  )

  def dot(lhs, rhs):
    copies = jax_grouped_gemm.quantize_weights(rhs)
    return ragged_dot(lhs, rhs, SIZES[0], quantized_rhs=copies)

  gradient = lambda dot: jax.vjp(dot, lhs, rhs)[1](integers(M, N))
  expected = gradient(dot)
  for policy in (
    jax.checkpoint_policies.everything_saveable,
    jax.checkpoint_policies.nothing_saveable,
  ):
    equal(gradient(jax.checkpoint(dot, policy=policy)), expected)


@recipes
def test_scan_over_weights(recipe):
  _, rhs, sizes = at(FUNCTIONS["ragged_dot"][1], 0)
  rhs = jnp.stack([rhs[:, :, :K], rhs[:, :, -K:]])

  def layer(x, weights):
    return ragged_dot(x, weights, sizes, recipe=recipe) % 5 - 2, None

  def scanned(x, rhs):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, rhs)[0])

  def unrolled(x, rhs):
    for weights in rhs:
      x, _ = layer(x, weights)
    return jnp.sum(x)

  results, expected = (
    jax.jit(jax.value_and_grad(fn, (0, 1)))(integers(M, K), rhs)
    for fn in (scanned, unrolled)
  )
  equal(results, expected)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_copies_of_weights_are_constants(implementation):
  """Also where a loop takes a gradient of zero through them."""
  lhs, rhs, sizes = at(FUNCTIONS["ragged_dot"][1], 0)
  lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
  quantize_weights = functools.partial(
    jax_grouped_gemm.quantize_weights, implementation=implementation
  )

  def loss(rhs, copies=None):
    if copies is None:
      copies = quantize_weights(rhs)

    def step(total, lhs):
      out = ragged_dot(lhs, rhs, sizes, quantized_rhs=copies)
      return total + jnp.sum(out, dtype=jnp.float32), None

    return jax.lax.scan(step, 0.0, jnp.stack([lhs, -3 * lhs]))[0]

  got = jax.jit(jax.grad(loss))(rhs)
  expected = jax.jit(jax.grad(loss))(rhs, quantize_weights(rhs))
  assert jnp.any(got != 0)
  equal(got, expected)

  def product(rhs):
    rows = quantize(lhs, (1, 128))
    return jnp.sum(m_grouped_gemm(rows, quantize_weights(rhs).forward, sizes))

  with pytest.raises(NotImplementedError, match="^m_grouped_gemm has no gradi"):
    jax.grad(product)(rhs)


def test_gradient_of_constants_is_zero():
  """Also of such as are not finite, in whatever dtype they are added up."""
  w = integers(G, K, N)
  large = jnp.full((G, 1, 1), 1e30).at[1].set(jnp.nan)

  def loss(w):
    copies = jax_grouped_gemm.quantize_weights(w).dgrad.dequantize()
    return jnp.sum(copies * large)

  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    equal(jax.grad(loss)(w.astype(dtype)), jnp.zeros_like(w, dtype))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize(
  "fn",
  [
    lambda x, **kwargs: quantize(x, (1, 128), **kwargs),
    lambda x, **kwargs: quantize_for_k_grouped(x, SIZES[0], **kwargs),
    lambda x, **kwargs: quantize_activation(x, "swiglu", **kwargs),
  ],
  ids=["rows", "tokens", "activation"],
)
def test_quantisation_refuses_gradients(fn, implementation):
  x = integers(M, K).astype(jnp.bfloat16)

  def loss(x):
    return jnp.sum(fn(x, implementation=implementation).dequantize())

  with pytest.raises(NotImplementedError, match="^quantisation has no gradie"):
    jax.grad(loss)(x)


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize(
  "gemm", [m_grouped_gemm, m_grouped_gemm_masked, k_grouped_gemm]
)
def test_gemms_of_quantised_operands_refuse_gradients(gemm, argument):
  """XLA's would be that of the scales, and the kernels have none."""
  lhs, rhs, sizes = at(FUNCTIONS["m_grouped_gemm"][1], 0)
  operands = [quantize_tokens(lhs), quantize_weights(rhs)]
  if gemm is m_grouped_gemm_masked:
    operands[0] = quantize(jnp.stack([lhs] * G), (1, 1, 128))
  elif gemm is k_grouped_gemm:
    operands = [quantize_for_k_grouped(lhs, sizes)] * 2

  def loss(scales, stop=False):
    scaled = operands[argument]
    scales = jax.lax.stop_gradient(scales) if stop else scales
    scaled = scaled.__class__(
      scaled.values, scales, scaled.block_shape, scaled.padding
    )
    both = [*operands[:argument], scaled, *operands[argument + 1 :]]
    return jnp.sum(gemm(*both, sizes)) + jnp.sum(scales)

  scales = operands[argument].scales
  with pytest.raises(NotImplementedError, match="^[mk]_.* has no gradient"):
    jax.jit(jax.grad(loss))(scales)
  jax.jit(jax.grad(loss), static_argnums=1)(scales, True)


def test_scan_over_scaled_arrays():
  lhs, rhs, sizes = FUNCTIONS["m_grouped_gemm"][1]
  operands = (
    jax.vmap(quantize_tokens)(lhs),
    jax.vmap(quantize_weights)(rhs),
    sizes,
  )
  step = lambda carry, args: (carry, m_grouped_gemm(*args))
  _, results = jax.jit(lambda xs: jax.lax.scan(step, None, xs))(operands)
  for i in range(BATCH):
    equal(results[i], m_grouped(lhs[i], rhs[i], sizes[i]))


# ---------------------------------------------------------------- shard_map


def mesh(axis_type=jax.sharding.AxisType.Auto):
  return jax.sharding.Mesh(jax.devices("cpu")[:2], "x", (axis_type,))


# What computes the products that are not quantised.
computed = pytest.mark.parametrize(
  "through", [lambda fn: fn, by_lax], ids=["scans", "lax"]
)


@recipes
@computed
def test_shard_map_of_experts(recipe, through):
  """Each device holds half of the weights and tells where they begin."""
  lhs, rhs, sizes = at(FUNCTIONS["ragged_dot"][1], 0)
  run = gradients(recipe)

  def local(lhs, rhs, sizes):
    offset = jax.lax.axis_index("x")[None] * rhs.shape[0]
    dot = functools.partial(
      ragged_dot, group_sizes=sizes, group_offset=offset, recipe=recipe
    )
    out, vjp = jax.vjp(lambda *xs: jax.lax.psum(dot(*xs), "x"), lhs, rhs)
    return out, *vjp(out % 7 - 3)

  sharded = jax.shard_map(
    local,
    mesh=mesh(),
    in_specs=(P(), P("x"), P()),
    out_specs=(P(), P(), P("x")),
  )
  equal(jax.jit(through(sharded))(lhs, rhs, sizes), run(lhs, rhs, sizes))


@recipes
@computed
def test_shard_map_of_tokens(recipe, through):
  """Each device has its own rows and sizes; weights are shared."""
  lhs, rhs, sizes = FUNCTIONS["ragged_dot"][1]
  run = gradients(recipe)
  sharded = jax.shard_map(
    lambda lhs, rhs, sizes: run(lhs, rhs, sizes[0]),
    mesh=mesh(),
    in_specs=(P("x"), P(), P("x")),
    out_specs=(P("x"), P("x"), P()),
  )
  out, dlhs, drhs = jax.jit(through(sharded))(lhs.reshape(-1, K), rhs[0], sizes)
  shards = [run(lhs[i], rhs[0], sizes[i]) for i in range(BATCH)]
  equal(out, jnp.concatenate([shard[0] for shard in shards]))
  equal(dlhs, jnp.concatenate([shard[1] for shard in shards]))
  equal(drhs, shards[0][2] + shards[1][2])


@pytest.mark.parametrize(
  "name",
  [
    "m_grouped_gemm",
    "m_grouped_gemm-bias",
    "m_grouped_gemm_masked",
    "k_grouped_gemm",
    "quantize_for_k_grouped",
  ],
)
def test_shard_map_of_other_functions(name):
  fn, args = FUNCTIONS[name]
  expected = [fn(*at(args, i)) for i in range(BATCH)]
  for mapped in itertools.product([True, False], repeat=len(args)):
    if not any(mapped):
      continue
    operands = [
      x if axis else x[0] for x, axis in zip(args, mapped, strict=True)
    ]

    def local(*args, mapped=mapped):
      args = (x[0] if axis else x for x, axis in zip(args, mapped, strict=True))
      return jax.tree.map(lambda x: x[None], fn(*args))

    sharded = jax.shard_map(
      local,
      mesh=mesh(),
      in_specs=tuple(P("x") if axis else P() for axis in mapped),
      out_specs=P("x"),
    )
    results = jax.jit(sharded)(*operands)
    equal(at(results, 0), expected[0])
    if all(mapped):
      equal(at(results, 1), expected[1])


@recipes
def test_out_sharding(recipe):
  """On a mesh of explicit axes, as jax.lax.ragged_dot has it."""
  lhs, rhs, sizes = at(FUNCTIONS["ragged_dot"][1], 0)
  expected = ragged_dot(lhs, rhs, sizes, recipe=recipe)
  explicit = mesh(jax.sharding.AxisType.Explicit)
  with jax.set_mesh(explicit):
    lhs = jax.device_put(lhs, jax.NamedSharding(explicit, P("x")))
    dot = functools.partial(ragged_dot, out_sharding=P("x"), recipe=recipe)
    out = jax.jit(dot)(lhs, rhs, sizes)
    assert jax.typeof(out).sharding.spec == P("x", None)
    equal(out, expected)


# ---------------------------------------------------------------- export


def reload(fn, *args, platforms):
  exported = jax.export.export(jax.jit(fn), platforms=platforms)(*args)
  return jax.export.deserialize(exported.serialize())


@functions
def test_export(fn, args):
  args = at(args, 0)
  equal(reload(fn, *args, platforms=["cpu"]).call(*args), fn(*args))


def test_export_of_scaled_arrays():
  lhs, rhs, sizes = at(FUNCTIONS["m_grouped_gemm"][1], 0)
  args = quantize_tokens(lhs), quantize_weights(rhs), sizes
  exported = reload(m_grouped_gemm, *args, platforms=["cpu"])
  equal(exported.call(*args), m_grouped_gemm(*args))
  exported = reload(quantize_tokens, lhs, platforms=["cpu"])
  equal(exported.call(lhs), quantize_tokens(lhs))


def operands_of_kernels(recipe, args):
  """Those of 16-bit operands take no others."""
  dtype = jnp.float32 if recipe.forward == "fp8" else jnp.bfloat16
  return *(x.astype(dtype) for x in args[:2]), args[2]


@recipes
def test_export_of_kernels_without_a_gpu(recipe):
  args = operands_of_kernels(recipe, at(FUNCTIONS["ragged_dot"][1], 0))
  run = gradients(recipe, "mosaic_gpu")
  exported = reload(run, *args, platforms=["cuda"])
  assert exported.platforms == ("cuda",)
  # The products; of float32 operands, only rows are quantised by a kernel.
  kernels = 5 if recipe.forward == "fp8" else 3
  assert exported.mlir_module().count("mosaic_gpu_v2") == kernels
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), exported.out_avals),
    (jnp.zeros((M, N), args[0].dtype), *args[:2]),
  )


# Each takes fn and operands with a batch axis in front.
COMPOSED = {
  "vmap": lambda fn, *args: jax.vmap(fn)(*args),
  "scan": lambda fn, *args: jax.lax.map(lambda xs: fn(*xs), args),
  "checkpoint": lambda fn, *args: jax.checkpoint(fn)(*at(args, 0)),
  "shard_map": lambda fn, *args: jax.shard_map(
    lambda *args: jax.tree.map(lambda x: x[None], fn(*at(args, 0))),
    mesh=mesh(),
    in_specs=P("x"),
    out_specs=P("x"),
  )(*args),
}


@pytest.mark.parametrize("transform", COMPOSED.values(), ids=COMPOSED)
def test_masked_kernel_lowers_for_cuda_without_a_gpu(transform):
  def run(lhs, rhs, sizes):
    lhs, rhs = quantize(lhs, (1, 1, 128)), quantize_weights(rhs)
    return m_grouped_gemm_masked(lhs, rhs, sizes, implementation="mosaic_gpu")

  args = FUNCTIONS["m_grouped_gemm_masked"][1]
  traced = jax.jit(functools.partial(transform, run)).trace(*args)
  lowered = traced.lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("transform", COMPOSED.values(), ids=COMPOSED)
def test_kernel_with_a_bias_lowers_for_cuda_without_a_gpu(transform):
  run = functools.partial(biased, implementation="mosaic_gpu")
  args = FUNCTIONS["m_grouped_gemm-bias"][1]
  traced = jax.jit(functools.partial(transform, run)).trace(*args)
  lowered = traced.lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu_v2") == 1


@recipes
@pytest.mark.parametrize("transform", COMPOSED.values(), ids=COMPOSED)
def test_kernels_lower_for_cuda_without_a_gpu(transform, recipe):
  args = operands_of_kernels(recipe, FUNCTIONS["ragged_dot"][1])
  run = gradients(recipe, "mosaic_gpu")
  traced = jax.jit(functools.partial(transform, run)).trace(*args)
  lowered = traced.lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu_v2" in lowered.as_text()


@pytest.mark.parametrize("bits", [32, 64])
@recipes
def test_gradients_compile_for_hopper(recipe, bits):
  args = operands_of_kernels(recipe, at(FUNCTIONS["ragged_dot"][1], 0))
  with jax.enable_x64(bits == 64):
    compile_for_hopper(gradients(recipe, "mosaic_gpu"), *args)


@pytest.mark.parametrize("layers", ["ragged_dot", "moe_layer"])
def test_scanned_layers_run_each_kernel_once(layers):
  # XLA runs a kernel twice where a scan stacks what others need, too.
  tokens, d, groups, num_layers = 512, 256, 4, 3
  sizes = jnp.full(groups, tokens // groups)

  def product(x, w):
    y = ragged_dot(x, w["gate_up"], sizes, implementation="mosaic_gpu")
    return jax.nn.silu(y)

  def layer(x, w):
    params = MoeParams(w["router"], w["gate_up"], w["down"])
    return moe_layer(x, params, 2, implementation="mosaic_gpu").out

  def loss(weights, x):
    body = product if layers == "ragged_dot" else layer
    x, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x, weights)
    return jnp.sum(x.astype(jnp.float32) ** 2)

  def shape(*dims):
    return jax.ShapeDtypeStruct((num_layers, *dims), jnp.bfloat16)

  width = d if layers == "ragged_dot" else 2 * d
  weights = {
    "router": shape(d, groups),
    "gate_up": shape(groups, d, width),
    "down": shape(groups, d, d),
  }
  x = jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16)
  text = compile_for_hopper(
    jax.grad(loss, argnums=(0, 1)), weights, x
  ).as_text()
  # The calls name them; scans are loops, whose bodies are there once.
  calls = re.findall(r"custom-call\(.*?(\w+)_sm90", text)
  products = 1 if layers == "ragged_dot" else 2
  expected = {
    "quantize_weights": products,
    "quantize_rows_and_tokens": 2 * products,
    "m_grouped_gemm": 2 * products,
    "k_grouped_gemm": products,
  }
  if layers == "moe_layer":
    expected["copy_rows"] = 1  # Of tokens.
  assert collections.Counter(calls) == expected


# ---------------------------------------------------------------- checkify


# Each takes group sizes only, of G groups in M rows.
CHECKED = {
  "ragged_dot": lambda s: ragged_dot(integers(M, K), integers(G, K, N), s),
  "m_grouped_gemm": lambda s: m_grouped(integers(M, K), integers(G, N, K), s),
  "quantize_for_k_grouped": lambda s: (
    quantize_for_k_grouped(integers(M, K), s).scales
  ),
  "k_grouped_gemm": lambda s: k_grouped_gemm(
    *[quantize(integers(n, 512), (1, 128)) for n in (K, N)], s
  ),
  "gradient": lambda s: gradients(RECIPES["fp8"])(
    integers(M, K), integers(G, K, N), s
  )[2],
}
TRANSFORMS = {
  "jit": lambda fn: lambda s: jax.jit(fn)(s),
  "vmap": lambda fn: lambda s: jax.vmap(fn)(jnp.stack([SIZES[0], s])),
  "scan": lambda fn: (
    lambda s: jax.lax.scan(
      lambda _, s: (None, fn(s)), None, jnp.stack([SIZES[0], s])
    )
  ),
  "grad": lambda fn: lambda s: jax.grad(lambda x: jnp.sum(x * fn(s)))(1.0),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", CHECKED)
def test_checkify_reports_bad_sizes(name, transform):
  checked = jax.jit(checkify.checkify(transform(CHECKED[name])))
  rows = 512 if name == "k_grouped_gemm" else M

  def message(sizes):
    return checked(jnp.array(sizes))[0].get()

  assert message([0, 5, rows - 5, 0]) is None
  assert message([0, 0, 0, 0]) is None
  assert "must not be negative, got" in message([3, -1, 2, 0])
  assert f"at most the {rows} rows, got" in message([rows, 0, 0, 1])
  assert f"at most the {rows} rows" in message([2**31 - 1, 2**31 - 1, 2, 0])


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_checkify_reports_bad_masked_sizes(transform):
  fn = lambda s: masked(integers(G, M, K), integers(G, N, K), s)
  checked = jax.jit(checkify.checkify(transform(fn)))

  def message(sizes):
    return checked(jnp.array(sizes))[0].get()

  assert message([0, M, M, M]) is None
  assert "must not be negative, got" in message([3, -1, 2, 0])
  assert f"at most max_m = {M}, got" in message([0, M + 1, 0, 1])


def test_checkify_of_narrow_sizes():
  """Which cannot hold the rows that there are."""
  fn = lambda s: masked(integers(1, 256, K), integers(1, N, K), s)
  error, _ = checkify.checkify(fn)(jnp.array([100], jnp.int8))
  assert error.get() is None

"""The quantisation kernels, bit for bit, in the interpreter, races included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hopper import compile_for_hopper, spilled_bytes

from jax_grouped_gemm import (
  ScaledArray,
  quantize,
  quantize_for_k_grouped,
  quantize_weights,
)
from jax_grouped_gemm.kernels import _tile_loop
from jax_grouped_gemm.kernels import quantize as rows_kernel
from jax_grouped_gemm.kernels import quantize_tokens as tokens_kernel
from jax_grouped_gemm.kernels import quantize_weights as weights_kernel
from jax_grouped_gemm.token_quantization import quantize_rows_and_tokens

pytestmark = pytest.mark.slow

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
BF16, F32 = jnp.bfloat16, jnp.float32
dtypes = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
# In units of the largest number of a block: subnormals, zero, halfway between
# two numbers of either type, and what saturates.
EDGES = [
  *(2.0**-i for i in range(36)),
  *(1.5 * 2.0**-i for i in range(1, 20)),
  *((8 + i) / 448 + 0.5 / 448 for i in range(8)),
  0.0,
]


def bits(x):
  """The bits of FP8 numbers; those of every NaN are the same."""
  x = np.asarray(x)
  return np.where(np.isnan(x.astype(np.float32)), 0x7F, x.view(np.uint8))


def hostile(m: int, k: int):
  """Rows of all magnitudes with ties, NaN, Inf, zeros and tiny numbers."""
  x = oracle.random_floats((m, k))
  edges = np.array([sign * edge for edge in EDGES for sign in (1, -1)])
  for i, amax in enumerate([1e-45, 9.9e-5, 1e-4, 1.0, 448.0, 57344.0, 3.3e38]):
    row = np.resize(edges, k) * amax
    x[(3 * i) % m] = row.astype(np.float32)
  x[1 % m, ::3] = np.resize([np.nan, np.inf, -np.inf, -np.nan], x[0, ::3].size)
  x[2 % m, :128] = np.nan
  return x


def check(out, x, block_shape, dtype, power_of_two=False):
  """Asserts that values, scales and padding are those of the oracle."""
  values, scales = oracle.quantize(x, block_shape, dtype, power_of_two)
  np.testing.assert_array_equal(out.scales, scales)
  padding = [(0, count) for count in out.padding]
  np.testing.assert_array_equal(bits(out.values), np.pad(bits(values), padding))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("x_dtype", [BF16, F32])
@dtypes
def test_rows(interpreter, x_dtype, dtype, power_of_two):
  x = jnp.asarray(hostile(40, 144)).astype(x_dtype)
  with interpreter():
    out = quantize(
      x,
      (1, 128),
      dtype=dtype,
      power_of_two_scales=power_of_two,
      implementation="interpret",
    )
  check(out, x, (1, 128), dtype, power_of_two)
  assert out.padding == (0, 112)


@pytest.mark.parametrize(
  "shape", [(1, 16), (9, 128), (77, 400), (3, 7, 144), (2, 16, 128)]
)
def test_shapes_of_rows(interpreter, shape):
  x = oracle.random_floats(shape)
  block_shape = (*(1 for _ in shape[1:]), 128)
  with interpreter():
    out = quantize(x, block_shape, implementation="interpret")
  expected = quantize(x, block_shape)
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  assert out.values.shape == expected.values.shape
  check(out, x, block_shape, E4M3)


def test_slots_are_used_again(interpreter, monkeypatch):
  """Few warpgroups, so that each has more tiles than slots."""
  monkeypatch.setattr(rows_kernel, "_WGS", 2)
  monkeypatch.setattr(_tile_loop, "num_sms", lambda: 2)
  x = jnp.asarray(hostile(100, 1040)).astype(BF16)
  with interpreter():
    out = quantize(x, (1, 128), implementation="interpret")
  check(out, x, (1, 128), E4M3)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(2, 144, 80), (1, 16, 256), (1, 130, 16)])
def test_weights(interpreter, monkeypatch, shape, power_of_two):
  """Both copies, from one warpgroup with more blocks than slots."""
  monkeypatch.setattr(weights_kernel, "_WGS", 1)
  monkeypatch.setattr(_tile_loop, "num_sms", lambda: 1)
  w = hostile(shape[0] * shape[1], shape[2]).reshape(shape).astype(BF16)
  kernel = functools.partial(
    weights_kernel.quantize_weights,
    power_of_two_scales=power_of_two,
    interpret=True,
  )
  with interpreter():
    values, transposed, scales = jax.jit(kernel)(w)
  padding = (0, *(-size % 128 for size in shape[1:]))
  blocks = (1, 128, 128)
  out = ScaledArray(values, scales, blocks, padding)
  check(out, w, blocks, E4M3, power_of_two)
  np.testing.assert_array_equal(bits(transposed), bits(values).mT)


def test_quantize_weights(interpreter):
  """As the XLA path has it, structure included."""
  w = jnp.asarray(oracle.random_floats((2, 48, 144))).astype(BF16)
  with interpreter():
    out = quantize_weights(w, implementation="interpret")
  expected = quantize_weights(w)
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  assert out.forward.shape == (2, 144, 48)
  for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(x.astype(F32), y.astype(F32))


@pytest.mark.parametrize("power_of_two", [False, True])
@dtypes
def test_tokens(interpreter, monkeypatch, dtype, power_of_two):
  """Groups that start anywhere, and NaN in the rows of none, or of another."""
  monkeypatch.setattr(tokens_kernel, "_WGS", 1)
  monkeypatch.setattr(_tile_loop, "num_sms", lambda: 2)
  x, sizes = hostile(300, 144), np.array([3, 0, 130, 1, 97])
  x[131:135] = np.nan
  x[231:] = np.inf
  x = jnp.asarray(x).astype(BF16)
  static = dict(dtype=dtype, power_of_two_scales=power_of_two)
  with interpreter():
    out = quantize_for_k_grouped(x, sizes, implementation="interpret", **static)
  expected = quantize_for_k_grouped(x, sizes, **static)
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  rows = oracle.group_rows(sizes, 300)
  padded = oracle.pad_tokens(x.astype(F32), rows, out.shape[1])
  check(out, padded, (1, 128), dtype, power_of_two)


@dtypes
def test_rows_and_tokens(interpreter, monkeypatch, dtype):
  """Rows and tokens of groups that start anywhere, from tiles read once."""
  monkeypatch.setattr(tokens_kernel, "_WGS_WITH_ROWS", 1)
  monkeypatch.setattr(_tile_loop, "num_sms", lambda: 2)
  x, sizes = hostile(300, 144), np.array([3, 0, 130, 1, 97])
  x[131:135] = np.nan
  x = jnp.asarray(x).astype(BF16)
  both = functools.partial(quantize_rows_and_tokens, x, sizes)
  with interpreter():
    out = both(dtype=dtype, implementation="interpret")
  expected = both(dtype=dtype, implementation="xla")
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  rows, tokens = out
  covered = int(sizes.sum())
  check(
    ScaledArray(
      rows.values[:covered], rows.scales[:covered], (1, 128), (0, 112)
    ),
    x[:covered],
    (1, 128),
    dtype,
  )
  np.testing.assert_array_equal(bits(tokens.values), bits(expected[1].values))
  np.testing.assert_array_equal(tokens.scales, expected[1].scales)


@pytest.mark.parametrize(
  "t, f, sizes",
  [
    (1, 16, [0, 1]),
    (100, 48, [40, 70, -1]),
    (140, 80, [0, 0]),
    (260, 64, [2**31 - 1, 3]),
  ],
)
def test_sizes_of_tokens(interpreter, t, f, sizes):
  x = jnp.asarray(oracle.random_floats((t, f))).astype(BF16)
  sizes = np.array(sizes, np.int32)
  with interpreter():
    outs = (
      quantize_for_k_grouped(x, sizes, implementation="interpret"),
      quantize_rows_and_tokens(
        x, sizes, implementation="interpret", dtype=E4M3
      )[1],
    )
  expected = quantize_for_k_grouped(x, sizes)
  for out in outs:
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    np.testing.assert_array_equal(bits(out.values), bits(expected.values))
    np.testing.assert_array_equal(out.scales, expected.scales)


# ---------------------------------------------------------------- jax

SIZES = np.array([5, 0, 9])
CALLS = {
  "rows": (lambda x, **kw: quantize(x, (1, 128), **kw), (20, 144)),
  "weights": (quantize_weights, (2, 16, 144)),
  "tokens": (lambda x, **kw: quantize_for_k_grouped(x, SIZES, **kw), (20, 48)),
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_vmap(interpreter, name):
  fn, shape = CALLS[name]
  x = jnp.asarray(oracle.random_floats((2, *shape))).astype(BF16)
  with interpreter():
    out = jax.vmap(functools.partial(fn, implementation="interpret"))(x)
  for leaf, right in zip(
    jax.tree.leaves(out), jax.tree.leaves(jax.vmap(fn)(x)), strict=True
  ):
    np.testing.assert_array_equal(leaf.astype(F32), right.astype(F32))


@calls
def test_kernels_lower_for_cuda_without_a_gpu(name):
  fn, shape = CALLS[name]
  fn = functools.partial(fn, implementation="mosaic_gpu")
  x = jax.ShapeDtypeStruct((2, *shape), BF16)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
  for transformed in (
    jax.vmap(fn),
    jax.shard_map(
      lambda x: jax.tree.map(lambda leaf: leaf[None], fn(x[0])),
      mesh=mesh,
      in_specs=jax.P("d"),
      out_specs=jax.P("d"),
    ),
    lambda x: jax.lax.scan(lambda _, x: (None, fn(x)), None, x)[1],
  ):
    exported = jax.export.export(jax.jit(transformed), platforms=["cuda"])(x)
    assert "mosaic_gpu" in exported.mlir_module()


# ---------------------------------------------------------------- Hopper


@pytest.fixture
def compile_and_report(capfd, monkeypatch):
  """Compiles, checks what the assembler said of registers, returns the PTX."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")

  def run(fn, *args):
    args = [jax.ShapeDtypeStruct(*arg) for arg in args]
    compile_for_hopper(fn, *args)
    captured = capfd.readouterr()
    report = captured.out + captured.err
    spills = spilled_bytes(report)
    assert spills and not any(spills)
    # div.full.f32, which Mosaic makes of a division, may be off by two units.
    assert "div.full" not in report and "rcp.rn.f32" in report
    return report

  return run


@dtypes
@pytest.mark.parametrize("x_dtype", [BF16, F32])
def test_rows_compile(compile_and_report, x_dtype, dtype):
  for m, k, power_of_two in [(20, 400, True), (4096, 2880, False)]:
    fn = functools.partial(
      rows_kernel.quantize_rows, dtype=dtype, power_of_two_scales=power_of_two
    )
    compile_and_report(fn, ((m, k), x_dtype))


@pytest.mark.parametrize("shape", [(8, 4096, 14336), (3, 16, 80)])
def test_weights_compile(compile_and_report, shape):
  for power_of_two in (False, True):
    fn = functools.partial(
      weights_kernel.quantize_weights, power_of_two_scales=power_of_two
    )
    compile_and_report(fn, (shape, BF16))


@dtypes
@pytest.mark.parametrize("t, f", [(5000, 7168), (1, 16), (133, 80)])
def test_tokens_compile(compile_and_report, t, f, dtype):
  blocks = (-(-t // 128) + 3,), jnp.int32
  for rows in (False, True):
    fn = functools.partial(
      tokens_kernel.quantize_tokens,
      dtype=dtype,
      power_of_two_scales=True,
      rows=rows,
    )
    compile_and_report(fn, ((t, f), BF16), blocks, blocks)

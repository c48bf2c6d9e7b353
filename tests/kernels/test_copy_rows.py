"""Rows copied by TMA: those of XLA, races included in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import compile_for_hopper, spilled_bytes

from jax_grouped_gemm import moe, quantize
from jax_grouped_gemm.kernels import _tile_loop, copy_rows
from jax_grouped_gemm.moe.prologue import Dispatched

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


@pytest.fixture
def few_warpgroups(monkeypatch):
  """So that each has more tiles than slots."""
  monkeypatch.setattr(copy_rows, "_WGS", 2)
  monkeypatch.setattr(_tile_loop, "num_sms", lambda: 2)


@pytest.mark.parametrize(
  "t, k, copies, dtype",
  [
    (333, 256, 3, jnp.uint8),
    (1, 128, 1, jnp.uint8),
    (40, 2944, 8, jnp.float8_e4m3fn),
    (50, 720, 2, jnp.bfloat16),  # Three boxes of 240 columns.
    (30, 8192, 1, jnp.float32),  # Rows in parts.
    (40, 4, 33, jnp.float32),  # The least that TMA copies.
  ],
)
def test_rows(interpreter, few_warpgroups, t, k, copies, dtype):
  """Of all copies, and of those that go somewhere, which are about half."""
  x = jnp.asarray(RNG.integers(0, 200, (t + 3, k))).astype(dtype)
  places = RNG.permutation(t * copies)
  source = np.argsort(places) // copies
  for m in (t * copies, max(1, t * copies // 2)):
    rows = np.where(places < m, places, m + places % 2).astype(np.int32)
    with interpreter():
      out = copy_rows.copy_rows(x, rows.reshape(t, copies), m, interpret=True)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.float32(out), np.float32(x)[source[:m]])


@pytest.mark.parametrize("d", [256, 400])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_copies_of_quantised_tokens(interpreter, d, dtype):
  """Of what no kernel quantises, too, and by XLA, the choice without a GPU."""
  tokens = jnp.asarray(RNG.standard_normal((23, d)), dtype)
  experts = RNG.integers(0, 7, (23, 3))
  permutation = moe.sort_by_expert(experts, 6)  # Some go to nobody.
  expected = quantize(moe.dispatch(tokens, experts, 6)[0], (1, 128))
  run = functools.partial(Dispatched().quantize, tokens, permutation)
  with interpreter():
    out = run(implementation="interpret")
  for result in (out, run(implementation=None)):
    assert result.shape == expected.shape == (69, d)
    np.testing.assert_array_equal(
      np.float32(result.values)[:69], np.float32(expected.values)[:69]
    )
    np.testing.assert_array_equal(result.scales, expected.scales)


@pytest.mark.parametrize("d", [256, 7])
def test_gradient_of_copies(interpreter, d):
  """By the kernel or, of rows that TMA cannot copy, without."""
  assert copy_rows.supports(d, 4) == (d == 256)
  x = jnp.asarray(RNG.standard_normal((24, d), np.float32))
  dout = jnp.asarray(RNG.standard_normal((72, d), np.float32))
  permutation = moe.sort_by_expert(RNG.integers(0, 7, (24, 3)), 6)

  def run(implementation):
    copy = lambda x: Dispatched().apply(x, permutation, implementation)
    out, vjp = jax.vjp(copy, x)
    return out, *vjp(dout)

  with interpreter():
    results = run("interpret")
  jax.tree.map(np.testing.assert_array_equal, results, run("xla"))


def test_vmap(interpreter):
  x = jnp.asarray(RNG.standard_normal((2, 24, 128), np.float32))
  permutations = jax.vmap(functools.partial(moe.sort_by_expert, num_experts=6))(
    jnp.asarray(RNG.integers(0, 6, (2, 24, 3)))
  )
  copy = lambda implementation: jax.vmap(
    lambda x, p: Dispatched().apply(x, p, implementation)
  )(x, permutations)
  with interpreter():
    out = copy("interpret")
  np.testing.assert_array_equal(out, copy("xla"))


def test_eager_calls_are_traced_once(interpreter, monkeypatch):
  traced, kernel = [], copy_rows.copy_rows

  def traced_kernel(*args, **options):
    traced.append(args)
    return kernel(*args, **options)

  monkeypatch.setattr(copy_rows, "copy_rows", traced_kernel)
  permutation = moe.sort_by_expert(RNG.integers(0, 7, (13, 3)), 6)
  for _ in range(2):
    with interpreter():
      Dispatched().apply(jnp.ones((13, 128)), permutation, "interpret")
  assert len(traced) == 1


def test_nothing():
  permutation = moe.sort_by_expert(jnp.zeros((0, 2), jnp.int32), 6)
  out = Dispatched().apply(jnp.zeros((0, 32)), permutation, "interpret")
  assert out.shape == (0, 32)


@pytest.mark.parametrize(
  "k, dtype",
  [(4096, jnp.float8_e4m3fn), (7168, jnp.bfloat16), (2944, jnp.float8_e5m2)],
  ids=str,
)
@pytest.mark.parametrize("copies", [1, 8])
def test_compiles_for_hopper(k, dtype, copies, monkeypatch, capfd):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  compile_for_hopper(
    functools.partial(copy_rows.copy_rows, m=5003),
    jax.ShapeDtypeStruct((1000, k), dtype),
    jax.ShapeDtypeStruct((1000, copies), jnp.int32),
  )
  captured = capfd.readouterr()
  assert spilled_bytes(captured.out + captured.err) == [0]

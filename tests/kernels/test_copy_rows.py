"""Rows gathered by TMA: those of XLA, races included in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import compile_for_hopper, spilled_bytes

from jax_grouped_gemm import moe, quantize
from jax_grouped_gemm.kernels import _tile_loop, copy_rows
from jax_grouped_gemm.moe.permutation import dispatch_quantized
from jax_grouped_gemm.moe.prologue import Dispatched

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


@pytest.fixture
def few_warpgroups(monkeypatch):
  """So that each has more tiles than slots."""
  monkeypatch.setattr(copy_rows, "_WGS", 2)
  monkeypatch.setattr(_tile_loop, "num_sms", lambda: 2)


@pytest.mark.parametrize(
  "t, k, m, dtype",
  [
    (40, 256, 333, jnp.uint8),
    (1, 128, 1, jnp.uint8),
    (9, 2944, 100, jnp.float8_e4m3fn),
    (5, 720, 50, jnp.bfloat16),  # Three boxes of 240 columns.
    (7, 8192, 30, jnp.float32),  # Rows in parts.
    (7, 4, 40, jnp.float32),  # The least that TMA copies.
  ],
)
def test_rows(interpreter, few_warpgroups, t, k, m, dtype):
  x = jnp.asarray(RNG.integers(0, 200, (t, k))).astype(dtype)
  index = RNG.integers(0, t, m).astype(np.int32)
  with interpreter():
    out = copy_rows.copy_rows(x, index, interpret=True)
  assert out.dtype == dtype
  np.testing.assert_array_equal(np.float32(out), np.float32(x)[index])


def test_no_row_is_zeros(interpreter):
  x = jnp.ones((4, 128), jnp.uint8)
  with interpreter():
    out = copy_rows.copy_rows(x, jnp.int32([3, 4, 0, 1000]), interpret=True)
  np.testing.assert_array_equal(out[:, 5], [1, 0, 1, 0])


@pytest.mark.parametrize("d", [256, 400])
def test_copies_of_quantised_tokens(interpreter, d):
  """By the kernel and by XLA, whose choice it is without a GPU."""
  tokens = RNG.standard_normal((24, d), np.float32)
  x = quantize(tokens, (1, 128))
  experts = RNG.integers(0, 7, (24, 3))
  permutation = moe.sort_by_expert(experts, 6)  # Some go to nobody.
  with interpreter():
    out = dispatch_quantized(x, permutation, "interpret")
  for expected in (
    dispatch_quantized(x, permutation, None),
    quantize(moe.dispatch(tokens, experts, 6)[0], (1, 128)),
  ):
    np.testing.assert_array_equal(np.float32(out.values), expected.values)
    np.testing.assert_array_equal(out.scales, expected.scales)


@pytest.mark.parametrize("d", [256, 7])
def test_gradient_of_copies(interpreter, d):
  """By the kernel or, of rows that TMA cannot copy, without."""
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


def test_what_tma_cannot_copy_xla_does():
  x = jnp.arange(14.0).reshape(2, 7)
  assert "28" in copy_rows.unsupported(7, 4)
  assert copy_rows.unsupported(8, 4) is None
  x = quantize(x, (1, 128))
  x = type(x)(x.values[:, :7], x.scales, x.block_shape, (0, 0))
  permutation = moe.sort_by_expert(jnp.int32([[1], [0]]), 2)
  out = dispatch_quantized(x, permutation, "interpret")
  np.testing.assert_array_equal(
    np.float32(out.values), np.float32(x.values)[1::-1]
  )


@pytest.mark.parametrize(
  "k, dtype",
  [(4096, jnp.float8_e4m3fn), (7168, jnp.bfloat16), (2944, jnp.float8_e5m2)],
  ids=str,
)
def test_compiles_for_hopper(k, dtype, monkeypatch, capfd):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  compile_for_hopper(
    copy_rows.copy_rows,
    jax.ShapeDtypeStruct((1000, k), dtype),
    jax.ShapeDtypeStruct((5003,), jnp.int32),
  )
  captured = capfd.readouterr()
  assert spilled_bytes(captured.out + captured.err) == [0]

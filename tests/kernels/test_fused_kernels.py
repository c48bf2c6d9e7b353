"""Quantisation fused with activation, and an activation's gradient.

Bit for bit what XLA gives step by step; in the interpreter, races included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hopper import compile_for_hopper, spilled_bytes
from test_quantize_kernels import E4M3, E5M2, bits, hostile

from jax_grouped_gemm import quantize
from jax_grouped_gemm.fused_quantization import (
  ACTIVATIONS,
  activate,
  activation_gradient,
  quantize_activation,
)
from jax_grouped_gemm.kernels import _tile_loop
from jax_grouped_gemm.kernels import activation_backward as backward_kernel
from jax_grouped_gemm.kernels import quantize as rows_kernel

pytestmark = pytest.mark.slow

BF16, F32 = jnp.bfloat16, jnp.float32
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
# Each value of both.
options = pytest.mark.parametrize(
  "dtype, power_of_two", [(E4M3, False), (E5M2, True)], ids=str
)


def gates(m, f):
  """bfloat16 gate and up, large enough for clamps, and hostile rows."""
  gate_up = 4 * oracle.random_floats((m, 2 * f))
  rows = hostile(m, 2 * f)[: m // 2]
  gate_up[: len(rows)] = rows
  gate_up[-1, :4], gate_up[-1, f : f + 4] = 7.0, [7.0, -7.0, 0.0, -0.0]
  return jnp.asarray(gate_up).astype(BF16)


def check(out, expected):
  """Asserts that two ScaledArrays are the same to the bit."""
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  np.testing.assert_array_equal(bits(out.values), bits(expected.values))
  np.testing.assert_array_equal(out.scales, expected.scales)


def equal(out, expected):
  np.testing.assert_array_equal(np.float32(out), np.float32(expected))


@pytest.fixture
def few_warpgroups(monkeypatch):
  """So that each has more tiles than slots."""
  for kernel in (rows_kernel, backward_kernel):
    monkeypatch.setattr(kernel, "_WGS", 2)
  monkeypatch.setattr(_tile_loop, "num_sms", lambda: 2)


# ---------------------------------------------------------------- activation


@activations
@options
def test_activation(
  interpreter, few_warpgroups, activation, dtype, power_of_two
):
  gate_up = gates(72, 272)
  static = dict(dtype=dtype, power_of_two_scales=power_of_two)
  fused = functools.partial(quantize_activation, activation=activation)
  with interpreter():
    out = fused(gate_up, implementation="interpret", **static)
  expected = quantize(activate(gate_up, activation), (1, 128), **static)
  assert np.isnan(np.float32(expected.values)).any()
  check(out, expected)
  check(fused(gate_up, implementation="xla", **static), expected)


@pytest.mark.parametrize("m, f", [(1, 16), (9, 128), (77, 400), (16, 144)])
def test_shapes_of_activation(interpreter, m, f):
  gate_up = gates(m, f)
  with interpreter():
    out = quantize_activation(gate_up, "swiglu", implementation="interpret")
  check(out, quantize(activate(gate_up, "swiglu"), (1, 128)))


@activations
@pytest.mark.parametrize("m, f", [(1, 16), (41, 272)])
def test_gradient(interpreter, few_warpgroups, activation, m, f):
  gate_up = gates(m, f)
  dout = jnp.asarray(hostile(m, f)[::-1]).astype(BF16)
  with interpreter():
    out = activation_gradient(
      gate_up, dout, activation, implementation="interpret"
    )
  expected = activation_gradient(gate_up, dout, activation)
  if activation == "geglu":
    # XLA contracts its polynomial to other fused multiply-adds: float32 numbers
    # are a few units off, and now and then round to another bfloat16.
    equal(jnp.isnan(out), jnp.isnan(expected))
    out, expected = (
      np.asarray(jnp.nan_to_num(x, nan=0.0)).view(np.int16).astype(int)
      for x in (out, expected)
    )
    steps = np.abs(out - expected)
    assert (steps <= 1).all() and (steps > 0).mean() <= 1e-3
    return
  equal(out, expected)


@activations
def test_gradient_is_that_of_the_activation(activation):
  """By finite differences, in float64, away from the clamps' corners."""
  gate, up = np.meshgrid(np.linspace(-9, 9, 29), np.linspace(-9, 9, 31))
  gate_up = np.stack([gate.ravel(), up.ravel()], 1)
  dout = oracle.random_floats((len(gate_up), 1)).astype(np.float64)
  with jax.enable_x64(True):
    step = 1e-6
    expected = [
      (activate(gate_up + e, activation) - activate(gate_up - e, activation))
      / (2 * step)
      * dout
      for e in step * np.eye(2)
    ]
    out = activation_gradient(gate_up, dout, activation)
    assert out.dtype == np.float64
    np.testing.assert_allclose(
      out, np.concatenate(expected, 1), rtol=1e-5, atol=1e-6
    )


@activations
def test_float32_is_as_good_as_float64(activation):
  """erf in float32 is a polynomial of ours."""
  gate_up = 3 * oracle.random_floats((100, 64))
  dout = oracle.random_floats((100, 32))
  out = (
    activate(gate_up, activation),
    activation_gradient(gate_up, dout, activation),
  )
  with jax.enable_x64(True):
    wide = np.float64(gate_up)
    expected = (
      activate(wide, activation),
      activation_gradient(wide, np.float64(dout), activation),
    )
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
      out,
      expected,
    )


# ---------------------------------------------------------------- jax

CALLS = {
  "activation": lambda x, **kw: quantize_activation(x, "swiglu", **kw),
  "gradient": lambda x, **kw: activation_gradient(x, x[:, ::2], "geglu", **kw),
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_vmap(interpreter, name):
  fn = CALLS[name]
  x = jnp.asarray(oracle.random_floats((2, 20, 160))).astype(BF16)
  with interpreter():
    out = jax.vmap(functools.partial(fn, implementation="interpret"))(x)
  for leaf, right in zip(
    jax.tree.leaves(out), jax.tree.leaves(jax.vmap(fn)(x)), strict=True
  ):
    equal(leaf, right)


@calls
def test_kernels_lower_for_cuda_without_a_gpu(name):
  fn = functools.partial(CALLS[name], implementation="mosaic_gpu")
  x = jax.ShapeDtypeStruct((2, 20, 160), BF16)
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


@pytest.mark.parametrize("shape", [(0, 32), (4, 0)])
def test_nothing(shape):
  x = jnp.zeros(shape, BF16)
  out = quantize_activation(x, "swiglu", implementation="interpret")
  assert 0 in out.shape
  dout = jnp.zeros((shape[0], shape[1] // 2), BF16)
  out = activation_gradient(x, dout, "swiglu", implementation="interpret")
  assert out.shape == shape


# ---------------------------------------------------------------- errors

X = jnp.zeros((4, 48), BF16)


@pytest.mark.parametrize(
  "call, error, message",
  [
    (
      lambda: quantize_activation(X, "relu"),
      ValueError,
      "'swiglu_clamped'.*'relu'",
    ),
    (lambda: quantize_activation(X[0], "swiglu"), ValueError, r"\(48,\)"),
    (lambda: quantize_activation(X[:, 1:], "swiglu"), ValueError, r"\(4, 47\)"),
    (
      lambda: quantize_activation(X, "swiglu", implementation="interpret"),
      NotImplementedError,
      "f to be a multiple of 16, got f=24",
    ),
    (
      lambda: quantize_activation(
        X.astype(F32), "swiglu", implementation="interpret"
      ),
      NotImplementedError,
      "activates bfloat16, got float32",
    ),
    (
      lambda: quantize_activation(X, "swiglu", dtype=jnp.int8),
      TypeError,
      "int8",
    ),
    (
      lambda: activation_gradient(X, X, "swiglu"),
      ValueError,
      r"\(4, 24\) of bfloat16.*got \(4, 48\)",
    ),
    (
      lambda: activation_gradient(X, X[:, :24].astype(F32), "swiglu"),
      ValueError,
      "got .* of float32",
    ),
  ],
)
def test_errors(call, error, message):
  with pytest.raises(error, match=message):
    call()


# ---------------------------------------------------------------- Hopper


@pytest.fixture
def compile_and_report(capfd, monkeypatch):
  """Compiles, checks what the assembler said of registers, returns the PTX."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")

  def run(fn, *args):
    compile_for_hopper(fn, *(jax.ShapeDtypeStruct(*arg) for arg in args))
    captured = capfd.readouterr()
    report = captured.out + captured.err
    spills = spilled_bytes(report)
    assert spills and not any(spills)
    return report

  return run


@activations
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_activation_compiles(compile_and_report, activation, dtype):
  for m, f in [(20, 400), (4096, 2880)]:
    fn = functools.partial(
      rows_kernel.quantize_rows,
      activation=activation,
      dtype=dtype,
      power_of_two_scales=m == 20,
    )
    report = compile_and_report(fn, ((m, 2 * f), BF16))
    if activation == "swiglu_clamped":
      # Others would hide a NaN.
      assert "min.NaN.f32" in report and "max.NaN.f32" in report


@activations
def test_gradient_compiles(compile_and_report, activation):
  fn = functools.partial(
    backward_kernel.activation_backward, activation=activation
  )
  for m, f in [(3, 16), (20, 400), (4096, 2880)]:
    compile_and_report(fn, ((m, 2 * f), BF16), ((m, f), BF16))

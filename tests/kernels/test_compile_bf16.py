"""Every config of 16-bit operands compiles for Hopper, without spills."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hopper import compile_for_hopper, spilled_bytes

from jax_grouped_gemm.config import SMEM_BYTES, Config
from jax_grouped_gemm.kernels import tuning
from jax_grouped_gemm.kernels.k_grouped_bf16 import k_grouped_bf16
from jax_grouped_gemm.kernels.m_grouped_bf16 import m_grouped_bf16

pytestmark = pytest.mark.slow

BF16 = jnp.bfloat16
WIDTHS = range(8, 16_000, 8)


def configs(choose):
  """All that it may choose, each with the least n that it is chosen for."""
  return {
    (choose(n, dtype), dtype): n
    for dtype in (BF16, jnp.float32)
    for n in reversed(WIDTHS)
  }


M_GROUPED, K_GROUPED = map(
  configs, (tuning.m_grouped_bf16_config, tuning.k_grouped_bf16_config)
)
# To be tried: three warpgroups, and rhs shared.
OTHER = (Config(tile_n=128, compute_wgs=3, multicast="rhs"), BF16)


def shape(*dims, dtype=BF16):
  return jax.ShapeDtypeStruct(dims, dtype)


@pytest.fixture
def compile_and_report(capfd, monkeypatch):
  """Compiles, then checks what the assembler said of registers."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

  def run(fn, *args):
    compile_for_hopper(fn, *args)
    captured = capfd.readouterr()
    report = captured.out + captured.err
    spills = spilled_bytes(report)
    assert spills and not any(spills)
    assert "serialized" not in report  # One product waiting for another.

  return run


@pytest.mark.parametrize("config, dtype", [*sorted(M_GROUPED, key=str), OTHER])
def test_m_grouped_configs(compile_and_report, config, dtype):
  assert config.smem_bytes(dtype, 0) <= SMEM_BYTES
  m, k, g = 4096, 2880, 4
  n = 8 * config.tile_n
  for transposed in (False, True):
    gemm = functools.partial(
      m_grouped_bf16,
      transposed=transposed,
      m=m,
      n=n,
      out_dtype=dtype,
      config=config,
    )
    rhs = shape(g, n, k) if transposed else shape(g, k, n)
    sizes, offset = shape(g, dtype=jnp.int32), shape(1, dtype=jnp.int32)
    compile_and_report(gemm, shape(m, k), rhs, sizes, offset)


@pytest.mark.parametrize("config, dtype", sorted(K_GROUPED, key=str))
def test_k_grouped_configs(compile_and_report, config, dtype):
  assert config.smem_bytes(dtype, 0) <= SMEM_BYTES
  t, m, g = 1024, 4096, 8
  n = K_GROUPED[config, dtype]  # With more, there are more tiles of the same.
  gemm = functools.partial(
    k_grouped_bf16, m=m, n=n, out_dtype=dtype, config=config
  )
  bounds = [shape(g, dtype=jnp.int32)] * 2
  compile_and_report(gemm, shape(t, m), shape(t, n + -n % 64), *bounds)

"""Every config compiles for Hopper, without a GPU, and spills no register."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hopper import compile_for_hopper, spilled_bytes

from jax_grouped_gemm import quantize
from jax_grouped_gemm.config import SMEM_BYTES, Config, SmallGroupsConfig
from jax_grouped_gemm.kernels import tuning
from jax_grouped_gemm.kernels.k_grouped import k_grouped_gemm
from jax_grouped_gemm.kernels.m_grouped import m_grouped_gemm
from jax_grouped_gemm.kernels.small_groups import small_groups_gemm
from jax_grouped_gemm.schedule import Masked

pytestmark = pytest.mark.slow

WIDTHS = range(16, 16_000, 16)
DTYPES = (jnp.bfloat16, jnp.float32)
# What `tune` tries besides.
TURNS = Config(tile_n=128, compute_wgs=3, turns=True), Config(turns=True)
# What the tables and the heuristics may choose.
TABLE = tuning.read_table(tuning.TABLE)
M_GROUPED = (
  {
    (config, dtype)
    for dtype in DTYPES
    for config in tuning.m_grouped_candidates(2880, dtype)
  }
  | {
    (entry.config, jnp.dtype(entry.out_dtype).type)
    for entry in TABLE
    if entry.kernel == "m_grouped"
  }
  | {(config, jnp.bfloat16) for config in TURNS}
)
SMALL_GROUPS = {
  (tuning.small_groups_config(rows, n, 2880, 8, dtype, row_align=8), dtype)
  for rows in (4, 8, 16, 64)
  for n in (128, 2**14)
  for dtype in DTYPES
  if dtype == jnp.bfloat16 or rows == 64
} | {
  (SmallGroupsConfig(tile_m=tile_m, tile_n=tile_n, split_k=2), jnp.bfloat16)
  for tile_m, tile_n in ((8, 128), (32, 64), (64, 128))
}
# With the least n it is chosen for.
K_GROUPED = {
  (tuning.k_grouped_config(256, n, t, g, dtype, acc), dtype, acc): n
  for n in reversed(WIDTHS)
  for g in (4, 16)
  for t in (1024, 2**18)
  for dtype in DTYPES
  for acc in {False, dtype == jnp.float32}
}


biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


def shape(*dims, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(dims, dtype)


@pytest.fixture
def compile_and_report(capfd, monkeypatch):
  """Compiles, then checks what the assembler said of registers."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

  def run(fn, *args):
    compile_for_hopper(fn, *args)
    captured = capfd.readouterr()
    spills = spilled_bytes(captured.out + captured.err)
    assert spills and not any(spills)

  return run


def m_grouped_args(m, n, k, g, bias=False):
  f8, i32 = jnp.float8_e4m3fn, jnp.int32
  k_stored, blocks = -(-k // 128) * 128, -(-k // 128)
  return (
    shape(m, k_stored, dtype=f8),
    shape(m, blocks),
    shape(g, n, k_stored, dtype=f8),
    shape(g, -(-n // 128), blocks),
    shape(g, dtype=i32),
    shape(1, dtype=i32),
    shape(g, n) if bias else None,
  )


@biases
@pytest.mark.parametrize("config, dtype", sorted(M_GROUPED, key=str))
def test_m_grouped_configs(compile_and_report, config, dtype, bias):
  assert config.smem_bytes(dtype, 2880) <= SMEM_BYTES
  n = config.tile_n + 16
  gemm = functools.partial(
    m_grouped_gemm, m=4096, n=n, out_dtype=dtype, config=config
  )
  compile_and_report(gemm, *m_grouped_args(4096, n, 2880, 4, bias))


@pytest.mark.parametrize("kernel", ["m_grouped", "small_groups"])
def test_e5m2_rows(compile_and_report, kernel):
  """As the gradient of the result is, times weights in e4m3fn."""
  rows, *args = m_grouped_args(4096, 528, 2880, 4)
  rows = shape(*rows.shape, dtype=jnp.float8_e5m2)
  if kernel == "m_grouped":
    config = tuning.m_grouped_config(4096, 528, 2880, 4, jnp.bfloat16)
    gemm = m_grouped_gemm
  else:
    config = tuning.small_groups_config(
      16, 528, 2880, 8, jnp.bfloat16, row_align=8
    )
    gemm = small_groups_gemm
  gemm = functools.partial(
    gemm, m=4096, n=528, out_dtype=jnp.bfloat16, config=config
  )
  compile_and_report(gemm, rows, *args)


@biases
@pytest.mark.parametrize("config, dtype", sorted(SMALL_GROUPS, key=str))
def test_small_groups_configs(compile_and_report, config, dtype, bias):
  assert config.smem_bytes(dtype, 2880) <= SMEM_BYTES
  gemm = functools.partial(
    small_groups_gemm, m=4096, n=528, out_dtype=dtype, config=config
  )
  compile_and_report(gemm, *m_grouped_args(4096, 528, 2880, 64, bias))


@pytest.mark.parametrize(
  "kernel, config",
  [
    (m_grouped_gemm, tuning.masked_config(192, 4096, 2880, 64, jnp.bfloat16)),
    (small_groups_gemm, tuning.masked_config(20, 4096, 2880, 64, jnp.bfloat16)),
  ],
)
def test_masked_kernels(compile_and_report, kernel, config):
  gemm = functools.partial(
    kernel,
    m=4096,
    n=4096,
    out_dtype=jnp.bfloat16,
    config=config,
    masked=Masked(64, 60, True),
  )
  compile_and_report(gemm, *m_grouped_args(4096, 4096, 2880, 64))


def k_grouped(m, n, g, config, acc, dtype=jnp.float32):
  """Returns the function and its arguments."""
  t, f8 = 1024, jnp.float8_e4m3fn
  gemm = functools.partial(
    k_grouped_gemm, m=m, n=n, out_dtype=dtype, config=config
  )
  return (
    gemm,
    shape(m, t, dtype=f8),
    shape(m, t // 128),
    shape(n, t, dtype=f8),
    shape(n, t // 128),
    shape(g, dtype=jnp.int32),
    shape(g, dtype=jnp.int32),
    shape(g, m, n) if acc else None,
  )


@pytest.mark.parametrize("config, dtype, accumulator", K_GROUPED)
def test_k_grouped_configs(compile_and_report, config, dtype, accumulator):
  assert config.smem_bytes(dtype) <= SMEM_BYTES
  n = K_GROUPED[config, dtype, accumulator]
  compile_and_report(*k_grouped(4096, n, 8, config, accumulator, dtype))


def test_k_grouped_adds_in_place():
  """A donated accumulator is the result; neither is there twice."""
  g, m, n = 8, 4096, 2048
  problem = k_grouped(m, n, g, Config(tile_n=128), True)
  compiled = compile_for_hopper(*problem, donate_argnums=6)
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == 4 * g * m * n
  assert memory.temp_size_in_bytes < 4 * m * n


def test_k_grouped_with_one_tile_per_cta(compile_and_report):
  """Then there is no loop over tiles, and registers are given otherwise."""
  compile_and_report(*k_grouped(400, 144, 4, Config(tile_n=128), False))


def test_spills_are_seen():
  report = "8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads"
  assert spilled_bytes(report) == [12]


def test_smem_formula_covers_what_a_kernel_allocates():
  """A config beyond the formula's limit is one that Mosaic refuses."""
  config = Config(tile_n=192, num_stages=5, cluster=1)
  assert config.smem_bytes(jnp.bfloat16, 256) > SMEM_BYTES
  gemm = functools.partial(
    m_grouped_gemm, m=256, n=192, out_dtype=jnp.bfloat16, config=config
  )
  with pytest.raises(ValueError, match="shared memory"):
    compile_for_hopper(gemm, *m_grouped_args(256, 192, 256, 2))


def test_xla_rounds_to_fp8():
  """It does not, by itself, where the values become float32 in the same jit."""

  def round_trip(x):
    return quantize(x, (1, 128), implementation="xla").dequantize()

  x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
  assert "f8e4m3fn[256,256]" in compile_for_hopper(round_trip, x).as_text()

"""What the tuning tables and the heuristic choose."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from jax_grouped_gemm import quantize, ragged_dot
from jax_grouped_gemm.config import SMEM_BYTES, Config
from jax_grouped_gemm.kernels import tuning
from jax_grouped_gemm.kernels._pipeline import NUM_SMS_VARIABLE


@pytest.fixture
def table(tmp_path, monkeypatch):
  """A user's table with one entry, for the device at hand."""
  entry = {
    "kernel": "m_grouped",
    "device": jax.devices()[0].device_kind,
    "m": 4096,
    "n": 512,
    "k": 256,
    "g": 8,
    "out_dtype": "bfloat16",
    "config": {"tile_n": 64, "cluster": 1, "num_stages": 3},
    "us": 12.5,
  }
  path = tmp_path / "table.json"
  path.write_text(json.dumps({"entries": [entry]}))
  monkeypatch.setenv(tuning.TABLE_VARIABLE, str(path))
  return Config(**entry["config"])


def config(m=4096, n=512, k=256, g=8, dtype=jnp.bfloat16):
  return tuning.m_grouped_config(m, n, k, g, dtype)


def test_own_table_comes_first(table):
  assert config() == table
  assert config(m=5000) == table


@pytest.mark.parametrize(
  "other", [{"m": 9000}, {"n": 528}, {"k": 512}, {"g": 4}, {"dtype": "float32"}]
)
def test_other_problems_are_left_to_the_heuristic(table, monkeypatch, other):
  chosen = config(**other)
  monkeypatch.delenv(tuning.TABLE_VARIABLE)
  assert chosen == config(**other) != table


@pytest.mark.parametrize(
  "text", ["", "{}", '{"entries": [{"m": 1}]}', '{"entries": [{"config": {}}]}']
)
def test_what_is_no_table_is_an_error(tmp_path, monkeypatch, text):
  path = tmp_path / "broken.json"
  path.write_text(text)
  monkeypatch.setenv(tuning.TABLE_VARIABLE, str(path))
  with pytest.raises(ValueError, match=r"broken.json is not a tuning table"):
    config()


def test_the_packages_table_is_one():
  for entry in tuning.read_table(tuning.TABLE):
    k = entry.k if entry.kernel == "m_grouped" else None
    assert entry.config.smem_bytes(entry.out_dtype, k) <= SMEM_BYTES
    assert entry.us > 0 and "NVIDIA" in entry.device


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("k", [16, 2880, 100_000])
@pytest.mark.parametrize("n", [16, 528, 4096, 6144])
def test_the_heuristics_choice_fits(n, k, dtype):
  chosen = config(n=n, k=k, dtype=dtype)
  assert chosen.smem_bytes(dtype, k) <= SMEM_BYTES


def test_the_heuristic_weighs_columns_in_vain():
  assert config(m=2**15, n=64, k=4096).tile_n == 64
  # One tile of 192, or two of 128 in a cluster that shares lhs.
  assert config(m=2**17, n=192, k=2880).tile_n == 192


def test_tiles_of_long_calls_are_claimed():
  assert config(m=2**15, n=6144, k=7168, g=64).dynamic
  assert not config(m=2**12, n=2048, k=1024, g=8).dynamic


@pytest.mark.parametrize(
  "g, accumulates, dynamic",
  [(4, True, False), (16, True, True), (16, False, False)],
)
def test_k_grouped_tiles_are_claimed_where_they_are_added_to(
  g, accumulates, dynamic
):
  chosen = tuning.k_grouped_config(
    4096, 7168, 2**15, g, jnp.float32, accumulates
  )
  assert chosen.dynamic == dynamic


@pytest.mark.parametrize(
  "dtype, n, tokens, tile_n",
  [
    (jnp.float32, 7168, 8192, 192),
    (jnp.float32, 7168, 2048, 128),
    (jnp.float32, 256, 8192, 128),
    (jnp.float32, 48, 8192, 64),
    (jnp.bfloat16, 7168, 512, 192),
    (jnp.float16, 2048, 512, 192),
    (jnp.bfloat16, 256, 512, 128),
  ],
)
def test_k_grouped_tiles_are_wide_where_that_pays(dtype, n, tokens, tile_n):
  """And columns in vain do not cost more than that saves."""
  chosen = tuning.k_grouped_config(4096, n, 4 * tokens, 4, dtype, False)
  assert chosen.tile_n == tile_n
  assert chosen.num_stages >= 3


def test_the_heuristic_weighs_rows_in_vain():
  assert config(m=2**15, n=6144, k=4096).tile_m == 192
  assert config(m=2**15, n=6144, k=4096, g=256).tile_m == 128


def test_the_estimate_grows_with_the_problem():
  widest = Config(tile_n=128, compute_wgs=3)
  us = tuning.m_grouped_us(widest, 2**15, 6144, 7168, 4)
  # As measured: benchmarks/results/m_grouped-h200.json.
  assert us == pytest.approx(2033, rel=0.1)
  assert tuning.m_grouped_us(widest, 2**16, 6144, 7168, 4) > 1.9 * us


# ---------------------------------------------------------------- processors


@pytest.mark.parametrize("most, launched", [("100", 100), ("5000", 132)])
def test_ctas_of_all_kernels_are_limited(monkeypatch, most, launched):
  """Whatever config is chosen for them."""
  monkeypatch.setenv(NUM_SMS_VARIABLE, most)
  jax.clear_caches()  # What is traced once is not traced again.

  def loss(lhs, rhs):
    out = ragged_dot(
      lhs, rhs, jnp.array([4096, 4096]), implementation="mosaic_gpu"
    )
    return out.astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct((8192, 2048), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((2, 2048, 4096), jnp.bfloat16)
  traced = str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(x, w))
  meshes = re.findall(r"Mesh\(grid=\((\d+),\).*cluster=\((\d*),?\)", traced)
  assert len(meshes) >= 6
  assert {int(grid) * int(cta or 1) for grid, cta in meshes} == {launched}


@pytest.mark.parametrize("most", ["1", "many", "", "-4"])
def test_what_is_no_number_of_ctas(monkeypatch, most):
  monkeypatch.setenv(NUM_SMS_VARIABLE, most)
  jax.clear_caches()
  x = jax.ShapeDtypeStruct((16, 128), jnp.bfloat16)
  fn = lambda x: quantize(x, (1, 128), implementation="mosaic_gpu")
  with pytest.raises(ValueError, match=f"NUM_SMS must be .*got '{most}'"):
    jax.eval_shape(fn, x)

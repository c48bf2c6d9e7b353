"""The configs of 16-bit operands: a heuristic alone."""

import jax.numpy as jnp
import pytest

from jax_grouped_gemm.config import SMEM_BYTES
from jax_grouped_gemm.kernels import tuning

CHOICES = tuning.m_grouped_bf16_config, tuning.k_grouped_bf16_config


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_any_n(choose, dtype):
  """Fits, with no tile in vain, and slots enough to load ahead of products."""
  for n in range(1, 20_000, 37):
    config = choose(n, dtype)
    columns = config.tile_n * config.cluster
    assert config.smem_bytes(dtype, 0) <= SMEM_BYTES
    assert config.num_stages >= 3 and config.multicast == "lhs"
    # A narrower tile or a single CTA would do if half of the columns were idle.
    assert columns <= 64 or -(-n // columns) * columns < 2 * n


@pytest.mark.parametrize("choose", CHOICES)
def test_wide_results_get_the_widest_tiles_that_fit(choose):
  assert choose(4096, jnp.bfloat16).tile_n == 256
  assert choose(4096, jnp.float32).tile_n == 192

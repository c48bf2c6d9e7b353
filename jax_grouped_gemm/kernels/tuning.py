"""Which `Config` a problem is run with."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_grouped_gemm.config import SMEM_BYTES, Config

_MAX_STAGES = 5  # More slots bring nothing.

# Rates of (tile_n, cluster) relative to the best, when all columns are used.
# 192 and 128: measured, M-grouped, 4 groups of ~8192 rows, n 6144, k 7168
# (H200, jax 0.11.2). 64: an estimate, their loads take longer than their
# products.
_M_GROUPED_RATES = {
  (192, 2): 1.0,
  (192, 1): 0.98,
  (128, 2): 0.92,
  (128, 1): 0.84,
  (64, 2): 0.6,
  (64, 1): 0.5,
}
# Tiles of 192 columns do not fit: out is f32, and both operands have scales.
_K_GROUPED_RATES = {
  key: rate for key, rate in _M_GROUPED_RATES.items() if key[0] != 192
}


def _best(
  n: int, k: int | None, rates, out_dtype: DTypeLike, **choices
) -> Config:
  """The fastest config by its rate and by the columns it computes in vain."""

  def time(key):
    cluster_n = key[0] * key[1]
    return -(-n // cluster_n) * cluster_n / rates[key]

  tile_n, cluster = min(rates, key=time)
  configs = [
    Config(tile_n=tile_n, cluster=cluster, num_stages=stages, **choices)
    for stages in range(2, _MAX_STAGES + 1)
  ]
  fits = lambda c: c.smem_bytes(out_dtype, k) <= SMEM_BYTES
  return [config for config in configs if fits(config)][-1]


def m_grouped_config(
  m: int, n: int, k: int, g: int, out_dtype: DTypeLike
) -> Config:
  """The config of an M-grouped GEMM (m, k) x (g, n, k) -> (m, n)."""
  del m, g  # What is known so far does not depend on them.
  return _best(n, k, _M_GROUPED_RATES, out_dtype)


def k_grouped_config(
  m: int, n: int, t: int, g: int, out_dtype: DTypeLike = jnp.float32
) -> Config:
  """The config of a K-grouped GEMM (m, t) x (n, t) -> (g, m, n)."""
  del m, t, g
  return _best(
    n,
    None,
    _K_GROUPED_RATES,
    out_dtype,
    raster_width=4,  # 1 % above 8: 4 groups of ~8192, 4096, 7168, H200.
  )

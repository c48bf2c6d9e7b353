"""Which `Config` a problem is run with: measured entries, then a heuristic.

tuning_table.json, which `python -m benchmarks tune` writes, holds what was the
fastest on the GPU that each entry names. A table of one's own goes before it:
the environment variable JAX_GROUPED_GEMM_TUNING_TABLE is its path.
"""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_grouped_gemm.config import SMEM_BYTES, Config

TABLE = Path(__file__).with_name("tuning_table.json")
TABLE_VARIABLE = "JAX_GROUPED_GEMM_TUNING_TABLE"

_MAX_STAGES = 5  # More slots bring nothing.
_MAX_M_RATIO = math.sqrt(2)  # of a problem's m to that of a measured entry.

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

# ---------------------------------------------------------------- table


@dataclasses.dataclass(frozen=True)
class Entry:
  """A measured problem and its fastest config."""

  kernel: str  # "m_grouped" or "k_grouped"
  device: str  # as jax.Device.device_kind
  m: int  # rows of all groups; K-grouped: tokens
  n: int
  k: int  # K-grouped: rows of out
  g: int
  out_dtype: str
  config: Config
  us: float


def read_table(path: Path) -> list[Entry]:
  """Reads a table; ValueError if it is not one."""
  try:
    rows = json.loads(path.read_text())["entries"]
    return [Entry(**{**row, "config": Config(**row["config"])}) for row in rows]
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is not a tuning table: {error}") from error


@functools.cache
def _cached_table(path: Path) -> list[Entry]:
  return read_table(path)


def _lookup(kernel: str, m, n, k, g, out_dtype: DTypeLike) -> Config | None:
  """Returns the config measured for the problem with the nearest m, if any."""
  device = jax.devices()[0].device_kind
  problem = (kernel, device, n, k, g, jnp.dtype(out_dtype).name)
  own = os.environ.get(TABLE_VARIABLE)
  for path in [Path(own), TABLE] if own else [TABLE]:
    entries = [
      entry
      for entry in _cached_table(path)
      if problem
      == (
        entry.kernel,
        entry.device,
        entry.n,
        entry.k,
        entry.g,
        entry.out_dtype,
      )
      and max(m / entry.m, entry.m / m) <= _MAX_M_RATIO
    ]
    if entries:
      return min(entries, key=lambda e: max(m / e.m, e.m / m)).config
  return None


# ---------------------------------------------------------------- heuristic


def _best(
  n: int, k: int | None, rates, out_dtype: DTypeLike, **choices
) -> Config:
  """The fastest config by its rate and by the columns it computes in vain."""

  def time(key):
    cluster_n = key[0] * key[1]
    return -(-n // cluster_n) * cluster_n / rates[key]

  tile_n, cluster = min(rates, key=time)
  return most_stages(
    Config(tile_n=tile_n, cluster=cluster, **choices), out_dtype, k
  )


def most_stages(config: Config, out_dtype: DTypeLike, k: int | None) -> Config:
  """Returns the config with as many stages as fit and are of use."""
  configs = [
    dataclasses.replace(config, num_stages=stages)
    for stages in range(2, _MAX_STAGES + 1)
  ]
  return [c for c in configs if c.smem_bytes(out_dtype, k) <= SMEM_BYTES][-1]


def m_grouped_config(
  m: int, n: int, k: int, g: int, out_dtype: DTypeLike
) -> Config:
  """The config of an M-grouped GEMM (m, k) x (g, n, k) -> (m, n)."""
  measured = _lookup("m_grouped", m, n, k, g, out_dtype)
  return measured or _best(n, k, _M_GROUPED_RATES, out_dtype)


def k_grouped_config(
  m: int, n: int, t: int, g: int, out_dtype: DTypeLike = jnp.float32
) -> Config:
  """The config of a K-grouped GEMM (m, t) x (n, t) -> (g, m, n)."""
  measured = _lookup("k_grouped", t, n, m, g, out_dtype)
  return measured or _best(
    n,
    None,
    _K_GROUPED_RATES,
    out_dtype,
    raster_width=4,  # 1 % above 8: 4 groups of ~8192, 4096, 7168, H200.
  )

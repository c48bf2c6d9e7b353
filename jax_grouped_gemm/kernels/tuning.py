"""Which `Config` a problem is run with: measured entries, then a heuristic.

tuning_table.json, which `python -m benchmarks tune` writes, holds what was the
fastest on the GPU that each entry names. A table of one's own goes before it:
the environment variable JAX_GROUPED_GEMM_TUNING_TABLE is its path.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_grouped_gemm.config import (
  ROW_ALIGN,
  SCALE_BLOCK,
  SMEM_BYTES,
  WGMMA_M,
  Config,
  SmallGroupsConfig,
)
from jax_grouped_gemm.kernels._pipeline import num_sms

TABLE = Path(__file__).with_name("tuning_table.json")
TABLE_VARIABLE = "JAX_GROUPED_GEMM_TUNING_TABLE"

_MAX_STAGES = 5  # More slots bring nothing.
_MAX_M_RATIO = math.sqrt(2)  # of a problem's m to that of a measured entry.

# M-grouped: (compute_wgs, tile_n, cluster, multicast, dynamic) -> microseconds
# of a k slice of a tile, of a tile besides and of a call besides. The least
# squares of the relative errors of what `python -m benchmarks tune` measured of
# the shapes "deepgemm", "small", "masked", "models" and "random" (H200, jax
# 0.11.2).
_COSTS_US = {
  (3, 128, 2, "lhs", False): (0.565, 0.44, 6),
  (3, 128, 1, "lhs", False): (0.570, 0.49, 7),
  (2, 192, 1, "lhs", False): (0.615, 0.36, 6),
  (2, 192, 2, "lhs", False): (0.618, 0.21, 7),
  (2, 128, 2, "lhs", False): (0.430, 0.22, 8),
  (2, 64, 2, "lhs", False): (0.266, 0.37, 12),
  (2, 64, 1, "lhs", False): (0.280, 0.37, 12),  # An estimate.
  (3, 128, 2, "lhs", True): (0.542, 0.94, 10),
  (2, 192, 1, "lhs", True): (0.599, 0.72, 8),
  (2, 192, 2, "lhs", True): (0.600, 0.59, 10),
  (2, 192, 2, "rhs", True): (0.599, 0.87, 9),
}
_RASTER_WIDTHS = {False: 8, True: 4}  # of dynamic

_SMALL_GROUP = 64  # rows, on average; more are not for that kernel.
_ROW_SPREAD = 1.5  # Of a group's rows to their average; more are a second tile.
_MOST_SLOTS = 24  # of small tiles

# K-grouped: rates of tile_n relative to 128 when all columns are used. 64 is an
# estimate. For the same columns a tile of 192 costs 8 % less a slice, and 20 %
# less besides where its sums are rounded to 16 bits (512 tokens a group: 1.16,
# 1024: 1.10, 2048: 1.07, 4096: 1.05; H200). In float32 it costs more besides
# (8192: 1.05, 4096 and 2048: 1.00; H200). CTAs that share lhs are as fast or
# slower (H200, H100). Claimed tiles pay where results are added to what is
# there (3 % for 16 groups, not for 4), else they cost 1 to 8 % (H200).
_K_GROUPED_DYNAMIC_GROUPS = 8
_K_GROUPED_RATES = {128: 1.0, 64: 0.6}
_K_GROUPED_RATES_16_BITS = {**_K_GROUPED_RATES, 192: 1.08}
_K_GROUPED_RATES_MANY_TOKENS = {**_K_GROUPED_RATES, 192: 1.05}
_K_GROUPED_MANY_TOKENS = 6144  # of a group, on average

# 16-bit operands: rates of tile_n, and of the CTAs that share lhs, relative to
# the best. Estimates. Two slots are too few to hide the loads.
_BF16_RATES = {256: 1.0, 192: 0.97, 128: 0.9, 64: 0.6}
_BF16_CLUSTER_RATES = {2: 1.0, 1: 0.95}
_BF16_LEAST_STAGES = 3

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


def m_grouped_candidates(k: int, out_dtype: DTypeLike) -> list[Config]:
  """Returns what the heuristic chooses from."""
  names = "compute_wgs", "tile_n", "cluster", "multicast", "dynamic"
  configs = [
    Config(
      **dict(zip(names, key, strict=True)),
      raster_width=_RASTER_WIDTHS[key[-1]],
    )
    for key in _COSTS_US
  ]
  return [most_stages(config, out_dtype, k) for config in configs]


def m_grouped_us(config: Config, m: int, n: int, k: int, g: int) -> float:
  """Estimates the time of an M-grouped GEMM, whatever the group sizes.

  Their distribution is taken to be exponential, which popular experts and
  forgotten ones resemble more than equal sizes do.
  """
  # The mean of ceil(size / tile_m) is 1 / (1 - exp(-tile_m / mean size)).
  row_tiles = -g / math.expm1(-config.tile_m * g / m)
  columns = config.tile_n * config.cluster_shape[1]
  col_tiles = -(-n // columns) * config.cluster_shape[1]
  waves = row_tiles * col_tiles / (config.num_sms or num_sms())
  # Claimed tiles end one after the other, others all at a time.
  waves = max(1.0, waves + 0.5) if config.dynamic else math.ceil(waves)
  slice_us, tile_us, call_us = _COSTS_US[
    config.compute_wgs,
    config.tile_n,
    config.cluster,
    config.multicast,
    config.dynamic,
  ]
  return waves * (-(-k // SCALE_BLOCK) * slice_us + tile_us) + call_us


def most_stages(
  config, out_dtype: DTypeLike, k: int | None, most: int = _MAX_STAGES
):
  """Returns the config with as many stages as fit and are of use."""
  configs = [
    dataclasses.replace(config, num_stages=stages)
    for stages in range(2, most + 1)
  ]
  return [c for c in configs if c.smem_bytes(out_dtype, k) <= SMEM_BYTES][-1]


def small_groups_config(
  rows: int, n: int, k: int, g: int, out_dtype: DTypeLike, row_align: int
) -> SmallGroupsConfig:
  """For g groups of about `rows` rows, each from a multiple of row_align on."""
  # TMA loads from a multiple of 8 on: rows before a group take part of a tile.
  rows = math.ceil(_ROW_SPREAD * rows) + ROW_ALIGN - row_align
  tile_m = next((t for t in (8, 16, 32) if t >= rows), 64)
  tiles = g * -(-rows // tile_m) * -(-n // 128)
  config = SmallGroupsConfig(
    tile_m=tile_m,
    tile_n=128 if n > WGMMA_M else WGMMA_M,
    # Costs 1.5 us a tile, which processors without any pay for (H200).
    split_k=2 if tiles < num_sms() else 1,
  )
  return most_stages(config, out_dtype, k, _MOST_SLOTS)


def m_grouped_config(
  m: int, n: int, k: int, g: int, out_dtype: DTypeLike
) -> Config | SmallGroupsConfig:
  """The config of an M-grouped GEMM (m, k) x (g, n, k) -> (m, n)."""
  measured = _lookup("m_grouped", m, n, k, g, out_dtype)
  if measured:
    return measured
  if m <= _SMALL_GROUP * g:
    # No more groups than rows; 8 rows and fewer are in one tile, all of them.
    row_align = ROW_ALIGN if m <= ROW_ALIGN else 1
    return small_groups_config(
      -(-m // g), n, k, min(g, m), out_dtype, row_align
    )
  configs = m_grouped_candidates(k, out_dtype)
  return min(configs, key=lambda c: m_grouped_us(c, m, n, k, g))


def masked_config(
  rows: int, n: int, k: int, g: int, out_dtype: DTypeLike
) -> Config | SmallGroupsConfig:
  """For `rows` rows in each of g groups, which start at multiples of 8."""
  if rows <= _SMALL_GROUP:
    return small_groups_config(rows, n, k, g, out_dtype, ROW_ALIGN)
  return m_grouped_config(rows * g, n, k, g, out_dtype)


def k_grouped_config(
  m: int, n: int, t: int, g: int, out_dtype: DTypeLike, accumulates: bool
) -> Config:
  """The config of a K-grouped GEMM (m, t) x (n, t) -> (g, m, n)."""
  measured = _lookup("k_grouped", t, n, m, g, out_dtype)
  if measured:
    return measured

  rates = _K_GROUPED_RATES
  if jnp.dtype(out_dtype).itemsize == 2:
    rates = _K_GROUPED_RATES_16_BITS
  elif t >= g * _K_GROUPED_MANY_TOKENS:
    rates = _K_GROUPED_RATES_MANY_TOKENS

  def time(tile_n):
    return -(-n // tile_n) * tile_n / rates[tile_n]

  dynamic = accumulates and g >= _K_GROUPED_DYNAMIC_GROUPS
  best = Config(
    tile_n=min(rates, key=time),
    cluster=1,
    raster_width=8 if dynamic else 4,
    dynamic=dynamic,
  )
  return most_stages(best, out_dtype, None)


def m_grouped_bf16_config(n: int, out_dtype: DTypeLike) -> Config:
  """The config of an M-grouped GEMM of 16-bit operands, n columns of out."""
  return _bf16_config(n, out_dtype, raster_width=8)


def k_grouped_bf16_config(n: int, out_dtype: DTypeLike) -> Config:
  """The config of a K-grouped GEMM of 16-bit operands, n columns of out."""
  return _bf16_config(n, out_dtype, raster_width=4)


def _bf16_config(n: int, out_dtype: DTypeLike, raster_width: int) -> Config:
  """The fastest by the rates, columns in vain included, with most stages."""

  def time(config: Config):
    columns = config.tile_n * config.cluster
    rate = _BF16_RATES[config.tile_n] * _BF16_CLUSTER_RATES[config.cluster]
    return -(-n // columns) * columns / rate, -config.num_stages

  configs = [
    Config(
      tile_n=tile_n,
      cluster=cluster,
      num_stages=stages,
      raster_width=raster_width,
    )
    for tile_n, cluster, stages in itertools.product(
      _BF16_RATES,
      _BF16_CLUSTER_RATES,
      range(_BF16_LEAST_STAGES, _MAX_STAGES + 1),
    )
  ]
  # A slot has as many bytes as one of FP8 operands; there are no scales.
  fit = [c for c in configs if c.smem_bytes(out_dtype, 0) <= SMEM_BYTES]
  return min(fit, key=time)

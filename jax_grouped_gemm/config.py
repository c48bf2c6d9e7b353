"""Static choices of a kernel launch, and the shared memory that they cost."""

import dataclasses
from numbers import Integral
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import DTypeLike

SCALE_BLOCK = 128  # elements of the contracted axis that share one scale.
WGMMA_M = 64  # rows of one wgmma instruction.
ROW_ALIGN = 8  # TMA addresses rows of swizzled SMEM tiles in groups of 8.
TILE_SLOTS = 2  # tiles on their way from the loading to the other warpgroups.
SCALE_ALIGN = 32  # scales in the 128 bytes that TMA aligns to in SMEM.
SMEM_BYTES = 232_448  # shared memory that one CTA may use on Hopper.
_SMEM_ALIGN = 1024  # Mosaic aligns each swizzled buffer to this.
_BARRIER_BYTES = 1024  # room for the barriers, an upper bound.


@dataclasses.dataclass(frozen=True)
class Config:
  """Static choices of one kernel launch. Sizes are in elements.

  Attributes:
    tile_n: columns of out that one CTA computes at a time: 64, 128, 192, or 256
      for 16-bit operands, whose sums stay in the tensor cores' accumulators.
    compute_wgs: warpgroups of a CTA that multiply, 2 or 3, each 64 rows of out;
      one more loads. With 3, registers suffice for tile_n of 64 and 128 only.
    num_stages: slots of shared memory between loading and multiplying.
    turns: whether the warpgroups of a CTA promote in turns, which keeps them
      from working in step: the products of one run while another promotes.
    cluster: CTAs, 1 or 2, that share what they load.
    multicast: what they share: "lhs", on neighbouring columns, or "rhs", on
      neighbouring rows, as far as those are of one group.
    raster_width: column tiles (of clusters) that are visited for one row tile
      before the next row tile; consecutive tiles share operands in L2.
    dynamic: whether CTAs take the next tile when they are free: what neighbours
      share is in L2 then, however much work differs from tile to tile. Costs a
      few microseconds. Otherwise each has every n-th.
    num_sms: CTAs launched; None: as many as a Hopper GPU has processors, or as
      the environment variable JAX_GROUPED_GEMM_NUM_SMS says.
  """

  tile_n: int = 192
  compute_wgs: int = 2
  num_stages: int = 4
  turns: bool = False
  cluster: int = 2
  multicast: str = "lhs"
  raster_width: int = 8
  dynamic: bool = False
  num_sms: int | None = None

  def __post_init__(self):
    _check_choices(
      self,
      tile_n=(64, 128, 192, 256),
      compute_wgs=(2, 3),
      cluster=(1, 2),
      multicast=("lhs", "rhs"),
      turns=(False, True),
      dynamic=(False, True),
    )
    _check_least(self, num_stages=2, raster_width=1)
    if self.compute_wgs == 3 and self.tile_n > 128:
      raise ValueError(f"tile_n={self.tile_n} needs compute_wgs=2, got 3")
    if self.num_sms is not None and self.num_sms < self.cluster:
      raise ValueError(
        f"num_sms must be at least cluster={self.cluster}, got {self.num_sms}"
      )

  @property
  def tile_m(self) -> int:
    """Rows of out that one CTA computes."""
    return self.compute_wgs * WGMMA_M

  @property
  def cluster_shape(self) -> tuple[int, int]:
    """Tiles of a cluster, along rows and columns of out."""
    by_rows = self.multicast == "rhs"
    return (self.cluster, 1) if by_rows else (1, self.cluster)

  def smem_bytes(self, out_dtype: DTypeLike, k: int | None = None) -> int:
    """Upper bound of the shared memory of a CTA, in bytes.

    M-grouped, whose tiles have their rhs scales of all of k, or K-grouped with
    k=None, whose slots have them.
    """
    scales = self.tile_m + (self.tile_n if k is None else 0)
    slot = (self.tile_m + self.tile_n) * SCALE_BLOCK + scales * 4
    out = self.tile_m * self.tile_n * jnp.dtype(out_dtype).itemsize
    tiles = 2 * _tile_scales_bytes(k or 0)
    fixed = 5 * _SMEM_ALIGN + _BARRIER_BYTES
    return self.num_stages * slot + out + tiles + fixed


@dataclasses.dataclass(frozen=True)
class SmallGroupsConfig:
  """Static choices of the M-grouped kernel for groups of few rows.

  It multiplies out.T = rhs @ lhs.T: the 64 rows of a wgmma instruction are
  columns of out, so that few rows of out are few columns of the product.

  Attributes:
    tile_m: rows of out that one CTA computes at a time: 8, 16, 32 or 64.
    tile_n: columns of out that one CTA computes at a time: 64 or 128, one
      warpgroup for each 64. 64 makes twice the tiles, for few and short groups.
    num_stages: slots of shared memory between loading and multiplying; as many
      as fit keep the memory busy.
    split_k: CTAs, 1 or 2, that each multiply their part of k of a tile, for
      fewer tiles than processors. Their sums are added in one order always.
    num_sms: as in Config.
  """

  tile_m: int = 16
  tile_n: int = 128
  num_stages: int = 8
  split_k: int = 1
  num_sms: int | None = None

  # What the walk over the groups and the launch want to know of any config.
  cluster_shape: ClassVar[tuple[int, int]] = 1, 1  # tiles
  dynamic: ClassVar[bool] = False
  # Row tiles of one group come one after another: they share rhs in L2.
  raster_width: ClassVar[int] = 1

  def __post_init__(self):
    _check_choices(
      self, tile_m=(8, 16, 32, 64), tile_n=(64, 128), split_k=(1, 2)
    )
    _check_least(self, num_stages=2)
    if self.num_sms is not None:
      _check_least(self, num_sms=self.split_k)

  @property
  def cluster(self) -> int:
    """CTAs of a cluster."""
    return self.split_k

  @property
  def compute_wgs(self) -> int:
    """Warpgroups of a CTA that multiply; one more loads."""
    return self.tile_n // WGMMA_M

  def smem_bytes(self, out_dtype: DTypeLike, k: int) -> int:
    """Upper bound of the shared memory of a CTA, in bytes."""
    scales = max(self.tile_m, SCALE_ALIGN)
    slot = (self.tile_m + self.tile_n) * SCALE_BLOCK + scales * 4
    out = self.tile_m * self.tile_n * jnp.dtype(out_dtype).itemsize
    fixed = 5 * _SMEM_ALIGN + _BARRIER_BYTES
    return self.num_stages * slot + out + _tile_scales_bytes(k) + fixed


def _tile_scales_bytes(k: int) -> int:
  """Of the rhs scales of 128 columns and all of k, for TILE_SLOTS tiles."""
  scales = -(-k // (SCALE_BLOCK * SCALE_ALIGN)) * SCALE_ALIGN
  return TILE_SLOTS * scales * 4


def _check_choices(config, **choices):
  for name, allowed in choices.items():
    if getattr(config, name) not in allowed:
      raise ValueError(
        f"{name} must be one of {allowed}, got {getattr(config, name)}"
      )


def _check_least(config, **bounds):
  for name, least in bounds.items():
    value = getattr(config, name)
    if not isinstance(value, Integral):
      raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
      raise ValueError(f"{name} must be at least {least}, got {value}")

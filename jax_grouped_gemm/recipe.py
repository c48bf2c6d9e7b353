"""What of ragged_dot is quantised, and how."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_grouped_gemm import checks

_PRODUCTS = ("fp8", "bf16")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the three products of ragged_dot and its gradients are quantised.

  Attributes:
    forward: "fp8", or "bf16": the operands as they are, of whatever dtype.
    dgrad: the same for the gradient of lhs.
    wgrad: the same for the gradient of rhs.
    gradient_dtype: of the quantised gradient of the result, float8_e4m3fn or
      float8_e5m2.
    power_of_two_scales: as in quantize.
  """

  forward: Literal["fp8", "bf16"] = "fp8"
  dgrad: Literal["fp8", "bf16"] = "fp8"
  wgrad: Literal["fp8", "bf16"] = "fp8"
  gradient_dtype: DTypeLike = jnp.float8_e4m3fn
  power_of_two_scales: bool = False

  def __post_init__(self):
    for name in ("forward", "dgrad", "wgrad"):
      if getattr(self, name) not in _PRODUCTS:
        raise ValueError(
          f"{name} must be one of {_PRODUCTS}, got {getattr(self, name)!r}"
        )
    dtype = jnp.dtype(self.gradient_dtype)
    checks.check_value_dtype("gradient_dtype", dtype)
    object.__setattr__(self, "gradient_dtype", dtype)
    if not isinstance(self.power_of_two_scales, bool):
      raise TypeError(
        f"power_of_two_scales must be a bool, got {self.power_of_two_scales!r}"
      )

  @property
  def quantizes(self) -> bool:
    """Whether a product is quantised."""
    return "fp8" in (self.forward, self.dgrad, self.wgrad)

  @property
  def quantizes_weights(self) -> bool:
    """Whether a product of the weights is quantised."""
    return "fp8" in (self.forward, self.dgrad)

  @classmethod
  def bf16(cls) -> "Recipe":
    """Nothing is quantised."""
    return cls(forward="bf16", dgrad="bf16", wgrad="bf16")


def check_recipe(recipe):
  """Raises TypeError unless it is a Recipe."""
  if not isinstance(recipe, Recipe):
    raise TypeError(f"recipe must be a Recipe, got {recipe!r}")

"""Checks of group_sizes: types when traced, values by checkify.

The values are data. What they ask for beyond the rows there are is cut off (see
schedule), and reported only where checkify's user checks are enabled.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Int

from jax_grouped_gemm import schedule


def check_group_sizes(
  group_sizes: Int[Array, "g_all"],
  m: int,
  num_groups: int,
  group_offset: Int[Array, "1"] | None = None,
) -> tuple[Int[Array, "g_all"], Int[Array, "1"] | None]:
  """Returns both as arrays, once they are known to fit `num_groups` groups."""
  group_sizes = _as_sizes(group_sizes, num_groups)
  length = group_sizes.shape[0]
  if group_offset is None:
    _check_length(
      group_sizes, num_groups, "; a group_offset tells which of more they are"
    )
  else:
    group_offset = _integers("group_offset", group_offset)
    if group_offset.size != 1 or group_offset.ndim > 1:
      raise ValueError(
        f"group_offset must have shape (1,), got {group_offset.shape}"
      )
    if length < num_groups:
      raise ValueError(
        "with a group_offset, group_sizes must have at least one entry for "
        f"each of the {num_groups} groups of rhs, got {length}"
      )
  return report_bad_sizes(group_sizes, m), group_offset


def check_masked_sizes(
  group_sizes: Int[Array, "g"], max_m: int, num_groups: int
) -> Int[Array, "g"]:
  """Returns it as an array, once it is known to fit groups of max_m rows."""
  group_sizes = _as_sizes(group_sizes, num_groups)
  _check_length(group_sizes, num_groups)
  return _checked_sizes_p.bind(group_sizes, m=max_m, masked=True)[0]


def _check_length(group_sizes, num_groups: int, hint: str = ""):
  if group_sizes.shape[0] != num_groups:
    raise ValueError(
      f"group_sizes must have one entry for each of the {num_groups} groups "
      f"of rhs, got {group_sizes.shape[0]}{hint}"
    )


def _as_sizes(group_sizes, num_groups: int) -> Int[Array, "g_all"]:
  group_sizes = _integers("group_sizes", group_sizes)
  if group_sizes.ndim != 1:
    raise ValueError(
      f"group_sizes must have one axis, got shape {group_sizes.shape}"
    )
  if num_groups < 1:
    raise ValueError(f"there must be at least 1 group, got {num_groups}")
  return group_sizes


def _integers(name: str, x) -> Int[Array, "..."]:
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise TypeError(f"{name} must be integers, got {x.dtype}")
  return x


# checkify.check is an effect, which jax.export cannot serialize. This identity
# has no effect and becomes a check only under checkify.
_checked_sizes_p = Primitive("checked_group_sizes")
_checked_sizes_p.multiple_results = True
_checked_sizes_p.def_abstract_eval(lambda sizes, **_: [sizes])
_checked_sizes_p.def_impl(lambda sizes, **_: [sizes])
mlir.register_lowering(_checked_sizes_p, lambda ctx, sizes, **_: [sizes])


def _batch(args, axes, **params):
  sizes = jnp.moveaxis(args[0], axes[0], 0)
  return _checked_sizes_p.bind(sizes, **params), [0]


batching.primitive_batchers[_checked_sizes_p] = _batch


def report_bad_sizes(sizes: Int[Array, "g"], m: int) -> Int[Array, "g"]:
  """Returns the sizes; under checkify, < 0 or a sum > m are errors."""
  return _checked_sizes_p.bind(sizes, m=m, masked=False)[0]


@functools.partial(jax.jit, static_argnames=("m", "masked"))
def _check(sizes: Int[Array, "... g"], m: int, masked: bool):
  checkify.check(
    jnp.all(sizes >= 0),
    "group_sizes must not be negative, got {sizes}",
    sizes=sizes,
  )
  if masked:
    checkify.check(
      jnp.all(schedule.as_int32(sizes) <= m),  # m may not be of their dtype.
      f"group_sizes must be at most max_m = {m}, got {{sizes}}",
      sizes=sizes,
    )
    return
  rows = sizes.reshape(-1, sizes.shape[-1])
  _, ends = jax.vmap(lambda row: schedule.group_bounds(row, m + 1))(rows)
  checkify.check(
    jnp.all(ends <= m),
    f"the sum of group_sizes must be at most the {m} rows, got {{sizes}}",
    sizes=sizes,
  )


def _checkify(*args, **params):
  *context, sizes = args
  (check,) = jax.make_jaxpr(functools.partial(_check, **params))(sizes).eqns
  rule = error_checks[check.primitive]
  error, _ = rule(*context, sizes, **check.params)
  return error, [sizes]


# Private in jax. Without it the sizes are cut off all the same, unreported.
with contextlib.suppress(ImportError):
  from jax._src.checkify import error_checks

  error_checks[_checked_sizes_p] = _checkify

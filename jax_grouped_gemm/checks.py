"""Checks of calls when they are traced: what is wrong, and the rule."""

from numbers import Integral

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_grouped_gemm import implementation as implementations
from jax_grouped_gemm.config import (
  SCALE_BLOCK,
  SMEM_BYTES,
  Config,
  SmallGroupsConfig,
)
from jax_grouped_gemm.scaled_array import ScaledArray, scales_shape
from jax_grouped_gemm.undifferentiable import undifferentiable

_VALUE_DTYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))
_INPUT_DTYPES = tuple(
  map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64))
)
_KERNEL_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
_MAX_TILE_N = 192
_KERNEL_ALIGN = 16  # of the sizes that kernels support.


def check_quantize(x, dtype: DTypeLike, implementation: str | None):
  """Returns x as an array and dtype as a dtype, once both are known to do."""
  x, dtype = jnp.asarray(x), jnp.dtype(dtype)
  check_input_dtype("x", x.dtype)
  check_value_dtype("dtype", dtype)
  implementations.check(implementation)
  x = undifferentiable(
    "quantisation has no gradient; ragged_dot has one, and quantises for "
    "itself. Where none is wanted: quantise jax.lax.stop_gradient(x)",
    x,
  )
  return x, dtype


def unsupported_by_quantize(x, block_shape) -> str | None:
  """Returns what of the call the kernels do not support, if anything."""
  if x.ndim not in (2, 3) or block_shape != (1,) * (x.ndim - 1) + (
    SCALE_BLOCK,
  ):
    return (
      f"quantises (m, k) or (g, m, k) in blocks of {SCALE_BLOCK} along k, got "
      f"x {x.shape} in blocks of {block_shape}"
    )
  return _unsupported_input("k", x.shape[-1], x.dtype)


def unsupported_by_quantize_weights(w) -> str | None:
  """Returns what of the weights (g, k, n) the kernel does not support."""
  if w.dtype != jnp.bfloat16:
    return f"quantises weights of bfloat16, got {w.dtype}"
  return _unsupported_input("k", w.shape[1], w.dtype) or _unsupported_input(
    "n", w.shape[2], w.dtype
  )


def unsupported_by_quantize_tokens(x) -> str | None:
  """Returns what of the tokens (t, f) the kernel does not support."""
  if x.dtype != jnp.bfloat16:
    return f"quantises tokens of bfloat16, got {x.dtype}"
  return _unsupported_input("f", x.shape[1], x.dtype)


def unsupported_by_activation(gate_up) -> str | None:
  """Returns what of gate_up (m, 2 f) the kernels do not activate."""
  if gate_up.dtype != jnp.bfloat16:
    return f"activates bfloat16, got {gate_up.dtype}"
  return _unsupported_input("f", gate_up.shape[1] // 2, gate_up.dtype)


def unsupported_by_fusion(x, f: int) -> str | None:
  """Returns what of an MLP of x (m, d), f wide, cannot be fused."""
  if x.dtype != jnp.bfloat16:
    return f"needs x of bfloat16, got {x.dtype}"
  return _unsupported_input("d", x.shape[1], x.dtype) or _unsupported_input(
    "f", f, x.dtype
  )


def _unsupported_input(name: str, size: int, dtype) -> str | None:
  if size % _KERNEL_ALIGN:
    return (
      f"needs {name} to be a multiple of {_KERNEL_ALIGN}, got {name}={size}"
    )
  if dtype not in _KERNEL_DTYPES:
    return f"quantises one of {_names(_KERNEL_DTYPES)}, got {dtype}"
  return None


def check_value_dtype(name: str, dtype):
  """Raises TypeError unless quantised values can have the dtype."""
  _check_dtype(name, dtype, _VALUE_DTYPES)


def check_input_dtype(name: str, dtype):
  """Raises TypeError unless values to quantise can have the dtype."""
  _check_dtype(name, dtype, _INPUT_DTYPES)


def _check_dtype(name: str, dtype, allowed):
  if dtype not in allowed:
    raise TypeError(f"{name} must be one of {_names(allowed)}, got {dtype}")


def _names(dtypes) -> str:
  return ", ".join(map(str, dtypes))


def check_scaled(name, x, axes, block_shape) -> ScaledArray:
  """Returns x with jax arrays, once it is known to be consistent."""
  if not isinstance(x, ScaledArray):
    raise TypeError(
      f"{name} must be a ScaledArray, as quantize() makes it, got {type(x)}"
    )
  x = jax.tree.map(jnp.asarray, x)
  layout = f"({', '.join(axes)})"
  if x.ndim != len(axes) or x.block_shape != block_shape:
    raise ValueError(
      f"{name} must be {layout} in blocks of {block_shape}, got shape "
      f"{x.shape} in blocks of {x.block_shape}"
    )
  check_value_dtype(f"{name}.values", x.dtype)
  _check_dtype(f"{name}.scales", x.scales.dtype, (jnp.dtype(jnp.float32),))
  expected = scales_shape(x.shape, block_shape)
  if x.scales.shape != expected:
    raise ValueError(
      f"{name}.scales must be {layout} / {block_shape} rounded up, for "
      f"{x.shape} {expected}, got {x.scales.shape}"
    )
  return x


def check_quantized_lhs(name: str, quantized, shape) -> ScaledArray | None:
  """Returns it with jax arrays, once it can be a copy of `shape` (m, k).

  What it holds is not compared.
  """
  if quantized is None:
    return None
  quantized = check_scaled(name, quantized, ("m", "k"), (1, SCALE_BLOCK))
  if quantized.shape != shape:
    raise ValueError(f"{name} must be (m, k) = {shape}, got {quantized.shape}")
  return quantized


def check_accumulator(accumulator, shape):
  """Returns it as an array, once it is known to be float32 of `shape`."""
  if accumulator is None:
    return None
  accumulator = jnp.asarray(accumulator)
  _check_dtype("accumulator", accumulator.dtype, (jnp.dtype(jnp.float32),))
  if accumulator.shape != shape:
    raise ValueError(
      f"accumulator must be (g, m, n) = {shape}, got {accumulator.shape}"
    )
  return accumulator


def check_bias(name: str, bias, shape):
  """Returns it as an array, once it is known to be floats of `shape`."""
  if bias is None:
    return None
  bias = jnp.asarray(bias)
  check_input_dtype(name, bias.dtype)
  if bias.shape != shape:
    raise ValueError(f"{name} must be {shape}, got {bias.shape}")
  return bias


def check_out_dtype(dtype: DTypeLike):
  """Returns a preferred_element_type as a dtype, once it is known to do."""
  dtype = jnp.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"preferred_element_type must be a float, got {dtype}")
  return dtype


def check_expected_m(expected_m: int | None, max_m: int) -> int:
  """Returns how many rows of a group to expect, from 1 to max_m."""
  if expected_m is None:
    expected_m = max_m
  if not isinstance(expected_m, Integral):
    raise TypeError(f"expected_m must be an int or None, got {expected_m!r}")
  if expected_m < 0:
    raise ValueError(f"expected_m must not be negative, got {expected_m}")
  return max(1, min(int(expected_m), max_m))


def check_m_grouped_config(config, out_dtype, k: int):
  """Raises if no M-grouped kernel can run with it."""
  if _has_type(config, (Config, SmallGroupsConfig)):
    _check_fits(config, out_dtype, k)


def check_k_grouped_config(config, out_dtype):
  """Raises if the K-grouped kernel cannot run with it."""
  if not _has_type(config, (Config,)):
    return
  if config.cluster > 1 and config.multicast != "lhs":
    raise NotImplementedError(
      f"K-grouped clusters share lhs only, got multicast={config.multicast!r}"
    )
  if config.compute_wgs > 2:
    raise NotImplementedError(
      f"K-grouped needs compute_wgs=2, got {config.compute_wgs}"
    )
  _check_fits(config, out_dtype, None)


def _has_type(config, types) -> bool:
  """False for None; TypeError unless it is that or of one of the types."""
  if config is not None and not isinstance(config, types):
    names = ", ".join(t.__name__ for t in types)
    raise TypeError(f"config must be a {names} or None, got {config!r}")
  return config is not None


def _check_fits(config, out_dtype, k: int | None):
  if config.tile_n > _MAX_TILE_N:
    raise NotImplementedError(
      f"registers suffice for FP8 products of tile_n={_MAX_TILE_N} and their "
      f"sums, got {config.tile_n}"
    )
  needed = config.smem_bytes(out_dtype, k)
  if needed > SMEM_BYTES:
    raise ValueError(
      f"{config} needs {needed} bytes of shared memory for {out_dtype} "
      f"results, a Hopper GPU has {SMEM_BYTES}"
    )


def unsupported_by_kernels(sizes, out_dtype) -> str | None:
  """Returns what of the problem the kernels do not support, if anything."""
  for name, size in sizes.items():
    if size % _KERNEL_ALIGN:
      return (
        f"needs {name} to be a multiple of {_KERNEL_ALIGN}, got {name}={size}"
      )
  if out_dtype not in _KERNEL_DTYPES:
    return f"gives one of {_names(_KERNEL_DTYPES)}, got {out_dtype}"
  return None

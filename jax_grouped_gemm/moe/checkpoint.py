"""Weights of block-scaled FP8 checkpoints, such as DeepSeek-V3's.

A safetensors file is 8 bytes of the header's length (little-endian), the header
(JSON: name -> dtype, shape and the range of its bytes), and the bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_grouped_gemm.config import SCALE_BLOCK
from jax_grouped_gemm.scaled_array import ScaledArray, scales_shape

_LENGTH_BYTES = 8
_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


def read_safetensors(source: str | Path | bytes) -> dict[str, np.ndarray]:
  """name -> array of a safetensors file, of all files of a directory, or bytes.

  Files are mapped into memory and read where an array is used. ValueError if
  the file is damaged; arrays of dtypes that NumPy and ml_dtypes lack are left
  out.
  """
  if isinstance(source, bytes):
    return _parse(np.frombuffer(source, np.uint8), "bytes")
  path = Path(source)
  if path.is_dir():
    files = sorted(path.glob("*.safetensors"))
    if not files:
      raise ValueError(f"no *.safetensors in {path}")
    return {k: v for file in files for k, v in read_safetensors(file).items()}
  if not path.stat().st_size:  # Nothing to map.
    return _parse(np.empty(0, np.uint8), path)
  return _parse(np.memmap(path, np.uint8, mode="r"), path)


def _parse(data: np.ndarray, name) -> dict[str, np.ndarray]:
  length = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
  start = _LENGTH_BYTES + length
  if data.size < start or length < 2:
    raise ValueError(
      f"{name} is no safetensors file: {data.size} bytes, of which the header "
      f"takes {length}"
    )
  try:
    header = json.loads(data[_LENGTH_BYTES:start].tobytes())
  except ValueError as error:
    raise ValueError(f"{name}: the header is no JSON: {error}") from error
  if not isinstance(header, dict):
    raise ValueError(
      f"{name}: the header must be a JSON object, got {type(header)}"
    )
  arrays = {}
  for key, entry in header.items():
    if key == "__metadata__":
      continue
    if not _is_entry(entry):
      raise ValueError(
        f"{name}: {key!r} must have a dtype, a shape and two data_offsets, got "
        f"{entry!r}"
      )
    if entry["dtype"] not in _DTYPES:
      continue
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = (start + offset for offset in entry["data_offsets"])
    if end - begin != math.prod(shape) * dtype.itemsize or end > data.size:
      raise ValueError(
        f"{name}: {key!r} of shape {shape} and dtype {dtype} should be bytes "
        f"[{begin}, {end}) of {data.size}"
      )
    arrays[key] = data[begin:end].view(dtype).reshape(shape)
  return arrays


def _is_entry(entry) -> bool:
  match entry:
    case {"dtype": str(), "shape": [*shape], "data_offsets": [begin, end]}:
      return all(type(n) is int and n >= 0 for n in (*shape, begin, end))
  return False


def load_block_scaled(
  tensors: Mapping[str, np.ndarray], names: Iterable[str | Sequence[str]]
) -> ScaledArray:
  """out[g] = `weight` (n, k) * `weight_scale_inv` by blocks, of names[g].

  (g, n, k) in blocks of (1, 128, 128), an operand of m_grouped_gemm and, as
  gate_up or down, of moe_layer. Several names in place of one are stacked along
  n: gate and up projection. Despite its name `weight_scale_inv`, float32
  (ceil(n / 128), ceil(k / 128)), is what multiplies the values.

  Args:
    tensors: such as read_safetensors gives.
    names: per group, without the ".weight" and ".weight_scale_inv" at the end.
  """
  values, scales = [], []
  for group in names:
    group = [group] if isinstance(group, str) else list(group)
    parts = [_block_scaled(tensors, name) for name in group]
    for name, (value, _) in zip(group[:-1], parts[:-1], strict=True):
      if value.shape[0] % SCALE_BLOCK:
        raise NotImplementedError(
          f"{name} has {value.shape[0]} rows, no multiple of {SCALE_BLOCK}: "
          f"its last scale would cover rows of {group[-1]}"
        )
    widths = {value.shape[1] for value, _ in parts}
    if len(widths) != 1:
      raise ValueError(f"{', '.join(group)} must have one k, got {widths}")
    values.append(np.concatenate([value for value, _ in parts]))
    scales.append(np.concatenate([scale for _, scale in parts]))
  if not values:
    raise ValueError("names must hold one group at least, got none")
  shapes = {value.shape for value in values}
  if len(shapes) != 1:
    raise ValueError(f"all groups must have one shape, got {sorted(shapes)}")
  return ScaledArray(
    jnp.asarray(np.stack(values)),
    jnp.asarray(np.stack(scales)),
    (1, SCALE_BLOCK, SCALE_BLOCK),
  )


def _block_scaled(tensors, name: str) -> tuple[np.ndarray, np.ndarray]:
  missing = [
    key
    for key in (f"{name}.weight", f"{name}.weight_scale_inv")
    if key not in tensors
  ]
  if missing:
    raise ValueError(f"the checkpoint has no {' and no '.join(missing)}")
  value, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
  if value.dtype != ml_dtypes.float8_e4m3fn or scale.dtype != np.float32:
    raise TypeError(
      f"{name} must be float8_e4m3fn with float32 scales, got {value.dtype} "
      f"and {scale.dtype}"
    )
  if value.ndim != 2 or scale.shape != scales_shape(
    value.shape, (SCALE_BLOCK, SCALE_BLOCK)
  ):
    raise ValueError(
      f"{name}.weight must be (n, k) with a scale per {SCALE_BLOCK} x "
      f"{SCALE_BLOCK} values, got {value.shape} and {scale.shape}"
    )
  return value, scale


def load_experts(
  tensors: Mapping[str, np.ndarray], prefix: str, experts: Iterable[int]
) -> tuple[ScaledArray, ScaledArray]:
  """(gate_up (e, 2 f, d), down (e, d, f)) of experts named as in DeepSeek-V3.

  Their names are `prefix`.i.gate_proj, .up_proj and .down_proj.

  Args:
    tensors: such as read_safetensors gives.
    prefix: e.g. "model.layers.3.mlp.experts".
    experts: which, e.g. range(256), or a device's own.
  """
  names = [f"{prefix}.{i}" for i in experts]
  return (
    load_block_scaled(
      tensors, [(f"{n}.gate_proj", f"{n}.up_proj") for n in names]
    ),
    load_block_scaled(tensors, [f"{n}.down_proj" for n in names]),
  )

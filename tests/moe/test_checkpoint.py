"""A checkpoint as DeepSeek-V3 ships them, written here byte by byte."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_grouped_gemm import ScaledArray, moe

D, F, E, K = 160, 256, 4, 2  # d: a whole scale block and a part of one.
PREFIX = "model.layers.3.mlp.experts"
NAMES = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "bfloat16": "BF16"}
RNG = np.random.default_rng(0)


def safetensors(tensors, **changes):
  """Returns the file's bytes."""
  header, data = {"__metadata__": {"format": "pt"}}, b""
  for name, x in tensors.items():
    begin, data = len(data), data + x.tobytes()
    header[name] = {
      "dtype": NAMES[x.dtype.name],
      "shape": x.shape,
      "data_offsets": [begin, len(data)],
    }
  header |= changes
  header = json.dumps(header).encode()
  header += b" " * (-len(header) % 8)
  return with_header(header) + data


def with_header(header):
  return len(header).to_bytes(8, "little") + header


def block_scaled(n, k):
  values = np.clip(RNG.standard_normal((n, k)) * 100, -448, 448)
  values[::128, ::128] = 448  # The largest of each block.
  scales = RNG.uniform(1e-3, 2e-3, (-(-n // 128), -(-k // 128)))
  return values.astype(ml_dtypes.float8_e4m3fn), scales.astype(np.float32)


def expert_tensors(f=F):
  tensors = {
    "model.norm.weight": RNG.standard_normal(D).astype(ml_dtypes.bfloat16)
  }
  for e in range(E):
    for name, shape in (
      ("gate_proj", (f, D)),
      ("up_proj", (f, D)),
      ("down_proj", (D, f)),
    ):
      weight, scale = block_scaled(*shape)
      tensors[f"{PREFIX}.{e}.{name}.weight"] = weight
      tensors[f"{PREFIX}.{e}.{name}.weight_scale_inv"] = scale
  return tensors


TENSORS = expert_tensors()


def dequantized(name):
  """(n, k) in float64, scale by scale."""
  weight = TENSORS[f"{name}.weight"].astype(np.float64)
  scales = TENSORS[f"{name}.weight_scale_inv"]
  for i, j in np.ndindex(*scales.shape):
    weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scales[i, j]
  return weight


def test_reads_what_was_written(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(safetensors(TENSORS))
  for source in (path, str(path), path.read_bytes()):
    tensors = moe.read_safetensors(source)
    assert tensors.keys() == TENSORS.keys()
    for name, x in tensors.items():
      assert x.dtype == TENSORS[name].dtype and x.shape == TENSORS[name].shape
      assert x.tobytes() == TENSORS[name].tobytes()


def test_reads_all_files_of_a_directory(tmp_path):
  items = list(TENSORS.items())
  for i in range(2):
    path = tmp_path / f"model-0000{i + 1}-of-00002.safetensors"
    path.write_bytes(safetensors(dict(items[i::2])))
  assert moe.read_safetensors(tmp_path).keys() == TENSORS.keys()
  with pytest.raises(ValueError, match="no \\*.safetensors in"):
    moe.read_safetensors(tmp_path / "..")


def test_experts_are_the_checkpoint_s():
  tensors = moe.read_safetensors(safetensors(TENSORS))
  gate_up, down = moe.load_experts(tensors, PREFIX, range(E))
  assert isinstance(gate_up, ScaledArray) and gate_up.dtype == down.dtype
  assert gate_up.shape == (E, 2 * F, D) and down.shape == (E, D, F)
  for e in range(E):
    gate, up, expected_down = (
      dequantized(f"{PREFIX}.{e}.{name}")
      for name in ("gate_proj", "up_proj", "down_proj")
    )
    np.testing.assert_allclose(
      gate_up.dequantize()[e], np.concatenate([gate, up]), rtol=1e-6
    )
    np.testing.assert_allclose(down.dequantize()[e], expected_down, rtol=1e-6)
  (some, _) = moe.load_experts(tensors, PREFIX, [2, 0])
  np.testing.assert_array_equal(
    some.dequantize(), gate_up.dequantize()[jnp.array([2, 0])]
  )


def test_layer_serves_from_it():
  """The result is that of the dequantised weights in the FP8 recipe."""
  tensors = moe.read_safetensors(safetensors(TENSORS))
  gate_up, down = moe.load_experts(tensors, PREFIX, range(E))
  router = jnp.asarray(RNG.standard_normal((D, E)), jnp.float32)
  params = moe.MoeParams(router, gate_up, down)
  x = jnp.asarray(RNG.standard_normal((10, D)), jnp.float32)
  out = jax.jit(lambda x, params: moe.moe_layer(x, params, K).out)(x, params)
  floats = moe.MoeParams(router, gate_up.dequantize().mT, down.dequantize().mT)
  # Which the recipe quantises once more, to the same values and, but for
  # their rounding, the same scales.
  expected = moe.moe_layer(x, floats, K).out
  error = np.linalg.norm(out - expected, axis=1)
  assert (error < 1e-5 * np.linalg.norm(expected, axis=1)).all()


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "0 bytes"),
    (b"\xff" * 64, "is no safetensors file"),
    (safetensors(TENSORS)[:-1], "should be bytes"),
    (
      safetensors({}, x={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}),
      r"'x' of shape \(2,\) and dtype float32",
    ),
    (with_header(b"{]"), "the header is no JSON: .*property name"),
    (with_header(b"{\xff"), "the header is no JSON: .*decode"),
    (with_header(b"[]"), "the header must be a JSON object, got .*'list'"),
    *(
      (safetensors({}, x=entry), "'x' must have a dtype, a shape and two data_")
      for entry in (
        1,
        {**ENTRY, "data_offsets": [-4, 0]},
        {**ENTRY, "data_offsets": [4]},
        {**ENTRY, "data_offsets": ["0", "4"]},
        {**ENTRY, "shape": [1.0]},
        {**ENTRY, "shape": 1},
        {**ENTRY, "dtype": ["F32"]},
        *({k: ENTRY[k] for k in ENTRY if k != missing} for missing in ENTRY),
      )
    ),
  ],
)
def test_damaged_files(data, message, tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(data)
  for source, name in ((data, "bytes"), (path, str(path))):
    with pytest.raises(ValueError, match=message) as error:
      moe.read_safetensors(source)
    assert str(error.value).startswith(name)


@pytest.mark.parametrize("name, size", [("F8_E8M0", 1), ("U16", 2), ("U64", 8)])
def test_dtypes_beside_floats(name, size):
  entry = {"dtype": name, "shape": [1], "data_offsets": [0, size]}
  data = safetensors({}, x=entry) + bytes(size)
  assert moe.read_safetensors(data)["x"].dtype.itemsize == size


def test_unknown_dtypes_are_left_out():
  entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
  assert moe.read_safetensors(safetensors({}, x=entry)) == {}


@pytest.mark.parametrize(
  "changes, error, message",
  [
    ({"a.weight": None}, ValueError, "has no a.weight"),
    (
      {"a.weight": np.zeros((F, D), np.float32)},
      TypeError,
      "a must be float8_e4m3fn.*got float32",
    ),
    (
      {"a.weight_scale_inv": np.zeros((2, 1), np.float32)},
      ValueError,
      r"got \(256, 160\) and \(2, 1\)",
    ),
    (
      dict(
        zip(("b.weight", "b.weight_scale_inv"), block_scaled(8, D), strict=True)
      ),
      ValueError,
      "one shape",
    ),
  ],
)
def test_bad_checkpoints(changes, error, message):
  tensors = {}
  for name in ("a", "b"):
    weight, scale = block_scaled(F, D)
    tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}
  tensors |= changes
  tensors = {k: v for k, v in tensors.items() if v is not None}
  with pytest.raises(error, match=message):
    moe.load_block_scaled(tensors, ["a", "b"])


def test_gate_and_up_of_one_k():
  tensors = expert_tensors(f=128)
  weight, scale = block_scaled(128, 2 * D)
  name = f"{PREFIX}.0.up_proj"
  tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}
  with pytest.raises(ValueError, match=f"gate_proj, {name} must have one k"):
    moe.load_experts(tensors, PREFIX, range(E))


def test_no_experts():
  with pytest.raises(ValueError, match="one group at least, got none"):
    moe.load_experts({}, PREFIX, [])


def test_gate_and_up_need_whole_scale_blocks():
  tensors = expert_tensors(f=96)
  with pytest.raises(NotImplementedError, match="has 96 rows"):
    moe.load_experts(tensors, PREFIX, range(E))

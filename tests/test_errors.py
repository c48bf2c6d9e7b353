"""Wrong calls say what is wrong, with the values and the rule."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jax_grouped_gemm import (
  Config,
  Recipe,
  ScaledArray,
  SmallGroupsConfig,
  implementation,
  k_grouped_gemm,
  m_grouped_gemm,
  m_grouped_gemm_masked,
  quantize,
  quantize_for_k_grouped,
  quantize_weights,
  ragged_dot,
)

ONES = jnp.ones
SIZES = jnp.array([3, 4])
X, W = ONES((10, 32)), ONES((2, 32, 48))
LHS = quantize(X, (1, 128))
MASKED_LHS = quantize(ONES((2, 10, 32)), (1, 1, 128))
RHS = quantize(ONES((2, 48, 32)), (1, 128, 128))
K_LHS = quantize_for_k_grouped(X, SIZES)
K_RHS = quantize_for_k_grouped(ONES((10, 48)), SIZES)


def m_grouped(lhs=LHS, rhs=RHS, sizes=SIZES, **kwargs):
  return m_grouped_gemm(lhs, rhs, sizes, **kwargs)


def masked(lhs=MASKED_LHS, rhs=RHS, sizes=SIZES, **kwargs):
  return m_grouped_gemm_masked(lhs, rhs, sizes, **kwargs)


def k_grouped(lhs=K_LHS, rhs=K_RHS, sizes=SIZES, **kwargs):
  return k_grouped_gemm(lhs, rhs, sizes, **kwargs)


def dot(lhs=X, rhs=W, sizes=SIZES, **kwargs):
  return ragged_dot(lhs, rhs, sizes, **kwargs)


def for_k_grouped(x=X, sizes=SIZES, **kwargs):
  return quantize_for_k_grouped(x, sizes, **kwargs)


def scaled(scales, dtype=jnp.float32):
  values = jnp.zeros((10, 32), jnp.float8_e4m3fn)
  return ScaledArray(values, ONES(scales, dtype), (1, 128))


# Every call that takes group sizes.
SIZED = [m_grouped, masked, k_grouped, dot, for_k_grouped]
TOO_BIG = Config(tile_n=192, num_stages=8)
CASES = [
  # Group sizes.
  *(
    case
    for call in SIZED
    for case in (
      (call, {"sizes": ONES(2)}, TypeError, "integers, got float32"),
      (call, {"sizes": SIZES[None]}, ValueError, r"axis.*\(1, 2\)"),
    )
  ),
  (m_grouped, {"sizes": SIZES[:1]}, ValueError, "each of the 2 groups.*got 1"),
  (masked, {"sizes": SIZES[:1]}, ValueError, "each of the 2 groups.*got 1$"),
  (dot, {"sizes": SIZES[:1]}, ValueError, "each of the 2 groups.*got 1"),
  (
    m_grouped,
    {"group_offset": jnp.array([1, 2])},
    ValueError,
    r"shape \(1,\), got \(2,\)",
  ),
  (m_grouped, {"group_offset": 0.5}, TypeError, "group_offset.*float32"),
  (
    m_grouped,
    {"group_offset": 0, "sizes": SIZES[:1]},
    ValueError,
    "at least one entry for each of the 2.*got 1",
  ),
  (
    m_grouped,
    {"bias": ONES((2, 32))},
    ValueError,
    r"bias must be \(2, 48\), got \(2, 32\)",
  ),
  (m_grouped, {"bias": ONES(48)}, ValueError, r"bias must.* got \(48,\)"),
  (m_grouped, {"bias": ONES((2, 48), int)}, TypeError, "bias .*got int32"),
  (
    for_k_grouped,
    {"group_offset": 0},
    ValueError,
    "together.*group_offset=0, num_groups=None",
  ),
  (
    for_k_grouped,
    {"group_offset": 0, "num_groups": 0},
    ValueError,
    "at least 1 group, got 0",
  ),
  # Quantisation.
  (quantize, {"x": ONES((4, 4), int)}, TypeError, "x must be.*got int32"),
  (quantize, {"dtype": jnp.float16}, TypeError, "e4m3fn.*got float16"),
  (
    quantize,
    {"block_shape": (128,)},
    ValueError,
    r"\(4, 4\) and block_shape \(128,\)",
  ),
  (quantize, {"block_shape": (1, 2.0)}, TypeError, r"ints, got \(1, 2.0\)"),
  (quantize, {"block_shape": 128}, TypeError, "tuple of ints, got 128"),
  (quantize, {"x": 1.0, "block_shape": ()}, ValueError, r"axes.*x \(\)"),
  (quantize, {"block_shape": (1, 0)}, ValueError, r"positive.*\(1, 0\)"),
  (quantize, {"implementation": "cuda"}, ValueError, "one of.*got 'cuda'"),
  (
    quantize,
    {"implementation": "interpret"},
    NotImplementedError,
    "multiple of 16.*k=4",
  ),
  (
    for_k_grouped,
    {"x": ONES(10)},
    ValueError,
    r"features\), got shape \(10,\)",
  ),
  (
    for_k_grouped,
    {"implementation": "interpret"},
    NotImplementedError,
    "tokens of bfloat16, got float32",
  ),
  (
    quantize,
    {"implementation": "interpret", "block_shape": (2, 128)},
    NotImplementedError,
    r"blocks of 128 along k, got x \(4, 4\) in blocks of \(2, 128\)",
  ),
  (
    quantize_weights,
    {"w": ONES((4, 4))},
    ValueError,
    r"\(g, k, n\), got shape \(4, 4\)",
  ),
  (
    quantize_weights,
    {"w": ONES((2, 16, 16)), "implementation": "mosaic_gpu"},
    NotImplementedError,
    "weights of bfloat16, got float32",
  ),
  (
    quantize_weights,
    {"w": ONES((2, 16, 24), jnp.bfloat16), "implementation": "mosaic_gpu"},
    NotImplementedError,
    "multiple of 16, got n=24",
  ),
  # Operands of the GEMMs.
  (m_grouped, {"lhs": ONES((10, 32))}, TypeError, "lhs must be a ScaledArray"),
  (m_grouped, {"lhs": RHS}, ValueError, r"\(m, k\).*\(1, 128\).*\(2, 48, 32\)"),
  (
    m_grouped,
    {"rhs": quantize(ONES((2, 48, 32)), (1, 1, 128))},
    ValueError,
    r"blocks of \(1, 128, 128\), got .* \(1, 1, 128\)",
  ),
  (
    m_grouped,
    {"lhs": quantize(ONES((10, 64)), (1, 128))},
    ValueError,
    r"one k, got \(10, 64\) and \(2, 48, 32\)",
  ),
  (
    m_grouped,
    {"lhs": scaled((10, 2))},
    ValueError,
    r"\(10, 32\) \(10, 1\), got \(10, 2\)",
  ),
  (
    m_grouped,
    {"lhs": scaled((10, 1), jnp.bfloat16)},
    TypeError,
    "lhs.scales must be one of float32, got bfloat16",
  ),
  (
    m_grouped,
    {"lhs": ScaledArray(ONES((10, 32)), ONES((10, 1)), (1, 128))},
    TypeError,
    "lhs.values must be.*got float32",
  ),
  (
    k_grouped,
    {"rhs": quantize(ONES((48, 512)), (1, 128))},
    ValueError,
    r"one t_padded.*\(32, 256\) and \(48, 512\)",
  ),
  (
    k_grouped,
    {"lhs": scaled((10, 1)), "rhs": scaled((10, 1))},
    ValueError,
    r"multiple of 128, got \(10, 32\)",
  ),
  (
    k_grouped,
    {"accumulator": ONES((2, 48, 32))},
    ValueError,
    r"\(2, 32, 48\), got \(2, 48, 32\)",
  ),
  (
    k_grouped,
    {"accumulator": ONES((2, 32, 48), jnp.bfloat16)},
    TypeError,
    "accumulator must be.*float32, got bfloat16",
  ),
  (
    masked,
    {"lhs": LHS},
    ValueError,
    r"\(g, max_m, k\).*\(1, 1, 128\).*\(10, 32\)",
  ),
  *(
    (
      masked,
      {"lhs": quantize(ONES(shape), (1, 1, 128))},
      ValueError,
      r"one g and one k, got .* and \(2, 48, 32\)",
    )
    for shape in ((3, 10, 32), (2, 10, 64))
  ),
  (masked, {"expected_m": 2.5}, TypeError, "an int or None, got 2.5"),
  (masked, {"expected_m": -1}, ValueError, "not be negative, got -1"),
  # What all GEMMs take.
  *(
    case
    for call in (m_grouped, masked, k_grouped)
    for case in (
      (
        call,
        {"preferred_element_type": jnp.int32},
        TypeError,
        "a float, got int32",
      ),
      (call, {"config": 192}, TypeError, "Config or None, got 192"),
      (call, {"config": TOO_BIG}, ValueError, "num_stages=8.*needs.*232448"),
      (call, {"implementation": "gpu"}, ValueError, "one of.*got 'gpu'"),
      (
        call,
        {"implementation": "mosaic_gpu", "preferred_element_type": jnp.float16},
        NotImplementedError,
        "bfloat16, float32, got float16",
      ),
    )
  ),
  *(
    (
      call,
      {"config": SmallGroupsConfig(num_stages=20)},
      ValueError,
      "num_stages=20.*needs.*232448",
    )
    for call in (m_grouped, masked)
  ),
  (
    k_grouped,
    {"config": SmallGroupsConfig()},
    TypeError,
    "must be a Config or None, got SmallGroupsConfig",
  ),
  # What the kernels do not support.
  (
    m_grouped,
    {"config": Config(tile_n=256)},
    NotImplementedError,
    "registers suffice .* tile_n=192 and their sums, got 256",
  ),
  (
    k_grouped,
    {"config": Config(tile_n=128, multicast="rhs")},
    NotImplementedError,
    "share lhs only, got multicast='rhs'",
  ),
  (
    k_grouped,
    {"config": Config(tile_n=128, compute_wgs=3)},
    NotImplementedError,
    "needs compute_wgs=2, got 3",
  ),
  (
    m_grouped,
    {
      "lhs": quantize(ONES((10, 40)), (1, 128)),
      "rhs": quantize(ONES((2, 48, 40)), (1, 128, 128)),
      "implementation": "mosaic_gpu",
    },
    NotImplementedError,
    "multiple of 16, got k=40",
  ),
  (
    m_grouped,
    {
      "rhs": quantize(ONES((2, 20, 32)), (1, 128, 128)),
      "implementation": "interpret",
    },
    NotImplementedError,
    "multiple of 16, got n=20",
  ),
  (
    k_grouped,
    {
      "lhs": quantize_for_k_grouped(ONES((10, 24)), SIZES),
      "implementation": "mosaic_gpu",
    },
    NotImplementedError,
    "multiple of 16, got m=24",
  ),
  (
    k_grouped,
    {
      "accumulator": ONES((2, 32, 48)),
      "preferred_element_type": jnp.bfloat16,
      "implementation": "mosaic_gpu",
    },
    NotImplementedError,
    "accumulator.*got bfloat16",
  ),
  # ragged_dot.
  (dot, {"lhs": ONES(10)}, TypeError, r"\(m, k\), got shape \(10,\)"),
  (dot, {"rhs": ONES((32, 48))}, TypeError, r"\(g, k, n\).*\(32, 48\)"),
  (dot, {"lhs": ONES((10, 32), int)}, TypeError, "lhs must be.*got int32"),
  (dot, {"lhs": ONES((10, 33))}, TypeError, "33"),
  (
    dot,
    {"preferred_element_type": jnp.int32},
    TypeError,
    "must be a float dtype, got int32",
  ),
  (dot, {"recipe": "fp8"}, TypeError, "a Recipe, got 'fp8'"),
  (dot, {"implementation": "gpu"}, ValueError, "one of.*got 'gpu'"),
  # Recipe and Config.
  (Recipe, {"forward": "fp4"}, ValueError, "forward.*'fp8'.*got 'fp4'"),
  (Recipe, {"wgrad": None}, ValueError, "wgrad.*got None"),
  (Recipe, {"gradient_dtype": jnp.int8}, TypeError, "gradient_dtype.*int8"),
  (Recipe, {"power_of_two_scales": 1}, TypeError, "a bool, got 1"),
  (Config, {"tile_n": 96}, ValueError, r"\(64, 128, 192, 256\), got 96"),
  (Config, {"cluster": 4}, ValueError, r"\(1, 2\), got 4"),
  (Config, {"multicast": "out"}, ValueError, r"\('lhs', 'rhs'\), got out"),
  (Config, {"turns": 2}, ValueError, r"\(False, True\), got 2"),
  (Config, {"compute_wgs": 4}, ValueError, r"\(2, 3\), got 4"),
  (Config, {"compute_wgs": 3}, ValueError, "tile_n=192 needs compute_wgs=2"),
  (Config, {"num_stages": 1}, ValueError, "at least 2, got 1"),
  (Config, {"num_stages": 2.5}, TypeError, "must be an int, got 2.5"),
  (Config, {"raster_width": 0}, ValueError, "at least 1, got 0"),
  (Config, {"num_sms": 1}, ValueError, "cluster=2, got 1"),
  (SmallGroupsConfig, {"tile_m": 24}, ValueError, r"16, 32, 64\), got 24"),
  (SmallGroupsConfig, {"tile_n": 192}, ValueError, r"\(64, 128\), got 192"),
  (SmallGroupsConfig, {"num_stages": 1}, ValueError, "at least 2, got 1"),
  (SmallGroupsConfig, {"num_sms": 0}, ValueError, "at least 1, got 0"),
]


def case_id(case):
  call, kwargs, error, _ = case
  return f"{call.__name__}-{'-'.join(kwargs)}-{error.__name__}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_message(case):
  call, kwargs, error, message = case
  if call is quantize:
    kwargs = {"x": ONES((4, 4)), "block_shape": (1, 128)} | kwargs
  with pytest.raises(error) as raised:
    call(**kwargs)
  text = str(raised.value)
  assert re.search(message, text, re.S), text


@pytest.mark.parametrize("call", [m_grouped, masked, k_grouped, dot])
def test_kernel_on_a_cpu(call):
  with pytest.raises(NotImplementedError, match="needs a Hopper GPU.*for cpu"):
    call(implementation="mosaic_gpu")


def pretend(monkeypatch, capability):
  """Makes a GPU the default device, for what is traced and not run."""
  gpu = SimpleNamespace(
    platform="gpu", compute_capability=capability, device_kind="NVIDIA A100"
  )
  monkeypatch.setattr(implementation, "default_device", lambda: gpu)


def traced(call, **kwargs):
  # A new function: one traced before would not be traced again.
  return str(jax.make_jaxpr(lambda: call(**kwargs))())


@pytest.mark.parametrize("call", [m_grouped, masked, k_grouped, dot])
def test_kernel_on_another_gpu(call, monkeypatch):
  pretend(monkeypatch, "8.0")
  with pytest.raises(
    NotImplementedError, match=r"9.0 \(Hopper\), got NVIDIA A100 of 8.0"
  ):
    call(implementation="mosaic_gpu")
  assert "sm90" not in traced(call)


@pytest.mark.parametrize("call", [m_grouped, k_grouped, dot])
def test_kernel_is_the_default_on_hopper(call, monkeypatch):
  pretend(monkeypatch, "9.0")
  assert "sm90" in traced(call)
  assert "sm90" not in traced(call, implementation="xla")


def test_kernels_for_small_groups(monkeypatch):
  """They get them, unless a config says otherwise."""
  pretend(monkeypatch, "9.0")
  for call in (m_grouped, masked):
    assert "small_groups" in traced(call)
    kernels = [
      traced(call, implementation="mosaic_gpu", config=config)
      for config in (SmallGroupsConfig(), Config())
    ]
    assert ["small_groups" in kernel for kernel in kernels] == [True, False]
    assert ["=m_grouped" in kernel for kernel in kernels] == [False, True]


def test_unsupported_problems_run_on_hopper(monkeypatch):
  pretend(monkeypatch, "9.0")
  rhs = quantize(ONES((2, 20, 32)), (1, 128, 128))
  assert "sm90" not in traced(m_grouped, rhs=rhs)


def test_errors_come_when_traced():
  with pytest.raises(ValueError, match="each of the 2 groups"):
    jax.eval_shape(m_grouped, LHS, RHS, SIZES[:1])

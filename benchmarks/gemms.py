"""The grouped GEMMs to time in JAX: operands, implementations, their check."""

import contextlib
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import masked, oracle, train_step
from benchmarks.operands import (
  Unsupported,
  check_dense,
  random_rows,
  random_weights,
)
from benchmarks.shapes import Problem
from benchmarks.timing import Program, measure_us
from jax_grouped_gemm import (
  Recipe,
  k_grouped_gemm,
  m_grouped_gemm,
  quantize_for_k_grouped,
  ragged_dot,
)
from jax_grouped_gemm.config import ROW_ALIGN, SCALE_BLOCK
from jax_grouped_gemm.kernels import tuning

# Largest |row of out - row of the reference| / |row of the reference|. bf16
# peers also round the operands.
_MAX_ROW_ERROR_OURS = 4e-3
_MAX_ROW_ERROR_BF16 = 1e-2
# What JAX's own kernel is tried with: block_m, block_n, block_k, steps.
_MGPU_CONFIGS = ((128, 128, 64, 4), (128, 256, 64, 4), (64, 256, 64, 4))


_NO_LOCK = contextlib.nullcontext()


def _max_row_error_of(impl: str) -> float:
  is_fp8 = "ours" in impl and "bf16" not in impl
  return _MAX_ROW_ERROR_OURS if is_fp8 else _MAX_ROW_ERROR_BF16


class MGrouped:
  """out[r] = lhs[r] @ rhs[group of r].T."""

  def __init__(self, p: Problem, operands):
    self.p, (self.lhs, self.rhs, self.sizes) = p, operands

  @staticmethod
  def operands(p: Problem):
    """Returns lhs, rhs and sizes, as masked.Decode but for up to 7 more rows.

    Whoever has many rows has a buffer of whole 8: others cost a copy of the
    scales.
    """
    rows = sum(p.sizes)
    lhs = random_rows(rows + -rows % ROW_ALIGN, p.k)
    return lhs, random_weights(p), jnp.asarray(p.sizes, jnp.int32)

  max_row_error = masked.Decode.max_row_error

  def calls(self):
    """Returns {implementation: function that returns (function, operands)}."""
    (m, k), (g, n, _) = self.lhs.shape, self.rhs.shape
    config = tuning.m_grouped_config(m, n, k, g, jnp.bfloat16)
    ours = functools.partial(m_grouped_gemm, config=config)
    return {
      "ours": lambda: (ours, (self.lhs, self.rhs, self.sizes)),
      "ours_bf16": lambda: (_ragged_dot_bf16, (*self._bf16(), self.sizes)),
      "lax_ragged_dot": self._lax_ragged_dot,
      "jax_ragged_dot_mgpu": self._ragged_dot_mgpu,
      "tokamax": self._tokamax,
    }

  def _bf16(self):
    """Returns lhs and rhs (g, k, n) as those who multiply in bf16 want them."""
    return _dequantize(self.lhs), _dequantize(self.rhs).mT

  def _lax_ragged_dot(self):
    check_dense(self.sizes.size)
    return jax.lax.ragged_dot, (*self._bf16(), self.sizes)

  def _ragged_dot_mgpu(self):
    lhs, rhs = self._bf16()
    if lhs.shape[0] % 8:
      raise Unsupported(f"needs m to be a multiple of 8, got {lhs.shape[0]}")
    operands = lhs, rhs, self.sizes
    return _fastest_mgpu("ragged_dot", operands), operands

  def _tokamax(self):
    tokamax = importlib.import_module("tokamax")
    return tokamax.ragged_dot, (*self._bf16(), self.sizes)


@jax.jit  # Else in steps, some of which keep all of it in float32.
def _dequantize(x):
  return x.dequantize(jnp.bfloat16)


def _ragged_dot_bf16(lhs, rhs, sizes):
  """Through our kernel where it runs."""
  return ragged_dot(lhs, rhs, sizes, recipe=Recipe.bf16())


def _rhs_gradient_bf16(lhs, dout, sizes):
  """out[g] = lhs[rows of g].T @ dout[rows of g]."""
  # It does not depend on the weights, nor is the product with them computed.
  weights = jnp.zeros((sizes.size, lhs.shape[1], dout.shape[1]), lhs.dtype)
  _, vjp = jax.vjp(lambda rhs: _ragged_dot_bf16(lhs, rhs, sizes), weights)
  return vjp(dout)[0]


def _fastest_mgpu(name: str, operands):
  """Returns JAX's own kernel with the fastest of a few configs."""
  module = importlib.import_module(
    f"jax.experimental.pallas.ops.gpu.{name}_mgpu"
  )
  best = None
  for block_m, block_n, block_k, steps in _MGPU_CONFIGS:
    fn = functools.partial(
      _call_mgpu,
      getattr(module, name),
      block_m=block_m,
      block_n=block_n,
      block_k=block_k,
      max_concurrent_steps=steps,
      grid_block_n=8,
    )
    try:
      us = measure_us(fn, *operands, iterations=3)
    except Exception as error:  # This config does not fit the problem.
      last_error = error
      continue
    if best is None or us < best[0]:
      best = us, fn
  if best is None:
    raise Unsupported(str(last_error))
  return best[1]


def _call_mgpu(kernel, lhs, rhs, sizes, **config):
  return kernel(lhs, rhs, group_sizes=sizes, **config)


class KGrouped:
  """out[g] = lhs[:, tokens of g] @ rhs[:, tokens of g].T.

  Ours adds it to an accumulator, in place, as DeepGEMM does.
  """

  def __init__(self, p: Problem, operands):
    self.p = p
    self.lhs, self.rhs, self.sizes, self.accumulator = operands

  @staticmethod
  def operands(p: Problem):
    """Returns lhs, rhs, sizes and accumulator."""
    t, sizes = sum(p.sizes), jnp.asarray(p.sizes, jnp.int32)
    shape = len(p.sizes), p.n, p.k
    accumulator = jax.random.normal(jax.random.key(1), shape, jnp.float32)
    lhs, rhs = (
      quantize_for_k_grouped(
        jax.random.normal(key, (t, features), jnp.bfloat16), sizes
      )
      for key, features in zip(
        jax.random.split(jax.random.key(0)), (p.n, p.k), strict=True
      )
    )
    return lhs, rhs, sizes, accumulator

  def max_row_error(self, out, impl):
    """Compared with the result in float32 arithmetic, the products alone."""
    expected = k_grouped_gemm(
      self.lhs, self.rhs, self.sizes, implementation="xla"
    )
    out = out - self.accumulator if impl == "ours" else out
    return oracle.row_error(out, expected)

  def calls(self):
    """Returns {implementation: function that returns (function, operands)}."""
    (m, t), (n, _), g = self.lhs.shape, self.rhs.shape, self.sizes.size
    config = tuning.k_grouped_config(
      m, n, t, g, self.accumulator.dtype, accumulates=True
    )
    ours = functools.partial(_accumulate, config=config)
    operands = self.lhs, self.rhs, self.sizes, self.accumulator
    return {
      "ours": lambda: (ours, operands),
      "ours_bf16": lambda: (_rhs_gradient_bf16, self._bf16()),
      "jax_transposed_ragged_dot_mgpu": self._transposed_ragged_dot_mgpu,
    }

  def _bf16(self):
    """Returns lhs (t, m), rhs (t, n) and sizes: tokens without padding."""
    sizes = np.asarray(self.sizes)
    padded = sizes + -sizes % SCALE_BLOCK
    columns = np.concatenate(
      [
        start + np.arange(size)
        for start, size in zip(np.cumsum(padded) - padded, sizes, strict=True)
      ]
    )
    lhs, rhs = (
      jnp.take(_dequantize(x), columns, axis=1).T for x in (self.lhs, self.rhs)
    )
    return lhs, rhs, self.sizes

  def _transposed_ragged_dot_mgpu(self):
    operands = self._bf16()
    return _fastest_mgpu("transposed_ragged_dot", operands), operands


def _accumulate(lhs, rhs, sizes, accumulator, config):
  return k_grouped_gemm(lhs, rhs, sizes, accumulator=accumulator, config=config)


GEMMS = {
  "m_grouped": MGrouped,
  "k_grouped": KGrouped,
  "masked": masked.Masked,
  "decode": masked.Decode,
  "train_step": train_step.TrainStep,
}
# Their operands may be shapes, to compile for.
_OURS = ("ours", "ours_m_grouped", "ours_small_groups")
_IN_PLACE = {("k_grouped", "ours"): 3}  # The accumulator is the result, too.
IMPLS = {
  "m_grouped": (
    "ours",
    "ours_bf16",
    "lax_ragged_dot",
    "jax_ragged_dot_mgpu",
    "tokamax",
  ),
  "k_grouped": ("ours", "ours_bf16", "jax_transposed_ragged_dot_mgpu"),
  "masked": ("read", "ours", "ours_m_grouped", "ours_small_groups"),
  "decode": ("read", "ours"),
  "train_step": train_step.IMPLS,
}


def rows(
  benchmark: str, problem: Problem, impls, iterations: int, lock=_NO_LOCK
) -> list[dict]:
  """Checks and times each implementation, or says why it cannot run.

  `lock` is held while the device is used, but not to compile what is ours.
  """
  kind = GEMMS[benchmark]
  make = functools.partial(kind.operands, problem)
  operands = jax.eval_shape(make)
  make = jax.jit(make).lower().compile()

  def max_row_error(operands, out, impl):
    return kind(problem, operands).max_row_error(out, impl)

  # XLA would time its own GEMMs beside what is measured.
  options = {"xla_gpu_autotune_level": 0}
  check = jax.jit(
    max_row_error, static_argnames="impl", compiler_options=options
  )
  calls, programs = kind(problem, operands).calls(), {}
  for impl in impls:
    if impl in _OURS:
      fn, args = calls[impl]()
      programs[impl] = Program(
        fn, *args, in_place=_IN_PLACE.get((benchmark, impl))
      )
      # jit keeps it.
      check.lower(operands, programs[impl].out_info, impl).compile()
  with lock:
    operands = make()
    calls = kind(problem, operands).calls()
    check = functools.partial(check, operands)
    return [
      masked.read_row(iterations)
      if impl == "read"
      else _row(impl, calls[impl], programs.get(impl), check, iterations)
      for impl in impls
    ]


def _row(impl: str, call, program, check, iterations: int) -> dict:
  try:
    fn, operands = call()
    program = program or Program(fn, *operands)
    out = program(*operands)
    error = float(check(out, impl))
    num_bytes = sum(x.nbytes for x in jax.tree.leaves((operands, out)))
    del out
    us, kernels_us = program.measure(*operands, iterations=iterations)
  except (ImportError, Unsupported) as reason:
    return {"impl": impl, "unavailable": str(reason)}
  return {
    "impl": impl,
    **_config(fn),
    "us": round(us, 2),
    **_kernels(kernels_us),
    "gbps": round(num_bytes / us / 1e3, 1),
    "peak_bytes": program.peak_bytes,
    "max_row_error": error,
    "verified": error <= _max_row_error_of(impl),
  }


def _kernels(kernels_us: dict[str, float]) -> dict:
  """Returns the time of each kernel, if they are several."""
  if len(kernels_us) < 2:
    return {}
  return {"kernels": {name: round(us, 1) for name, us in kernels_us.items()}}


def _config(fn) -> dict:
  """Returns what a call of ours was launched with."""
  config = getattr(fn, "keywords", {}).get("config")
  if config is None:
    return {}
  stages = f"{config.num_stages} slots"
  if getattr(config, "turns", False):
    stages += ", turns"
  if config.dynamic:
    stages += ", claimed"
  shares = "k" if hasattr(config, "split_k") else config.multicast
  shares = f"{config.cluster} share {shares}"
  return {
    "config": f"{config.tile_m}x{config.tile_n}, {stages}, "
    f"{shares if config.cluster > 1 else 'no cluster'}, "
    f"raster {config.raster_width}"
  }


def device() -> str:
  """Returns the name of the device that JAX uses."""
  return jax.devices()[0].device_kind

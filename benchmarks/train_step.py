"""The training step to time: a product of ragged_dot and both gradients.

"ours_quantized_weights" gets its weights quantised beside the floats, as for
one of several microbatches; "ours_bf16_wgrad" computes d(rhs) in bf16.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks import oracle
from benchmarks.operands import check_dense
from benchmarks.shapes import Problem
from jax_grouped_gemm import Recipe, quantize_weights, ragged_dot

IMPLS = (
  "ours",
  "ours_quantized_weights",
  "ours_bf16_wgrad",
  "ours_bf16",
  "lax_ragged_dot",
)
_BF16_WGRAD = Recipe(wgrad="bf16")


def _step(dot, lhs, rhs, dout, sizes):
  """Returns the product, d(lhs) and d(rhs), all bfloat16."""
  out, vjp = jax.vjp(lambda lhs, rhs: dot(lhs, rhs, sizes), lhs, rhs)
  return out, *vjp(dout)


def _ours(recipe: Recipe, implementation: str | None = None):
  if implementation is None and jax.default_backend() == "gpu":
    implementation = "mosaic_gpu"
  dot = functools.partial(
    ragged_dot, recipe=recipe, implementation=implementation
  )
  return functools.partial(_step, dot)


def _with_quantized(lhs, rhs, dout, sizes, quantized):
  dot = functools.partial(ragged_dot, quantized_rhs=quantized)
  return _step(dot, lhs, rhs, dout, sizes)


class TrainStep:
  """out[r] = lhs[r] @ rhs[group of r], d(lhs), d(rhs); bf16 arrays in and out.

  Quantisation is part of what is timed, but for weights that are given so.
  """

  def __init__(self, p: Problem, operands):
    self.p, self.step_operands = p, operands

  @staticmethod
  def operands(p: Problem):
    """Returns lhs, rhs, d(out) and sizes."""
    m, g = sum(p.sizes), len(p.sizes)
    shapes = (m, p.k), (g, p.k, p.n), (m, p.n)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    floats = [
      jax.random.normal(key, shape, jnp.bfloat16)
      for key, shape in zip(keys, shapes, strict=True)
    ]
    return *floats, jnp.asarray(p.sizes, jnp.int32)

  def max_row_error(self, out, impl):
    """Of the three results, compared with XLA's, quantised in the same way."""
    recipe = {
      "ours": Recipe(),
      "ours_quantized_weights": Recipe(),
      "ours_bf16_wgrad": _BF16_WGRAD,
    }.get(impl, Recipe.bf16())
    worst, operands = jnp.float32(0), self.step_operands
    for i, result in enumerate(out):
      # One after the other: all at a time need more memory than some GPUs have.
      worst, operands = jax.lax.optimization_barrier((worst, operands))
      expected = _ours(recipe, "xla")(*operands)[i]
      worst = jnp.maximum(worst, oracle.row_error(result, expected))
    return worst

  def calls(self):
    """Returns {implementation: function that returns (function, operands)}."""
    return {
      "ours": lambda: (_ours(Recipe()), self.step_operands),
      "ours_quantized_weights": lambda: (
        _with_quantized,
        (*self.step_operands, quantize_weights(self.step_operands[1])),
      ),
      "ours_bf16_wgrad": lambda: (_ours(_BF16_WGRAD), self.step_operands),
      "ours_bf16": lambda: (_ours(Recipe.bf16()), self.step_operands),
      "lax_ragged_dot": self._lax_ragged_dot,
    }

  def _lax_ragged_dot(self):
    check_dense(self.step_operands[-1].size)
    return functools.partial(_step, jax.lax.ragged_dot), self.step_operands

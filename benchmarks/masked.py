"""GEMMs of a decoding step, whose time is that of reading the weights."""

import functools
import itertools

import jax
import jax.numpy as jnp

from benchmarks import oracle
from benchmarks.operands import random_rows, random_weights
from benchmarks.shapes import Problem
from benchmarks.timing import measure_us
from jax_grouped_gemm import m_grouped_gemm, m_grouped_gemm_masked
from jax_grouped_gemm.kernels import tuning

_DTYPE = jnp.bfloat16
_READ_COLUMNS = 8192
_READ_BYTES = {"gpu": 2**30}  # Far more than the L2 cache.
_READ_BYTES_ELSEWHERE = 2**20


class Masked:
  """out[g, i] = lhs[g, i] @ rhs[g].T for i < sizes[g]."""

  def __init__(self, p: Problem, operands):
    self.p, (self.lhs, self.rhs, self.sizes) = p, operands
    self.mean = -(-sum(p.sizes) // len(p.sizes))

  @staticmethod
  def operands(p: Problem):
    """Returns lhs, rhs and sizes."""
    lhs = random_rows(len(p.sizes), p.max_m, p.k)
    return lhs, random_weights(p), jnp.asarray(p.sizes, jnp.int32)

  def calls(self):
    """Returns {implementation: function that returns (function, operands)}."""
    p, g = self.p, len(self.p.sizes)
    large = tuning.m_grouped_config(self.mean * g, p.n, p.k, g, _DTYPE)
    small = tuning.small_groups_config(
      self.mean, p.n, p.k, g, _DTYPE, row_align=8
    )
    return {
      "ours": lambda: self._call(
        tuning.masked_config(self.mean, p.n, p.k, g, _DTYPE)
      ),
      "ours_m_grouped": lambda: self._call(large),
      "ours_small_groups": lambda: self._call(small),
    }

  def _call(self, config):
    gemm = functools.partial(
      m_grouped_gemm_masked,
      expected_m=self.mean,
      config=config,
    )
    return gemm, (self.lhs, self.rhs, self.sizes)

  def max_row_error(self, out, impl):
    """Of the rows in use."""
    rows = len(self.p.sizes) * self.p.max_m
    flat = jax.tree.map(lambda x: x.reshape(rows, -1), (out, self.lhs))
    starts = range(0, rows, self.p.max_m)
    return oracle.max_row_error(*flat, self.rhs, self.p.sizes, starts)


class Decode:
  """out[r] = lhs[r] @ rhs[group of r].T, a handful of rows per group."""

  def __init__(self, p: Problem, operands):
    self.p, (self.lhs, self.rhs, self.sizes) = p, operands

  @staticmethod
  def operands(p: Problem):
    """Returns lhs, rhs and sizes."""
    lhs = random_rows(sum(p.sizes), p.k)
    return lhs, random_weights(p), jnp.asarray(p.sizes, jnp.int32)

  def calls(self):
    """Returns {implementation: function that returns (function, operands)}."""
    p, m, g = self.p, sum(self.p.sizes), len(self.p.sizes)
    config = tuning.m_grouped_config(m, p.n, p.k, g, _DTYPE)
    gemm = functools.partial(m_grouped_gemm, config=config)
    return {"ours": lambda: (gemm, (self.lhs, self.rhs, self.sizes))}

  def max_row_error(self, out, impl):
    """All rows are somebody's."""
    starts = itertools.accumulate(self.p.sizes[:-1], initial=0)
    return oracle.max_row_error(out, self.lhs, self.rhs, self.p.sizes, starts)


def read_row(iterations: int) -> dict:
  """Checks and times a sum of each row of a large array, by XLA."""
  num_bytes = _READ_BYTES.get(jax.default_backend(), _READ_BYTES_ELSEWHERE)
  rows = num_bytes // (4 * _READ_COLUMNS)
  starts = jnp.arange(rows, dtype=jnp.uint32) * jnp.uint32(2654435761)
  steps = jnp.arange(_READ_COLUMNS, dtype=jnp.uint32) * jnp.uint32(2246822519)
  x = jax.block_until_ready(starts[:, None] + steps)
  read = lambda x: jnp.sum(x, axis=1)
  # Sums modulo 2^32 are exact in any order.
  expected = starts * jnp.uint32(_READ_COLUMNS) + jnp.sum(steps)
  us = measure_us(read, x, iterations=iterations)
  return {
    "impl": "read",
    "us": round(us, 2),
    "gbps": round(num_bytes / us / 1e3, 1),
    "verified": bool(jnp.all(jax.jit(read)(x) == expected)),
  }

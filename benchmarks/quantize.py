"""Times quantisation, and what is fused with it: the time to move bytes."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run import RESULTS, clocks, short_name, versions, write
from benchmarks.shapes import ragged_sizes
from benchmarks.timing import measure_us
from jax_grouped_gemm import (
  quantize,
  quantize_for_k_grouped,
  quantize_weights,
)
from jax_grouped_gemm.fused_quantization import (
  activation_gradient,
  quantize_activation,
)
from jax_grouped_gemm.moe.permutation import sort_by_expert
from jax_grouped_gemm.moe.prologue import Dispatched
from jax_grouped_gemm.scaled_array import ScaledArray, expand_scales
from jax_grouped_gemm.token_quantization import quantize_rows_and_tokens


class Problem(NamedTuple):
  """Rows or tokens (m, k), in blocks along k or m, or weights (g, k, n).

  Of an activation and its gradient, (m, f); of copies of tokens, the copies.
  """

  set: str
  dims: tuple[int, ...]

  @property
  def shape(self) -> str:
    """What it is called."""
    return "x".join(map(str, self.dims))


# --shapes -> problems
SHAPES = {
  "deepgemm": [
    Problem("rows", (32768, 7168)),
    Problem("rows", (65536, 2048)),
    Problem("tokens", (32768, 7168)),
    Problem("tokens", (65536, 2048)),
    Problem("rows_and_tokens", (32768, 7168)),
    Problem("rows_and_tokens", (65536, 2048)),
    Problem("weights", (8, 4096, 14336)),
    Problem("weights", (256, 2048, 768)),
    *(
      Problem(name, dims)
      for name in ("activation", "activation_backward", "copies")
      for dims in ((32768, 7168), (65536, 2048))
    ),
  ],
  "smoke": [
    Problem("rows", (16, 256)),
    Problem("tokens", (50, 32)),
    Problem("rows_and_tokens", (56, 32)),
    Problem("weights", (1, 144, 64)),
    Problem("activation", (16, 256)),
    Problem("activation_backward", (16, 128)),
    Problem("copies", (16, 256)),
  ],
}
PEERS = ("xla",)
_GROUPS = 8  # of the tokens, ragged.
_ACTIVATION = "swiglu"
_COPIES, _EXPERTS = 8, 64  # Copies of each token.
# The hardware's exponential function is not the CPU's: a rounded activation may
# be the neighbour, then its FP8 value too. That many may.
_MAX_DIFFERENT = 0.01
_COPY_BYTES = {"gpu": 2**30}  # read; far more than the L2 cache.
_COPY_BYTES_ELSEWHERE = 2**20


def _operands(problem: Problem):
  """Returns normal random numbers, and what else the function takes."""
  *batch, m, k = problem.dims
  keys = jax.random.split(jax.random.key(0))
  normal = lambda i, *shape: jax.random.normal(keys[i], shape, jnp.bfloat16)
  if problem.set == "activation":
    return (normal(0, m, 2 * k),)
  if problem.set == "activation_backward":
    return normal(0, m, 2 * k), normal(1, m, k)
  if problem.set == "copies":
    tokens = m // _COPIES
    scores = jax.random.uniform(keys[1], (tokens, _EXPERTS))
    experts = jax.lax.top_k(scores, _COPIES)[1]
    return normal(0, tokens, k), sort_by_expert(experts, _EXPERTS)
  return (normal(0, *batch, m, k),)


def _function(problem: Problem, implementation: str):
  fused = {
    "activation": lambda x, **kw: quantize_activation(x, _ACTIVATION, **kw),
    "activation_backward": lambda x, dout, **kw: activation_gradient(
      x, dout, _ACTIVATION, **kw
    ),
    "copies": Dispatched().quantize,
  }
  if problem.set in fused:
    return functools.partial(fused[problem.set], implementation=implementation)
  if problem.set == "weights":
    return lambda w: quantize_weights(w, implementation=implementation)
  if problem.set.endswith("tokens"):
    return functools.partial(
      quantize_rows_and_tokens
      if "rows" in problem.set
      else quantize_for_k_grouped,
      group_sizes=_sizes(problem),
      implementation=implementation,
    )
  return lambda x: quantize(x, (1, 128), implementation=implementation)


def _as_gemms_read(fn):
  """Returns fn with scales of rows and tokens transposed, as GEMM kernels do.

  The kernels write them so. In a jit with a GEMM nobody turns them round.
  """

  def transposed(x):
    is_scaled = isinstance(x, ScaledArray) and x.scales.ndim == 2
    return (x.values, x.scales.T) if is_scaled else x

  def run(*args):
    is_scaled = lambda x: isinstance(x, ScaledArray)
    return jax.tree.map(transposed, fn(*args), is_leaf=is_scaled)

  return run


def _sizes(problem: Problem):
  """Returns those of the groups of tokens, to which all tokens belong."""
  tokens = problem.dims[0]
  *sizes, _ = ragged_sizes(_GROUPS, tokens // _GROUPS)
  return np.array([*sizes, tokens - sum(sizes)])


def _difference(out, expected) -> tuple[int, int]:
  """Returns how many values or scales differ, and the most in units of bits."""
  count = most = 0
  leaves = zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True)
  for x, y in leaves:
    x, y = (np.asarray(z).view(f"i{z.dtype.itemsize}") for z in (x, y))
    wrong = x != y
    if wrong.any():
      count += int(wrong.sum())
      bits = x[wrong].astype(np.int64) - y[wrong]
      most = max(most, int(np.abs(bits).max()))
  return count, most


def _is_near(out, expected) -> bool:
  """Whether each element is at most a step of its type off."""
  if isinstance(out, ScaledArray):
    scales = expand_scales(expected.scales, expected.block_shape, out.shape)
    step = 2.0**-9 * scales  # of the subnormal values.
    relative = 2.0**-3
    out, expected = out.dequantize(), expected.dequantize()
  else:
    # In float32 sums of numbers of up to 30 or so, before they are rounded.
    step, relative = 1e-5, 2.0**-7
  out, expected = np.float32(out), np.float32(expected)
  bound = np.asarray(step) + relative * np.abs(expected)
  return bool((np.abs(out - expected) <= bound).all())


def _verify(problem: Problem, impl: str, out, expected) -> dict:
  """Returns how many values or scales differ, and whether that is right."""
  different, most = _difference(out, expected)
  if problem.set.startswith("activation"):
    size = sum(x.size for x in jax.tree.leaves(out))
    few = different <= _MAX_DIFFERENT * size
    return {"different": different, "verified": few and _is_near(out, expected)}
  # A peer may round a few quotients to the neighbour.
  return {
    "different": different,
    "verified": most <= (0 if impl == "ours" else 1),
  }


def _num_bytes(problem: Problem, operands, out) -> int:
  """Read and written; of a permutation, where the copies go."""
  if problem.set == "copies":
    x, permutation = operands
    operands = x, permutation.inverse
  arrays = jax.tree.leaves((operands, out))
  return sum(x.nbytes for x in arrays)


def _copy_row(iterations: int) -> dict:
  """Checks and times x + 1, by XLA."""
  num_bytes = _COPY_BYTES.get(jax.default_backend(), _COPY_BYTES_ELSEWHERE)
  x = jnp.arange(num_bytes // 4, dtype=jnp.uint32)
  copy = lambda x: x + jnp.uint32(1)
  us = measure_us(copy, x, iterations=iterations)
  return {
    "impl": "copy",
    "us": round(us, 2),
    "gbps": round(2 * num_bytes / us / 1e3, 1),
    "verified": bool(jnp.all(jax.jit(copy)(x) - x == 1)),
  }


def rows(problem: Problem, peers, iterations: int):
  """Yields a row of bandwidth, then one for each implementation."""
  copy = _copy_row(iterations)
  yield copy
  on_gpu = jax.default_backend() == "gpu"
  operands = _operands(problem)
  # On a CPU XLA divides to the nearest, on a GPU it does not.
  on_cpu = jax.device_put(operands, jax.devices("cpu")[0])
  expected = jax.jit(_function(problem, "xla"))(*on_cpu)
  for impl in ("ours", *peers):
    ours = "mosaic_gpu" if on_gpu else "interpret"
    fn = _function(problem, ours if impl == "ours" else impl)
    out = jax.jit(fn)(*operands)
    checked = _verify(problem, impl, out, expected)
    num_bytes = _num_bytes(problem, operands, out)
    del out
    us = measure_us(_as_gemms_read(fn), *operands, iterations=iterations)
    gbps = num_bytes / us / 1e3
    yield {
      "impl": impl,
      "us": round(us, 2),
      "gbps": round(gbps, 1),
      "of_copy": round(gbps / copy["gbps"], 3),
      **checked,
    }


def run(args) -> int:
  """Times what `args` names; 1 if a result is wrong."""
  device = jax.devices()[0].device_kind
  print(f"{device} ({clocks()}), {versions()}; normal random bfloat16 numbers")
  done = []
  for name in args.shapes:
    for problem in SHAPES[name]:
      if args.only not in problem.shape:
        continue
      for row in rows(problem, args.peers, args.iterations):
        *batch, m, k = problem.dims
        g = math.prod(batch)
        head = {"set": problem.set, "shape": problem.shape}
        done.append(
          {**head, "impl": row["impl"], "g": g, "m": m, "k": k, **row}
        )
        print(_line(done[-1]), flush=True)
      path = args.json or RESULTS / f"quantize-{short_name(device)}.json"
      # After each problem: a run that is cut off leaves what it measured.
      write(path, "quantize", device, done, args)
  return 0 if all(row["verified"] for row in done) else 1


def _line(row) -> str:
  """shape | us | GB/s | % of a copy | how many bits are wrong."""
  of_copy = 100 * row.get("of_copy", 1)
  return (
    f"{row['set']:19} {row['shape']:16} {row['impl']:6} {row['us']:10.1f} us "
    f"{row['gbps']:7.1f} GB/s {of_copy:5.1f} % of copy "
    f"{row.get('different', 0)} differ{'' if row['verified'] else ' WRONG'}"
  )

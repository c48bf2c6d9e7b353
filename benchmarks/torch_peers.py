"""The peers that run in PyTorch, in a process of their own.

python -m benchmarks.torch_peers reads a line of JSON per problem and writes one
per implementation: its time, or why it cannot run.

DeepGEMM gets each group padded to 128 rows, as it demands; its padded rows are
not counted. Operands are quantised random numbers. Times are medians of CUDA
events around a call, after the L2 cache was flushed.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.shapes import Problem

IMPLS = (
  "deepgemm",
  "torch_scaled_grouped_mm",
  "torch_grouped_mm",
  "per_expert_loop",
  "cublaslt_fp8",
  "cublaslt_fp8_block",
)
# benchmark -> what can run it
IMPLS_OF = {
  "m_grouped": IMPLS,
  "k_grouped": ("deepgemm", "torch_grouped_mm"),
  "masked": ("deepgemm",),
  "decode": IMPLS[:4],
  "train_step": ("torch_grouped_mm",),
}
_E4M3_MAX = 448.0
_FLUSH_BYTES = 2**28  # several times the L2 cache.
# |row of out - row of the reference| / |row of the reference|, at most. The
# reference has the same quantised operands; what accumulates in FP8 precision
# over all of k is further away.
_MAX_ROW_ERROR = {
  "deepgemm": 4e-3,
  "torch_grouped_mm": 1e-2,
  "cublaslt_fp8_block": 4e-3,
}
_MAX_ROW_ERROR_FAST = 2e-2


class Unsupported(Exception):
  """The implementation cannot run the problem."""


def _scale(amax):
  return amax.float().clamp(min=1e-4) / _E4M3_MAX


class _Operands:
  """Random operands of a problem, quantised in each of the peers' ways."""

  def __init__(self, torch, p: Problem):
    self.torch, self.p = torch, p
    self.generator = torch.Generator("cuda").manual_seed(0)
    self.sizes = p.sizes
    self.padded = [size + -size % 128 for size in p.sizes]

  def normal(self, *shape):
    return self.torch.randn(
      *shape,
      device="cuda",
      dtype=self.torch.bfloat16,
      generator=self.generator,
    )

  def blocks(self, x, rows: int):
    """Returns x (.., m, k) in FP8 and its scales per (rows, 128) elements."""
    *batch, m, k = x.shape
    if m % rows or k % 128:
      raise Unsupported(f"needs whole scale blocks, got {tuple(x.shape)}")
    x = x.view(*batch, m // rows, rows, k // 128, 128)
    scales = _scale(x.abs().amax((-3, -1)))
    values = (x / scales[..., None, :, None]).to(self.torch.float8_e4m3fn)
    return values.view(*batch, m, k), scales

  def per_row(self, x):
    scales = _scale(x.abs().amax(-1, keepdim=True))
    return (x / scales).to(self.torch.float8_e4m3fn), scales

  def weights(self, quantise):
    """Quantises one group at a time: all of them in bf16 may not fit."""
    parts = [quantise(self.normal(self.p.n, self.p.k)) for _ in self.p.sizes]
    return tuple(self.torch.stack(part) for part in zip(*parts, strict=True))

  def offsets(self, sizes):
    sizes = self.torch.tensor(sizes, device="cuda")
    return sizes.cumsum(0, dtype=self.torch.int32)


def _check(torch, out, sizes, lhs, rhs) -> float:
  """Returns the largest error of a row; lhs and rhs give float32 (rows, k)."""
  worst, start = 0.0, 0
  for group, size in enumerate(sizes):
    for row in range(start, start + size, 8192):
      rows = slice(row, min(row + 8192, start + size))
      expected = lhs(rows) @ rhs(group).T
      error = (out[rows].float() - expected).norm(dim=1) / expected.norm(dim=1)
      worst = max(worst, error.max().item())
    start += size
  return worst


def _expand(torch, values, scales, rows):
  scales = scales.repeat_interleave(rows, 0).repeat_interleave(128, 1)
  return values.float() * scales[: values.shape[0], : values.shape[1]]


# ------------------------------------------------------------ implementations
# Each returns (call, check): check(out) is the largest error of a row.


def _deepgemm(torch, p: Problem):
  deep_gemm = importlib.import_module("deep_gemm")
  if p.max_m:
    return _deepgemm_masked(torch, deep_gemm, p)
  ops = _Operands(torch, p)
  sizes = ops.padded
  m = sum(sizes)
  lhs, lhs_scales = ops.blocks(ops.normal(m, p.k), 1)
  rhs, rhs_scales = ops.weights(lambda x: ops.blocks(x, 128))
  group = torch.repeat_interleave(
    torch.arange(len(sizes), device="cuda", dtype=torch.int32),
    torch.tensor(sizes, device="cuda"),
  )
  out = torch.empty(m, p.n, device="cuda", dtype=torch.bfloat16)
  aligned = deep_gemm.get_mn_major_tma_aligned_tensor(lhs_scales)

  def call():
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
      (lhs, aligned), (rhs, rhs_scales), out, group
    )
    return out

  def check(out):
    return _check(
      torch,
      out,
      sizes,
      lambda rows: _expand(torch, lhs[rows], lhs_scales[rows], 1),
      lambda i: _expand(torch, rhs[i], rhs_scales[i], 128),
    )

  return call, check


def _deepgemm_masked(torch, deep_gemm, p: Problem):
  ops, g = _Operands(torch, p), len(p.sizes)
  lhs, lhs_scales = ops.blocks(ops.normal(g, p.max_m, p.k), 1)
  rhs, rhs_scales = ops.weights(lambda x: ops.blocks(x, 128))
  sizes = torch.tensor(p.sizes, device="cuda", dtype=torch.int32)
  expected_m = -(-sum(p.sizes) // g)
  out = torch.empty(g, p.max_m, p.n, device="cuda", dtype=torch.bfloat16)
  aligned = deep_gemm.get_mn_major_tma_aligned_tensor(lhs_scales)

  def call():
    deep_gemm.m_grouped_fp8_gemm_nt_masked(
      (lhs, aligned), (rhs, rhs_scales), out, sizes, expected_m
    )
    return out

  def check(out):
    errors = [
      _check(
        torch,
        out[i],
        [size],
        lambda rows, i=i: _expand(torch, lhs[i][rows], lhs_scales[i][rows], 1),
        lambda _, i=i: _expand(torch, rhs[i], rhs_scales[i], 128),
      )
      for i, size in enumerate(p.sizes)
    ]
    return max(errors)

  return call, check


def _rowwise(torch, p: Problem, multiply):
  """FP8 with one scale per row of lhs and of each rhs."""
  ops = _Operands(torch, p)
  lhs, lhs_scales = ops.per_row(ops.normal(sum(p.sizes), p.k))
  rhs, rhs_scales = ops.weights(ops.per_row)

  def check(out):
    return _check(
      torch,
      out,
      p.sizes,
      lambda rows: lhs[rows].float() * lhs_scales[rows],
      lambda i: rhs[i].float() * rhs_scales[i],
    )

  return multiply(ops, lhs, lhs_scales, rhs, rhs_scales), check


def _scaled_grouped_mm(torch, p: Problem):
  def multiply(ops, lhs, lhs_scales, rhs, rhs_scales):
    offsets = ops.offsets(p.sizes)
    return lambda: torch._scaled_grouped_mm(
      lhs,
      rhs.transpose(1, 2),
      lhs_scales.squeeze(1),
      rhs_scales.squeeze(2),
      offs=offsets,
      out_dtype=torch.bfloat16,
      use_fast_accum=True,
    )

  return _rowwise(torch, p, multiply)


def _per_expert_loop(torch, p: Problem):
  """What grouped GEMM replaces: the host knows the sizes, a launch for each."""

  def multiply(ops, lhs, lhs_scales, rhs, rhs_scales):
    out = torch.empty(lhs.shape[0], p.n, device="cuda", dtype=torch.bfloat16)
    ends = ops.offsets(p.sizes).tolist()
    rows = [
      slice(end - size, end) for end, size in zip(ends, p.sizes, strict=True)
    ]

    def call():
      for i, r in enumerate(rows):
        if r.start < r.stop:
          out[r] = torch._scaled_mm(
            lhs[r],
            rhs[i].T,
            lhs_scales[r],
            rhs_scales[i].T,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
          )
      return out

    return call

  return _rowwise(torch, p, multiply)


def _grouped_mm(torch, p: Problem):
  ops = _Operands(torch, p)
  lhs = ops.normal(sum(p.sizes), p.k)
  (rhs,) = ops.weights(lambda x: (x,))
  offsets = ops.offsets(p.sizes)

  def check(out):
    return _check(
      torch, out, p.sizes, lambda r: lhs[r].float(), lambda i: rhs[i].float()
    )

  return (
    lambda: torch._grouped_mm(lhs, rhs.transpose(1, 2), offs=offsets)
  ), check


def _dense(torch, p: Problem, quantise_lhs, quantise_rhs, options, expand):
  """All rows times one rhs: the bound of what grouping can reach."""
  ops = _Operands(torch, p)
  m = sum(p.sizes)
  m -= m % 128  # A bound does not need the last rows.
  lhs, lhs_scales = quantise_lhs(ops, ops.normal(m, p.k))
  rhs, rhs_scales = quantise_rhs(ops, ops.normal(p.n, p.k))

  def call():
    return torch._scaled_mm(
      lhs, rhs.T, **options(lhs_scales, rhs_scales), out_dtype=torch.bfloat16
    )

  def check(out):
    return _check(
      torch,
      out,
      [m],
      lambda rows: expand(lhs[rows], lhs_scales, rows, 1),
      lambda _: expand(rhs, rhs_scales, slice(None), 128),
    )

  return call, check


def _cublaslt_fp8(torch, p: Problem):
  def per_tensor(_, x):
    scale = _scale(x.abs().amax())
    return (x / scale).to(torch.float8_e4m3fn), scale

  return _dense(
    torch,
    p,
    per_tensor,
    per_tensor,
    lambda a, b: dict(scale_a=a, scale_b=b, use_fast_accum=True),
    lambda x, scale, rows, _: x.float() * scale,
  )


def _cublaslt_fp8_block(torch, p: Problem):
  """1x128 and 128x128 blocks; scales of lhs column by column."""
  return _dense(
    torch,
    p,
    lambda ops, x: ops.blocks(x, 1),
    lambda ops, x: ops.blocks(x, 128),
    lambda a, b: dict(scale_a=a.T.contiguous().T, scale_b=b.T),
    lambda x, scales, rows, block: _expand(
      torch, x, scales[rows] if block == 1 else scales, block
    ),
  )


def _check_k_grouped(torch, out, sizes, lhs, rhs) -> float:
  """The same of out (g, n, k); lhs and rhs give a group's float32 tokens."""
  worst, start = 0.0, 0
  for group, size in enumerate(sizes):
    tokens = slice(start, start + size)
    expected = lhs(tokens).T @ rhs(tokens)
    error = (out[group].float() - expected).norm(dim=1)
    # A group without tokens is zero.
    error = torch.where(error == 0, error, error / expected.norm(dim=1))
    worst = max(worst, error.max().item())
    start += size
  return worst


def _deepgemm_k_grouped(torch, p: Problem):
  """Groups of whole 128 tokens, one K-major matrix after another."""
  deep_gemm = importlib.import_module("deep_gemm")
  multiply = deep_gemm.k_grouped_fp8_gemm_nt_contiguous
  ops = _Operands(torch, p)
  sizes, t = ops.padded, sum(ops.padded)

  def operand(features):
    x = ops.normal(t, features).view(t // 128, 128, features)
    scales = _scale(x.abs().amax(1))
    values = (x / scales[:, None]).to(torch.float8_e4m3fn).view(t, features)
    groups = [group.T.reshape(-1) for group in values.split(sizes)]
    return torch.cat(groups), scales, values

  def dequantize(values, scales):
    blocks = scales.repeat_interleave(128, 0)
    return lambda tokens: values[tokens].float() * blocks[tokens]

  lhs, lhs_scales, lhs_values = operand(p.n)
  rhs, rhs_scales, rhs_values = operand(p.k)
  ks = torch.tensor(sizes, device="cuda", dtype=torch.int32)
  # It adds to what is there: right in the first call, which is checked.
  out = torch.zeros(len(sizes), p.n, p.k, device="cuda")

  def call():
    # Scales by feature, the features of a block of tokens side by side.
    multiply((lhs, lhs_scales.T), (rhs, rhs_scales.T), out, sizes, ks, out)
    return out

  def check(out):
    return _check_k_grouped(
      torch,
      out,
      sizes,
      dequantize(lhs_values, lhs_scales),
      dequantize(rhs_values, rhs_scales),
    )

  return call, check


def _grouped_mm_k_grouped(torch, p: Problem):
  ops = _Operands(torch, p)
  lhs, rhs = (ops.normal(sum(p.sizes), width) for width in (p.n, p.k))
  offsets = ops.offsets(p.sizes)

  def check(out):
    return _check_k_grouped(
      torch, out, p.sizes, lambda t: lhs[t].float(), lambda t: rhs[t].float()
    )

  return (lambda: torch._grouped_mm(lhs.T, rhs, offs=offsets)), check


def _grouped_mm_train_step(torch, p: Problem):
  ops, m = _Operands(torch, p), sum(p.sizes)
  lhs, dout = ops.normal(m, p.k), ops.normal(m, p.n)
  rhs = ops.normal(len(p.sizes), p.k, p.n)
  offsets = ops.offsets(p.sizes)

  def call():
    return (
      torch._grouped_mm(lhs, rhs, offs=offsets),
      torch._grouped_mm(dout, rhs.mT, offs=offsets),
      torch._grouped_mm(lhs.T, dout, offs=offsets),
    )

  def check(results):
    out, dlhs, drhs = results
    rows = lambda x: lambda tokens: x[tokens].float()
    return max(
      _check(torch, out, p.sizes, rows(lhs), lambda i: rhs[i].T.float()),
      _check(torch, dlhs, p.sizes, rows(dout), lambda i: rhs[i].float()),
      _check_k_grouped(torch, drhs, p.sizes, rows(lhs), rows(dout)),
    )

  return call, check


_RUN_K_GROUPED = dict(
  zip(
    IMPLS_OF["k_grouped"],
    (_deepgemm_k_grouped, _grouped_mm_k_grouped),
    strict=True,
  )
)
_RUN: dict[str, Callable[..., Any]] = dict(
  zip(
    IMPLS,
    (
      _deepgemm,
      _scaled_grouped_mm,
      _grouped_mm,
      _per_expert_loop,
      _cublaslt_fp8,
      _cublaslt_fp8_block,
    ),
    strict=True,
  )
)

_RUN_OF = {
  "k_grouped": _RUN_K_GROUPED,
  "train_step": {"torch_grouped_mm": _grouped_mm_train_step},
}

# ---------------------------------------------------------------- process


def _measure_us(torch, call, iterations: int) -> float:
  flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
  for _ in range(3):
    call()
  events = []
  for _ in range(iterations):
    flush.zero_()
    flush.sum()  # What was written is not left to the call to evict.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    events.append((start, end))
  torch.cuda.synchronize()
  times = sorted(start.elapsed_time(end) for start, end in events)
  return 1e3 * times[len(times) // 2]


def _rows(
  torch, benchmark: str, p: Problem, impls, iterations: int
) -> Iterator[dict]:
  run = _RUN_OF.get(benchmark, _RUN)
  for impl in impls:
    try:
      call, check = run[impl](torch, p)
      error = check(call())
      limit = _MAX_ROW_ERROR.get(impl, _MAX_ROW_ERROR_FAST)
      yield {
        "impl": impl,
        "us": round(_measure_us(torch, call, iterations), 2),
        "max_row_error": error,
        "verified": error <= limit,
      }
    except Exception as error:  # A peer that fails is a line that says why.
      text = str(error).strip().split("\n")[0] or type(error).__name__
      yield {"impl": impl, "unavailable": text}
    torch.cuda.empty_cache()


def main():
  """Serves problems until the input ends."""
  torch = importlib.import_module("torch")
  for line in sys.stdin:
    request = json.loads(line)
    p = Problem(**request["problem"])
    options = request["impls"], request["iterations"]
    for row in _rows(torch, request["benchmark"], p, *options):
      print(json.dumps(row), flush=True)
    print(json.dumps({"done": True}), flush=True)


if __name__ == "__main__":
  main()

"""Runs the implementations of a benchmark side by side."""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from benchmarks import torch_peers
from benchmarks.shapes import MEMORY_BOUND, Problem, problems

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "torch", "tokenspeed-deepgemm", "tokamax")
# Dense products per second of the tensor cores in FP8, without sparsity.
_PEAK_TFLOPS = {"NVIDIA H100": 1979, "NVIDIA H200": 1979}


def commit() -> str:
  """Returns the commit that runs, with a + if files differ from it."""
  command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
  try:
    return subprocess.run(
      command, capture_output=True, text=True, check=True, cwd=RESULTS.parent
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def versions() -> dict[str, str]:
  """Returns the versions of Python and of what is installed."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  return found


def clocks() -> str | None:
  """Returns the GPU's largest clocks and power limit, where there is one."""
  query = "clocks.max.sm,clocks.max.mem,power.limit"
  command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.splitlines()[0].strip()


def short_name(device: str) -> str:
  """E.g. h200 for NVIDIA H200."""
  return device.removeprefix("NVIDIA ").split()[0].lower()


def write(path: Path, benchmark: str, device: str, rows, args) -> None:
  """Writes the rows of one invocation."""
  result = {
    "benchmark": benchmark,
    "device": device,
    "clocks": clocks(),
    "date": time.strftime("%Y-%m-%d"),
    "commit": args.commit or commit(),
    "command": "python -m benchmarks " + shlex.join(args.argv),
    "versions": versions(),
    "rows": rows,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + "\n")


class TorchPeers:
  """The peers that need torch, in a process beside this one."""

  def __init__(self):
    self._process = None

  def rows(self, benchmark: str, problem: Problem, impls, iterations: int):
    """Returns a row for each implementation."""
    if not importlib.util.find_spec("torch"):
      return [
        {"impl": i, "unavailable": "torch is not installed"} for i in impls
      ]
    if self._process is None:
      self._process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.torch_peers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
    request = {
      "benchmark": benchmark,
      "problem": problem._asdict(),
      "impls": impls,
      "iterations": iterations,
    }
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    rows = []
    for line in self._process.stdout:
      if not line.startswith("{"):
        continue  # What libraries print.
      row = json.loads(line)
      if row.get("done"):
        return rows
      rows.append(row)
    failed = [i for i in impls if i not in [row["impl"] for row in rows]]
    self._process = None
    return rows + [{"impl": i, "unavailable": "crashed"} for i in failed]


def _measure(args, todo: list[Problem], impls, torch) -> Iterator[list[dict]]:
  """Yields the rows of each problem.

  With args.jobs > 1, that many processes compile; the device is used by one at
  a time.
  """
  from benchmarks import gemms

  ours = [impl for impl in impls if impl in gemms.IMPLS[args.benchmark]]
  peers = [impl for impl in impls if impl in torch_peers.IMPLS]

  def all_rows(of_jax, lock):
    for problem, rows in zip(todo, of_jax, strict=True):
      if peers:
        with lock:
          rows = rows + torch.rows(
            args.benchmark, problem, peers, args.iterations
          )
      yield rows

  call = functools.partial(
    gemms.rows, args.benchmark, impls=ours, iterations=args.iterations
  )
  if args.jobs == 1:
    yield from all_rows(map(call, todo), contextlib.nullcontext())
    return
  with side_by_side(args.jobs) as (pool, lock):
    call = functools.partial(call, lock=lock)
    yield from all_rows(pool.map(call, todo), lock)


@contextlib.contextmanager
def side_by_side(jobs: int):
  """Returns a pool of processes, and a lock for them to share the device."""
  # What a process no longer needs, the others get.
  os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
  context = multiprocessing.get_context("spawn")  # jax must not be forked.
  with (
    context.Manager() as manager,
    ProcessPoolExecutor(jobs, mp_context=context) as pool,
  ):
    yield pool, manager.Lock()


def _line(row, reference, peak) -> str:
  """shape | us | TFLOP/s | % of peak | GB/s (| % of read) | × ours | config."""
  head = f"{row['set']:8} {row['shape']:28} {row['impl']:24}"
  if "us" not in row:
    return f"{head} not run: {row['unavailable'][:80]}"
  tflops = row.get("tflops", 0.0)
  of_read = (
    f"{100 * row['of_read']:5.1f} % of read " if "of_read" in row else ""
  )
  ratio = reference / row["us"] if reference else 1.0
  return (
    f"{head} {row['us']:10.1f} us {tflops:7.1f} TFLOP/s "
    f"{100 * tflops / peak:5.1f} % {row.get('gbps', 0):7.1f} GB/s "
    f"{of_read}"
    f"{ratio:5.2f} x ours{'' if row['verified'] else ' WRONG'}"
    f"{'  ' + row['config'] if 'config' in row else ''}"
  )


def run(args) -> int:
  """Times what `args` names; 1 if a result is wrong."""
  from benchmarks import gemms

  todo = [
    problem
    for problem in problems(args.benchmark, args.shapes, args.groups)
    if args.only in problem.shape
  ]
  memory_bound = args.benchmark in MEMORY_BOUND
  impls = [*(["read"] if memory_bound else []), "ours", *args.peers]
  device = gemms.device()
  peak = _PEAK_TFLOPS.get(device, float("nan"))
  print(
    f"{device} ({clocks()}), {versions()}; quantised normal random numbers; "
    f"groups {', '.join(args.groups)}; rows of padding do not count"
  )
  torch, rows = TorchPeers(), []
  measured = _measure(args, todo, impls, torch)
  bar = tqdm(todo, desc=args.benchmark, disable=None)
  for problem, rows_of_problem in zip(bar, measured, strict=True):
    our_us = read_gbps = None
    for row in rows_of_problem:
      row = {
        "set": problem.set,
        "shape": problem.shape,
        "impl": row["impl"],
        "g": len(problem.sizes),
        "m": sum(problem.sizes),
        "n": problem.n,
        "k": problem.k,
        **row,
      }
      if row["impl"] == "read":
        read_gbps = row["gbps"]
      elif "us" in row:
        if memory_bound:
          row["gbps"] = round(problem.num_bytes / row["us"] / 1e3, 1)
          row["of_read"] = round(row["gbps"] / read_gbps, 3)
        row["tflops"] = round(problem.flops / row["us"] / 1e6, 1)
        our_us = row["us"] if row["impl"] == "ours" else our_us
      tqdm.write(_line(row, our_us, peak))
      rows.append(row)
    path = args.json or (
      RESULTS / f"{args.benchmark}-{short_name(device)}.json"
    )
    # After each problem: a run that is cut off leaves what it measured.
    write(path, args.benchmark, device, rows, args)
  print(f"{len(rows)} rows: {path}")
  return 0 if all(row.get("verified", True) for row in rows) else 1

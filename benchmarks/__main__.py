"""Times the grouped GEMMs on the device at hand and writes what it saw.

python -m benchmarks run m_grouped --set ragged
python -m benchmarks run k_grouped --set ragged --only 4x8192
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import jaxlib
from tqdm import tqdm

from benchmarks.gemms import GEMMS, check
from benchmarks.shapes import SETS
from benchmarks.timing import measure_us

_RESULTS = Path(__file__).parent / "results"


def _commit() -> str:
  """Returns the commit that runs, with a + if files differ from it."""
  command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
  try:
    return subprocess.run(
      command, capture_output=True, text=True, check=True, cwd=_RESULTS.parent
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _rows(benchmark: str, problems, impls, iterations: int):
  for problem in tqdm(problems, desc=benchmark, disable=None):
    gemm = GEMMS[benchmark](problem)
    expected = gemm.expected()
    for impl, (fn, operands) in gemm.calls().items():
      if impls and impl not in impls:
        continue
      out = jax.jit(fn)(*operands)
      num_bytes = sum(x.nbytes for x in jax.tree.leaves((operands, out)))
      us = measure_us(fn, *operands, iterations=iterations)
      yield {
        "set": problem.set,
        "shape": problem.shape,
        "impl": impl,
        "g": len(problem.sizes),
        "m": sum(problem.sizes),
        "n": problem.n,
        "k": problem.k,
        "us": round(us, 2),
        "tflops": round(problem.flops / us / 1e6, 1),
        "gbps": round(num_bytes / us / 1e3, 1),
        **check(impl, out, expected),
      }


def run(args) -> int:
  """Times every implementation on every problem; 1 if a result is wrong."""
  sets = SETS[args.benchmark]
  problems = [
    problem
    for name in args.set
    for problem in sets[name]
    if args.only in problem.shape
  ]
  device = jax.devices()[0].device_kind
  rows = []
  for row in _rows(args.benchmark, problems, args.impl, args.iterations):
    rows.append(row)
    tqdm.write(
      f"{row['set']:8} {row['shape']:20} {row['impl']:16}"
      f" {row['us']:10.1f} us {row['tflops']:7.1f} TFLOP/s"
      f" {row['gbps']:7.1f} GB/s"
      f" row error {row['max_row_error']:.1e}"
      f" {'' if row['verified'] else 'WRONG'}"
    )
  result = {
    "benchmark": args.benchmark,
    "device": device,
    "date": time.strftime("%Y-%m-%d"),
    "commit": args.commit or _commit(),
    "command": "python -m benchmarks " + shlex.join(args.argv),
    "versions": {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "jaxlib": jaxlib.__version__,
    },
    "rows": rows,
  }
  short_device = device.removeprefix("NVIDIA ").split()[0].lower()
  path = args.results / f"{args.benchmark}-{short_device}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + "\n")
  print(f"{len(rows)} rows: {path}")
  return 0 if all(row["verified"] for row in rows) else 1


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks", description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(required=True)
  command = commands.add_parser("run", help="time, check and write a JSON")
  command.add_argument("benchmark", choices=SETS)
  names = sorted({name for sets in SETS.values() for name in sets})
  command.add_argument("--set", nargs="+", choices=names, default=["ragged"])
  command.add_argument("--only", default="", help="part of the shapes' names")
  command.add_argument("--impl", nargs="+", help="default: all")
  command.add_argument("--iterations", type=int, default=20)
  command.add_argument("--results", type=Path, default=_RESULTS)
  command.add_argument("--commit", help="what runs, where git cannot tell")
  args = parser.parse_args(argv)
  args.argv = argv
  return run(args)


if __name__ == "__main__":
  sys.exit(main())

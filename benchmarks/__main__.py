"""Times the grouped GEMMs and their peers on the device at hand.

python -m benchmarks run m_grouped --shapes deepgemm --groups ragged --peers all
python -m benchmarks run moe_layer --shapes forward decode --peers all
python -m benchmarks run expert_parallel --shapes forward --devices 1 8
python -m benchmarks tune --shapes models --table mine.json
python -m benchmarks plot benchmarks/results/m_grouped-h200.json
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Before jax starts: the peers' process needs memory too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import (
  expert_parallel,
  expert_parallel_plot,
  moe_layer,
  shapes,
  torch_peers,
)
from benchmarks.plot import plot
from benchmarks.run import run

# Those of whole layers have a command line of their own behind this one.
_LAYERS = {"moe_layer": moe_layer.main, "expert_parallel": expert_parallel.main}
_PLOTS = {
  "moe_layer": moe_layer.plot,
  "expert_parallel": expert_parallel_plot.plot,
}
_BENCHMARKS = (
  "m_grouped",
  "k_grouped",
  "masked",
  "decode",
  "quantize",
  "train_step",
)


def _peers(benchmark: str, names):
  from benchmarks import gemms, quantize

  if benchmark == "quantize":
    peers = list(quantize.PEERS)
  else:
    ours = ("ours", "read")  # They always run.
    peers = [impl for impl in gemms.IMPLS[benchmark] if impl not in ours]
    peers += torch_peers.IMPLS_OF.get(benchmark, ())
  if names == ["all"]:
    return peers
  unknown = [name for name in names if name not in peers]
  if unknown:
    raise SystemExit(f"--peers must be of {peers} or all, got {unknown}")
  return names


def _shapes(benchmark: str) -> list[str]:
  """Returns what --shapes may be."""
  if benchmark != "quantize":
    return shapes.names(benchmark)
  from benchmarks import quantize

  return list(quantize.SHAPES)


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks", description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(required=True, dest="do")
  command = commands.add_parser("run", help="check, time and write a JSON")
  command.add_argument("benchmark", choices=(*_BENCHMARKS, *_LAYERS))
  command.add_argument("--shapes", nargs="+", default=["deepgemm"])
  command.add_argument(
    "--groups", nargs="+", choices=shapes.GROUPS, default=["ragged"]
  )
  command.add_argument("--peers", nargs="+", default=[], help="names, or all")
  command.add_argument("--only", default="", help="part of the shapes' names")
  command.add_argument("--iterations", type=int, default=20)
  command.add_argument("--json", type=Path, help="default: in results/")
  command.add_argument("--jobs", type=int, default=1, help="that compile")
  command.add_argument(
    "--devices", nargs="+", type=int, help="of expert_parallel; default: all"
  )
  command.add_argument(
    "--no-stages",
    dest="stages",
    action="store_false",
    help="moe_layer: whole layers only",
  )
  command = commands.add_parser("tune", help="find the fastest configs")
  command.add_argument("--shapes", nargs="+", default=["deepgemm"])
  command.add_argument(
    "--groups", nargs="+", choices=shapes.GROUPS, default=["ragged"]
  )
  command.add_argument("--only", default="", help="part of the shapes' names")
  command.add_argument("--iterations", type=int, default=5)
  command.add_argument("--table", type=Path, help="default: the package's")
  command.add_argument("--sweeps", type=Path, help="JSON of all times")
  command.add_argument("--jobs", type=int, default=4, help="that compile")
  command = commands.add_parser("plot", help="draw a JSON of run as PNG")
  command.add_argument("json", type=Path)
  command.add_argument("--png", type=Path, help="default: beside the JSON")
  for command in (commands.choices["run"], commands.choices["tune"]):
    command.add_argument("--commit", help="what runs, where git cannot tell")
  args = parser.parse_args(argv)
  if args.do == "plot":
    benchmark = json.loads(args.json.read_text()).get("benchmark")
    draw = _PLOTS.get(benchmark, plot)
    return draw(args.json, args.png or args.json.with_suffix(".png"))
  if args.do == "run" and args.benchmark in _LAYERS:
    return _LAYERS[args.benchmark](args, argv)
  if args.do == "tune":
    args.benchmark = "m_grouped"
  names = _shapes(args.benchmark)
  unknown = set(args.shapes) - set(names)
  if unknown:
    parser.error(f"--shapes must be of {names}, got {unknown}")
  if args.do == "tune":
    from benchmarks.tune import tune
    from jax_grouped_gemm.kernels import tuning

    problems = shapes.problems("m_grouped", args.shapes, args.groups)
    problems = [problem for problem in problems if args.only in problem.shape]
    table = args.table or tuning.TABLE
    args.argv = argv
    return tune(problems, table, args)
  args.peers = _peers(args.benchmark, args.peers)
  args.argv = argv
  if args.benchmark == "quantize":
    from benchmarks import quantize

    return quantize.run(args)
  return run(args)


if __name__ == "__main__":
  sys.exit(main())

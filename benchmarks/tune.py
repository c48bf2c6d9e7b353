"""Finds the fastest config of each problem by trying them all."""

import dataclasses
import functools
import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.gemms import MGrouped
from benchmarks.run import commit, side_by_side, versions
from benchmarks.shapes import Problem
from benchmarks.timing import Program
from jax_grouped_gemm import Config, m_grouped_gemm
from jax_grouped_gemm.kernels import tuning

_OUT_DTYPE = jnp.bfloat16
# By what was measured (see NOTES.md), no others win.
_CANDIDATES = (
  *(
    {"compute_wgs": 3, "tile_n": 128, "cluster": cluster, "raster_width": width}
    for cluster, width in ((1, 4), (2, 4), (2, 8), (2, 16))
  ),
  *(
    {"compute_wgs": 3, "tile_n": 128, "raster_width": width, "dynamic": True}
    for width in (2, 4, 8)
  ),
  *(
    {"compute_wgs": 2, "tile_n": 192, "cluster": cluster, "dynamic": dynamic}
    for cluster in (1, 2)
    for dynamic in (False, True)
  ),
  {"compute_wgs": 2, "tile_n": 192, "turns": True},
  {"compute_wgs": 2, "tile_n": 192, "multicast": "rhs", "turns": True},
  {"compute_wgs": 2, "tile_n": 192, "multicast": "rhs", "dynamic": True},
  {"compute_wgs": 2, "tile_n": 128},
  {"compute_wgs": 2, "tile_n": 128, "dynamic": True},
  {"compute_wgs": 2, "tile_n": 64},
)


def candidates(p: Problem) -> list[Config]:
  """Returns all configs worth trying."""
  configs = [Config(**choices) for choices in _CANDIDATES]
  return [
    tuning.most_stages(config, _OUT_DTYPE, p.k)
    for config in configs
    if config.tile_n < 2 * p.n
  ]


def sweep(p: Problem, iterations: int, lock) -> dict[Config, float]:
  """Returns the time of each config in microseconds.

  `lock` is held while the device is used, not to compile.
  """
  make = functools.partial(MGrouped.operands, p)
  shapes = jax.eval_shape(make)
  make = jax.jit(make).lower().compile()
  programs = {
    config: Program(
      functools.partial(
        m_grouped_gemm, preferred_element_type=_OUT_DTYPE, config=config
      ),
      *shapes,
    )
    for config in candidates(p)
  }
  with lock:
    operands = make()
    return {
      config: program.measure(*operands, iterations=iterations)[0]
      for config, program in programs.items()
    }


def _sweeps(problems: list[Problem], iterations: int, jobs: int):
  """Yields each problem's sweep. Jobs compile side by side and run in turns."""
  with side_by_side(jobs) as (pool, lock):
    call = functools.partial(sweep, iterations=iterations, lock=lock)
    yield from zip(problems, pool.map(call, problems), strict=True)


def tune(problems: list[Problem], path: Path, args) -> int:
  """Adds the problems to the table at `path`, and prints what was found.

  All times go to the file args.sweeps: what the heuristic can be fitted to.
  """
  device = jax.devices()[0].device_kind
  entries, measured = {}, []
  if path.exists():
    entries = {
      dataclasses.replace(entry, config=None, us=0): entry
      for entry in tuning.read_table(path)
    }
  results = _sweeps(problems, args.iterations, args.jobs)
  for p, times in tqdm(results, total=len(problems), disable=None):
    m, g = sum(p.sizes), len(p.sizes)
    best = min(times, key=times.get)
    chosen = tuning.m_grouped_config(m, p.n, p.k, g, _OUT_DTYPE)
    loss = times.get(chosen, float("nan")) / times[best] - 1
    entry = tuning.Entry(
      "m_grouped",
      device,
      m,
      p.n,
      p.k,
      g,
      jnp.dtype(_OUT_DTYPE).name,
      best,
      round(times[best], 1),
    )
    entries[dataclasses.replace(entry, config=None, us=0)] = entry
    tqdm.write(
      f"{p.shape:28} {times[best]:8.1f} us "
      f"{p.flops / times[best] / 1e6:7.1f} TFLOP/s, chosen before: "
      f"{100 * loss:+.1f} %  {best}"
    )
    table = {
      "commit": args.commit or commit(),
      "versions": versions(),
      "command": "python -m benchmarks " + shlex.join(args.argv),
      "entries": [dataclasses.asdict(entry) for entry in entries.values()],
    }
    measured += [
      {"problem": p, "config": dataclasses.asdict(config), "us": round(us, 2)}
      for config, us in times.items()
    ]
    # After each problem: a run that is cut off leaves what it measured.
    path.write_text(json.dumps(table, indent=1) + "\n")
    if args.sweeps:
      args.sweeps.write_text(json.dumps(measured) + "\n")
  print(f"{len(entries)} entries: {path}")
  return 0

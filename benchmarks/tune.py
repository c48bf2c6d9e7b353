"""Finds the fastest config of each problem by trying them all."""

import dataclasses
import functools
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.gemms import MGrouped
from benchmarks.run import commit, versions
from benchmarks.shapes import Problem
from benchmarks.timing import measure_us
from jax_grouped_gemm import Config, m_grouped_gemm
from jax_grouped_gemm.kernels import tuning

_OUT_DTYPE = jnp.bfloat16
# tile_n, compute_wgs
_TILES = ((64, 2), (128, 2), (128, 3), (192, 2))
_CLUSTERS = ((1, "lhs"), (2, "lhs"), (2, "rhs"))


def candidates(p: Problem) -> list[Config]:
  """Returns all configs worth trying."""
  found = []
  for (tile_n, wgs), (cluster, multicast), raster in itertools.product(
    _TILES, _CLUSTERS, (2, 4, 8, 16)
  ):
    config = Config(
      tile_n=tile_n,
      compute_wgs=wgs,
      cluster=cluster,
      multicast=multicast,
      raster_width=raster,
    )
    columns = tile_n * (cluster if multicast == "lhs" else 1)
    # Strips wider than what there is are all the same.
    if columns < 2 * p.n and (raster == 2 or raster * columns < 2 * p.n):
      found.append(tuning.most_stages(config, _OUT_DTYPE, p.k))
  return found


def sweep(p: Problem, iterations: int, lock) -> dict[Config, float]:
  """Returns the time of each config in microseconds."""
  gemm = MGrouped(p)
  operands = gemm.lhs, gemm.rhs, gemm.sizes
  return {
    config: measure_us(
      lambda *x, c=config: m_grouped_gemm(
        *x, preferred_element_type=_OUT_DTYPE, config=c
      ),
      *operands,
      iterations=iterations,
      lock=lock,
    )
    for config in candidates(p)
  }


def _sweeps(problems: list[Problem], iterations: int, jobs: int):
  """Yields each problem's sweep. Jobs compile side by side and run in turns."""
  context = multiprocessing.get_context("spawn")  # jax must not be forked.
  with (
    context.Manager() as manager,
    ProcessPoolExecutor(jobs, mp_context=context) as pool,
  ):
    call = functools.partial(sweep, iterations=iterations, lock=manager.Lock())
    yield from zip(problems, pool.map(call, problems), strict=True)


def tune(
  problems: list[Problem],
  path: Path,
  iterations: int,
  sweeps: Path | None,
  jobs: int,
) -> int:
  """Adds the problems to the table at `path`, and prints what was found.

  All times go to the file `sweeps`: what the heuristic can be fitted to.
  """
  device = jax.devices()[0].device_kind
  entries, measured = {}, []
  if path.exists():
    entries = {
      dataclasses.replace(entry, config=None, us=0): entry
      for entry in tuning.read_table(path)
    }
  results = _sweeps(problems, iterations, jobs)
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
      "commit": commit(),
      "versions": versions(),
      "command": "python -m benchmarks tune",
      "entries": [dataclasses.asdict(entry) for entry in entries.values()],
    }
    measured += [
      {"problem": p, "config": dataclasses.asdict(config), "us": round(us, 2)}
      for config, us in times.items()
    ]
    # After each problem: a run that is cut off leaves what it measured.
    path.write_text(json.dumps(table, indent=1) + "\n")
    if sweeps:
      sweeps.write_text(json.dumps(measured) + "\n")
  print(f"{len(entries)} entries: {path}")
  return 0

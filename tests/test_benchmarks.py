"""The benchmark's command line, on problems that a CPU does in seconds."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import gemms, shapes
from benchmarks.__main__ import main


@pytest.mark.parametrize("benchmark", ["m_grouped", "k_grouped"])
def test_run_writes_verified_rows(benchmark, tmp_path):
  flags = ["--set", "smoke", "--iterations=2", f"--results={tmp_path}"]
  assert main(["run", benchmark, *flags]) == 0
  written = json.loads((tmp_path / f"{benchmark}-cpu.json").read_text())
  assert written["benchmark"] == benchmark
  assert written["versions"]["jax"] and written["commit"]
  for row in written["rows"]:
    assert row["verified"] and row["us"] > 0
    assert (row["g"], row["m"], row["n"], row["k"]) == (2, 94, 128, 256)
  assert "ours" in [row["impl"] for row in written["rows"]]


def test_wrong_results_are_reported(tmp_path, monkeypatch):
  monkeypatch.setattr(
    gemms, "m_grouped_gemm", lambda *args, **kwargs: jnp.ones((94, 128))
  )
  monkeypatch.setattr(
    gemms.MGrouped, "expected", lambda self: jnp.full((94, 128), 1.01)
  )
  flags = ["--set=smoke", "--impl=ours", f"--results={tmp_path}"]
  assert main(["run", "m_grouped", *flags, "--iterations=1"]) == 1


def test_problems_are_named_once():
  for sets in shapes.SETS.values():
    for problems in sets.values():
      names = [problem.shape for problem in problems]
      assert len(set(names)) == len(names)


def test_ragged_and_aligned_sizes():
  for problem in shapes.SETS["m_grouped"]["aligned"]:
    assert all(size % 128 == 0 for size in problem.sizes)
  ragged = shapes.SETS["m_grouped"]["ragged"][0]
  assert any(size % 128 for size in ragged.sizes)
  assert ragged.flops == 2 * sum(ragged.sizes) * 6144 * 7168

"""The benchmark of a training step, on a problem that a CPU does in seconds."""

import json

import jax
import pytest

from benchmarks import gemms, run, shapes, train_step
from benchmarks.__main__ import main


def call(tmp_path, *flags):
  path = tmp_path / "result.json"
  flags = ["--shapes=smoke", "--iterations=1", f"--json={path}", *flags]
  code = main(["run", "train_step", *flags])
  return code, json.loads(path.read_text())["rows"]


def test_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
  code, rows = call(tmp_path, "--peers", "all")
  assert code == 0
  *ours, torch = rows
  assert [row["impl"] for row in ours] == list(train_step.IMPLS)
  assert torch["unavailable"] == "torch is not installed"
  for row in ours:
    assert row["verified"]
    # At least the results: bf16 of out, d(lhs) and d(rhs).
    results = 94 * 128 + 94 * 256 + 2 * 256 * 128
    assert row["peak_bytes"] >= 2 * results
    assert row["tflops"] == pytest.approx(
      3 * 2 * 94 * 128 * 256 / row["us"] / 1e6, abs=0.1
    )
  assert main(["plot", str(tmp_path / "result.json")]) == 0
  assert (tmp_path / "result.png").stat().st_size > 10_000


@pytest.mark.parametrize("wrong", range(3))
def test_each_result_is_verified(wrong, monkeypatch):
  (problem,) = shapes.problems("train_step", ["smoke"], ["ragged"])
  step = train_step._step

  def spoilt(dot, *operands):
    results = list(step(dot, *operands))
    if dot is jax.lax.ragged_dot:
      results[wrong] = results[wrong].at[-1].multiply(1.05)
    return tuple(results)

  monkeypatch.setattr(train_step, "_step", spoilt)
  (row,) = gemms.rows("train_step", problem, ["lax_ragged_dot"], 1)
  assert not row["verified"]


def test_dense_products_of_many_groups_are_not_timed():
  problem = shapes.Problem("", "", (1,) * 9, 16, 16)
  (row,) = gemms.rows("train_step", problem, ["lax_ragged_dot"], 1)
  assert "densely" in row["unavailable"]

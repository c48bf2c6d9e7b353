"""The benchmark's command line, on problems that a CPU does in seconds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gemms, run, shapes, torch_peers, tune
from benchmarks.__main__ import main
from jax_grouped_gemm import Config, implementation
from jax_grouped_gemm.kernels import tuning


def call(tmp_path, benchmark, *flags):
  path = tmp_path / "result.json"
  flags = ["--shapes=smoke", "--iterations=2", f"--json={path}", *flags]
  return main(["run", benchmark, *flags]), json.loads(path.read_text())


@pytest.mark.parametrize("benchmark", ["m_grouped", "k_grouped"])
def test_run_writes_verified_rows(benchmark, tmp_path):
  code, written = call(tmp_path, benchmark)
  assert code == 0
  assert written["benchmark"] == benchmark
  assert written["versions"]["jax"] and written["commit"]
  (row,) = written["rows"]
  assert row["impl"] == "ours" and row["verified"] and row["us"] > 0
  assert (row["g"], row["m"], row["n"], row["k"]) == (2, 94, 128, 256)
  assert "slots" in row["config"]
  assert row["tflops"] == pytest.approx(
    2 * 94 * 128 * 256 / row["us"] / 1e6, abs=0.1
  )


@pytest.mark.parametrize(
  "benchmark, peers", [("masked", ["ours_m_grouped"]), ("decode", [])]
)
def test_what_moves_bytes_is_compared_with_reading(benchmark, peers, tmp_path):
  flags = ["--peers", *peers] if peers else []
  code, written = call(tmp_path, benchmark, *flags)
  assert code == 0
  read, *others = written["rows"]
  assert read["impl"] == "read" and read["verified"] and "tflops" not in read
  assert [row["impl"] for row in others] == ["ours", *peers]
  (problem,) = shapes.problems(benchmark, ["smoke"], ["ragged"])
  for row in others:
    assert row["verified"]
    assert row["gbps"] == pytest.approx(
      problem.num_bytes / row["us"] / 1e3, abs=0.06
    )
    assert row["of_read"] == pytest.approx(
      row["gbps"] / read["gbps"], abs=0.001
    )
  path = tmp_path / "result.json"
  assert main(["plot", str(path)]) == 0


def test_bytes_that_must_move():
  problem = shapes.Problem("", "", (3, 0, 5), 256, 384)
  weights = 256 * 384 + 4 * 2 * 3
  assert problem.num_bytes == 2 * weights + 8 * (384 + 4 * 3 + 2 * 256)


def test_peers_run_or_say_why_not(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
  code, written = call(
    tmp_path, "m_grouped", "--peers", "lax_ragged_dot", "tokamax", "deepgemm"
  )
  assert code == 0
  rows = {row["impl"]: row for row in written["rows"]}
  assert rows["lax_ragged_dot"]["verified"]
  assert "tokamax" in rows["tokamax"]["unavailable"]
  assert rows["deepgemm"]["unavailable"] == "torch is not installed"
  assert "not run: torch is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", ["m_grouped", "k_grouped"])
def test_bf16_of_ours(benchmark, tmp_path):
  code, written = call(tmp_path, benchmark, "--peers", "ours_bf16")
  assert code == 0
  assert [row["impl"] for row in written["rows"]] == ["ours", "ours_bf16"]
  assert all(row["verified"] for row in written["rows"])


def test_only_the_gradient_of_rhs_is_timed(monkeypatch):
  hopper = type("Hopper", (), {"platform": "gpu", "compute_capability": "9.0"})
  (problem,) = shapes.problems("k_grouped", ["smoke"], ["ragged"])
  operands = gemms.KGrouped.operands(problem)
  fn, args = gemms.KGrouped(problem, operands).calls()["ours_bf16"]()
  monkeypatch.setattr(implementation, "default_device", lambda: hopper)
  untraced = jax.jit(lambda *args: fn(*args))
  lowered = untraced.trace(*args).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu_v2") == 1


def test_peers_of_k_grouped_say_why_not(tmp_path, monkeypatch):
  """JAX's own kernel runs on GPUs only."""
  monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
  code, written = call(tmp_path, "k_grouped", "--peers", "all")
  assert code == 0
  rows = {row["impl"]: row for row in written["rows"]}
  peers = {"deepgemm", "torch_grouped_mm", "jax_transposed_ragged_dot_mgpu"}
  assert peers < set(rows)
  assert all("unavailable" in rows[peer] for peer in peers)


def test_all_peers_are_known():
  with pytest.raises(SystemExit, match="deepgemm"):
    main(["run", "m_grouped", "--peers", "deepgem"])


def test_wrong_results_are_reported(tmp_path, monkeypatch):
  monkeypatch.setattr(
    gemms, "m_grouped_gemm", lambda *args, **kwargs: jnp.ones((94, 128))
  )
  code, written = call(tmp_path, "m_grouped")
  assert code == 1 and not written["rows"][0]["verified"]


def test_plot(tmp_path):
  rows = [
    {"set": name, "shape": shape, "impl": impl, "us": 1.0, "tflops": 100.0}
    for name in ("ragged", "dense")
    for shape in ("a", "b")
    for impl in ("ours", "deepgemm", "cublaslt_fp8")
  ]
  rows.append({"set": "dense", "shape": "b", "impl": "x", "unavailable": "no"})
  path = tmp_path / "m_grouped-h200.json"
  path.write_text(json.dumps({"rows": rows, "device": "GPU", "date": "today"}))
  assert main(["plot", str(path)]) == 0
  assert (tmp_path / "m_grouped-h200.png").stat().st_size > 10_000


def test_tune_writes_a_table_and_all_times(tmp_path, capsys):
  table, sweeps = tmp_path / "table.json", tmp_path / "sweeps.json"
  flags = ["--shapes=smoke", "--iterations=1", "--jobs=2"]
  assert main(["tune", *flags, f"--table={table}", f"--sweeps={sweeps}"]) == 0
  (entry,) = tuning.read_table(table)
  assert (entry.m, entry.n, entry.k, entry.g) == (94, 128, 256, 2)
  times = {
    Config(**row["config"]): row["us"] for row in json.loads(sweeps.read_text())
  }
  (problem,) = shapes.problems("m_grouped", ["smoke"], ["ragged"])
  assert set(times) == set(tune.candidates(problem))
  assert entry.us == pytest.approx(min(times.values()), abs=0.1)
  assert times[entry.config] == min(times.values())
  assert "TFLOP/s" in capsys.readouterr().out


def test_problems_are_named_once():
  for benchmark in ("m_grouped", "k_grouped", "masked", "decode"):
    problems = shapes.problems(
      benchmark, shapes.names(benchmark), ["aligned", "ragged"]
    )
    names = [(problem.set, problem.shape) for problem in problems]
    assert len(set(names)) == len(names)


def test_group_sizes():
  assert all(size % 128 == 0 for size in shapes.aligned_sizes(64, 512))
  assert any(size % 128 for size in shapes.ragged_sizes(64, 512))
  assert sum(shapes.one_hot_sizes(8, 16)) == 128
  sizes = shapes.zipf_sizes(4096, 64, 8)
  assert sum(sizes) == 4096 * 8 and max(sizes) <= 4096
  # The most popular of 64 experts: about as often as its weight says.
  assert max(shapes.zipf_sizes(4096, 64, 1)) == pytest.approx(
    4096 / np.sum(1 / np.arange(1, 65)), rel=0.1
  )


def test_padding_does_not_count():
  """Nor do the peers' names differ from what DESIGN calls them."""
  (problem,) = shapes.problems("m_grouped", ["smoke"], ["ragged"])
  assert problem.flops == 2 * sum(problem.sizes) * problem.n * problem.k
  assert set(torch_peers.IMPLS) == set(torch_peers._RUN)
  for impls in torch_peers.IMPLS_OF.values():
    assert set(impls) <= set(torch_peers.IMPLS)

"""The benchmark of whole layers, on one that a CPU does in seconds."""

import json

import pytest

from benchmarks import moe_layer, moe_stages
from benchmarks.__main__ import main


def call(tmp_path, *flags):
  path = tmp_path / "moe_layer-cpu.json"
  flags = ["--shapes=smoke", "--iterations=1", f"--json={path}", *flags]
  return main(["run", "moe_layer", *flags]), path


@pytest.mark.slow
def test_run_and_plot(tmp_path, capsys):
  code, path = call(tmp_path, "--peers", "all")
  rows = json.loads(path.read_text())["rows"]
  assert [(row["set"], row["impl"]) for row in rows] == [
    (name, impl)
    for name in ("smoke forward", "smoke forward_backward")
    for impl in moe_layer.IMPLS
    if impl not in moe_layer._ONLY_WITH_BACKWARD or "backward" in name
  ]
  assert code == 0 and all(row["verified"] for row in rows)
  for row in rows:
    assert (row["g"], row["m"], row["n"], row["k"]) == (4, 96, 128, 256)
    products = 3 if "backward" in row["set"] else 1
    assert row["tflops"] == pytest.approx(
      products * 6 * 96 * 128 * 256 / row["us"] / 1e6, abs=0.1
    )
    assert row["peak_bytes"] > 0
  ours, unfused, bf16 = rows[:3]
  assert tuple(unfused["stages"]) == moe_stages.STAGES
  # Nothing is left of it.
  assert set(ours["stages"]) == {*moe_stages.STAGES} - {"activation"}
  assert set(bf16["stages"]) == {
    stage for stage in moe_stages.STAGES if "quantize" not in stage
  }
  assert "gate/up" in capsys.readouterr().out
  assert main(["plot", str(path)]) == 0
  assert path.with_suffix(".png").stat().st_size > 10_000


def test_without_stages(tmp_path, monkeypatch):
  monkeypatch.setattr(moe_layer, "SETS", {"smoke": moe_layer.SETS["smoke"][:1]})
  code, path = call(tmp_path, "--no-stages")
  (row,) = json.loads(path.read_text())["rows"]
  assert code == 0 and "stages" not in row and row["us"] > 0


def test_kernels_by_kind():
  """By the names that the profiler reports."""
  names = {
    "m_grouped_gemm_sm90_mosaic_gpu_kernel": 40.0,
    "k_grouped_bf16_sm90_mosaic_gpu_kernel": 2.0,
    "small_groups_gemm_sm90_mosaic_gpu_kernel": 1.0,
    "quantize_swiglu_sm90_mosaic_gpu_kernel": 5.0,
    "quantize_tokens_sm90_mosaic_gpu_kernel": 6.0,
    "geglu_backward_sm90_mosaic_gpu_kernel": 7.0,
    "loop_convert_fusion": 0.5,
    "nvjet_qqtst_128x256": 0.25,
  }
  kinds = moe_layer._by_kind(names)
  assert kinds == {
    "GEMMs": 43.0,
    "quantisation": 11.0,
    "activation gradient": 7.0,
    "others": 0.75,
  }
  row = {"kernels": kinds, "stages": {"gate/up": 1.0, "down": 2.0}, "us": 100}
  assert moe_layer._gemms_us(row) == 43.0
  assert moe_layer._gemms_us(row | {"kernels": {}}) == 3.0


def test_wrong_results_are_reported(tmp_path, monkeypatch):
  monkeypatch.setattr(moe_layer, "SETS", {"smoke": moe_layer.SETS["smoke"][:1]})
  monkeypatch.setattr(
    moe_layer, "_layer", lambda problem, impl: lambda x, params: x
  )
  code, path = call(tmp_path)
  assert code == 1
  assert not json.loads(path.read_text())["rows"][0]["verified"]


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--shapes=deepseek"], "--shapes must be of .*'decode'.*'deepseek'"),
    (["--peers=tokamax"], "--peers must be of .*'lax_ragged_dot'.*'tokamax'"),
  ],
)
def test_unknown_names(flags, message, tmp_path):
  with pytest.raises(SystemExit, match=message):
    call(tmp_path, *flags)


def test_problems_fit_the_models():
  """Every layer is routed and multiplied as its options say."""
  names = set()
  for problems in moe_layer.SETS.values():
    for problem in problems:
      assert (problem.set, problem.shape) not in names
      names.add((problem.set, problem.shape))
      experts, top_k, *_ = problem.sizes
      routing, _ = moe_layer._options(problem)
      groups = routing.get("num_expert_groups", 1)
      assert experts % groups == 0
      kept = routing.get("top_expert_groups", 1) * experts // groups
      assert top_k <= kept
  flops = moe_layer.Problem("forward", "mixtral-8x7b", 1).flops
  assert flops == 2 * 2 * 3 * 4096 * 14336

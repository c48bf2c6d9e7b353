"""The benchmark of experts on several devices, on layers that a CPU does."""

import json

import jax
import numpy as np
import pytest

from benchmarks import expert_parallel, expert_parallel_stages
from benchmarks.__main__ import main
from benchmarks.expert_parallel_layers import IMPLS, Problem

FORWARD = Problem("smoke forward", "smoke", "zipf", 24, 2)


def call(tmp_path, *flags):
  path = tmp_path / "expert_parallel-cpu.json"
  flags = ["--shapes=smoke", "--iterations=1", f"--json={path}", *flags]
  return main(["run", "expert_parallel", *flags]), path


def only(monkeypatch, *problems):
  monkeypatch.setattr(expert_parallel, "problems", lambda *_: list(problems))


@pytest.mark.slow
def test_run_and_plot(tmp_path, monkeypatch):
  only(monkeypatch, FORWARD._replace(devices=1), FORWARD)
  code, path = call(tmp_path, "--peers", "all", "--devices", "1", "2")
  rows = json.loads(path.read_text())["rows"]
  alone = ["ours", "lax_ragged_dot"]
  assert [(row["impl"], row["devices"]) for row in rows] == [
    *((impl, 1) for impl in alone),
    *((impl, 2) for impl in ["link", *IMPLS]),
  ]
  assert code == 0 and all(row["verified"] for row in rows)
  link = rows.pop(2)
  for row in rows:
    copies = 2 * 24 * row["devices"]
    assert (row["g"], row["m"], row["n"], row["k"]) == (8, copies, 128, 256)
    assert row["tflops"] == pytest.approx(
      6 * copies * 128 * 256 / row["us"] / 1e6, abs=0.1
    )
  ours, bf16, chunks, *others, lax = rows[2:]
  assert set(ours["stages"]) == set(expert_parallel_stages.STAGES) - {
    "quantize"
  }
  assert set(bf16["stages"]) == set(expert_parallel_stages.STAGES)
  assert ours["efficiency"] == pytest.approx(
    rows[0]["us"] / ours["us"], abs=1e-3
  )
  assert lax["efficiency"] == pytest.approx(rows[1]["us"] / lax["us"], abs=1e-3)
  gemms = ours["stages"]["gate/up"] + ours["stages"]["down"]
  for row in (ours, bf16, chunks, *others):
    exchanged = row["exchanged_bytes"] / link["gbps"] / 1e3
    assert row["bound_us"] == pytest.approx(exchanged + gemms, abs=0.1)
  # 256 values of a byte and 2 scales of 4, or 2 bytes; 2 on the way back. With
  # two weights and rows of copies.
  assert ours["exchanged_bytes"] / bf16["exchanged_bytes"] == (
    pytest.approx((256 + 8 + 16 + 512) / (16 + 1024))
  )
  assert main(["plot", str(path)]) == 0
  assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_gradients(tmp_path, monkeypatch):
  only(monkeypatch, FORWARD._replace(set="smoke forward_backward"))
  code, path = call(tmp_path, "--devices=2")
  _, row = json.loads(path.read_text())["rows"]
  assert code == 0 and row["verified"]
  assert row["tflops"] == pytest.approx(
    18 * 96 * 128 * 256 / row["us"] / 1e6, abs=0.1
  )
  # There in FP8, back, and both once more in bfloat16; with two weights, their
  # gradients, and two rows of copies. Of 24 tokens of each device.
  tokens = row["exchanged_bytes"] / (256 + 8 + 16 + 3 * 512 + 8)
  assert 0 < tokens == int(tokens) <= 24


def test_wrong_results_are_reported(tmp_path, monkeypatch):
  only(monkeypatch, FORWARD._replace(devices=1))
  monkeypatch.setattr(
    expert_parallel,
    "function",
    lambda *_: lambda x, dout, params: (0, x),
  )
  code, path = call(tmp_path, "--devices=1")
  assert code == 1
  assert not json.loads(path.read_text())["rows"][0]["verified"]


def test_traffic():
  """Tokens between devices, the busiest one, and what no chunk exceeds."""
  copies = np.array([[[5, 300], [2, 7]], [[100, 10], [4, 3]]])
  tokens = np.array([[[4, 100], [2, 5]], [[60, 9], [4, 2]]])
  traffic = expert_parallel_stages.Traffic(copies, tokens)
  assert traffic.busiest == 300 + 7 + 10 + 3
  assert traffic.exchanged == 109  # The first device sends so many.
  assert traffic.capacity == 2 * 384  # The first chunk fills 307 rows.


@pytest.mark.parametrize("set_name", expert_parallel.SETS)
def test_problems(set_name):
  """As many experts as fit; each is routed as its options say."""
  for problem in expert_parallel.problems([set_name], expert_parallel.DEVICES):
    experts, top_k, *_ = problem.sizes
    assert experts % problem.devices == 0 and experts >= top_k
    groups = problem.routing_options.get("num_expert_groups", 1)
    kept = problem.routing_options.get("top_expert_groups", 1)
    assert experts % groups == 0 and top_k <= kept * experts // groups
  alone = Problem("forward_backward", "deepseek-v3", "zipf", 16384, 1)
  assert alone.sizes[0] == 128 and alone._replace(devices=2).sizes[0] == 256


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--shapes=deepseek"], "--shapes must be of .*'decode'.*'deepseek'"),
    (["--peers=tokamax"], "--peers must be of .*'lax_ragged_dot'.*'tokamax'"),
    (["--devices=3"], r"--devices must be of \[1, 2.*got \[3\]"),
  ],
)
def test_unknown_names(flags, message, tmp_path):
  with pytest.raises(SystemExit, match=message):
    call(tmp_path, *flags)


def test_a_queue_of_calls_is_timed():
  from benchmarks.timing import measure_queued_us

  calls = []

  def compiled(x):
    calls.append(x)
    return jax.numpy.asarray(x)

  assert 0 < measure_queued_us(compiled, 3, iterations=4) < 1e6
  assert len(calls) == 1 + 3 * 4  # One to warm up, three rounds.

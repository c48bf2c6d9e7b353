"""The quantisation benchmark, on problems that a CPU does in seconds."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import quantize
from benchmarks.__main__ import main


def test_rows_are_verified_and_compared_with_a_copy(tmp_path):
  path = tmp_path / "result.json"
  flags = ["--shapes=smoke", "--iterations=1", "--peers=xla", f"--json={path}"]
  assert main(["run", "quantize", *flags]) == 0
  written = json.loads(path.read_text())["rows"]
  assert [(row["set"], row["impl"]) for row in written] == [
    (name, impl)
    for name in (
      "rows",
      "tokens",
      "rows_and_tokens",
      "weights",
      "activation",
      "activation_backward",
      "copies",
    )
    for impl in ("copy", "ours", "xla")
  ]
  copy, ours = written[:2]
  assert ours["of_copy"] == pytest.approx(ours["gbps"] / copy["gbps"], abs=1e-3)
  # bf16 in, FP8 and a scale per 128 out.
  num_bytes = 16 * 256 * 3 + 16 * 2 * 4
  assert ours["gbps"] == pytest.approx(num_bytes / ours["us"] / 1e3, abs=0.06)
  assert all(row["verified"] and not row.get("different") for row in written)
  # A token counts as read once, and where its 8 copies go.
  copies = written[-2]
  num_bytes += 2 * 256 * 2 - 16 * 256 * 2 + 16 * 4
  assert copies["gbps"] == pytest.approx(
    num_bytes / copies["us"] / 1e3, abs=0.1
  )


def test_a_wrong_activation_is_noticed():
  problem = quantize.Problem("activation", (16, 256))
  (x,) = quantize._operands(problem)
  fn = quantize._function(problem, "xla")
  right = fn(x)
  verify = lambda out: quantize._verify(problem, "ours", out, right)
  assert verify(right) == {"different": 0, "verified": True}
  # One element that is wrong, and all a little.
  wrong = fn(x.at[3, 5].set(9.0))
  assert not verify(wrong)["verified"]
  assert not verify(fn(x * 1.01))["verified"]


def test_wrong_bits_are_counted():
  expected = jnp.array([1, 2, 3], jnp.float8_e4m3fn)
  bits = jax.lax.bitcast_convert_type(expected, jnp.int8)
  wrong = jax.lax.bitcast_convert_type(
    bits + jnp.array([0, 1, -2], jnp.int8), expected.dtype
  )
  assert quantize._difference([expected], [expected]) == (0, 0)
  assert quantize._difference([wrong], [expected]) == (2, 2)


def test_names_are_checked():
  with pytest.raises(SystemExit):
    main(["run", "quantize", "--shapes", "dense"])
  with pytest.raises(SystemExit, match="xla"):
    main(["run", "quantize", "--peers", "deepgemm"])

"""examples/expert_parallel.py: in one process, and in two as on two hosts."""

import pytest
from example_processes import finish, start, start_together

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone():
  """What one process says."""
  return finish(start("--simulate=4"))


def test_one_process_and_two_do_the_same(alone):
  stdout, rows_alone = alone
  assert "4 x cpu of 1 processes, mesh {'data': 2, 'expert': 2}" in stdout
  assert "16 experts, 8 on each device" in stdout
  (first, _, _), (last, _, dropped) = rows_alone
  assert last < 0.95 * first and dropped == 0

  processes = start_together([["--simulate=2"]] * 2)
  (stdout, rows), (_, silent) = map(finish, processes)
  assert "4 x cpu of 2 processes" in stdout and silent == []
  for got, want in zip(rows, rows_alone, strict=True):
    assert got == pytest.approx(want, rel=1e-2)


def test_payload_and_chunks_leave_the_loss_as_it_is(alone):
  _, rows = finish(start("--simulate=4", "--payload=bf16", "--chunks=2"))
  for got, want in zip(rows, alone[1], strict=True):
    assert got == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize(
  "flags, message",
  [
    (
      ["--simulate=3"],
      "--expert-axis 2 must divide 3 devices and 16 experts, and 3 the 256 "
      "tokens",
    ),
    (
      ["--simulate=4", "--chunks=65"],
      "--chunks 65 must be from 1 to the 64 tokens of a device",
    ),
  ],
)
def test_bad_flags_give_one_line(flags, message):
  process = start(*flags)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 1
  assert stderr.strip().splitlines()[-1] == f"expert_parallel.py: {message}"

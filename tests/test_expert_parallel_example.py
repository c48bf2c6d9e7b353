"""examples/expert_parallel.py: in one process, and in two as on two hosts."""

import re
import socket
import subprocess
import sys

import expert_parallel
import pytest

pytestmark = pytest.mark.slow
FLAGS = ["--steps=6", "--tokens=256", "--expert-axis=2"]


def start(*flags):
  return subprocess.Popen(
    [sys.executable, expert_parallel.__file__, *FLAGS, *flags],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  """Returns what it printed, and [(error, balance, dropped)]."""
  stdout, stderr = process.communicate(timeout=200)
  assert process.returncode == 0, stderr
  rows = re.findall(
    r"step \d+: error (\S+), balance (\S+), dropped (\d+)", stdout
  )
  return stdout, [tuple(map(float, row)) for row in rows]


def test_one_process_and_two_do_the_same():
  stdout, alone = finish(start("--simulate=4"))
  assert "4 x cpu of 1 processes, mesh {'data': 2, 'expert': 2}" in stdout
  assert "16 experts, 8 on each device" in stdout
  (first, _, _), (last, _, dropped) = alone
  assert last < 0.95 * first and dropped == 0

  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = [
    start(
      f"--coordinator={address}",
      "--num-processes=2",
      f"--process-id={i}",
      "--simulate=2",
    )
    for i in range(2)
  ]
  (stdout, rows), (_, silent) = map(finish, processes)
  assert "4 x cpu of 2 processes" in stdout and silent == []
  for got, want in zip(rows, alone, strict=True):
    assert got == pytest.approx(want, rel=1e-2)


def test_bad_mesh_gives_one_line():
  process = start("--simulate=3")
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 1
  assert stderr.strip().splitlines()[-1] == (
    "expert_parallel.py: --expert-axis 2 must divide 3 devices and 16 experts, "
    "and 3 the 256 tokens"
  )

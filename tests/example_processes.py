"""examples/expert_parallel.py in processes of its own."""

import re
import socket
import subprocess
import sys

import expert_parallel

FLAGS = ["--steps=6", "--tokens=256", "--expert-axis=2"]


def start(*flags, **options):
  return subprocess.Popen(
    [sys.executable, expert_parallel.__file__, *FLAGS, *flags],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def start_together(flags_of_each, **options):
  """Starts a process per entry, which find each other."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  return [
    start(
      f"--coordinator={address}",
      f"--num-processes={len(flags_of_each)}",
      f"--process-id={i}",
      *flags,
      **options,
    )
    for i, flags in enumerate(flags_of_each)
  ]


def finish(process):
  """Returns what it printed, and [(error, balance, dropped)]."""
  stdout, stderr = process.communicate(timeout=200)
  assert process.returncode == 0, stderr
  rows = re.findall(
    r"step \d+: error (\S+), balance (\S+), dropped (\d+)", stdout
  )
  return stdout, [tuple(map(float, row)) for row in rows]

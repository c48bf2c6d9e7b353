"""The README's programs run as they stand."""

import re
from pathlib import Path

import jax.numpy as jnp

README = Path(__file__).parent.parent / "README.md"


def test_programs_run():
  """The second one goes on where the first one ends."""
  programs = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
  assert len(programs) == 2
  names = {}
  for program in programs:
    exec(program, names)
  assert names["value"] > 0
  gradient = names["gradient"].astype(jnp.float32)
  assert gradient.shape == (4, 256, 384)
  assert (gradient[1] == 0).all()  # Its group is empty.
  assert (jnp.abs(gradient[jnp.array([0, 2, 3])]).max(axis=(1, 2)) > 0).all()
  out = names["layer"].out.astype(jnp.float32)
  assert out.shape == names["x"].shape and (out != 0).any(axis=1).all()


def test_files_that_it_names_exist():
  links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
  paths = [link for link in links if "://" not in link]
  assert paths
  for path in paths:
    assert (README.parent / path).exists(), path

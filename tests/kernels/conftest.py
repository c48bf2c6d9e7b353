"""Fixtures of the kernel tests."""

import contextlib

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@pytest.fixture
def interpreter(capfd):
  """Interprets kernels, and fails the test on any race between warpgroups."""

  @contextlib.contextmanager
  def interpret():
    params = plgpu.InterpretGPUParams(detect_races=True)
    with plgpu.force_gpu_interpret_mode(params):
      yield

  yield interpret
  # Races are printed, not raised.
  assert "RACE DETECTED" not in capfd.readouterr().out

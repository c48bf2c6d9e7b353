"""Chooses what computes the products that are not quantised."""

import contextlib
from unittest import mock

from jax_grouped_gemm import implementation


@contextlib.contextmanager
def by_lax_ragged_dot():
  """In it, those products are traced as on a GPU where nobody asks for more."""
  gpu = mock.Mock(platform="gpu", compute_capability=None)
  with mock.patch.object(implementation, "default_device", lambda: gpu):
    yield

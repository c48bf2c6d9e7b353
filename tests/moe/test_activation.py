"""Wrong calls of the activation; its values are tested with the MLP."""

import jax.numpy as jnp
import pytest

from jax_grouped_gemm import moe


@pytest.mark.parametrize(
  "options, message",
  [
    ({"activation": "relu"}, "got 'relu'"),
    ({"implementation": "cuda"}, "None or one of .*got 'cuda'"),
  ],
)
def test_errors(options, message):
  with pytest.raises(ValueError, match=message):
    moe.activate(jnp.ones((2, 4)), **options)

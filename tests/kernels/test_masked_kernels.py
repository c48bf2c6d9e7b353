"""The kernels with the masked layout, in the interpreter, races included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import check, m_grouped

from jax_grouped_gemm.config import Config, SmallGroupsConfig
from jax_grouped_gemm.kernels.m_grouped import m_grouped_gemm
from jax_grouped_gemm.kernels.small_groups import small_groups_gemm
from jax_grouped_gemm.schedule import Masked

pytestmark = pytest.mark.slow

ROWS, MAX_M, N = 24, 21, 80  # Each group has 24 rows, of which 21 may be used.
SIZES = ([21, 0, 3, 16], [2**31 - 1, 17, -5, 0])


@pytest.mark.parametrize("zero_padding", [False, True])
@pytest.mark.parametrize(
  "kernel, config",
  [
    (
      m_grouped_gemm,
      Config(tile_n=64, multicast="rhs", num_stages=2, num_sms=4),
    ),
    (
      small_groups_gemm,
      SmallGroupsConfig(tile_m=16, tile_n=64, num_stages=3, num_sms=3),
    ),
  ],
  ids=["m_grouped", "small_groups"],
)
def test_masked(interpreter, kernel, config, zero_padding):
  gemm = jax.jit(
    functools.partial(
      kernel,
      m=4 * ROWS,
      n=N,
      out_dtype=jnp.bfloat16,
      config=config,
      masked=Masked(ROWS, MAX_M, zero_padding),
      interpret=True,
    )
  )
  operands, *expected = m_grouped([ROWS] * 4, 4 * ROWS, N, 144)
  for sizes in SIZES:
    in_use = np.arange(ROWS) < np.clip(sizes, 0, MAX_M)[:, None]
    in_use = in_use.reshape(-1, 1)
    with interpreter():
      out = gemm(*operands[:4], jnp.array(sizes, jnp.int32), None)
    if not zero_padding:  # Then they keep what the interpreter fills out with.
      written = ~np.isnan(np.asarray(out, np.float32))
      np.testing.assert_array_equal(
        written, np.broadcast_to(in_use, written.shape)
      )
      out = jnp.where(in_use, out, 0)
    check(out, *(np.where(in_use, x, 0) for x in expected), label=sizes)

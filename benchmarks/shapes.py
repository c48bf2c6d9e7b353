"""The problems that are timed."""

import random
from typing import NamedTuple

_GROUPS = ((4, 8192), (8, 4096), (64, 512), (256, 128))  # groups, mean rows


class Problem(NamedTuple):
  """A grouped GEMM: M-grouped (m, k) x (g, n, k), sizes along m.

  K-grouped (n, tokens) x (k, tokens), sizes along the tokens: the gradient of
  the weights of the M-grouped problem.
  """

  set: str
  shape: str
  sizes: tuple[int, ...]
  n: int
  k: int

  @property
  def flops(self) -> int:
    """Of the rows that are asked for: no padding."""
    return 2 * sum(self.sizes) * self.n * self.k


def ragged_sizes(g: int, mean: int) -> tuple[int, ...]:
  """Sizes within 30 % of the mean, the same on every call."""
  rng = random.Random(0)
  return tuple(int(mean * rng.uniform(0.7, 1.3)) for _ in range(g))


def _aligned(sizes):
  return tuple(size + -size % 128 for size in sizes)


def _problems(name, groups, widths):
  for g, mean in groups:
    ragged = ragged_sizes(g, mean)
    sizes = _aligned(ragged) if name == "aligned" else ragged
    for n, k in widths:
      yield Problem(name, f"{g}x{mean}, {n}, {k}", sizes, n, k)


_M_WIDTHS = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
_K_WIDTHS = ((4096, 7168), (7168, 2048))
_SMOKE = ((2, 40),)  # Runs in seconds on a CPU.

# benchmark -> set -> its problems
SETS = {
  "m_grouped": {
    "ragged": [*_problems("ragged", _GROUPS, _M_WIDTHS)],
    "aligned": [*_problems("aligned", _GROUPS, _M_WIDTHS)],
    "smoke": [*_problems("smoke", _SMOKE, ((128, 256),))],
  },
  "k_grouped": {
    "ragged": [*_problems("ragged", _GROUPS[:3], _K_WIDTHS)],
    "aligned": [*_problems("aligned", _GROUPS[:3], _K_WIDTHS)],
    "smoke": [*_problems("smoke", _SMOKE, ((128, 256),))],
  },
}

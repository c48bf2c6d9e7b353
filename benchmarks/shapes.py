"""The problems that are timed. Needs no framework."""

import random
from typing import NamedTuple

import numpy as np


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
  max_m: int = 0  # masked: rows that lhs has for each group
  products: int = 1  # of these sizes: 3 in a training step

  @property
  def num_bytes(self) -> int:
    """Least to move, FP8 to bf16: weights of a group without rows stay."""
    slices = -(-self.k // 128)
    weights = self.n * self.k + 4 * -(-self.n // 128) * slices
    rows = sum(self.sizes) * (self.k + 4 * slices + 2 * self.n)
    return sum(size > 0 for size in self.sizes) * weights + rows

  @property
  def flops(self) -> int:
    """Of the rows that are asked for: no padding."""
    return 2 * self.products * sum(self.sizes) * self.n * self.k


# ---------------------------------------------------------------- group sizes


def ragged_sizes(g: int, mean: int) -> tuple[int, ...]:
  """Sizes within 30 % of the mean, the same on every call."""
  rng = random.Random(0)
  return tuple(int(mean * rng.uniform(0.7, 1.3)) for _ in range(g))


def aligned_sizes(g: int, mean: int) -> tuple[int, ...]:
  """The ragged ones, rounded up to what other kernels pad groups to."""
  return tuple(size + -size % 128 for size in ragged_sizes(g, mean))


def zipf_sizes(tokens: int, experts: int, top_k: int) -> tuple[int, ...]:
  """Rows per expert if the i-th most popular one is chosen with weight 1/i.

  Each token goes to `top_k` different experts. The same on every call.
  """
  rng = np.random.default_rng(0)
  weights = np.log(1 / rng.permutation(np.arange(1, experts + 1)))
  return _routed_sizes(tokens, weights, top_k, rng)


def uniform_sizes(tokens: int, experts: int, top_k: int) -> tuple[int, ...]:
  """Rows per expert if all are equally popular, as zipf_sizes."""
  return _routed_sizes(
    tokens, np.zeros(experts), top_k, np.random.default_rng(0)
  )


def _routed_sizes(tokens: int, weights, top_k: int, rng) -> tuple[int, ...]:
  experts = len(weights)
  # The top k of logits with Gumbel noise are samples without replacement.
  logits = weights + rng.gumbel(size=(tokens, experts)).astype(np.float32)
  chosen = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
  return tuple(np.bincount(chosen.ravel(), minlength=experts).tolist())


def one_hot_sizes(g: int, mean: int) -> tuple[int, ...]:
  """All rows in one group."""
  return tuple(g * mean if i == g // 2 else 0 for i in range(g))


# --groups -> sizes of `g` groups of `mean` rows
GROUPS = {
  "aligned": aligned_sizes,
  "ragged": ragged_sizes,
  "zipf": lambda g, mean: zipf_sizes(g * mean, g, 1),
  "one-hot": one_hot_sizes,
}

# ---------------------------------------------------------------- shapes

_M_WIDTHS = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
_GROUPS = ((4, 8192), (8, 4096), (64, 512))  # groups, mean rows

# --shapes -> (groups, mean rows, n, k), sizes as --groups says
_GROUPED = {
  "m_grouped": {
    "deepgemm": [(*g, *w) for g in _GROUPS for w in _M_WIDTHS],
    "small": [(*g, *w) for g in ((256, 128), (160, 96)) for w in _M_WIDTHS],
    # Of "masked" below, for `tune`: the masked layout takes its configs too.
    "masked": [(*g, *w) for g in ((32, 192), (6, 1024)) for w in _M_WIDTHS],
    "smoke": [(2, 40, 128, 256)],
  },
  "k_grouped": {
    "deepgemm": [
      (*g, *w)
      for g in ((4, 8192), (8, 4096), (16, 2048))
      for w in ((4096, 7168), (7168, 2048))
    ],
    "smoke": [(2, 40, 128, 256)],
  },
  "masked": {
    "deepgemm": [
      (*g, *w)
      for g in ((32, 192), (6, 1024), (32, 20), (6, 20))
      for w in _M_WIDTHS
    ],
    "smoke": [(2, 40, 128, 256)],
  },
  "decode": {"smoke": [(4, 3, 128, 256)]},
  "train_step": {
    "deepgemm": [
      (8, 4096, 4096, 4096),
      (64, 512, 7168, 4096),
      (128, 256, 1536, 2048),
    ],
    "smoke": [(2, 40, 128, 256)],
  },
}
# The time of these is that of moving bytes.
MEMORY_BOUND = ("masked", "decode")
_MAX_M, _MAX_M_LARGE = 512, 4096  # masked; as the peers' in the design notes

# model -> experts, top k, d_model, d_ff of an expert. From the models' config
# files.
MODELS = {
  "mixtral-8x7b": (8, 2, 4096, 14336),
  "deepseek-v3": (256, 8, 7168, 2048),
  "qwen3-235b-a22b": (128, 8, 4096, 1536),
  "gpt-oss-120b": (128, 4, 2880, 2880),
  "llama-4-maverick": (128, 1, 5120, 8192),
}
_TOKENS = (4096, 16384, 65536)


def _model_problems():
  """Forward: gate and up projection in one, then down."""
  for model, (experts, top_k, d_model, d_ff) in MODELS.items():
    for tokens in _TOKENS:
      sizes = zipf_sizes(tokens, experts, top_k)
      for name, n, k in (
        ("gate/up", 2 * d_ff, d_model),
        ("down", d_model, d_ff),
      ):
        shape = f"{model} {name} {tokens}"
        yield Problem("models", shape, sizes, n, k)


def _random_moe_problems(count: int = 20):
  """Layers that no table has: what the heuristic is judged by."""
  rng = random.Random(0)
  for _ in range(count):
    experts = rng.choice((8, 16, 32, 64, 128, 256))
    top_k = rng.choice((1, 2, 4, 8))
    tokens = 2 ** rng.randint(10, 15) + rng.randrange(1024)
    n, k = (64 * rng.randint(16, 112) for _ in range(2))
    shape = f"{experts} experts, top {top_k} of {tokens} tokens, {n}, {k}"
    yield Problem("random", shape, zipf_sizes(tokens, experts, top_k), n, k)


def _decode_problems():
  """One decoding step: gate and up projection in one, then down."""
  for model, tokens in (
    ("deepseek-v3", 64),
    ("deepseek-v3", 1),
    ("mixtral-8x7b", 1),
  ):
    experts, top_k, d_model, d_ff = MODELS[model]
    sizes = uniform_sizes(tokens, experts, top_k)
    for name, n, k in (
      ("gate/up", 2 * d_ff, d_model),
      ("one of them", d_ff, d_model),
      ("down", d_model, d_ff),
    ):
      yield Problem("models", f"{model} {name} {tokens}", sizes, n, k)


def names(benchmark: str) -> list[str]:
  """Returns what --shapes may be."""
  of_models = {
    "m_grouped": ["models", "random", "dense"],
    "decode": ["models"],
  }
  return [*_GROUPED[benchmark], *of_models.get(benchmark, [])]


def _max_m(mean: int) -> int:
  return _MAX_M if 2 * mean <= _MAX_M else _MAX_M_LARGE


def problems(benchmark: str, shapes, groups) -> list[Problem]:
  """Returns the problems of the named shapes with the named group sizes.

  Those of "models" and "random" are routed as zipf_sizes says, "dense" is a
  single group.
  """
  result = []
  for name in shapes:
    if name == "models" and benchmark == "decode":
      result += _decode_problems()
    elif name == "models":
      result += _model_problems()
    elif name == "random":
      result += _random_moe_problems()
    elif name == "dense":
      result.append(Problem("dense", "8192, 8192, 8192", (8192,), 8192, 8192))
    else:
      result += [
        Problem(
          sizes,
          f"{g}x{mean}, {n}, {k}",
          GROUPS[sizes](g, mean),
          n,
          k,
          _max_m(mean) if benchmark == "masked" else 0,
          3 if benchmark == "train_step" else 1,
        )
        for sizes in groups
        for g, mean, n, k in _GROUPED[benchmark][name]
      ]
  return result

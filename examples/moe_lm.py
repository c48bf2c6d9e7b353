"""Trains a small mixture-of-experts language model, byte by byte, in FP8.

A decoder-only transformer whose feed-forward layers send every token to 2 of
several SwiGLU experts: `jax_grouped_gemm.moe.moe_layer`.

  python examples/moe_lm.py                               # 2 CPU cores, minutes
  python examples/moe_lm.py --preset gpu --recipe both    # one H100 or H200
"""

import argparse
import dataclasses
import functools
import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

from jax_grouped_gemm import Recipe
from jax_grouped_gemm.moe import MoeParams, moe_layer

RECIPES = {
  "fp8": Recipe(),
  "fp8-e5m2-gradients": Recipe(gradient_dtype=jnp.float8_e5m2),
  "fp8-bf16-wgrad": Recipe(wgrad="bf16"),
  "bf16": Recipe.bf16(),
}
SEVERAL = {"both": ["fp8", "bf16"], "all": [*RECIPES]}
VOCABULARY = 256  # Bytes.
BALANCE_WEIGHT = 0.01  # Of the load-balancing loss.
HELD_OUT = 0.1  # Of the text.


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes of the model and of the run; each is a flag. As given: for a CPU."""

  d_model: int = 128
  d_ff: int = 128  # of one expert
  layers: int = 2
  heads: int = 4
  experts: int = 8
  top_k: int = 2  # experts that each token goes to
  batch: int = 8  # sequences per step
  seq: int = 128  # bytes per sequence
  steps: int = 450
  learning_rate: float = 4e-3
  dtype: str = "float32"  # of the activations; the weights stay in float32
  recipe: str = "fp8"


PRESETS = {
  "cpu": Settings(),
  "gpu": Settings(
    d_model=2048,
    d_ff=2048,
    layers=4,
    heads=16,
    experts=16,
    batch=16,
    seq=512,
    steps=300,
    learning_rate=3e-4,
    dtype="bfloat16",
  ),
}

# ------------------------------------------------------------------- the model


def init(key: jax.Array, s: Settings) -> dict:
  """Returns the weights; those of all layers are stacked along axis 0."""
  keys = iter(jax.random.split(key, 7))

  def weight(*shape: int, fan_in: int, gain: float = 1.0) -> jax.Array:
    return jax.random.normal(next(keys), shape) * (gain / math.sqrt(fan_in))

  l, d, f, e = s.layers, s.d_model, s.d_ff, s.experts
  small = 1 / math.sqrt(2 * l)  # 2 l branches add up in the residual stream.
  return {
    "embed": weight(VOCABULARY, d, fan_in=1),
    "layers": {
      "qkv": weight(l, d, 3 * d, fan_in=d),
      "attention_out": weight(l, d, d, fan_in=d, gain=small),
      "router": weight(l, d, e, fan_in=d),
      "gate_up": weight(l, e, d, 2 * f, fan_in=d),
      "down": weight(l, e, f, d, fan_in=f, gain=small),
    },
    "unembed": weight(d, VOCABULARY, fan_in=d, gain=0.1),
  }


def rms_norm(x: jax.Array) -> jax.Array:
  """Without a gain: the matrix that follows can learn it."""
  x32 = x.astype(jnp.float32)
  scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
  return (x32 * scale).astype(x.dtype)


def rope(x: jax.Array) -> jax.Array:
  """Rotates pairs of x (batch, seq, heads, d_head) by their position."""
  seq, half = x.shape[1], x.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half) / half)
  angle = (jnp.arange(seq)[:, None] * frequency)[:, None, :]
  cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def moe(x: jax.Array, layer: dict, s: Settings):
  """x (tokens, d_model) -> (same shape, load-balancing loss)."""
  experts = MoeParams(layer["router"], layer["gate_up"], layer["down"])
  result = moe_layer(x, experts, s.top_k, recipe=RECIPES[s.recipe])
  return result.out, result.load_balancing_loss


def forward(params: dict, tokens: jax.Array, s: Settings):
  """tokens (batch, seq) -> (logits (batch, seq, 256), load-balancing loss)."""
  batch, seq = tokens.shape
  params = jax.tree.map(lambda w: w.astype(s.dtype), params)

  def block(x, layer):
    qkv = rms_norm(x) @ layer["qkv"]
    q, k, v = jnp.moveaxis(qkv.reshape(batch, seq, 3, s.heads, -1), 2, 0)
    q, k = rope(rms_norm(q)), rope(rms_norm(k))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(x.shape) @ layer["attention_out"]
    y, balance = moe(rms_norm(x).reshape(-1, s.d_model), layer, s)
    return x + y.reshape(x.shape), balance

  # As a product: the gradient of indexing would be a scatter of many rows.
  x = jax.nn.one_hot(tokens, VOCABULARY, dtype=s.dtype) @ params["embed"]
  x, balance = lax.scan(block, x, params["layers"])
  logits = rms_norm(x) @ params["unembed"]
  return logits.astype(jnp.float32), balance.mean()


def nats_per_byte(params: dict, tokens: jax.Array, s: Settings):
  """tokens (batch, seq + 1) -> (mean cross-entropy, load-balancing loss)."""
  logits, balance = forward(params, tokens[:, :-1], s)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  )
  return losses.mean(), balance


# ---------------------------------------------------------------- the training

jit = functools.partial(jax.jit, static_argnames="s")


def make_optimizer(s: Settings) -> optax.GradientTransformation:
  """AdamW with clipping, warm-up and cosine decay."""
  warmup = max(1, s.steps // 10)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, s.learning_rate, warmup, max(s.steps, warmup + 1)
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.95, weight_decay=0.1),
  )


@jit
def init_state(key: jax.Array, s: Settings):
  """Returns (weights, state of the optimizer)."""
  params = init(key, s)
  return params, make_optimizer(s).init(params)


@functools.partial(jit, donate_argnames="state")
def train_step(state, tokens: jax.Array, s: Settings):
  """One step on tokens (batch, seq + 1) -> (state, nats per byte)."""
  # FP8 scales have a floor, which the gradients of a mean would come near.
  scale = float(s.batch * s.seq)

  def objective(params):
    nats, balance = nats_per_byte(params, tokens, s)
    return scale * (nats + BALANCE_WEIGHT * balance), nats

  params, optimizer_state = state
  gradients, nats = jax.grad(objective, has_aux=True)(params)
  gradients = jax.tree.map(lambda g: g / scale, gradients)
  updates, optimizer_state = make_optimizer(s).update(
    gradients, optimizer_state, params
  )
  return (optax.apply_updates(params, updates), optimizer_state), nats


@jit
def evaluate(params: dict, batches: jax.Array, s: Settings):
  """Mean nats per byte of batches (n, batch, seq + 1)."""
  return lax.map(
    lambda tokens: nats_per_byte(params, tokens, s)[0], batches
  ).mean()


@jit
def generate(params: dict, prompt: jax.Array, s: Settings):
  """Samples 300 bytes that continue the prompt (seq,)."""

  def step(window, key):
    logits, _ = forward(params, window[None], s)
    byte = jax.random.categorical(key, logits[0, -1] / 0.7)
    return jnp.roll(window, -1).at[-1].set(byte), byte

  return lax.scan(step, prompt, jax.random.split(jax.random.key(0), 300))[1]


@dataclasses.dataclass
class Run:
  """What one training run showed."""

  recipe: str
  train: list[float] = dataclasses.field(default_factory=list)
  validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
  tokens_per_s: float = 0.0  # of all training steps but the first
  seconds: float = 0.0  # with compilation and validation
  interrupted: bool = False


def train(s: Settings, text: "Text", seed: int) -> Run:
  """Trains one model; Ctrl-C ends it early and keeps what there is."""
  run, started = Run(s.recipe), time.perf_counter()
  try:
    _train(run, s, text, seed)
  except KeyboardInterrupt:
    run.interrupted = True
  run.seconds = time.perf_counter() - started
  return run


def _train(run: Run, s: Settings, text: "Text", seed: int) -> None:
  state = init_state(jax.random.key(seed), s)
  rng = np.random.default_rng(seed)
  held_out = text.held_out_batches(s)

  def validate(step: int) -> None:
    run.validation.append((step, float(evaluate(state[0], held_out, s))))
    tqdm.write(f"step {step}: held out {run.validation[-1][1]:.3f}")

  busy = 0.0
  with tqdm(total=s.steps, desc=s.recipe, unit="step", disable=None) as bar:
    for step in range(s.steps):
      if step % math.ceil(s.steps / 6) == 0:
        validate(step)
      step_started = time.perf_counter()
      state, nats = train_step(state, text.batch(rng, s), s)
      run.train.append(float(nats))  # Waits for the step.
      if step > 0:  # The first one compiles.
        busy += time.perf_counter() - step_started
        run.tokens_per_s = step * s.batch * s.seq / busy
      bar.set_postfix_str(
        f"loss {run.train[-1]:.3f}, {run.tokens_per_s:,.0f} tokens/s"
      )
      bar.update()
    validate(s.steps)
  sample = np.asarray(generate(state[0], text.held_out[: s.seq], s))
  print(
    "Sample:", bytes(sample.astype(np.uint8)).decode(errors="replace"), "\n"
  )


# ------------------------------------------------------------------- the text


@dataclasses.dataclass(frozen=True)
class Text:
  """Bytes to train on, and bytes that come after them."""

  train: np.ndarray
  held_out: np.ndarray

  @classmethod
  def of(cls, data: bytes) -> "Text":
    """Splits off the end of the data."""
    tokens = np.frombuffer(data, np.uint8).astype(np.int32)
    return cls(*np.split(tokens, [round(len(tokens) * (1 - HELD_OUT))]))

  def batch(self, rng: np.random.Generator, s: Settings) -> np.ndarray:
    """Random training sequences (batch, seq + 1)."""
    starts = rng.integers(len(self.train) - s.seq, size=s.batch)
    return self.train[starts[:, None] + np.arange(s.seq + 1)]

  def held_out_batches(self, s: Settings) -> np.ndarray:
    """All whole held-out sequences, as many as fill batches (n, b, seq + 1)."""
    count = (len(self.held_out) - 1) // s.seq
    batch = min(s.batch, count)
    starts = np.arange(count // batch * batch) * s.seq
    windows = self.held_out[starts[:, None] + np.arange(s.seq + 1)]
    return windows.reshape(-1, batch, s.seq + 1)

  def bigram_loss(self) -> float:
    """Nats per held-out byte of the smoothed bigram model."""
    counts = np.full((VOCABULARY, VOCABULARY), 0.1)
    np.add.at(counts, (self.train[:-1], self.train[1:]), 1)
    p = counts / counts.sum(axis=1, keepdims=True)
    return float(-np.log(p[self.held_out[:-1], self.held_out[1:]]).mean())


def python_reference() -> bytes:
  """The language reference that ships inside CPython."""
  from pydoc_data.topics import topics

  # Topics quote each other: a held-out paragraph must not be a known one.
  paragraphs = "\n\n".join(topics.values()).split("\n\n")
  return "\n\n".join(dict.fromkeys(paragraphs)).encode()


# ----------------------------------------------------------------- the results


def plot(path: Path, runs: list[Run], bigram: float, title: str) -> None:
  """Writes the training curves of all runs."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
  for i, run in enumerate(runs):
    color = f"C{i}"
    axes.plot(run.train, color=color, alpha=0.3, linewidth=1)
    label = f"{run.recipe}: {run.tokens_per_s:,.0f} tokens/s"
    if run.validation:
      label += f", validation {run.validation[-1][1]:.3f}"
      axes.plot(*zip(*run.validation, strict=True), "o-", color=color)
    axes.plot([], [], "o-", color=color, label=label)
  axes.axhline(
    bigram, color="gray", linestyle=":", label=f"bigram {bigram:.3f}"
  )
  axes.set(
    title=title,
    xlabel="step",
    ylabel="nats per byte (thin: training, dots: held-out text)",
  )
  axes.set_ylim(bottom=0, top=max(4.0, 1.2 * bigram))
  axes.grid(alpha=0.3)
  axes.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
  """Returns the flags, with the text's bytes as `data`, and the settings."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.error = lambda message: parser.exit(2, f"moe_lm.py: {message}\n")
  parser.add_argument("--preset", choices=PRESETS, default="cpu")
  parser.add_argument("--text", type=Path, help="default: Python's reference")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--plot", type=Path, default=Path("out/moe_lm.png"))
  parser.add_argument("--json", type=Path, help="write the run's numbers here")
  choices = {"recipe": [*RECIPES, *SEVERAL], "dtype": ["float32", "bfloat16"]}
  names = [field.name for field in dataclasses.fields(Settings)]
  for name in names:
    flag, kind = "--" + name.replace("_", "-"), type(getattr(Settings, name))
    parser.add_argument(flag, type=kind, choices=choices.get(name))
  args = parser.parse_args(arguments)

  changes = {n: v for n in names if (v := getattr(args, n)) is not None}
  s = dataclasses.replace(PRESETS[args.preset], **changes)
  for name in names:
    if name not in choices and getattr(s, name) <= 0:
      parser.error(f"{name} is {getattr(s, name)}, must be positive")
  if s.d_model % (2 * s.heads):
    parser.error(f"d_model {s.d_model} is no multiple of 2 * {s.heads} heads")
  if s.top_k > s.experts:
    parser.error(f"top_k {s.top_k} exceeds the {s.experts} experts")
  try:
    args.data = args.text.read_bytes() if args.text else python_reference()
  except (OSError, ImportError) as error:
    parser.error(f"cannot read the text: {error}")
  needed = math.ceil((s.seq + 2) / HELD_OUT)
  if len(args.data) < needed:
    parser.error(f"the text has {len(args.data)} bytes, needs {needed}")
  return args, s


def main(arguments: list[str] | None = None) -> int:
  """Trains, reports, and returns the exit code."""
  args, settings = parse(arguments)
  text = Text.of(args.data)
  bigram = text.bigram_loss()
  device = jax.devices()[0].device_kind
  print(f"{device}: {settings}")

  runs = []
  for name in SEVERAL.get(settings.recipe, [settings.recipe]):
    run = train(dataclasses.replace(settings, recipe=name), text, args.seed)
    runs.append(run)
    if run.interrupted:
      break
    print(
      f"{name}: {run.validation[-1][1]:.4f} nats/byte on held-out text (bigram"
      f" model: {bigram:.4f}), {run.tokens_per_s:,.0f} tokens/s,"
      f" {run.seconds:.0f} s\n"
    )
  else:
    *others, last = runs
    for run in others:
      change = run.validation[-1][1] / last.validation[-1][1] - 1
      print(f"{run.recipe} over {last.recipe}: {change * 100:+.2f} %")

  plot(args.plot, runs, bigram, f"MoE byte-level language model, {device}")
  print(f"Curves: {args.plot}")
  if args.json:
    numbers = {
      "benchmark": "moe_lm",
      "device": device,
      "date": time.strftime("%Y-%m-%d"),
      "command": shlex.join(sys.argv),
      "versions": {"python": platform.python_version(), "jax": jax.__version__},
      "settings": dataclasses.asdict(settings),
      "bigram": bigram,
      "rows": [dataclasses.asdict(run) for run in runs],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(numbers, indent=1) + "\n")
  return 130 if run.interrupted else 0


if __name__ == "__main__":
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit(130)

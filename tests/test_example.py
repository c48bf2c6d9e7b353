import dataclasses
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import moe_lm
import numpy as np
import pytest

TINY = dict(
  d_model=32, d_ff=32, layers=2, heads=2, experts=4, batch=4, seq=32, steps=30
)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
SETTINGS = moe_lm.Settings(**TINY, recipe="bf16")


@pytest.fixture
def text(tmp_path):
  path = tmp_path / "text.txt"
  path.write_bytes(moe_lm.python_reference()[:6000])
  return f"--text={path}"


@pytest.mark.slow
def test_trains_all_recipes(text, tmp_path, capsys):
  plot, numbers = tmp_path / "new" / "curves.png", tmp_path / "new" / "run.json"
  flags = [text, f"--plot={plot}", f"--json={numbers}", "--learning-rate=0.01"]
  assert moe_lm.main(["--recipe=all", *FLAGS, *flags]) == 0

  assert plot.read_bytes().startswith(b"\x89PNG")
  written = json.loads(numbers.read_text())
  assert written["settings"]["d_model"] == 32
  runs = written["rows"]
  recipes = [run["recipe"] for run in runs]
  assert recipes == ["fp8", "fp8-e5m2-gradients", "fp8-bf16-wgrad", "bf16"]
  for run in runs:
    assert len(run["train"]) == 30
    assert run["train"][-1] < run["train"][0] - 1
    assert [step for step, _ in run["validation"]] == [*range(0, 30, 5), 30]
    assert run["validation"][-1][1] < run["validation"][0][1] - 1
    assert run["tokens_per_s"] > 0
  # The same seed: the same weights and batches, but not the same arithmetic.
  *quantized, bf16 = (run["validation"] for run in runs)
  for fp8 in quantized:
    np.testing.assert_allclose(fp8[0][1], bf16[0][1], rtol=5e-3)
    np.testing.assert_allclose(fp8[-1][1], bf16[-1][1], rtol=2e-2)
  last = {run["validation"][-1][1] for run in runs}
  assert len(last) == len(runs)

  out = capsys.readouterr().out
  for recipe in recipes[:-1]:
    assert f"{recipe} over bf16" in out
  assert f"bigram model: {written['bigram']:.4f}" in out
  assert out.count("Sample:") == 4


@pytest.mark.slow
def test_interrupt_leaves_the_curves(text, tmp_path):
  plot, numbers = tmp_path / "curves.png", tmp_path / "run.json"
  flags = [
    text,
    *FLAGS,
    "--steps=1000000",
    f"--plot={plot}",
    f"--json={numbers}",
  ]
  # Of a shell's background jobs it is ignored, which processes inherit.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  process = subprocess.Popen(
    [sys.executable, moe_lm.__file__, "--recipe=both", *flags],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stdout:
    if line.startswith("step 0:"):
      break
  process.send_signal(signal.SIGINT)
  try:
    _, stderr = process.communicate(timeout=300)
  finally:
    process.kill()
  assert process.returncode == 130, stderr
  assert "Traceback" not in stderr
  assert plot.read_bytes().startswith(b"\x89PNG")
  (run,) = json.loads(numbers.read_text())["rows"]
  assert run["interrupted"]
  assert run["validation"][0][0] == 0


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--text=missing.txt"], "missing.txt"),
    (["--text=."], "cannot read the text"),
    (["--text=short.txt"], "the text has 100 bytes, needs 1300"),
    (["--recipe=fp4"], "invalid choice: 'fp4'"),
    (["--steps=0"], "steps is 0, must be positive"),
    (["--steps=many"], "invalid int value: 'many'"),
    (["--d-model=100", "--heads=3"], "d_model 100 is no multiple of 2 * 3"),
    (["--experts=1"], "top_k 2 exceeds the 1 experts"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
  ],
)
def test_bad_argument_gives_one_line(
  flags, message, capsys, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "short.txt").write_text("x" * 100)
  with pytest.raises(SystemExit) as error:
    moe_lm.main(flags)
  assert error.value.code == 2
  stderr = capsys.readouterr().err
  assert message in stderr
  assert stderr.count("\n") == 1 and stderr.startswith("moe_lm.py: ")


@pytest.mark.slow
def test_moe_is_the_weighted_sum_of_the_chosen_experts():
  s = dataclasses.replace(SETTINGS, top_k=3)
  params = moe_lm.init(jax.random.key(0), s)
  layer = jax.tree.map(lambda w: w[0], params["layers"])
  x = jax.random.normal(jax.random.key(1), (50, s.d_model))

  def expert(x, e):
    gate, up = jnp.split(x @ layer["gate_up"][e], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ layer["down"][e]

  def oracle(x):
    p = jax.nn.softmax(x @ layer["router"])
    p = jnp.where(p >= jnp.sort(p)[:, -3:-2], p, 0)
    p = p / p.sum(axis=-1, keepdims=True)
    return sum(p[:, e, None] * expert(x, e) for e in range(s.experts))

  weight = jax.random.normal(jax.random.key(2), x.shape)
  got, vjp = jax.vjp(lambda x: moe_lm.moe(x, layer, s)[0], x)
  expected, oracle_vjp = jax.vjp(oracle, x)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  np.testing.assert_allclose(*vjp(weight), *oracle_vjp(weight), atol=1e-5)


def test_balanced_router_has_balance_loss_one():
  layer = jax.tree.map(
    lambda w: w[0], moe_lm.init(jax.random.key(0), SETTINGS)["layers"]
  )
  x = jax.random.normal(jax.random.key(1), (64, SETTINGS.d_model))
  even = {**layer, "router": jnp.zeros_like(layer["router"])}
  np.testing.assert_allclose(moe_lm.moe(x, even, SETTINGS)[1], 1, rtol=1e-5)
  # All probability on expert 0, to which half of the copies go.
  x = jnp.ones_like(x)
  skewed = {**layer, "router": jnp.eye(32, 4) * jnp.array([90.0, 0, 0, 0])}
  np.testing.assert_allclose(moe_lm.moe(x, skewed, SETTINGS)[1], 2, rtol=1e-5)


def test_model_sees_only_the_past():
  params = moe_lm.init(jax.random.key(0), SETTINGS)
  tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 256)
  before, _ = moe_lm.forward(params, tokens, SETTINGS)
  changed = tokens.at[:, 20].add(1)
  after, _ = moe_lm.forward(params, changed, SETTINGS)
  np.testing.assert_allclose(after[:, :20], before[:, :20], atol=1e-5)
  assert (jnp.abs(after[:, 20:] - before[:, 20:]).max(-1) > 1e-4).all()


def test_default_text_repeats_no_paragraph():
  paragraphs = moe_lm.python_reference().split(b"\n\n")
  assert len(paragraphs) > 1000
  assert len({*paragraphs}) == len(paragraphs)


def test_held_out_text_is_not_trained_on():
  text = moe_lm.Text.of(bytes(range(250)) * 4)
  assert len(text.train) == 900 and len(text.held_out) == 100
  s = dataclasses.replace(SETTINGS, seq=15, batch=4)
  batches = text.held_out_batches(s)
  assert batches.shape == (1, 4, 16)
  np.testing.assert_array_equal(batches[0, 1], text.held_out[15:31])
  rng = np.random.default_rng(0)
  starts = [text.batch(rng, s)[:, 0] for _ in range(2000)]
  assert {*np.concatenate(starts)} == set(range(250))


def test_bigram_loss_is_that_of_the_counts():
  text = moe_lm.Text.of(b"ab" * 5000)
  # Each byte follows from the one before, but for the smoothing.
  assert 0 < text.bigram_loss() < 0.01


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_gpu_preset_fits(recipe):
  s = dataclasses.replace(moe_lm.PRESETS["gpu"], recipe=recipe)
  assert s.d_model % 128 == s.d_ff % 128 == 0
  state = jax.eval_shape(moe_lm.init_state, jax.random.key(0), s)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert size < 20 * 2**30  # Weights and Adam's moments.
  tokens = jax.ShapeDtypeStruct((s.batch, s.seq + 1), jnp.int32)
  new_state, nats = jax.eval_shape(moe_lm.train_step, state, tokens, s)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert nats.shape == ()

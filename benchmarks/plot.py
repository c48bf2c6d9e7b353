"""Draws the rate of each implementation on each shape."""

import json
from pathlib import Path

from benchmarks.shapes import MEMORY_BOUND

_ORDER = (
  "ours",
  "ours_quantized_weights",
  "ours_bf16_wgrad",
  "ours_m_grouped",
  "deepgemm",
  "torch_scaled_grouped_mm",
  "per_expert_loop",
  "torch_grouped_mm",
  "jax_ragged_dot_mgpu",
  "tokamax",
  "lax_ragged_dot",
  "ours_bf16",
  "xla",
)
# Dense products of the same sizes, memory alone: not to be exceeded.
_BOUNDS = {"cublaslt_fp8": "-", "cublaslt_fp8_block": ":"} | dict.fromkeys(
  ("read", "copy"), "-"
)


def plot(source: Path, target: Path) -> int:
  """Draws a panel per set of problems; returns 0."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  result = json.loads(source.read_text())
  memory_bound = result.get("benchmark") in (*MEMORY_BOUND, "quantize")
  rate, unit = ("gbps", "GB/s") if memory_bound else ("tflops", "TFLOP/s")
  rows = [row for row in result["rows"] if rate in row]
  sets = list(dict.fromkeys(row["set"] for row in rows))
  heights = [
    len({r["shape"] for r in rows if r["set"] == name}) for name in sets
  ]
  impls = [i for i in _ORDER if any(row["impl"] == i for row in rows)]
  figure, panels = plt.subplots(
    len(sets),
    figsize=(9, 1.5 + 0.14 * len(impls) * sum(heights)),
    height_ratios=heights,
    squeeze=False,
    layout="constrained",
  )
  for name, axes in zip(sets, panels[:, 0], strict=True):
    of_set = [row for row in rows if row["set"] == name]
    shapes = list(dict.fromkeys(row["shape"] for row in of_set))
    rates = {(row["impl"], row["shape"]): row[rate] for row in of_set}
    for i, impl in enumerate(impls):
      offset = (i + 0.5) / (len(impls) + 1) - 0.5
      axes.barh(
        [j + offset for j in range(len(shapes))],
        [rates.get((impl, shape), 0) for shape in shapes],
        height=1 / (len(impls) + 1),
        label=impl,
        color=plt.get_cmap("tab20")(_ORDER.index(impl)),
      )
    for impl, style in _BOUNDS.items():
      for j, shape in enumerate(shapes):
        if (impl, shape) in rates:
          axes.vlines(
            rates[impl, shape],
            j - 0.5,
            j + 0.5,
            colors="black",
            linestyles=style,
            label=None if j else f"{impl} (bound)",
          )
    axes.set_yticks(range(len(shapes)), shapes, fontsize=7)
    axes.invert_yaxis()
    axes.set_title(name, fontsize=9)
    axes.margins(y=0.01)
  panels[0, 0].legend(fontsize=7, loc="lower right")
  panels[-1, 0].set_xlabel(
    f"{unit} of useful rows, {result['device']}, {result['date']}"
  )
  figure.savefig(target, dpi=110)
  print(target)
  return 0

"""Draws how layers scale over devices, and where their time goes."""

import json
from pathlib import Path

from benchmarks import stage_bars
from benchmarks.expert_parallel_stages import STAGES


def plot(source: Path, target: Path) -> int:
  """Draws weak scaling, and the stages of the most devices below it."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  result = json.loads(source.read_text())
  rows = [row for row in result["rows"] if "us" in row]
  most = max(row["devices"] for row in rows)
  staged = [r for r in rows if "stages" in r and r["devices"] == most]
  scaled = [r for r in rows if r["impl"] == "ours" and "efficiency" in r]
  heights = [4] if scaled else []
  heights += [1 + 0.3 * len(staged)] if staged else []
  figure, axes = plt.subplots(
    len(heights),
    figsize=(10, 0.5 + sum(heights)),
    height_ratios=heights,
    layout="constrained",
    squeeze=False,
  )
  axes = axes[:, 0]
  axes[0].set_title(
    f"{most} x {result['device']}, {result['date']}", fontsize=9
  )
  if scaled:
    _draw_scaling(axes[0], scaled)
  if staged:
    stage_bars.draw(
      axes[-1],
      staged,
      STAGES,
      time_of=lambda row, stage: row["stages"].get(stage, 0),
      bound_of=lambda row: row.get("bound_us"),
      what="time of each stage alone",
    )
  figure.savefig(target, dpi=110)
  print(target)
  return 0


def _draw_scaling(axes, rows):
  lines = {}
  for row in rows:
    label = f"{row['set']} {row['shape'].rsplit(' ', 1)[0]}"
    lines.setdefault(label, []).append((row["devices"], row["efficiency"]))
  colors = {}  # One for both routings of a layer.
  for label, points in lines.items():
    layer = label.replace("zipf", "uniform")
    color = colors.setdefault(layer, f"C{len(colors)}")
    axes.plot(
      *zip(*points, strict=True),
      "-" if label == layer else "--",
      marker="o",
      color=color,
      label=label,
    )
  counts = sorted({row["devices"] for row in rows})
  axes.set_xscale("log", base=2)
  axes.set_xticks(counts, counts)
  axes.set_ylim(bottom=0)
  axes.axhline(1, color="black", linewidth=0.8)
  axes.set_xlabel("devices, each with as many tokens")
  axes.set_ylabel("time on one device / time on all")
  axes.legend(fontsize=6, handlelength=5)

"""Draws how layers scale over devices, and where their time goes."""

import json
from pathlib import Path

from benchmarks.expert_parallel_stages import STAGES


def plot(source: Path, target: Path) -> int:
  """Draws weak scaling above, the stages of the most devices below."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  result = json.loads(source.read_text())
  rows = [row for row in result["rows"] if "us" in row]
  most = max(row["devices"] for row in rows)
  staged = [r for r in rows if "stages" in r and r["devices"] == most]
  figure, (scaling, bars) = plt.subplots(
    2,
    figsize=(9, 5 + 0.3 * len(staged)),
    height_ratios=[4, 1 + 0.3 * len(staged)],
    layout="constrained",
  )
  _draw_scaling(scaling, [row for row in rows if row["impl"] == "ours"])
  _draw_stages(bars, staged)
  bars.set_xlabel(
    "time of each stage alone / time of the whole layer; "
    f"{most} x {result['device']}, {result['date']}"
  )
  figure.legend(
    *bars.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=len(STAGES),
    fontsize=7,
  )
  figure.savefig(target, dpi=110)
  print(target)
  return 0


def _draw_scaling(axes, rows):
  lines = {}
  for row in rows:
    if "efficiency" in row:
      label = f"{row['set']} {row['shape'].rsplit(' ', 1)[0]}"
      lines.setdefault(label, []).append((row["devices"], row["efficiency"]))
  for i, (label, points) in enumerate(lines.items()):
    style = "--" if "zipf" in label else "-"
    axes.plot(
      *zip(*points, strict=True),
      style,
      marker="o",
      color=f"C{i // 2}",
      label=label,
    )
  counts = sorted({row["devices"] for row in rows})
  axes.set_xscale("log", base=2)
  axes.set_xticks(counts, counts)
  axes.set_ylim(0, 1.1)
  axes.axhline(1, color="black", linewidth=0.8)
  axes.set_xlabel("devices, each with as many tokens")
  axes.set_ylabel("time on one device / time on all")
  axes.legend(fontsize=6, handlelength=5)


def _draw_stages(axes, rows):
  labels = [f"{row['set']} {row['shape']} {row['impl']}" for row in rows]
  left = [0.0] * len(rows)
  for i, stage in enumerate(STAGES):
    widths = [row["stages"].get(stage, 0) / row["us"] for row in rows]
    axes.barh(labels, widths, left=left, color=f"C{i}", label=stage)
    left = [a + b for a, b in zip(left, widths, strict=True)]
  for i, row in enumerate(rows):
    axes.text(max(left[i], 1), i, f" {row['us']:.0f} us", va="center")
    if "of_bound" in row:
      axes.vlines(row["of_bound"], i - 0.4, i + 0.4, colors="black")
  axes.axvline(1, color="black", linewidth=0.8)
  axes.invert_yaxis()
  axes.margins(x=0.15)
  axes.set_title("vertical lines: the bound", fontsize=8)

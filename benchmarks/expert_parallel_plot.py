"""Draws how layers scale over devices, and where their time goes."""

import json
from pathlib import Path

from benchmarks import stage_bars
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
    figsize=(10, 5 + 0.3 * len(staged)),
    height_ratios=[4, 1 + 0.3 * len(staged)],
    layout="constrained",
  )
  _draw_scaling(scaling, [row for row in rows if row["impl"] == "ours"])
  stage_bars.draw(
    bars,
    staged,
    STAGES,
    time_of=lambda row, stage: row["stages"].get(stage, 0),
    bound_of=lambda row: row.get("bound_us"),
    what="time of each stage alone",
  )
  bars.set_title(f"{most} x {result['device']}, {result['date']}", fontsize=9)
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

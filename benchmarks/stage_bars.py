"""Draws where the time of layers goes, as stacked bars."""


def draw(axes, rows, parts, *, time_of, bound_of, what: str):
  """Draws a bar for each row: its parts' share of the time of the layer.

  Args:
    axes: of matplotlib.
    rows: of a benchmark's JSON.
    parts: in the order that they are drawn in.
    time_of: time_of(row, part) in microseconds, 0 if the row has none.
    bound_of: bound_of(row), the least time of the row's layer, or None.
    what: the parts are, for the axis' label.
  """
  from matplotlib import colormaps

  labels = [f"{row['set']} {row['shape']} {row['impl']}" for row in rows]
  colors, left = colormaps["tab20"], [0.0] * len(rows)
  for i, part in enumerate(parts):
    widths = [time_of(row, part) / row["us"] for row in rows]
    if any(widths):
      axes.barh(labels, widths, left=left, color=colors(i), label=part)
    left = [a + b for a, b in zip(left, widths, strict=True)]
  for i, row in enumerate(rows):
    axes.text(max(left[i], 1), i, f" {row['us']:.0f} us", va="center")
    if bound := bound_of(row):
      axes.vlines(bound / row["us"], i - 0.4, i + 0.4, "black", ":")
  axes.axvline(1, color="black", linewidth=0.8)
  axes.invert_yaxis()
  axes.margins(x=0.2)
  axes.set_xlabel(f"{what} / time of the whole layer\ndotted: the bound")
  axes.figure.legend(
    *axes.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=6,
    fontsize=7,
  )

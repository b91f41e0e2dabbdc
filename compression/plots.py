"""Figures of the final report, drawn from its JSON alone. No display is needed."""

from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from compression.checkpoint import new_file

# Okabe and Ito's palette, told apart by colour-blind readers too; shapes tell the models apart in grey print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "h")
LARGEST_MARKER = 450.0
"""Area of the largest marker in square points; the others are to scale."""
LEGEND_MARKER = 90.0
DPI = 200


def plot_accuracy_against_gflops(report: dict[str, Any]) -> Figure:
    """Accuracy in percent, with one standard error, against GFLOPs.

    A marker's area is proportional to the size of the weights on disk. Models are named in a legend, not beside
    their markers: models of equal cost and close accuracy lie on top of one another, and so would labels.
    """
    figure = Figure(figsize=(9.6, 5.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    entries = report["models"]
    largest = max(entry["size"]["weights_bytes"] for entry in entries)
    handles = []
    for entry, colour, shape, cap in zip(entries, cycle(COLOURS), cycle(SHAPES), count(3, 1.5), strict=False):
        gflops, accuracy = entry["macs"]["gflops"], 100 * entry["quality"]["accuracy"]
        error = 100 * entry["quality"]["accuracy_standard_error"]
        style = {"marker": shape, "facecolor": to_rgba(colour, 0.35), "edgecolor": colour, "linewidth": 1.4}
        area = LARGEST_MARKER * entry["size"]["weights_bytes"] / largest
        axes.errorbar(gflops, accuracy, yerr=error, color=colour, elinewidth=1, capsize=cap, zorder=2)
        axes.scatter(gflops, accuracy, s=area / _unit_area(shape), zorder=3, **style)
        label = f"{entry['name']}\n{accuracy:.2f} %, {gflops:.2f} GFLOPs"
        handles.append(axes.scatter([], [], s=LEGEND_MARKER / _unit_area(shape), label=label, **style))
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=0)
    _describe_axes(axes, report)
    _add_legends(axes, handles, largest / 1e6)
    return figure


def _describe_axes(axes: Axes, report: dict[str, Any]) -> None:
    data, length = report["data"], report["config"]["flops_sequence_length"]
    axes.set_xlabel(f"GFLOPs per sequence of {length} tokens (1 MAC = 2 FLOPs, attention included)")
    axes.set_ylabel("Accuracy (%), ± 1 standard error")
    axes.set_title(f"Accuracy against compute: {data['name']} validation, n = {data['n']}", fontsize=11)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legends(axes: Axes, models: list[PathCollection], largest: float) -> None:
    """The models by shape and colour, and below them what a marker's area means (sizes in MB)."""
    sizes = [float(f"{share * largest:.2g}") for share in (0.25, 0.5, 1)]
    circles = [
        axes.scatter([], [], s=LARGEST_MARKER * size / largest / _unit_area("o"), color="0.75", label=f"{size:g} MB")
        for size in sizes
    ]
    common = {"frameon": False, "alignment": "left", "fontsize": 9, "title_fontsize": 9}
    axes.figure.legend(handles=models, loc="outside right upper", labelspacing=0.9, **common)
    axes.figure.legend(
        handles=circles,
        title="Marker area: weights on disk",
        loc="outside right lower",
        # Room for the largest marker above, below and beside its text.
        labelspacing=1.8,
        handletextpad=1.4,
        borderpad=1.8,
        **common,
    )


def _unit_area(shape: str) -> float:
    """Area in square points of a marker drawn with `s=1`: shapes drawn with the same `s` differ in area."""
    marker = MarkerStyle(shape)
    # Enlarged, because curves become polygons with segments of about one unit.
    outline = marker.get_path().transformed(marker.get_transform().scale(1000))
    x, y = outline.to_polygons()[0].T
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 1000**2


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all."""
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")

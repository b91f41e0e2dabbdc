"""Figures, drawn from the numbers that others measured. No display is needed."""

from collections.abc import Iterator, Sequence
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

from compression.files import new_file
from compression.structures import CHANNELS, GROUPS

# Okabe and Ito's palette, told apart by colour-blind readers too; shapes tell the models apart in grey print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "h")
LARGEST_MARKER = 450.0
"""Area of the largest marker in square points; the others are to scale."""
LEGEND_MARKER = 90.0
DPI = 200


def plot_accuracy_against_cost(report: dict[str, Any]) -> Figure:
    """Accuracy in percent, with one standard error, against GFLOPs and against size, each with its Pareto front.

    A marker's area is proportional to the size of the weights on disk. Models are named in a legend, not beside
    their markers: models of equal cost and close accuracy lie on top of one another, and so would labels.

    Raises:
        ValueError: a number is not finite; names the model.
    """
    for entry in report["models"]:
        quality = (entry["quality"][name] for name in ("accuracy", "accuracy_standard_error"))
        _require_finite(entry["name"], *quality, entry["macs"]["gflops"], entry["size"]["weights_bytes"])
    figure = Figure(figsize=(14, 5.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    entries, length = report["models"], report["config"]["flops_sequence_length"]
    against_gflops, against_size = figure.subplots(1, 2, sharey=True)
    gflops = [entry["macs"]["gflops"] for entry in entries]
    megabytes = [entry["size"]["weights_bytes"] / 1e6 for entry in entries]
    _draw_models(against_gflops, report, gflops)
    _draw_models(against_size, report, megabytes)
    against_gflops.set_xlabel(f"GFLOPs per sequence of {length} tokens (1 MAC = 2 FLOPs, attention included)")
    against_gflops.set_ylabel("Accuracy (%), ± 1 standard error")
    against_size.set_xlabel("Weights on disk (MB)")
    figure.suptitle(f"{report['data']['name']} validation, n = {report['data']['n']}", fontsize=11)
    handles = [_legend_marker(against_gflops, entry, *look) for entry, *look in _looks(entries)]
    _add_legends(against_gflops, handles, max(megabytes))
    return figure


def _require_finite(model: str, *numbers: float) -> None:
    if not np.isfinite(numbers).all():
        raise ValueError(f"{model}: a number to draw is not finite, among {', '.join(map(str, numbers))}")


def _looks(entries: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each entry with its colour and shape."""
    return zip(entries, cycle(COLOURS), cycle(SHAPES), strict=False)


def _style(colour: str, shape: str) -> dict[str, Any]:
    return {"marker": shape, "facecolor": to_rgba(colour, 0.35), "edgecolor": colour, "linewidth": 1.4}


def _legend_marker(axes: Axes, entry: dict[str, Any], colour: str, shape: str) -> PathCollection:
    accuracy, megabytes = 100 * entry["quality"]["accuracy"], entry["size"]["weights_bytes"] / 1e6
    label = f"{entry['name']}\n{accuracy:.2f} %, {entry['macs']['gflops']:.2f} GFLOPs, {megabytes:.1f} MB"
    return axes.scatter([], [], s=LEGEND_MARKER / _unit_area(shape), label=label, **_style(colour, shape))


def _draw_models(axes: Axes, report: dict[str, Any], costs: list[float]) -> None:
    """The models' accuracy against their cost, and the Pareto front of the two."""
    entries = report["models"]
    largest = max(entry["size"]["weights_bytes"] for entry in entries)
    accuracies = [100 * entry["quality"]["accuracy"] for entry in entries]
    front = pareto_front(costs, accuracies)
    axes.plot(*zip(*front, strict=True), color="0.6", linestyle="--", linewidth=1, drawstyle="steps-post", zorder=1)
    for (entry, colour, shape), cost, accuracy, cap in zip(
        _looks(entries), costs, accuracies, count(3, 1.5), strict=False
    ):
        error = 100 * entry["quality"]["accuracy_standard_error"]
        area = LARGEST_MARKER * entry["size"]["weights_bytes"] / largest
        axes.errorbar(cost, accuracy, yerr=error, color=colour, elinewidth=1, capsize=cap, zorder=2)
        axes.scatter(cost, accuracy, s=area / _unit_area(shape), zorder=3, **_style(colour, shape))
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=0)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def pareto_front(costs: Sequence[float], accuracies: Sequence[float]) -> list[tuple[float, float]]:
    """The points (cost, accuracy), by rising cost, than which no other is both as cheap and more accurate."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(zip(costs, accuracies, strict=True), key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


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
        title="Marker area: weights on disk;\ndashed: Pareto front",
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


def plot_model_comparison(rows: list[dict[str, Any]]) -> Figure:
    """Four panels, a row per model in each: accuracy, inference time, load time, size; with their spread.

    Args:
        rows: one per model, as `evaluate_plot.py` writes them to its table. Spread is one standard error of the
            accuracy, and the 10th to 90th percentile of the times.

    Raises:
        ValueError: a number is not finite; names the model.
    """
    for row in rows:
        _require_finite(row["model"], *(value for value in row.values() if isinstance(value, int | float)))
    figure = Figure(figsize=(11, 2.4 + 0.8 * len(rows)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharey=True)
    accuracy = np.array([100 * row["accuracy"] for row in rows])
    error = np.array([100 * row["accuracy_standard_error"] for row in rows])
    # Points, not bars: this axis does not begin at zero.
    for place, colour in zip(range(len(rows)), cycle(COLOURS), strict=False):
        panels[0, 0].errorbar(accuracy[place], place, xerr=error[place], fmt="o", color=colour, capsize=3)
    _label_rows(panels[0, 0], rows, accuracy, accuracy + error, "Accuracy (%), ± 1 standard error", "{:.2f}")
    for axes, name, unit, label in (
        (panels[0, 1], "inference", "ms", "Inference time, one sequence (ms)"),
        (panels[1, 0], "load", "s", "Load time (s)"),
    ):
        low, median, high = (
            np.array([row[f"{name}_{key}_{unit}"] for row in rows]) for key in ("p10", "median", "p90")
        )
        _bars(axes, rows, median, np.stack([median - low, high - median]), f"{label}, 10th–90th percentile", "{:.3g}")
    _bars(panels[1, 1], rows, np.array([row["weights_bytes"] / 1e6 for row in rows]), None, "Weights (MB)", "{:.1f}")
    figure.suptitle(f"{rows[0]['data']} validation, n = {rows[0]['sentences']}", fontsize=11)
    return figure


def _bars(
    axes: Axes, rows: list[dict[str, Any]], values: np.ndarray, spread: np.ndarray | None, label: str, number: str
) -> None:
    """Horizontal bars; `spread` [2, rows] is how far the values spread below and above."""
    places = np.arange(len(rows))
    colours = [colour for colour, _ in zip(cycle(COLOURS), rows, strict=False)]
    axes.barh(places, values, xerr=spread, color=[to_rgba(colour, 0.45) for colour in colours], edgecolor=colours,
              error_kw={"elinewidth": 1, "capsize": 3})  # fmt: skip
    _label_rows(axes, rows, values, values if spread is None else values + spread[1], label, number)


def _label_rows(
    axes: Axes, rows: list[dict[str, Any]], values: np.ndarray, ends: np.ndarray, label: str, number: str
) -> None:
    """Name the rows, and write each value behind where its drawing ends."""
    for place, (value, end) in enumerate(zip(values, ends, strict=True)):
        axes.annotate(number.format(value), (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    axes.grid(axis="x", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_retained(rows: list[dict[str, Any]]) -> Figure:
    """Share of each layer's attention and MLP parameters that is left, a pair of bars per layer of the dense model.

    Args:
        rows: the table of all structures, see `GlobalPruning.table`.
    """
    depth = 1 + max(row["layer"] for row in rows)
    figure = Figure(figsize=(max(6, 0.32 * depth), 3.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (kind, label) in enumerate(((GROUPS, "attention"), (CHANNELS, "MLP"))):
        total, left = np.zeros(depth), np.zeros(depth)
        for row in rows:
            if row["kind"] == kind:
                total[row["layer"]] += 1
                left[row["layer"]] += row["removed_in_step"] is None
        shares = 100 * left / np.maximum(total, 1)
        colour = COLOURS[place]
        axes.bar(np.arange(depth) + 0.4 * place - 0.2, shares, 0.4, label=label, color=to_rgba(colour, 0.45),
                 edgecolor=colour)  # fmt: skip
    axes.set_xlabel("Layer of the dense model")
    axes.set_ylabel("Left (%)")
    axes.set_ylim(0, 105)
    axes.set_xlim(-0.6, depth - 0.4)
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_removal(removal: dict[str, Any]) -> Figure:
    """Perplexity without each layer, each attention and each MLP, on a logarithmic axis.

    Args:
        removal: see `calibration.removal_perplexities`. What is not finite is left out: without an important layer a
            perplexity can exceed all numbers.
    """
    figure = Figure(figsize=(max(6, 0.32 * len(removal["layer"])), 3.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for part, label, colour, shape in zip(
        ("layer", "attention", "mlp"), ("whole layer", "attention", "MLP"), COLOURS, SHAPES, strict=False
    ):
        axes.plot(removal[part], marker=shape, markersize=4, linewidth=1, color=colour, label=f"without {label}")
    axes.axhline(removal["dense"], color="0.4", linewidth=1, linestyle="--", label="dense model")
    if np.isfinite([*removal["layer"], *removal["attention"], *removal["mlp"], removal["dense"]]).any():
        axes.set_yscale("log")
    axes.set_xlabel("Layer")
    axes.set_ylabel("Perplexity")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_rates(rows: list[dict[str, Any]]) -> Figure:
    """What each layer loses, as bars, and the perplexity without that layer on a logarithmic axis beside them.

    Args:
        rows: one per layer: `removed`, the share of its parameters that went; `removal_perplexity`, or None.
    """
    figure = Figure(figsize=(max(6, 0.32 * len(rows)), 3.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars, line = COLOURS[:2]
    axes.bar([row["layer"] for row in rows], [100 * row["removed"] for row in rows], color=to_rgba(bars, 0.45),
             edgecolor=bars, label="removed")  # fmt: skip
    axes.set_xlabel("Layer")
    axes.set_ylabel("Removed (%)")
    axes.spines[["top", "right"]].set_visible(False)
    known = [row for row in rows if row["removal_perplexity"] is not None]
    if known:
        other = axes.twinx()
        other.plot([row["layer"] for row in known], [row["removal_perplexity"] for row in known], color=line,
                   marker="s", markersize=4, linewidth=1, label="perplexity without the layer")  # fmt: skip
        other.set_yscale("log")
        other.set_ylabel("Perplexity without the layer")
        other.spines["top"].set_visible(False)
    figure.legend(ncols=2, loc="outside upper center", frameon=False, fontsize=8)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all."""
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format=Path(path).suffix[1:])

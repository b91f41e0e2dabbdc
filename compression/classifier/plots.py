"""Figures of classifiers, drawn from the numbers that others measured."""

from collections.abc import Sequence
from itertools import count
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D

from compression.classifier.models import EVALUATED, EvaluatedModel, looks
from compression.plots import bar_style, new_figure, open_frame, require_finite

LARGEST_MARKER = 450.0
"""Area of the largest marker in square points; the others are to scale."""
LEGEND_MARKER = 90.0
LEGEND_WIDTH = 42
"""Characters of a model's name on a line."""
LEGEND_LINE = 0.22
"""Height of a line of the legend in inches, with its share of the space between models."""


def plot_accuracy_against_cost(report: dict[str, Any], models: Sequence[EvaluatedModel] = EVALUATED) -> Figure:
    """Accuracy in percent, with one standard error, against GFLOPs and against size, each with its Pareto front.

    A marker's area is proportional to the size of the weights on disk. Models are named in a legend, not beside
    their markers: models of equal cost and close accuracy lie on top of one another, and so would labels.

    Raises:
        ValueError: a number is not finite; names the model.
    """
    for entry in report["models"]:
        quality = (entry["quality"][name] for name in ("accuracy", "accuracy_standard_error"))
        require_finite(entry["name"], *quality, entry["macs"]["gflops"], entry["size"]["weights_bytes"])
    entries, length = report["models"], report["config"]["flops_sequence_length"]
    lines = sum(1 + len(_legend_name(entry).splitlines()) for entry in entries)
    figure = new_figure(14, max(5.6, LEGEND_LINE * lines + 2))
    against_gflops, against_size = figure.subplots(1, 2, sharey=True)
    gflops = [entry["macs"]["gflops"] for entry in entries]
    megabytes = [entry["size"]["weights_bytes"] / 1e6 for entry in entries]
    styles = list(looks([entry["name"] for entry in entries], models))
    _draw_models(against_gflops, entries, styles, gflops)
    _draw_models(against_size, entries, styles, megabytes)
    against_gflops.set_xlabel(f"GFLOPs per sequence of {length} tokens\n(1 MAC = 2 FLOPs, attention included)")
    against_gflops.set_ylabel("Accuracy (%), ± 1 standard error")
    against_size.set_xlabel("Weights on disk (MB)")
    figure.suptitle(f"{report['data']['name']} validation, n = {report['data']['n']}", fontsize=11)
    handles = [_legend_marker(against_gflops, entry, *look) for entry, look in zip(entries, styles, strict=True)]
    _add_legends(against_gflops, handles, max(megabytes))
    return figure


def _style(colour: str, shape: str) -> dict[str, Any]:
    return {"marker": shape, "facecolor": to_rgba(colour, 0.35), "edgecolor": colour, "linewidth": 1.4}


def _legend_name(entry: dict[str, Any]) -> str:
    return fill(entry["name"], LEGEND_WIDTH)


def _legend_marker(axes: Axes, entry: dict[str, Any], colour: str, shape: str) -> PathCollection:
    accuracy, megabytes = 100 * entry["quality"]["accuracy"], entry["size"]["weights_bytes"] / 1e6
    label = f"{_legend_name(entry)}\n{accuracy:.2f} %, {entry['macs']['gflops']:.2f} GFLOPs, {megabytes:.1f} MB"
    return axes.scatter([], [], s=LEGEND_MARKER / _unit_area(shape), label=label, **_style(colour, shape))


def _draw_models(axes: Axes, entries: list[dict[str, Any]], styles: list[tuple[str, str]], costs: list[float]) -> None:
    """The models' accuracy against their cost, and the Pareto front of the two."""
    largest = max(entry["size"]["weights_bytes"] for entry in entries)
    accuracies = [100 * entry["quality"]["accuracy"] for entry in entries]
    front = pareto_front(costs, accuracies)
    axes.plot(*zip(*front, strict=True), color="0.6", linestyle="--", linewidth=1, drawstyle="steps-post", zorder=1)
    for entry, (colour, shape), cost, accuracy, cap in zip(
        entries, styles, costs, accuracies, count(3, 1.5), strict=False
    ):
        error = 100 * entry["quality"]["accuracy_standard_error"]
        area = LARGEST_MARKER * entry["size"]["weights_bytes"] / largest
        axes.errorbar(cost, accuracy, yerr=error, color=colour, elinewidth=1, capsize=cap, zorder=2)
        axes.scatter(cost, accuracy, s=area / _unit_area(shape), zorder=3, **_style(colour, shape))
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=0)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    open_frame(axes)


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
    outline = marker.get_path().transformed(marker.get_transform() + Affine2D().scale(1000))
    x, y = np.transpose(outline.to_polygons()[0])
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 1000**2


def plot_model_comparison(rows: list[dict[str, Any]], models: Sequence[EvaluatedModel] = EVALUATED) -> Figure:
    """Four panels, a row per model in each: accuracy, inference time, load time, size; with their spread.

    Args:
        rows: one per model, as `evaluate_plot.py` writes them to its table. Spread is one standard error of the
            accuracy, and the 10th to 90th percentile of the times.

    Raises:
        ValueError: a number is not finite; names the model.
    """
    for row in rows:
        require_finite(row["model"], *(value for value in row.values() if isinstance(value, int | float)))
    figure = new_figure(11, 2.4 + 0.8 * len(rows))
    panels = figure.subplots(2, 2, sharey=True)
    colours = [colour for colour, _ in looks([row["model"] for row in rows], models)]
    accuracy = np.array([100 * row["accuracy"] for row in rows])
    error = np.array([100 * row["accuracy_standard_error"] for row in rows])
    # Points, not bars: this axis does not begin at zero.
    for place, colour in enumerate(colours):
        panels[0, 0].errorbar(accuracy[place], place, xerr=error[place], fmt="o", color=colour, capsize=3)
    _label_rows(panels[0, 0], rows, accuracy, accuracy + error, "Accuracy (%), ± 1 standard error", "{:.2f}")
    for axes, name, unit, label in (
        (panels[0, 1], "inference", "ms", "Inference time, one sequence (ms)"),
        (panels[1, 0], "load", "s", "Load time (s)"),
    ):
        low, median, high = (
            np.array([row[f"{name}_{key}_{unit}"] for row in rows]) for key in ("p10", "median", "p90")
        )
        spread = np.stack([median - low, high - median])
        _bars(axes, rows, colours, median, spread, f"{label}, 10th–90th percentile", "{:.3g}")
    sizes = np.array([row["weights_bytes"] / 1e6 for row in rows])
    _bars(panels[1, 1], rows, colours, sizes, None, "Weights (MB)", "{:.1f}")
    figure.suptitle(f"{rows[0]['data']} validation, n = {rows[0]['sentences']}", fontsize=11)
    return figure


def _bars(
    axes: Axes,
    rows: list[dict[str, Any]],
    colours: list[str],
    values: np.ndarray,
    spread: np.ndarray | None,
    label: str,
    number: str,
) -> None:
    """Horizontal bars; `spread` [2, rows] is how far the values spread below and above."""
    caps = {"elinewidth": 1, "capsize": 3}
    axes.barh(np.arange(len(rows)), values, xerr=spread, error_kw=caps, **bar_style(colours))
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
    open_frame(axes)

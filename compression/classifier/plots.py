"""Figures of classifiers, drawn from the numbers that others measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from compression.classifier.models import EVALUATED, EvaluatedModel, looks
from compression.plots import bar_style, new_figure, open_frame, require_finite, undominated, unit_area

LARGEST_MARKER = 450.0
"""Area of the largest marker in square points; the others are to scale."""
CAPS = (3.0, 4.5, 6.0, 7.5, 9.0, 10.5)
"""Widths of the ends of error bars in points: those of neighbours differ, so that equal bars are told apart."""
LEGEND_MARKER = 90.0
LEGEND_WIDTH = 42
"""Characters of a model's name on a line."""
LEGEND_LINE = 0.22
"""Height of a line of the legend in inches, with its share of the space between models."""


@dataclass(frozen=True)
class Quality:
    """The task's primary metric as figures show it.

    Attributes:
        label: of its axis.
        number: how a value is written.
        values: one per model.
        errors: one standard error of each; None for metrics other than accuracy, whose error is not binomial.
    """

    label: str
    number: str
    values: list[float]
    errors: list[float | None]


def quality_of(found: Sequence[dict[str, Any]], task: dict[str, Any]) -> Quality:
    """The primary metric of models.

    Args:
        found: what `classification_metrics` gives of each.
        task: what `describe_task` says of it.
    """
    primary, title = task["primary"], task["metrics"][task["primary"]]
    if primary != "accuracy":
        return Quality(title, f"{title} {{:.4f}}", [one[primary] for one in found], [None] * len(found))
    errors: list[float | None] = [100 * one["accuracy_standard_error"] for one in found]
    return Quality(f"{title} (%), ± 1 standard error", "{:.2f} %", [100 * one["accuracy"] for one in found], errors)


def plot_quality_against_cost(report: dict[str, Any], models: Sequence[EvaluatedModel] = EVALUATED) -> Figure:
    """The task's primary metric, see `quality_of`, against GFLOPs and against size, each with its Pareto front.

    A marker's area is proportional to the size of the weights on disk. Models are named in a legend, not beside
    their markers: models of equal cost and close accuracy lie on top of one another, and so would labels.

    Raises:
        ValueError: a number is not finite; names the model.
    """
    entries, length = report["models"], report["config"]["flops_sequence_length"]
    quality = quality_of([entry["quality"] for entry in entries], report["task"])
    for entry, value, error in zip(entries, quality.values, quality.errors, strict=True):
        costs = entry["macs"]["gflops"], entry["size"]["weights_bytes"]
        require_finite(entry["name"], value, *filter(None, [error]), *costs)
    lines = sum(1 + len(_legend_name(entry).splitlines()) for entry in entries)
    figure = new_figure(14, max(5.6, LEGEND_LINE * lines + 2))
    against_gflops, against_size = figure.subplots(1, 2, sharey=True)
    gflops = [entry["macs"]["gflops"] for entry in entries]
    megabytes = [entry["size"]["weights_bytes"] / 1e6 for entry in entries]
    styles = list(looks([entry["name"] for entry in entries], models))
    _draw_models(against_gflops, entries, styles, gflops, quality)
    _draw_models(against_size, entries, styles, megabytes, quality)
    against_gflops.set_xlabel(f"GFLOPs per sequence of {length} tokens\n(1 MAC = 2 FLOPs, attention included)")
    against_gflops.set_ylabel(quality.label)
    against_size.set_xlabel("Weights on disk (MB)")
    _title(figure, report["data"]["name"], report["data"]["n"])
    handles = [
        _legend_marker(against_gflops, entry, quality.number.format(value), *look)
        for entry, value, look in zip(entries, quality.values, styles, strict=True)
    ]
    _add_legends(against_gflops, handles, max(megabytes))
    return figure


def _title(figure: Figure, data: str, rows: int) -> None:
    figure.suptitle(f"{data} validation, n = {rows}", fontsize=11, parse_math=False)


def _style(colour: str, shape: str) -> dict[str, Any]:
    return {"marker": shape, "facecolor": to_rgba(colour, 0.35), "edgecolor": colour, "linewidth": 1.4}


def _legend_name(entry: dict[str, Any]) -> str:
    return fill(entry["name"], LEGEND_WIDTH)


def _legend_marker(axes: Axes, entry: dict[str, Any], quality: str, colour: str, shape: str) -> PathCollection:
    megabytes = entry["size"]["weights_bytes"] / 1e6
    label = f"{_legend_name(entry)}\n{quality}, {entry['macs']['gflops']:.2f} GFLOPs, {megabytes:.1f} MB"
    return axes.scatter([], [], s=LEGEND_MARKER / unit_area(shape), label=label, **_style(colour, shape))


def _draw_models(
    axes: Axes, entries: list[dict[str, Any]], styles: list[tuple[str, str]], costs: list[float], quality: Quality
) -> None:
    """The models' quality against their cost, and the Pareto front of the two."""
    largest = max(entry["size"]["weights_bytes"] for entry in entries)
    front = pareto_front(costs, quality.values)
    axes.plot(*zip(*front, strict=True), color="0.6", linestyle="--", linewidth=1, drawstyle="steps-post", zorder=1)
    for entry, (colour, shape), cost, value, error, cap in zip(
        entries, styles, costs, quality.values, quality.errors, cycle(CAPS), strict=False
    ):
        area = LARGEST_MARKER * entry["size"]["weights_bytes"] / largest
        axes.errorbar(cost, value, yerr=error, color=colour, elinewidth=1, capsize=cap, zorder=2)
        axes.scatter(cost, value, s=area / unit_area(shape), zorder=3, **_style(colour, shape))
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=0)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    open_frame(axes)


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[tuple[float, float]]:
    """The points (cost, quality), by rising cost, than which no other is both as cheap and better."""
    points = list(zip(costs, qualities, strict=True))
    return sorted({points[place] for place in undominated(points, [False, True])})


def _add_legends(axes: Axes, models: list[PathCollection], largest: float) -> None:
    """The models by shape and colour, and below them what a marker's area means (sizes in MB)."""
    sizes = [float(f"{share * largest:.2g}") for share in (0.25, 0.5, 1)]
    circles = [
        axes.scatter([], [], s=LARGEST_MARKER * size / largest / unit_area("o"), color="0.75", label=f"{size:g} MB")
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


def plot_model_comparison(
    rows: list[dict[str, Any]], task: dict[str, Any], models: Sequence[EvaluatedModel] = EVALUATED
) -> Figure:
    """Four panels, a row per model in each: the task's primary metric, inference time, load time, size; with spread.

    Args:
        rows: one per model, as `evaluate_plot.py` writes them to its table. Spread is one standard error of an
            accuracy, and the 10th to 90th percentile of the times.
        task: what `describe_task` says of it.

    Raises:
        ValueError: a number is not finite; names the model.
    """
    for row in rows:
        require_finite(row["model"], *(value for value in row.values() if isinstance(value, int | float)))
    figure = new_figure(11, 2.4 + 0.8 * len(rows))
    panels = figure.subplots(2, 2, sharey=True)
    colours = [colour for colour, _ in looks([row["model"] for row in rows], models)]
    quality = quality_of(rows, task)
    # Points, not bars: this axis does not begin at zero.
    for place, colour in enumerate(colours):
        value, error = quality.values[place], quality.errors[place]
        panels[0, 0].errorbar(value, place, xerr=error, fmt="o", color=colour, capsize=3)
    values = np.array(quality.values)
    ends = values + [error or 0.0 for error in quality.errors]
    _label_rows(panels[0, 0], rows, values, ends, quality.label, "{:.4f}" if None in quality.errors else "{:.2f}")
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
    _title(figure, rows[0]["data"], rows[0]["sentences"])
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


CELL, LARGEST_PANEL = 0.6, 9.0
"""Inches of a class in a confusion matrix, and of the whole matrix at most."""
LARGEST_FONT, SMALLEST_FONT = 9.0, 4.5
"""Points of a matrix's text."""
CHARACTER = 0.6
"""Width of a character in parts of its font's size."""
LABEL_WIDTH = 40
"""Characters of a label; a longer one ends in an ellipsis."""


def checkpoints_in_pytorch(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a report in PyTorch, the first one of each checkpoint."""
    entries = [entry for entry in report["models"] if entry["engine"]["name"] == "PyTorch"]
    return list({entry["folder"]: entry for entry in reversed(entries)}.values())[::-1]


def plot_confusion_matrices(report: dict[str, Any]) -> Figure:
    """How often each class is taken for each, a panel per checkpoint, in colours that show shares of the true class.

    Numbers of rows are printed where they fit, and every label that fits.
    """
    entries, labels = checkpoints_in_pytorch(report), report["task"]["labels"]
    labels = [label if len(label) <= LABEL_WIDTH else f"{label[: LABEL_WIDTH - 1]}…" for label in labels]
    size = min(max(CELL * len(labels), 4 * CELL), LARGEST_PANEL)
    cell = 72 * size / len(labels)
    font = min(LARGEST_FONT, max(0.75 * cell, SMALLEST_FONT))
    beside = CHARACTER * font * max(map(len, labels)) / 72 + 0.6
    columns = ceil(len(entries) ** 0.5)
    rows = ceil(len(entries) / columns)
    figure = new_figure(columns * (size + 0.2) + beside + 1.2, rows * (size + 0.4) + beside + 0.5)
    figure.set_layout_engine("compressed")
    panels = figure.subplots(rows, columns, squeeze=False)
    for place, (axes, entry) in enumerate(zip(panels.flat, entries, strict=False)):
        counts = np.array(entry["quality"]["confusion_matrix"])
        image = axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(fill(entry["name"], int(1.1 * size * 72 / (CHARACTER * 10))), fontsize=10, parse_math=False)
        _label_classes(axes, labels, cell, font)
        if place % columns:
            axes.set(ylabel=None, yticklabels=[])
        if place + columns < len(entries):
            axes.set(xlabel=None, xticklabels=[])
        _print_counts(axes, counts, cell)
    for axes in panels.flat[len(entries) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=panels, label="Share of the true class", shrink=0.6)
    _title(figure, report["data"]["name"], report["data"]["n"])
    return figure


def _label_classes(axes: Axes, labels: list[str], cell: float, font: float) -> None:
    """Name the classes on both axes, upright where they would touch; `cell` and `font` are in points."""
    places = range(0, len(labels), ceil(font / cell))
    named = [labels[place] for place in places]
    upright = CHARACTER * font * max(map(len, labels)) > 0.95 * cell
    axes.set_xticks(places, named, fontsize=font, rotation=90 if upright else 0, parse_math=False)
    axes.set_yticks(places, named, fontsize=font, parse_math=False)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True")


def _print_counts(axes: Axes, counts: np.ndarray, cell: float) -> None:
    """Print the numbers of rows that are not 0 where the largest has room in a cell of so many points."""
    font = min(LARGEST_FONT, 0.95 * cell / (CHARACTER * len(str(counts.max()))))
    if font < SMALLEST_FONT:
        return
    for truth, predicted in zip(*counts.nonzero(), strict=True):
        dark = counts[truth, predicted] > 0.5 * counts[truth].sum()
        colour = "white" if dark else "black"
        axes.text(
            predicted, truth, str(counts[truth, predicted]), ha="center", va="center", fontsize=font, color=colour
        )

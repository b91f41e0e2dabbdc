"""Rows of classifier_pruning_methods.json as a table and a curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from compression.classifier.metrics import paired_difference
from compression.plots import COLOURS, MARKERS, new_figure, open_frame
from compression.tables import Column, markdown_table

OURS, TEACHER = "ours", "teacher"


def hits_of(rows: Sequence[dict[str, Any]]) -> Tensor:
    """How often each sentence was right over the seeds [sentences]."""
    return torch.stack([torch.tensor([int(hit) for hit in row["hits"]], dtype=torch.double) for row in rows]).mean(0)


@dataclass(frozen=True)
class Point:
    """A method at a ratio, over its seeds.

    Attributes:
        spread: of the accuracy over seeds, in points; None of one seed.
        against: by name (teacher, ours) the difference in accuracy in points and its paired standard error.
    """

    method: str
    ratio: float
    share: float
    accuracy: float
    spread: float | None
    against: dict[str, tuple[float, float]]
    parameters: float
    throughput: float | None
    speed_up: float | None

    @property
    def error(self) -> float:
        """Over seeds, else the paired one against ours, else against the teacher."""
        if self.spread is not None:
            return self.spread
        return self.against.get(OURS, self.against[TEACHER])[1]


def points(found: dict[str, Any]) -> list[Point]:
    """What was measured, ratio by ratio; methods in the order of their accuracy."""
    done = [row for row in found["rows"] if "hits" in row]
    places = {(row["ratio"], row["method"]): [] for row in done}
    for row in done:
        places[row["ratio"], row["method"]].append(row)
    made = [_point(found, rows, places.get((ratio, OURS))) for (ratio, _), rows in places.items()]
    return sorted(made, key=lambda point: (point.ratio, -point.accuracy))


def _point(found: dict[str, Any], rows: list[dict[str, Any]], ours: list[dict[str, Any]] | None) -> Point:
    method, ratio, hits = rows[0]["method"], rows[0]["ratio"], hits_of(rows)
    accuracies = [100 * row["accuracy"] for row in rows]
    others = {TEACHER: [found["teacher"]]} | ({OURS: ours} if ours and method != OURS else {})
    differences = {name: paired_difference(hits, hits_of(other)) for name, other in others.items()}
    speed = found["throughput"]
    throughput = speed.get(key_of(rows[0]))
    return Point(
        method,
        ratio,
        100 * mean(row["share"] for row in rows),
        mean(accuracies),
        stdev(accuracies) if len(rows) > 1 else None,
        {name: tuple(difference.values()) for name, difference in differences.items()},
        mean(row["parameters"]["total"] for row in rows) / 1e6,
        throughput,
        None if throughput is None else throughput / speed[TEACHER],
    )


def key_of(row: dict[str, Any]) -> str:
    """What a row is called."""
    return f"{row['method']}_{row['ratio']:g}_{row['seed']}"


def table(found: dict[str, Any]) -> str:
    """All points, and under them what could not be had."""
    columns = [
        Column("MACs removed", lambda point: 100 * point.ratio, "{:g} %"),
        Column("method", lambda point: point.method),
        Column("MACs left", lambda point: point.share, "{:.2f} %"),
        Column("accuracy", lambda point: point.accuracy, "{:.2f}"),
        Column("± over seeds", lambda point: point.spread, "{:.2f}", "-"),
        Column("against the teacher", lambda point: point.against[TEACHER], "{:+.2f} ± {:.2f}"),
        Column("against ours", lambda point: point.against.get(OURS), "{:+.2f} ± {:.2f}", "-"),
        Column("sentences per second", lambda point: point.throughput, "{:,.1f}", "-"),
        Column("times the teacher's", lambda point: point.speed_up, "{:.2f}", "-"),
        Column("million parameters", lambda point: point.parameters, "{:.2f}"),
    ]
    failed = {(row["method"], row["ratio"]): row["impossible"] for row in found["rows"] if "impossible" in row}
    notes = [f"- {method} at {100 * ratio:g} %: {why}" for (method, ratio), why in failed.items()]
    return "\n".join([markdown_table(columns, points(found)), *([""] if notes else []), *notes])


def draw(found: dict[str, Any]) -> Figure:
    """Accuracy against the share of MACs that is left, a curve for each method."""
    figure, made = new_figure(7, 4.5), points(found)
    axes = figure.subplots()
    axes.axhline(100 * found["teacher"]["accuracy"], color="0.6", linestyle="--", label=TEACHER)
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    for method, colour, marker in zip(methods, COLOURS, MARKERS, strict=False):
        curve = [point for point in made if point.method == method]
        if curve:
            values = [point.share for point in curve], [point.accuracy for point in curve]
            errors = [point.error for point in curve]
            axes.errorbar(*values, yerr=errors, color=colour, marker=marker, capsize=2, label=method)
    axes.set(xscale="log", xlabel="% of the teacher's encoder MACs left", ylabel="accuracy")
    shares = sorted({round(100 * (1 - point.ratio), 6) for point in made})
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    open_frame(axes)
    return figure

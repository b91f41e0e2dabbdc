"""Rows of llm_pruning_methods.json as a table and as curves."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compression.plots import COLOURS, MARKERS, SPARE_MARKERS, new_figure, open_frame
from compression.tables import Column, at, markdown_table

STAGES = {"pruned": "no training", "recovered": "after recovery"}
# The frame ends at so many times the dense perplexity; what is above stands in the table alone.
HIGHEST = 100
# Inches of a method's line beside the panels.
LEGEND_LINE = 0.17
# Points of the share that is gone which are left beside the curves, also where there is one ratio only.
BESIDE = 5

Row = dict[str, Any]


def measured(found: dict[str, Any]) -> list[Row]:
    """The rows that have figures, by ratio, and by perplexity on the first text."""
    first = texts(found)[0]
    rows = [row for row in found["rows"] if "pruned" in row]
    return sorted(rows, key=lambda row: (row["ratio"], row["pruned"]["perplexity"][first]))


def texts(found: dict[str, Any]) -> list[str]:
    """Names of the texts that perplexity is measured on."""
    return list(found["dense"]["perplexity"])


def stages(found: dict[str, Any]) -> list[str]:
    """When models were measured: after pruning, and where they were trained then also after that."""
    return [stage for stage in STAGES if any(stage in row for row in measured(found))]


def title(found: dict[str, Any]) -> str:
    """What the figures are of."""
    told, where = found["config"], "{processor}, GPU {gpu}, torch {torch}".format(**found["environment"])
    count = told["eval_samples"] or "all"
    trained = f", then {told['recover_tokens']:,} tokens of training" if told["recover_tokens"] else ""
    return (
        f"{told['base_model']} ({where}), pruned{trained}. Perplexity on {count} windows of {told['length']} tokens of "
        "each text, in brackets relative to the dense model's."
    )


def table(found: dict[str, Any]) -> str:
    """All rows, the dense model the first, and under them what could not be had."""
    columns = [
        Column("ratio", lambda row: row.get("ratio"), "{:g}", "-"),
        Column("method", lambda row: row.get("method", "dense")),
        Column("removed", at("removed", per=0.01), "{:.2f} %"),
        Column("layers", at("layers")),
        Column("million parameters", at("parameters", per=1e6), "{:.2f}"),
        *[column for stage in stages(found) for column in stage_columns(found, stage)],
        Column("seconds", lambda row: row.get("seconds"), "{:,.0f}", "-"),
    ]
    failed = [row for row in found["rows"] if "impossible" in row]
    notes = [f"- {row['method']} at {row['ratio']:g}: {row['impossible']}" for row in failed]
    rows = [found["dense"] | {"pruned": found["dense"]}, *measured(found)]
    return "\n".join([markdown_table(columns, rows), *([""] if notes else []), *notes])


def stage_columns(found: dict[str, Any], stage: str) -> list[Column]:
    """Perplexity on each text, in brackets relative to the dense model's, and mean zero-shot accuracy."""

    def against(name: str) -> Callable[[Row], Any]:
        def value(row: Row) -> tuple[float, float] | None:
            perplexity = row.get(stage, {}).get("perplexity", {}).get(name)
            return None if perplexity is None else (perplexity, perplexity / found["dense"]["perplexity"][name])

        return value

    def zero_shot(row: Row) -> tuple[float, float] | None:
        mean = row.get(stage, {}).get("zero_shot")
        return mean and (100 * mean["mean"], 100 * mean["standard_error"])

    columns = [Column(f"{name}, {STAGES[stage]}", against(name), "{:,.2f} ({:.2f})", "-") for name in texts(found)]
    if "zero_shot" in found["dense"]:
        columns.append(Column(f"zero-shot mean, {STAGES[stage]}", zero_shot, "{:.1f} ± {:.1f}", "-"))
    return columns


def draw(found: dict[str, Any]) -> Figure:
    """Perplexity against the share of the layers' parameters that is gone: a panel for each text, a row of them for
    each stage, a curve for each method."""
    names, times, rows = texts(found), stages(found), measured(found)
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    figure = new_figure(4 * len(names) + 3, max(3.6 * len(times), LEGEND_LINE * (len(methods) + 2)))
    panels = figure.subplots(len(times), len(names), squeeze=False, sharex=True)
    gone = [100 * row["removed"] for row in rows]
    panels[0, 0].set_xlim(min(gone) - BESIDE, max(gone) + BESIDE)  # shared by all
    styles = dict(zip(methods, zip(cycle(COLOURS), cycle((*MARKERS, *SPARE_MARKERS)), strict=False), strict=False))
    for stage, line in zip(times, panels, strict=True):
        for name, axes in zip(names, line, strict=True):
            draw_panel(axes, [row for row in rows if stage in row], stage, name, styles)
            dense = found["dense"]["perplexity"][name]
            axes.axhline(dense, color="0.6", linestyle="--", label="dense")
            axes.set(yscale="log", ylim=(0.9 * dense, HIGHEST * dense), title=f"{name}, {STAGES[stage]}")
            open_frame(axes)
        line[0].set_ylabel("perplexity")
    for axes in panels[-1]:
        axes.set_xlabel("% of the layers' parameters removed")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def draw_panel(axes: Axes, rows: list[Row], stage: str, name: str, styles: dict[str, tuple[str, str]]) -> None:
    """The curves of all methods on one text."""
    for method, (colour, marker) in styles.items():
        mine = [row for row in rows if row["method"] == method]
        curve = sorted((100 * row["removed"], row[stage]["perplexity"][name]) for row in mine)
        axes.plot(*(zip(*curve, strict=True) if curve else ([], [])), color=colour, marker=marker, label=method)

"""Figures of pruned language models, drawn from the numbers that others measured."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from compression.plots import COLOURS, MARKERS, bar_style, new_figure, open_frame
from compression.structures import CHANNELS, GROUPS


def plot_retained(rows: list[dict[str, Any]]) -> Figure:
    """Share of each layer's attention and MLP parameters that is left, a pair of bars per layer of the dense model.

    Args:
        rows: the table of all structures, see `GlobalPruning.table`.
    """
    depth = 1 + max(row["layer"] for row in rows)
    figure = new_figure(max(6, 0.32 * depth), 3.2)
    axes = figure.subplots()
    for place, (kind, label) in enumerate(((GROUPS, "attention"), (CHANNELS, "MLP"))):
        total, left = np.zeros(depth), np.zeros(depth)
        for row in rows:
            if row["kind"] == kind:
                total[row["layer"]] += 1
                left[row["layer"]] += row["removed_in_step"] is None
        shares = 100 * left / np.maximum(total, 1)
        axes.bar(np.arange(depth) + 0.4 * place - 0.2, shares, 0.4, label=label, **bar_style(COLOURS[place]))
    axes.set_xlabel("Layer of the dense model")
    axes.set_ylabel("Left (%)")
    axes.set_ylim(0, 105)
    axes.set_xlim(-0.6, depth - 0.4)
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    open_frame(axes)
    return figure


def plot_search(searched: dict[str, Any]) -> Figure:
    """How a search went: the best candidate's divergence and the mean of all, generation by generation.

    Args:
        searched: see `GlobalPruning.searches`.
    """
    figure = new_figure(5, 3.2)
    axes = figure.subplots()
    labels = {"best": "best, all held-out text", "mean": "mean of the candidates, first windows"}
    for (name, label), colour, shape in zip(labels.items(), COLOURS, MARKERS, strict=False):
        values = [np.nan if one[name] is None else one[name] for one in searched["history"]]
        axes.plot(values, marker=shape, markersize=3, linewidth=1, color=colour, label=label)
    axes.set_xlabel("Generation")
    axes.set_ylabel("Divergence, by that of the start")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    open_frame(axes)
    return figure


def plot_allocations(searched: dict[str, Any], table: list[dict[str, Any]]) -> Figure:
    """What each layer's attention and MLP keep before and after a search, a pair of bars per layer of the dense model.

    Args:
        searched: see `GlobalPruning.searches`. table: see `GlobalPruning.table`.
    """
    depth = 1 + max(row["layer"] for row in table)
    figure = new_figure(max(6, 0.32 * depth), 4.8)
    for axes, kind, label in zip(
        figure.subplots(2, sharex=True), (GROUPS, CHANNELS), ("attention", "MLP"), strict=True
    ):
        dense = np.zeros(depth)
        for row in table:
            dense[row["layer"]] += row["kind"] == kind
        for place, (name, title) in enumerate((("before", "by the scores"), ("after", "found"))):
            shares = np.zeros(depth)
            shares[searched["layers"]] = [sizes[kind] for sizes in searched[name]]
            shares *= 100 / np.maximum(dense, 1)
            axes.bar(np.arange(depth) + 0.4 * place - 0.2, shares, 0.4, label=title, **bar_style(COLOURS[place]))
        axes.set_ylabel(f"Left of {label} (%)")
        axes.set_ylim(0, 105)
        axes.set_xlim(-0.6, depth - 0.4)
        open_frame(axes)
    axes.set_xlabel("Layer of the dense model")
    figure.legend(*axes.get_legend_handles_labels(), ncols=2, loc="outside upper center", frameon=False)
    return figure


def plot_removal(removal: dict[str, Any]) -> Figure:
    """Perplexity without each layer, each attention and each MLP, on a logarithmic axis.

    Args:
        removal: see `calibration.removal_perplexities`. What is not finite is left out: without an important layer a
            perplexity can exceed all numbers.
    """
    figure = new_figure(max(6, 0.32 * len(removal["layer"])), 3.2)
    axes = figure.subplots()
    for part, label, colour, shape in zip(
        ("layer", "attention", "mlp"), ("whole layer", "attention", "MLP"), COLOURS, MARKERS, strict=False
    ):
        axes.plot(removal[part], marker=shape, markersize=4, linewidth=1, color=colour, label=f"without {label}")
    axes.axhline(removal["dense"], color="0.4", linewidth=1, linestyle="--", label="dense model")
    if np.isfinite([*removal["layer"], *removal["attention"], *removal["mlp"], removal["dense"]]).any():
        axes.set_yscale("log")
    axes.set_xlabel("Layer")
    axes.set_ylabel("Perplexity")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    open_frame(axes)
    return figure


def plot_rates(rows: list[dict[str, Any]]) -> Figure:
    """What each layer loses, as bars, and the perplexity without that layer on a logarithmic axis beside them.

    Args:
        rows: one per layer: `removed`, the share of its parameters that went; `removal_perplexity`, or None.
    """
    figure = new_figure(max(6, 0.32 * len(rows)), 3.2)
    axes = figure.subplots()
    bars, line = COLOURS[:2]
    removed = [100 * row["removed"] for row in rows]
    axes.bar([row["layer"] for row in rows], removed, label="removed", **bar_style(bars))
    axes.set_xlabel("Layer")
    axes.set_ylabel("Removed (%)")
    open_frame(axes)
    known = [row for row in rows if row["removal_perplexity"] is not None]
    if known:
        other = axes.twinx()
        other.plot(
            [row["layer"] for row in known],
            [row["removal_perplexity"] for row in known],
            color=line,
            marker="s",
            markersize=4,
            linewidth=1,
            label="perplexity without the layer",
        )
        other.set_yscale("log")
        other.set_ylabel("Perplexity without the layer")
        other.spines["top"].set_visible(False)
    figure.legend(ncols=2, loc="outside upper center", frameon=False, fontsize=8)
    return figure

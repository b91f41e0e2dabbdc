"""Pictures of a study: two goals against each other with the Pareto front, or the means of a single goal."""

from matplotlib.figure import Figure as Picture

from compression.plots import COLOURS, new_figure, open_frame
from compression.study.outcome import Outcome
from compression.study.workers import Goal

ERRORS = dict(fmt="none", ecolor="#999999", elinewidth=0.8, capsize=2, zorder=1)
NUMBERED = 12
"""Rows up to which all have their numbers in the picture, and not those of the front alone."""
LONGEST_LABEL = 60
"""Characters of a row's name."""


def draw_pareto(outcome: Outcome) -> Picture:
    """The first two goals, the first one upwards, with standard deviations; the front is filled and joined."""
    up, across = outcome.goals[:2]
    lines, front = outcome.lines(), outcome.front([up, across])
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    xs, ys = ([line.figures[goal.figure].mean for line in lines] for goal in (across, up))
    for goal, kind in ((across, "xerr"), (up, "yerr")):
        spreads = [line.figures[goal.figure].spread or 0.0 for line in lines]
        if any(spreads):
            axes.errorbar(xs, ys, **{kind: spreads}, **ERRORS)  # type: ignore[arg-type]
    axes.scatter(xs, ys, facecolors="white", edgecolors=COLOURS[0], zorder=2, label="rows of the table")
    places = sorted((line.figures[across.figure].mean, line.figures[up.figure].mean) for line in front)
    axes.plot(*zip(*places, strict=True), "o-", color=COLOURS[3], zorder=3, label="Pareto front")
    best = {line.number for line in front}
    for line in front if len(lines) > NUMBERED else lines:
        # Beyond the front no point is; the others have their numbers on the side of worse ones.
        right, above = (goal.maximize == (line.number in best) for goal in (across, up))
        axes.annotate(
            str(line.number),
            (line.figures[across.figure].mean, line.figures[up.figure].mean),
            xytext=(5 if right else -5, 4 if above else -4),
            textcoords="offset points",
            ha="left" if right else "right",
            va="bottom" if above else "top",
            fontsize=8,
        )
    axes.set_xlabel(_label(across))
    axes.set_ylabel(_label(up))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # where no point is
    open_frame(axes)
    return figure


def draw_means(outcome: Outcome) -> Picture:
    """The mean of each row with its standard deviation."""
    (goal,), lines = outcome.goals, outcome.lines()
    figure = new_figure(6.4, 0.9 + 0.28 * len(lines))
    axes = figure.subplots()
    figures = [line.figures[goal.figure] for line in lines]
    spreads = [found.spread or 0.0 for found in figures]
    axes.errorbar(
        [found.mean for found in figures], range(len(lines)), xerr=spreads, fmt="o", color=COLOURS[0], ecolor="#999999"
    )
    names = [", ".join(f"{name} {value}" for name, value in line.row.point.items()) for line in lines]
    axes.set_yticks(range(len(lines)), [f"{name or 'as given'}"[:LONGEST_LABEL] for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(_label(goal))
    open_frame(axes)
    return figure


def _label(goal: Goal) -> str:
    return f"{goal.figure} ({'more' if goal.maximize else 'less'} is better)"

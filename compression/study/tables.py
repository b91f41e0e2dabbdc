"""A study's files: `study.json` with all that is known, and tables and pictures of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from compression.files import write_json, write_text
from compression.plots import COLOURS, new_figure, open_frame, save_figure
from compression.runtime import fingerprint
from compression.study.scripts import SEED
from compression.study.shared import ERROR, POINT, RESULTS, SharedStudy
from compression.study.summary import Effect, Figure, Row, effects, pareto_front, summarize
from compression.study.workers import Goal
from compression.tables import Column, markdown_table, write_csv

PARETO, MEANS = "pareto.png", "means.png"
NUMBER = "{:.4g}"


@dataclass(frozen=True)
class Outcome:
    """What a study's trials have given so far.

    Attributes:
        about: what the study is, for `study.json`.
        rows: the points with a result, in the order of the grid, or in which they were drawn.
        failed: what is known of those that failed.
        drawn: whether it is a search.
        importances: share of a goal's variance that each field explains, in a search.
    """

    about: dict[str, Any]
    goals: tuple[Goal, ...]
    fields: tuple[str, ...]
    rows: tuple[Row, ...]
    failed: tuple[dict[str, Any], ...]
    drawn: bool
    importances: dict[str, dict[str, float]]

    def figures(self, goal: Goal) -> list[Figure | None]:
        return summarize(self.rows, goal.figure, goal.maximize)

    @property
    def others(self) -> list[str]:
        """The figures that are no goals."""
        names = dict.fromkeys(name for row in self.rows for name in row.figures)
        return [name for name in names if name not in [goal.figure for goal in self.goals]]

    def front(self) -> list[int]:
        """The rows of the Pareto front of all goals' means."""
        means = [[figure.mean for figure in self.figures(goal) if figure] for goal in self.goals]
        return pareto_front(list(zip(*means, strict=True)), [goal.maximize for goal in self.goals])


def read_outcome(
    study: SharedStudy, about: dict[str, Any], goals: tuple[Goal, ...], points: Sequence[dict[str, Any]] | None
) -> Outcome:
    """What a study's trials have given.

    Args:
        points: of a grid, in whose order the rows are; None for a search.
    """
    trials = study.trials()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    failed = [
        {POINT: trial.user_attrs.get(POINT), "error": trial.user_attrs.get(ERROR)}
        for trial in trials
        if trial.state == TrialState.FAIL
    ]
    found: dict[str, Row] = {_text(_of_point(point)): _row(point) for point in points or ()}
    for trial in complete:
        point = _of_point(trial.user_attrs[POINT])
        row = found.setdefault(_text(point), _row(point))
        for result in trial.user_attrs[RESULTS]:
            seed = result["seed"]
            row.runs[seed] = result["run"]
            flat = {name: value for step in result["figures"] for name, value in step.items()} | result["goals"]
            for name, value in flat.items():
                row.figures.setdefault(name, {})[seed] = value
    rows = [_sorted(row) for row in found.values() if row.runs]
    importances = {} if points is not None else _importances(study, complete, goals)
    return Outcome(about, goals, tuple(study.axes), tuple(rows), tuple(failed), points is None, importances)


def _of_point(point: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name != SEED}


def _row(point: dict[str, Any]) -> Row:
    return Row(_of_point(point), {}, {})


def _sorted(row: Row) -> Row:
    """A row whose seeds are in order."""
    figures = {name: dict(sorted(values.items())) for name, values in row.figures.items()}
    return Row(row.point, figures, dict(sorted(row.runs.items())))


def _importances(
    study: SharedStudy, complete: Sequence[FrozenTrial], goals: tuple[Goal, ...]
) -> dict[str, dict[str, float]]:
    """Importances by functional ANOVA (Hutter et al. 2014), from four points on."""
    if len(complete) < 4 or not study.axes:
        return {}
    found = {}
    for place, goal in enumerate(goals):
        if len({trial.values[place] for trial in complete}) > 1:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            found[goal.figure] = optuna.importance.get_param_importances(
                study.study, evaluator=evaluator, target=lambda trial, place=place: trial.values[place]
            )
    return found


def write_outcome(folder: Path, outcome: Outcome, pictures: bool) -> None:
    """Write tables and, where wanted, pictures into a study's folder."""
    write_json(folder / "study.json", described(outcome))
    if not outcome.rows:
        return
    write_csv(folder / "table.csv", csv_columns(outcome), range(len(outcome.rows)))
    rows = effect_rows(outcome)
    if rows:
        write_csv(folder / "effects.csv", EFFECTS, rows)
    if pictures:
        draw(outcome, folder)
    write_text(folder / "table.md", page(outcome, rows, [name for name in (PARETO, MEANS) if (folder / name).exists()]))


def described(outcome: Outcome) -> dict[str, Any]:
    """All of it as JSON."""
    summaries = {goal.figure: outcome.figures(goal) for goal in outcome.goals}
    rows = [
        {
            "point": row.point,
            "runs": row.runs,
            "figures": row.figures,
            "goals": {name: asdict(figures[place]) for name, figures in summaries.items() if figures[place]},
        }
        for place, row in enumerate(outcome.rows)
    ]
    return outcome.about | {
        "goals": [asdict(goal) for goal in outcome.goals],
        "fields": list(outcome.fields),
        "rows": rows,
        "front": outcome.front() if rows else [],
        "effects": [{"figure": goal.figure, **asdict(effect)} for goal, effect in effect_rows(outcome)],
        "importances": outcome.importances,
        "failed": list(outcome.failed),
        "environment": fingerprint(),
    }


def csv_columns(outcome: Outcome) -> list[Column]:
    """The columns of `table.csv`, of the numbers of rows: goals with all that is known, other figures with mean and
    standard deviation."""
    columns = _point_columns(outcome)
    for goal in outcome.goals:
        figures, name = outcome.figures(goal), goal.figure
        columns += [
            Column(f"{name} mean", lambda place, figures=figures: figures[place] and figures[place].mean),
            Column(f"{name} standard deviation", lambda place, figures=figures: figures[place] and figures[place].spread),
            Column(f"{name} difference", lambda place, figures=figures: _of(figures[place], "mean")),
            Column(f"{name} standard error", lambda place, figures=figures: _of(figures[place], "error")),
        ]
    for name in outcome.others:
        figures = summarize(outcome.rows, name, None)
        columns += [
            Column(f"{name} mean", lambda place, figures=figures: figures[place] and figures[place].mean),
            Column(f"{name} standard deviation", lambda place, figures=figures: figures[place] and figures[place].spread),
        ]
    return columns


def _of(figure: Figure | None, name: str) -> Any:
    return getattr(figure.difference, name) if figure and figure.difference else None


def _point_columns(outcome: Outcome) -> list[Column]:
    rows = outcome.rows
    columns = [
        Column(name, lambda place, name=name: _text(rows[place].point[name])) for name in outcome.fields or ("settings",)
    ]
    if not outcome.fields:
        columns = [Column("settings", lambda place: "as given")]
    return [*columns, Column("seeds", lambda place: rows[place].seeds)]


def page(outcome: Outcome, rows: Sequence[tuple[Goal, Effect]], pictures: Sequence[str]) -> str:
    """`table.md`."""
    columns = _point_columns(outcome)
    for goal in outcome.goals:
        figures = outcome.figures(goal)
        columns += [
            Column(f"{goal.figure} ({'max' if goal.maximize else 'min'})", lambda p, f=figures: _mean_cell(f[p])),
            Column("difference to the first row", lambda p, f=figures: _difference_cell(f[p] and f[p].difference)),
        ]
    parts = [
        f"# {outcome.about['name']}",
        f"`{outcome.about['command']}`",
        "Mean ± standard deviation over the seeds; differences are paired by seed, ± their standard error. Bold is the "
        "best mean where it is ahead of the next best one and of the first row by more than that.",
        markdown_table(columns, range(len(outcome.rows))),
    ]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    if rows:
        titles = [column for column in EFFECTS if column.title not in ("standard error", "difference")]
        change = Column("difference to the first value", lambda row: _difference_cell(row[1].difference))
        about = "Means over all runs with the value; differences are paired by the other fields and the seed."
        parts += ["## Effects", about, markdown_table([*titles, change], rows)]
    for name, shares in outcome.importances.items():
        share = [Column("field", lambda item: item[0]), Column("share", lambda item: item[1], "{:.2f}")]
        parts += [f"## What explains {name}", "Share of the variance (functional ANOVA).", markdown_table(share, list(shares.items()))]
    if outcome.failed:
        lines = [f"- `{_text(trial[POINT])}`: {_last_line(trial['error'])}" for trial in outcome.failed]
        parts += ["## Failed", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _last_line(error: dict[str, Any] | None) -> str:
    lines = (error or {}).get("last_lines") or ["no output"]
    return f"`{lines[-1]}`"


def _mean_cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    text = NUMBER.format(figure.mean) + (f" ± {figure.spread:.2g}" if figure.spread is not None else "")
    return f"**{text}**" if figure.best else text


def _difference_cell(difference: Any) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.3g}" + (f" ± {difference.error:.2g}" if difference.error is not None else "")


EFFECTS = [
    Column("figure", lambda row: row[0].figure),
    Column("field", lambda row: row[1].field),
    Column("value", lambda row: _text(row[1].value)),
    Column("runs", lambda row: row[1].runs),
    Column("mean", lambda row: row[1].mean, NUMBER),
    Column("difference", lambda row: row[1].difference and row[1].difference.mean),
    Column("standard error", lambda row: row[1].difference and row[1].difference.error),
]


def effect_rows(outcome: Outcome) -> list[tuple[Goal, Effect]]:
    """What each value of each field does to each goal; of a search nothing, for its points have no partners."""
    if outcome.drawn:
        return []
    return [(goal, effect) for goal in outcome.goals for effect in effects(outcome.rows, goal.figure)]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# Pictures.


def draw(outcome: Outcome, folder: Path) -> None:
    """The Pareto front of the first two goals, or the means of a single one."""
    if len(outcome.goals) > 1:
        save_figure(draw_pareto(outcome), folder / PARETO)
    else:
        save_figure(draw_means(outcome), folder / MEANS)


def draw_pareto(outcome: Outcome) -> Any:
    """The first goal against the second, with standard deviations; those of the front are filled and joined."""
    up, across = outcome.goals[:2]
    pairs = [(x, y) for x, y in zip(outcome.figures(across), outcome.figures(up), strict=True) if x and y]
    means = [(x.mean, y.mean) for x, y in pairs]
    front = pareto_front(means, [across.maximize, up.maximize])
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    xs, ys = zip(*means, strict=True)
    for errors, kind in (([x.spread or 0 for x, _ in pairs], "xerr"), ([y.spread or 0 for _, y in pairs], "yerr")):
        if any(errors):
            axes.errorbar(xs, ys, **{kind: errors}, fmt="none", ecolor="#999999", elinewidth=0.8, zorder=1)
    axes.scatter(xs, ys, facecolors="white", edgecolors=COLOURS[0], zorder=2, label="all points")
    line = sorted(means[place] for place in front)
    axes.plot(*zip(*line, strict=True), "o-", color=COLOURS[3], zorder=3, label="Pareto front")
    for place in front:
        axes.annotate(str(place + 1), means[place], xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"{across.figure} ({'more' if across.maximize else 'less'} is better)")
    axes.set_ylabel(f"{up.figure} ({'more' if up.maximize else 'less'} is better)")
    axes.set_title("Numbers are rows of the table", fontsize=9)
    axes.legend(frameon=False)
    open_frame(axes)
    return figure


def draw_means(outcome: Outcome) -> Any:
    """The mean of each row with its standard deviation."""
    (goal,) = outcome.goals
    found = [(row, figure) for row, figure in zip(outcome.rows, outcome.figures(goal), strict=True) if figure]
    figure = new_figure(6.4, 0.9 + 0.28 * len(found))
    axes = figure.subplots()
    places, means = range(len(found)), [value.mean for _, value in found]
    errors = [value.spread or 0 for _, value in found]
    axes.errorbar(means, places, xerr=errors, fmt="o", color=COLOURS[0], ecolor="#999999")
    axes.set_yticks(places, [_text(row.point) or "as given" for row, _ in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{goal.figure} ({'more' if goal.maximize else 'less'} is better)")
    open_frame(axes)
    return figure

"""A study's files: `study.json` with all that is known, tables of it as CSV and as a page, a picture."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compression.files import write_json, write_text
from compression.plots import save_figure
from compression.runtime import fingerprint
from compression.study.outcome import Line, Outcome
from compression.study.pictures import draw_means, draw_pareto
from compression.study.summary import Difference, Figure
from compression.tables import Column, markdown_table, write_csv

PARETO, MEANS = "pareto.png", "means.png"
NUMBER = "{:.4g}"
ABOUT = (
    "Mean ± standard deviation over the seeds; differences are paired by seed, ± their standard error. Bold is the "
    "best mean where it is ahead of the next best one and of the first row by more than that."
)
ABOUT_EFFECTS = "Means over all runs with the value; differences are paired by the other fields and the seed."


def write_outcome(folder: Path, outcome: Outcome, pictures: bool) -> None:
    """Write tables and, where wanted, a picture into a study's folder."""
    write_json(folder / "study.json", described(outcome))
    if not outcome.rows:
        return
    write_csv(folder / "table.csv", csv_columns(outcome), outcome.lines())
    if found := outcome.effects():
        write_csv(folder / "effects.csv", [*EFFECT_COLUMNS, *EFFECT_DIFFERENCES], found)
    if pictures and len(outcome.goals) > 1:
        save_figure(draw_pareto(outcome), folder / PARETO)
    elif pictures:
        save_figure(draw_means(outcome), folder / MEANS)
    picture = PARETO if len(outcome.goals) > 1 else MEANS
    write_text(folder / "table.md", page(outcome, picture if (folder / picture).is_file() else None))


def described(outcome: Outcome) -> dict[str, Any]:
    """All of it as JSON."""
    names = [goal.figure for goal in outcome.goals]
    rows = [
        {
            "point": line.row.point,
            "runs": line.row.runs,
            "figures": line.row.figures,
            "goals": {name: asdict(line.figures[name]) for name in names},
        }
        for line in outcome.lines()
    ]
    return outcome.about | {
        "goals": [asdict(goal) for goal in outcome.goals],
        "fields": list(outcome.fields),
        "rows": rows,
        "front": [line.number - 1 for line in outcome.front(outcome.goals)],
        "effects": [{"figure": goal.figure, **asdict(effect)} for goal, effect in outcome.effects()],
        "importances": outcome.importances,
        "failed": list(outcome.failed),
        "environment": fingerprint(),
    }


def csv_columns(outcome: Outcome) -> list[Column]:
    """The columns of `table.csv`: goals with all that is known, other figures with mean and standard deviation."""
    columns = point_columns(outcome)
    for name in [*(goal.figure for goal in outcome.goals), *outcome.others]:
        columns.append(Column(f"{name} mean", _part(name, "mean")))
        columns.append(Column(f"{name} standard deviation", _part(name, "spread")))
        if name not in outcome.others:
            columns.append(Column(f"{name} difference", _part(name, "difference", "mean")))
            columns.append(Column(f"{name} standard error", _part(name, "difference", "error")))
    return columns


def _part(name: str, *path: str) -> Callable[[Line], Any]:
    """The getter of a part of a figure, None where it is missing."""

    def value(line: Line) -> Any:
        found: Any = line.figures.get(name)
        for part in path:
            found = getattr(found, part, None)
        return found

    return value


def point_columns(outcome: Outcome) -> list[Column]:
    """What each row is."""
    columns = [Column(name, lambda line, name=name: value_text(line.row.point[name])) for name in outcome.fields]  # type: ignore[misc]
    return [Column("row", lambda line: line.number), *columns, Column("seeds", lambda line: line.row.seeds)]


def page(outcome: Outcome, picture: str | None) -> str:
    """`table.md`."""
    columns = point_columns(outcome)
    for goal in outcome.goals:
        title = f"{goal.figure} ({'more' if goal.maximize else 'less'} is better)"
        columns.append(Column(title, lambda line, name=goal.figure: _mean_cell(line.figures.get(name))))  # type: ignore[misc]
        columns.append(Column("difference to row 1", _difference_of(goal.figure)))
    parts = [f"# {outcome.about['name']}", f"`{outcome.about['command']}`", ABOUT]
    parts.append(markdown_table(columns, outcome.lines()))
    if picture:
        parts.append(f"![{picture.removesuffix('.png')}]({picture})")
    if found := outcome.effects():
        change = Column("difference to the first value", lambda row: _difference_cell(row[1].difference))
        parts += ["## Effects", ABOUT_EFFECTS, markdown_table([*EFFECT_COLUMNS, change], found)]
    for name, shares in outcome.importances.items():
        share = [Column("field", lambda item: item[0]), Column("share", lambda item: item[1], "{:.2f}")]
        table = markdown_table(share, list(shares.items()))
        parts += [f"## What explains {name}", "Share of the variance over all points (functional ANOVA).", table]
    if outcome.failed:
        lines = [f"- {value_text(trial['point'])}: {_last_line(trial['error'])}" for trial in outcome.failed]
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


def _difference_of(name: str) -> Callable[[Line], str]:
    return lambda line: _difference_cell(_part(name, "difference")(line))


def _difference_cell(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.3g}" + (f" ± {difference.error:.2g}" if difference.error is not None else "")


def value_text(value: Any) -> str:
    """A value, or those of a point, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {value_text(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


EFFECT_COLUMNS = [
    Column("figure", lambda row: row[0].figure),
    Column("field", lambda row: row[1].field),
    Column("value", lambda row: value_text(row[1].value)),
    Column("runs", lambda row: row[1].runs),
    Column("mean", lambda row: row[1].mean, NUMBER),
]
EFFECT_DIFFERENCES = [
    Column("difference", lambda row: row[1].difference and row[1].difference.mean),
    Column("standard error", lambda row: row[1].difference and row[1].difference.error),
]

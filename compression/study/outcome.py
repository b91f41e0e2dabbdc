"""What a study's trials have given so far, read from its storage: rows with their figures, what failed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from compression.plots import undominated
from compression.study.scripts import SEED
from compression.study.shared import ERROR, POINT, RESULTS, SharedStudy
from compression.study.space import Point
from compression.study.summary import Effect, Figure, Row, effects, summarize
from compression.study.workers import Goal

LEAST_FOR_IMPORTANCE = 4
"""Points from which on it is estimated what explains a figure."""


@dataclass(frozen=True)
class Line:
    """A row with what is said of it: its number, from 1 on, and its figures by name."""

    number: int
    row: Row
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Outcome:
    """What a study has given.

    Attributes:
        about: what the study is, for `study.json`.
        fields: what is varied.
        rows: the points with a result, in the order of the grid, or in which they were drawn.
        failed: the points that failed, each with the end of what was said.
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

    @property
    def others(self) -> list[str]:
        """The figures that are no goals."""
        names = dict.fromkeys(name for row in self.rows for name in row.figures)
        return [name for name in names if name not in [goal.figure for goal in self.goals]]

    def lines(self) -> list[Line]:
        """All rows with all figures."""
        better: dict[str, bool | None] = {goal.figure: goal.maximize for goal in self.goals}
        summaries = {n: summarize(self.rows, n, up) for n, up in (better | dict.fromkeys(self.others)).items()}
        return [
            Line(place + 1, row, {name: found for name, column in summaries.items() if (found := column[place])})
            for place, row in enumerate(self.rows)
        ]

    def effects(self) -> list[tuple[Goal, Effect]]:
        """What each value of each field does to each goal; of a search nothing, for its points have no partners."""
        if self.drawn:
            return []
        return [(goal, effect) for goal in self.goals for effect in effects(self.rows, goal.figure)]

    def front(self, goals: Sequence[Goal]) -> list[Line]:
        """The lines of the Pareto front of some goals' means."""
        lines = self.lines()
        means = [tuple(line.figures[goal.figure].mean for goal in goals) for line in lines]
        return [lines[place] for place in undominated(means, [goal.maximize for goal in goals])]


def read_outcome(
    study: SharedStudy, about: dict[str, Any], goals: tuple[Goal, ...], points: Sequence[Point] | None, explained: bool
) -> Outcome:
    """What a study's trials have given.

    Args:
        points: of a grid, in whose order the rows are; None for a search.
        explained: whether importances are estimated, which takes seconds.
    """
    trials = study.trials()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    failed = tuple(
        {"point": trial.user_attrs.get(POINT), "error": trial.user_attrs.get(ERROR)}
        for trial in trials
        if trial.state == TrialState.FAIL
    )
    results = [
        (_unseeded(trial.user_attrs[POINT]), result) for trial in complete for result in trial.user_attrs[RESULTS]
    ]
    order = [_unseeded(point) for point in points or ()] + [point for point, _ in results]
    rows = [_row(point, [result for other, result in results if other == point]) for point in _once(order)]
    done = tuple(row for row in rows if row.runs)
    importances = _importances(study, complete, goals) if explained else {}
    return Outcome(about, goals, tuple(study.axes), done, failed, points is None, importances)


def _unseeded(point: Point) -> Point:
    return {name: value for name, value in point.items() if name != SEED}


def _once(points: Sequence[Point]) -> list[Point]:
    return list({str(point): point for point in points}.values())


def _row(point: Point, results: list[dict[str, Any]]) -> Row:
    """A point with what its runs gave, by their seeds."""
    figures: dict[str, dict[int, float]] = {}
    results = sorted(results, key=lambda result: result["seed"])
    for result in results:
        flat = {name: value for step in result["figures"] for name, value in step.items()} | result["goals"]
        for name, value in flat.items():
            figures.setdefault(name, {})[result["seed"]] = value
    return Row(point, figures, {result["seed"]: result["run"] for result in results})


def _importances(
    study: SharedStudy, complete: Sequence[FrozenTrial], goals: tuple[Goal, ...]
) -> dict[str, dict[str, float]]:
    """Shares of variance by functional ANOVA (Hutter et al., 2014)."""
    found = {}
    for place, goal in enumerate(goals):
        if len(complete) >= LEAST_FOR_IMPORTANCE and len({trial.values[place] for trial in complete}) > 1:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            target = partial(_value, place)
            found[goal.figure] = optuna.importance.get_param_importances(
                study.study, evaluator=evaluator, target=target
            )
    return found


def _value(place: int, trial: FrozenTrial) -> float:
    return trial.values[place]

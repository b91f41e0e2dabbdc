"""What the runs of a study say: means and spreads over seeds, paired differences, what each field does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from compression.study.space import Point

BySeed = dict[int, float]


@dataclass(frozen=True)
class Row:
    """A point of a study.

    Attributes:
        point: its values.
        figures: of each seed, by name.
        runs: the identity of each seed's run.
    """

    point: Point
    figures: dict[str, BySeed]
    runs: dict[int, str]

    @property
    def seeds(self) -> int:
        return len(self.runs)


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its standard error; None where there is a single pair."""

    mean: float
    error: float | None
    pairs: int

    @property
    def is_sure(self) -> bool:
        """Whether it is larger than its standard error."""
        return self.error is not None and abs(self.mean) > self.error


@dataclass(frozen=True)
class Figure:
    """A figure of a row.

    Attributes:
        spread: the standard deviation over seeds; None for a single one.
        difference: to the first row, over the seeds that both have.
        best: see `best_row`.
    """

    mean: float
    spread: float | None
    difference: Difference | None
    best: bool


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, None for a single value."""
    return stdev(values) if len(values) > 1 else None


def paired(first: dict[Any, float], second: dict[Any, float]) -> Difference | None:
    """The second less the first over the keys that both have; None where there are none."""
    differences = [second[key] - first[key] for key in first if key in second]
    if not differences:
        return None
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Difference(mean(differences), error, len(differences))


def summarize(rows: Sequence[Row], name: str, maximize: bool | None) -> list[Figure | None]:
    """A figure of each row, None where the row does not have it.

    Args:
        maximize: whether more is better; None: nothing is best.
    """
    values = [row.figures.get(name, {}) for row in rows]
    best = None if maximize is None else best_row(values, maximize)
    found: list[Figure | None] = []
    for place, own in enumerate(values):
        difference = paired(values[0], own) if place else None
        numbers = list(own.values())
        figure = Figure(mean(numbers), spread(numbers), difference, place == best) if numbers else None
        found.append(figure)
    return found


def best_row(values: Sequence[BySeed], maximize: bool) -> int | None:
    """The row of the best mean, where it is better than the next best one and than the first one by more than the
    standard error of the paired difference; else None, and of rows without seeds in common."""
    order = sorted((place for place, own in enumerate(values) if own), key=lambda p: mean(values[p].values()))
    if maximize:
        order.reverse()
    if len(order) < 2:
        return None
    rivals = {order[1], min(order)} - {order[0]}
    differences = [paired(values[rival], values[order[0]]) for rival in rivals]
    return order[0] if all(found is not None and found.is_sure for found in differences) else None


@dataclass(frozen=True)
class Effect:
    """What a value of a field does.

    Attributes:
        mean: over all runs that have the value.
        difference: to the field's first value, over the runs that are alike in the other fields and the seed.
    """

    field: str
    value: Any
    runs: int
    mean: float
    difference: Difference | None


def effects(rows: Sequence[Row], name: str) -> list[Effect]:
    """The effects of all fields that take several values, on a figure."""
    found = []
    for field in rows[0].point if rows else ():
        by_value: dict[str, tuple[Any, dict[Any, float]]] = {}
        for row in rows:
            others = tuple(str(value) for other, value in row.point.items() if other != field)
            _, numbers = by_value.setdefault(str(row.point[field]), (row.point[field], {}))
            numbers |= {(others, seed): value for seed, value in row.figures.get(name, {}).items()}
        taken = [(value, numbers) for value, numbers in by_value.values() if numbers]
        if len(taken) < 2:
            continue
        first = taken[0][1]
        for place, (value, numbers) in enumerate(taken):
            difference = paired(first, numbers) if place else None
            found.append(Effect(field, value, len(numbers), mean(numbers.values()), difference))
    return found

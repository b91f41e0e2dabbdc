"""What a study varies: fields of a configuration, each with the values or the range that it takes."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from compression.runtime import UserError
from compression.study.scripts import Script

Point = dict[str, Any]
"""A value for each field that is varied, as plain JSON."""


@dataclass(frozen=True)
class Choices:
    """A field and the values that it takes, as plain JSON."""

    name: str
    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are checked before the first run."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A field and the numbers between which its values are drawn, evenly in themselves or in their logarithms."""

    name: str
    low: float
    high: float
    log: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


Axis = Choices | Range
RANGE = re.compile(r"(?P<low>[^,\[\]]+?)\.\.(?P<high>[^,\[\]]+?)(?P<log>:log)?")


def read_axes(script: Script, entries: Sequence[str], search: bool) -> list[Axis]:
    """What is varied, from NAME=V,V, NAME=[...] (a JSON list) or NAME=LOW..HIGH with or without :log behind it.

    Args:
        search: whether ranges are allowed.

    Raises:
        UserError: a field or a value that the script does not have, a field that is named twice.
    """
    axes = [_axis(script, *assigned(entry, "--grid"), search) for entry in entries]
    _check_once([axis.name for axis in axes], "--grid")
    return axes


def read_fixed(script: Script, entries: Sequence[str]) -> dict[str, Any]:
    """What is the same in all runs, from NAME=VALUE."""
    pairs = [assigned(entry, "--fixed") for entry in entries]
    _check_once([name for name, _ in pairs], "--fixed")
    found = {}
    for name, text in pairs:
        script.check_name(name, "--fixed")
        found[name] = script.read(name, _listed(text) if text.startswith("[") else text, "--fixed")
    return found


def assigned(entry: str, flag: str) -> tuple[str, str]:
    """Name and value of NAME=VALUE.

    Raises:
        UserError: it is not of that form.
    """
    name, equals, text = entry.partition("=")
    if not (name and equals and text):
        raise UserError(f"{flag} {entry}: allowed is NAME=VALUE, as in importance_mode=l2,fisher")
    return name.strip(), text.strip()


def _check_once(names: list[str], flag: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{flag} {name}: is given twice")


def _axis(script: Script, name: str, text: str, search: bool) -> Axis:
    script.check_name(name, "--grid")
    if found := RANGE.fullmatch(text):
        return _range(script, name, text, found, search)
    given = _listed(text) if text.startswith("[") else [part.strip() for part in text.split(",")]
    values = [script.read(name, value, "--grid") for value in given]
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"--grid {name}={text}: has {value} twice")
    return Choices(name, tuple(values))


def _listed(text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{text}: is no JSON list ({error})") from None
    if not found:
        raise UserError(f"{text}: is empty; give at least one value")
    return found


def _range(script: Script, name: str, text: str, found: re.Match[str], search: bool) -> Range:
    if not search:
        raise UserError(f"--grid {name}={text}: a range needs --search tpe or nsga2; a grid takes values: {name}=A,B")
    low, high = (script.read(name, found[end], "--grid") for end in ("low", "high"))
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
            raise UserError(f"--grid {name}={text}: {name} is no number; give values: {name}=A,B")
    if not low < high or (found["log"] and low <= 0):
        raise UserError(f"--grid {name}={text}: allowed is LOW..HIGH with LOW under HIGH, and above 0 with :log")
    return Range(name, low, high, bool(found["log"]))


def points(axes: Sequence[Axis]) -> Iterator[Point]:
    """All combinations of values; of ranges their ends."""
    for values in product(*(axis.ends for axis in axes)):
        yield dict(zip([axis.name for axis in axes], values, strict=True))

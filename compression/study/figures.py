"""The numbers that a run's scripts have written, by dotted names, and how one is asked for."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from compression.files import read_object
from compression.integrity import STAGE_FILE, files_in, read_record
from compression.runtime import UserError

Figures = dict[str, float]
SHOWN = 30
"""Names that an error text lists, at most."""


def records_in(folder: Path) -> list[str]:
    """The `stage.json` of all that was written under a folder, relative to it, by the time; linked folders excepted."""
    paths = [name for name in files_in(folder) if Path(name).name == STAGE_FILE]
    visible = [name for name in paths if not any(part.startswith(".") for part in Path(name).parts)]
    return sorted(visible, key=lambda name: (str((read_record(Path(folder, name).parent) or {}).get("created")), name))


def read_figures(folder: Path, records: Sequence[str], reports: Sequence[Path]) -> Figures:
    """The numbers of some records, under the name of their stage, and of reports that a script wrote.

    Args:
        reports: JSON files, and folders of such.
    """
    found: Figures = {}
    for name in records:
        record = read_record(Path(folder, name).parent) or {}
        found |= dict(_numbers(record.get("metrics"), str(record.get("stage"))))
    for path in reports:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path] * path.is_file():
            found |= dict(_numbers(read_object(file), ""))
    return found


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers in a JSON value by their paths; members of a list have a name, or are left out."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    items = value.items() if isinstance(value, dict) else _named(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _numbers(item, f"{name}.{key}" if name else str(key))


def _named(values: list[Any]) -> Iterator[tuple[str, Any]]:
    for value in values:
        if isinstance(value, dict):
            for key in ("stage", "name"):
                if isinstance(value.get(key), str):
                    yield value[key], value
                    break


def look_up(steps: Sequence[Figures], name: str, flag: str) -> float:
    """A figure by its dotted name or a part of it; that of a later script goes before an earlier one's.

    Args:
        steps: what each script of a run wrote.

    Raises:
        UserError: there is none, or there are several.
    """
    for figures in reversed(steps):
        found = [name] if name in figures else [key for key in figures if f".{name}." in f".{key}."]
        if len(found) > 1:
            raise UserError(f"{flag} {name}: may be {some_names(found)}; write one of them")
        if found:
            return figures[found[0]]
    raise UserError(f"{flag} {name}: no such figure; there are {some_names([key for step in steps for key in step])}")


def some_names(names: Collection[str]) -> str:
    """A list of names, cut where it is long."""
    listed = list(dict.fromkeys(names))
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")

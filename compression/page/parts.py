"""What the page is put together from: cells, tables, and a section for each model or run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from compression.lineage import Record
from compression.page.records import number
from compression.tables import Column

UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError)
"""What a column of the report raises where an entry is not as stage 7 writes it."""


@dataclass(frozen=True)
class Look:
    """How a model is drawn: colour and SVG path."""

    colour: str
    path: str


@dataclass(frozen=True)
class Cell:
    """Text, and what the column is sorted by."""

    text: str
    sort: float | str


@dataclass(frozen=True)
class TableRow:
    cells: list[Cell]
    look: Look | None = None
    href: str | None = None


@dataclass(frozen=True)
class Table:
    titles: list[str]
    rows: list[TableRow]


@dataclass
class Section:
    """What is shown of one model or run; `charts` are names of specifications."""

    id: str
    name: str
    facts: list[tuple[str, str]]
    look: Look | None = None
    charts: list[str] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    texts: list[tuple[str, Table]] = field(default_factory=list)
    settings: list[tuple[str, str]] = field(default_factory=list)
    command: str | None = None


def text_cells(*words: str) -> list[Cell]:
    """Cells that are sorted by what they say."""
    return [Cell(word, word) for word in words]


def short(value: Any) -> str:
    """A figure in few digits."""
    found = number(value)
    return "not measured" if found is None else f"{found:.4g}" if abs(found) < 1e4 else f"{found:,.0f}"


def table(
    columns: Sequence[Column],
    entries: Sequence[Record],
    found: Sequence[Look | None],
    href: Callable[[Record], str | None] = lambda _: None,
) -> Table:
    """A table of entries; cells whose figures an entry does not have are empty, and so are columns left out."""
    rows = [[_cell(column, entry) for column in columns] for entry in entries]
    kept = [place for place, _ in enumerate(columns) if any(row[place].text for row in rows)]
    lines = [
        TableRow([row[place] for place in kept], look, href(entry))
        for row, entry, look in zip(rows, entries, found, strict=True)
    ]
    return Table([columns[place].title for place in kept], lines)


def _cell(column: Column, entry: Record) -> Cell:
    try:
        value, text = column.value(entry), column.cell(entry)
    except UNREADABLE:
        return Cell("", "")
    first = value[0] if isinstance(value, tuple) else value
    return Cell(text, first if number(first) is not None else text)

"""Tables as data: rows, and columns that say what each shows of a row; as markdown, as plain text, as CSV."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from compression.files import new_file


@dataclass(frozen=True)
class Column:
    """What a table shows of each row.

    Attributes:
        title: of the column.
        value: of a row; a tuple where the cell shows several values.
        format: how a cell shows its values, as `str.format` takes it.
        missing: what a cell shows where the value is None.
    """

    title: str
    value: Callable[[Any], Any]
    format: str = "{}"
    missing: str = "None"

    def cell(self, row: Any) -> str:
        """What the table shows of a row."""
        value = self.value(row)
        if value is None:
            return self.missing
        return self.format.format(*value) if isinstance(value, tuple) else self.format.format(value)


def at(*path: str | int, per: float | None = None) -> Callable[[Any], Any]:
    """The getter of the value at a path in nested objects and lists, of a number in units of `per`."""

    def value(row: Any) -> Any:
        found = reduce(getitem, path, row)
        return found if per is None else found / per

    return value


def cells(columns: Sequence[Column], rows: Sequence[Any]) -> list[list[str]]:
    """The titles, then the cells of each row."""
    return [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]


def markdown_table(columns: Sequence[Column], rows: Sequence[Any], align: str = "---:") -> str:
    """A markdown table; its columns after the first one are aligned to the right, as numbers are, by default."""
    header, *body = [[cell.replace("|", r"\|") for cell in line] for line in cells(columns, rows)]
    rule = ["---", *[align] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def text_table(columns: Sequence[Column], rows: Sequence[Any], transposed: bool = False) -> str:
    """A table for a terminal: the first column aligned to the left, the others to the right.

    Args:
        transposed: a line per column, and a column per row.
    """
    lines = cells(columns, rows)
    if transposed:
        lines = [list(line) for line in zip(*lines, strict=True)]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], others, strict=True))
        for line in lines
    )


def write_csv(path: Path, columns: Sequence[Column], rows: Sequence[Any]) -> None:
    """Write a table as CSV, its values not formatted; whole or not at all."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column.title for column in columns])
        writer.writerows([column.value(row) for column in columns] for row in rows)


def columns_of(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """A column per key of rows that have the same keys."""
    return [Column(name, at(name)) for name in rows[0]]

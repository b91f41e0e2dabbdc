"""Tables of texts and labels: files of CSV, TSV, JSON lines and Parquet, and data sets of the `datasets` library."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.runtime import UserError, first_line, log
from compression.text_files import read_json_lines, read_text

FIELD_LIMIT = 2**31 - 1  # characters; the csv module's own limit is that of a page


@dataclass(frozen=True)
class Table:
    """A table of which nothing is checked but that its rows have as many fields as it has columns.

    Attributes:
        name: in error texts.
        columns: the values of all rows by the column's name; None where a row has no such field.
        rows: what each row is called in error texts, such as "line 2".
        classes: for columns of numbers that stand for classes, what the file itself says that they are called.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    rows: Sequence[str]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        """Table and row, for error texts."""
        return f"{self.name}, {self.rows[row]}"


def read_table(path: Path, flag: str) -> Table:
    """The table in a file, read by the file's suffix.

    Args:
        flag: what named the file, for error texts.

    Raises:
        UserError: another suffix, or a file or row that is malformed; names the line.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{flag} {path}: allowed are files of {', '.join(READERS)}")
    return READERS[suffix](path, flag)


def read_csv(path: Path, flag: str) -> Table:
    """Comma-separated values with a header line, in UTF-8; fields in double quotes may hold commas and newlines."""
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(io.StringIO(read_text(path, flag), newline=""), strict=True)
    lines = []
    first = 1  # of the row that is read next, which may go over several
    try:
        for fields in reader:
            lines.append((first, fields))
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{flag} {path}, line {first}: is no valid CSV ({error}); mend the line") from None
    lines = [(number, fields) for number, fields in lines if fields]
    if not lines:
        raise UserError(f"{flag} {path}: holds no rows; allowed is a header line and a line for each text")
    return _with_header(f"{flag} {path}", lines[0][1], lines[1:])


def read_tsv(path: Path, flag: str, header: Sequence[str] | None = None, skip: bool = False) -> Table:
    """Tab-separated values in UTF-8, a line for each row: there is no quoting.

    Args:
        header: the names of the columns, where the file's first line does not have them.
        skip: lines of too few or too many fields are passed over, and counted in a log line.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path, flag).split("\n"), start=1) if line.strip()]
    rows = [(number, line.split("\t")) for number, line in lines]
    if header is None:
        header, rows = (rows[0][1] if rows else []), rows[1:]
    if skip:
        whole = [row for row in rows if len(row[1]) == len(header)]
        if len(whole) < len(rows):
            log.warning("%s: %d broken lines of %d passed over", path, len(rows) - len(whole), len(rows))
        rows = whole
    return _with_header(f"{flag} {path}", header, rows)


def _with_header(name: str, header: Sequence[str], rows: list[tuple[int, list[str]]]) -> Table:
    header = [column.strip() for column in header]
    if repeated := sorted({column for column in header if column and header.count(column) > 1}):
        raise UserError(f"{name}: has more than one column {repeated[0]!r}; give each a name of its own")
    for number, fields in rows:
        if len(fields) != len(header):
            raise UserError(
                f"{name}, line {number}: found {len(fields)} fields ({shortened(fields)}), "
                f"allowed is {len(header)}: {', '.join(header)}"
            )
    columns = {column: [fields[place] for _, fields in rows] for place, column in enumerate(header) if column}
    return Table(name, columns, [f"line {number}" for number, _ in rows])


def read_jsonl(path: Path, flag: str) -> Table:
    """JSON lines: an object in each line, its fields are the columns."""
    lines = list(read_json_lines(path, flag))
    for number, value in lines:
        if not isinstance(value, dict):
            raise UserError(f"{flag} {path}, line {number}: found {shortened(value)}, allowed is an object")
    names = dict.fromkeys(name for _, value in lines for name in value)
    columns = {name: [value.get(name) for _, value in lines] for name in names}
    return Table(f"{flag} {path}", columns, [f"line {number}" for number, _ in lines])


def read_parquet(path: Path, flag: str) -> Table:
    """A Parquet file; what `datasets` has noted in it about classes is read, too."""
    from datasets import Features
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        features = Features.from_arrow_schema(table.schema)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except Exception as error:  # of several libraries; whichever it is, the file was not read
        raise UserError(f"{flag} {path}: cannot be read as Parquet ({first_line(error)}); write it again") from None
    return Table(f"{flag} {path}", columns, _numbered(table.num_rows), _classes(features))


READERS = {".csv": read_csv, ".tsv": read_tsv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def saved_tables(folder: Path, flag: str, then: str) -> dict[str, Table]:
    """The splits in a folder that `DatasetDict.save_to_disk` wrote.

    Args:
        then: what to do where it cannot be read, for the error text.

    Raises:
        UserError: it cannot be read.
    """
    from datasets import load_from_disk

    try:
        splits = load_from_disk(str(folder))
    except Exception as error:  # of several libraries; whichever it is, the data was not read
        raise UserError(
            f"{flag} {folder}: cannot be read as a folder of datasets ({first_line(error)}); {then}"
        ) from None
    return split_tables(splits, f"{flag} {folder}")


def split_tables(splits: Mapping[str, Any], name: str) -> dict[str, Table]:
    """The splits of a data set of the `datasets` library."""
    return {
        part: Table(f"{name}, {part}", _Columns(rows), _numbered(len(rows)), _classes(rows.features))
        for part, rows in splits.items()
    }


@dataclass(frozen=True)
class _Columns(Mapping[str, Sequence[Any]]):
    """The columns of a split, of which only those are read that are asked for."""

    rows: Any

    def __getitem__(self, name: str) -> Sequence[Any]:
        return list(self.rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.column_names)

    def __len__(self) -> int:
        return len(self.rows.column_names)


def _numbered(count: int) -> list[str]:
    return [f"row {number}" for number in range(1, count + 1)]


def _classes(features: Any) -> dict[str, tuple[str, ...]]:
    from datasets import ClassLabel

    return {name: tuple(kind.names) for name, kind in features.items() if isinstance(kind, ClassLabel)}


def shortened(value: Any) -> str:
    """The start of a value as it is, for error texts."""
    text = repr(value)
    return f"{text[:60]}..." if len(text) > 60 else text

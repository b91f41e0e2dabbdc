"""From tables to texts and labels: which columns they are in, and what a row must hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compression.classifier.parts import Split
from compression.classifier.table_files import Table, shortened
from compression.classifier.tasks import listed
from compression.runtime import UserError
from compression.text_files import is_text

# Usual names, in lower case.
PAIRS = [
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2")),
    *(("question", "passage"), ("question", "sentence"), ("question", "context")),
    *(("query", "passage"), ("query", "document"), ("text_a", "text_b"), ("sentence_a", "sentence_b")),
]
TEXTS = ["text", "sentence", "review", "content", "comment", "document", "message", "tweet", "utterance", "question"]
LABELS = ["label", "labels", "gold_label", "gold", "class", "category", "sentiment", "intent", "target", "answer"]


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read: one or two of text, and the label."""

    text: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class ColumnFlags:
    """The columns that the user names; the others have their usual names."""

    text_column: str | None
    text_pair_column: str | None
    label_column: str | None


def find_columns(table: Table, asked: ColumnFlags) -> Columns:
    """The columns of texts and label in a table.

    Raises:
        UserError: there is no such column, or several may be meant; names the flag to give.
    """
    given = {flag: name for flag, name in vars(asked).items() if name is not None}
    for flag, name in given.items():
        if name not in table.columns:
            raise UserError(f"--{flag} {name}: {table.name} has no such column; it has {_names(table.columns)}")
    if len(set(given.values())) < len(given):
        raise UserError(f"{_flags(given)}: allowed is a column of its own for each")
    free = [name for name in table.columns if name not in given.values()]
    text = tuple(given[flag] for flag in ("text_column", "text_pair_column") if flag in given)
    if not text:
        pairs = _usual(free, PAIRS)
        texts = [found for found in _usual(free, [(name,) for name in TEXTS]) if not any(found[0] in p for p in pairs)]
        text = _the_one(table, [*pairs, *texts], "text", "--text_column (and --text_pair_column)")
    label = given.get("label_column")
    if label is None:
        free = [name for name in free if name not in text]
        (label,) = _the_one(table, _usual(free, [(name,) for name in LABELS]), "label", "--label_column")
    return Columns(text, label)


def _flags(given: Mapping[str, str]) -> str:
    return " ".join(f"--{flag} {name}" for flag, name in given.items())


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(columns) or "none"


def _usual(columns: Sequence[str], usual: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those of the usual names that there are, as the columns spell them."""
    spelled = {name.lower(): name for name in columns}
    return [tuple(spelled[name] for name in names) for names in usual if all(name in spelled for name in names)]


def _the_one(table: Table, found: list[tuple[str, ...]], what: str, flag: str) -> tuple[str, ...]:
    if len(found) == 1:
        return found[0]
    problem = f"no {what} by its usual name"
    if found:
        problem = f"more than one {what} by its usual name ({', '.join(' + '.join(names) for names in found)})"
    raise UserError(f"{table.name}: {problem} among the columns {_names(table.columns)}; name it with {flag}")


def read_split(table: Table, columns: Columns, ids: Mapping[str, int]) -> Split:
    """Texts and labels of a table.

    Args:
        ids: the number of each label.

    Raises:
        UserError: a column is not there, or a row has no text or no label, or a label that is none of `ids`; names the
            row.
    """
    for name in (*columns.text, columns.label):
        if name not in table.columns:
            raise UserError(
                f"{table.name}: has no column {name}, as the training data has; it has {_names(table.columns)}"
            )
    found = label_words(table, columns.label)
    for row, word in enumerate(found):
        if word not in ids:
            raise UserError(
                f"{table.place(row)}: found {columns.label} {word!r}, allowed are the {listed(list(ids))}"
                " of the training data"
            )
    texts = [_texts(table, name) for name in columns.text]
    sentences = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
    return Split(sentences, [ids[word] for word in found])


def _texts(table: Table, column: str) -> list[str]:
    values = table.columns[column]
    for row, value in enumerate(values):
        if not is_text(value) or not value.strip():
            raise UserError(f"{table.place(row)}: found {column} {shortened(value)}, allowed is a text")
    return [value.strip() for value in values]


def label_words(table: Table, column: str) -> list[str]:
    """The label of each row as a word: as it is, or what a number stands for, or the number's digits.

    Raises:
        UserError: a row has none; names the row.
    """
    names = table.classes.get(column)
    words = [_word(value, names) for value in table.columns[column]]
    if None in words:
        row = words.index(None)
        allowed = "a word or a whole number" if names is None else f"a number from 0 of {listed(names)}"
        found = shortened(table.columns[column][row])
        raise UserError(f"{table.place(row)}: found {column} {found}, allowed is {allowed}")
    return [word for word in words if word is not None]


def _word(value: Any, names: tuple[str, ...] | None) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and names is not None:
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, int):
        return str(value)
    return value.strip() if is_text(value) and value.strip() else None


def find_labels(table: Table, column: str) -> tuple[str, ...]:
    """The names of all labels in their order: as the file has them, else whole numbers by size, words by the alphabet.

    Raises:
        UserError: there are fewer than two, or so many that they cannot be classes.
    """
    words = set(label_words(table, column))
    names = table.classes.get(column) or tuple(sorted(words, key=int if all(map(_is_number, words)) else None))
    if len(names) < 2:
        raise UserError(f"{table.name}: found {listed(names)} in {column}, allowed are two or more; see --label_column")
    if len(words) > len(table) // 2:
        raise UserError(
            f"{table.name}: found {len(words)} different labels in {len(table)} rows of {column}, allowed are half as "
            "many labels as rows; name the column of the classes with --label_column"
        )
    return names


def _is_number(word: str) -> bool:
    """Whether a word is a whole number as it is written: no 01, no +1."""
    return len(word) < 20 and word.removeprefix("-").isdecimal() and str(int(word)) == word

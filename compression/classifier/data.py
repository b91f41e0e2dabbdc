"""A task's data: where it comes from, its parts, tokenized rows.

It comes, in this order, from a folder that the user gives; from the task's own folder; from the Hugging Face hub or its
local cache; for sentiment from the embedded review sentences. Of several processes the first one fetches, the others
wait and find it there.
"""

import bz2
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compression.assets import NotOnHub, hub_answers, hub_snapshot
from compression.batching import pad
from compression.classifier.tasks import SST2, Task
from compression.embedded import FILM_SHARES, install_reviews, part_of_film, reviews_file
from compression.files import read_object, real_path
from compression.integrity import digest_of
from compression.runtime import UserError, log, processes, shown
from compression.sources import describe_source, fetched, source_record
from compression.text_files import read_text

HELD_OUT_ROWS = 1000


@dataclass(frozen=True)
class DataSource:
    """Files of a task that were found.

    Attributes:
        kind: what `path` is. glue_tsv: a folder with `train.tsv` and `dev.tsv`. saved_dataset: a folder that
            `DatasetDict.save_to_disk` wrote, with splits train and validation, and the task's columns.
            embedded: a bz2-compressed CSV with columns category (fresh, rotten, plot), text and movie_name.
        path: the folder or file.
        name: what reports call the data.
        source: where the files came from, for people.
    """

    kind: Literal["glue_tsv", "saved_dataset", "embedded"]
    path: Path
    name: str
    source: str


def ensure_data(
    data_dir: str | None = None, task: Task = SST2, folder: Path | None = None, use_hub: bool = True
) -> DataSource:
    """Make sure that a task's data lies on the disk. Nothing is fetched where it already does.

    Args:
        data_dir: a folder that the user gives, with GLUE's `train.tsv` and `dev.tsv` (also below, under the task's
            name) or with what `DatasetDict.save_to_disk` wrote (also below, as `glue/sst2`). None takes `folder`, the
            hub or the embedded default.
        folder: where fetched data goes, by default the task's own folder.
        use_hub: False skips the hub.

    Raises:
        UserError: `data_dir` holds none of these, or nothing could be fetched.
    """
    with processes().main_process_first():
        return _find_or_fetch(data_dir, task, Path(folder or task.folder), use_hub)


def _find_or_fetch(data_dir: str | None, task: Task, folder: Path, use_hub: bool) -> DataSource:
    if data_dir is not None and real_path(Path(data_dir), "--data_dir") != real_path(folder):
        found = find_data(Path(data_dir).expanduser(), task)
        if found is None:
            raise UserError(
                f"--data_dir {data_dir}: no {task.about} data there; allowed is a folder with GLUE's train.tsv "
                f"and dev.tsv, or with glue/{task.subset} as save_to_disk writes it (splits train and validation)"
            )
        return found
    found = find_data(folder, task)
    if found is None:
        _refuse_partial(folder, task)
        return _fetch(folder, task, use_hub)
    return found


def find_data(folder: Path, task: Task = SST2) -> DataSource | None:
    """A task's data in a folder: GLUE files before a saved data set before the embedded reviews."""
    for candidate in (folder, folder / task.name):
        if (candidate / "train.tsv").is_file() and (candidate / "dev.tsv").is_file():
            return DataSource("glue_tsv", candidate, f"{task.name} (GLUE)", "a local folder")
    for candidate in (folder, folder / "glue" / task.subset):
        if _is_saved(candidate, task):
            return _saved(candidate, task)
    if task.reviews_stand_in and reviews_file(folder / "embedded").is_file():
        return _reviews(folder)
    return None


def _saved(folder: Path, task: Task) -> DataSource:
    return DataSource("saved_dataset", folder, f"{task.name} (GLUE)", describe_source(folder))


def _reviews(folder: Path) -> DataSource:
    path = reviews_file(folder / "embedded")
    return DataSource("embedded", path, "Rotten Tomatoes review sentences (embedded)", describe_source(path.parent))


def _is_saved(folder: Path, task: Task) -> bool:
    if not (folder / "dataset_dict.json").is_file():
        return False
    infos = [folder / split / "dataset_info.json" for split in ("train", "validation")]
    return all(info.is_file() and set(task.columns) <= set(read_object(info).get("features", {})) for info in infos)


def _refuse_partial(folder: Path, task: Task) -> None:
    """Data that the user put there incompletely is neither overwritten nor silently passed over."""
    for path in (folder / "train.tsv", folder / "dev.tsv", folder / task.name, folder / "glue" / task.subset):
        if path.exists():
            raise UserError(f"{shown(path)} is there, but not all of {task.name}; complete it or delete it")


def _fetch(folder: Path, task: Task, use_hub: bool) -> DataSource:
    try:
        _fetch_from_hub(folder / "glue" / task.subset, task, use_hub)
        return _saved(folder / "glue" / task.subset, task)
    except NotOnHub as problem:
        if not task.reviews_stand_in:
            raise UserError(f"{task.name}: {problem}; give its files with --data_dir") from None
        if use_hub and hub_answers():
            log.warning("%s: %s; taking the embedded default", task.repository, problem)
    install_reviews(task.name, folder / "embedded")
    return _reviews(folder)


def _fetch_from_hub(folder: Path, task: Task, use_hub: bool) -> None:
    subset = task.subset
    if use_hub and hub_answers():
        log.info("Fetching %s (%s) from the Hugging Face hub", task.repository, subset)
    snapshot = hub_snapshot(task.repository, "dataset", [f"{subset}/*.parquet"], use_hub)
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()  # of what follows, which takes a second; the download had its own
    files = {split: sorted(snapshot.glob(f"{subset}/{split}-*.parquet")) for split in ("train", "validation")}
    if not all(files.values()):
        raise NotOnHub(f"it has no {subset}/train-*.parquet and {subset}/validation-*.parquet")
    with fetched(folder, source_record("hub", task.repository, snapshot.name)) as temporary:
        with TemporaryDirectory(dir=temporary) as scratch:
            splits = {
                split: Dataset.from_parquet([str(path) for path in paths], cache_dir=scratch)
                for split, paths in files.items()
            }
            DatasetDict(splits).save_to_disk(temporary)


@dataclass(frozen=True)
class Split:
    """Sentences, or pairs of them, with their labels from 0."""

    sentences: Sequence[str | tuple[str, ...]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.sentences)

    def sample(self, share: float, seed: int) -> "Split":
        """A random share of the rows, in their order."""
        if share == 1:
            return self
        generator = torch.Generator().manual_seed(seed)
        size = max(1, round(share * len(self)))
        return self.take(torch.randperm(len(self), generator=generator)[:size].sort().values.tolist())

    def take(self, rows: list[int]) -> "Split":
        return Split([self.sentences[row] for row in rows], [self.labels[row] for row in rows])


@dataclass(frozen=True)
class TaskData:
    """A task's data in three parts.

    `selection` is held out of the training data: early stopping and the choice of the best epoch look at it, so that
    `validation` stays what it is reported as, data that no decision has seen. Many of SST-2's training rows are
    phrases of one another, so there the accuracy on `selection` is too high to report; it only compares epochs.
    """

    name: str
    source: str
    train: Split
    selection: Split
    validation: Split

    def describe(self) -> dict[str, str | int]:
        """What a report says about the data."""
        sizes = {part: len(getattr(self, part)) for part in ("train", "selection", "validation")}
        return {"name": self.name, "source": self.source} | sizes

    def digest(self) -> str:
        """A hash of all sentences and labels."""
        parts = [(part.sentences, part.labels) for part in (self.train, self.selection, self.validation)]
        return digest_of(repr(parts), 16)


def load_data(data_dir: str | None = None, task: Task = SST2) -> TaskData:
    """Load a task's data: see `ensure_data`.

    Raises:
        UserError: it is not there, or a file is malformed.
    """
    source = ensure_data(data_dir, task)
    if source.kind == "embedded":
        return _split_by_film(source)
    if source.kind == "glue_tsv":
        train, validation = (_read_tsv(source.path / name, task) for name in ("train.tsv", "dev.tsv"))
    else:
        train, validation = _read_saved(source.path, task)
    if len(train) < 10:
        raise UserError(f"{source.path}: {len(train)} training sentences; at least 10 are needed")
    held_out = min(HELD_OUT_ROWS, len(train) // 10)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    selection, rest = (rows.sort().values.tolist() for rows in (order[:held_out], order[held_out:]))
    return TaskData(source.name, source.source, train.take(rest), train.take(selection), validation)


def _read_tsv(path: Path, task: Task) -> Split:
    lines = read_text(path, "--data_dir").removesuffix("\n").split("\n")
    if task.tsv_header is not None and lines[0] != task.tsv_header:
        header = task.tsv_header.replace("\t", "<TAB>")
        raise UserError(f"{path}: the first line must be '{header}', as in GLUE's {task.name}")
    first = 0 if task.tsv_header is None else 1
    rows = [_read_line(path, number, line, task) for number, line in enumerate(lines[first:], start=first + 1)]
    if not rows:
        raise UserError(f"{path}: holds no sentences; get {task.name} again with: python download_model.py")
    return _as_split(rows)


def _read_line(path: Path, number: int, line: str, task: Task) -> tuple[list[str], int]:
    """The texts and the label of a line; number is the line's, for the error text."""
    labels = [str(label) for label in range(len(task.labels))]
    row = dict(zip(task.tsv, line.rsplit("\t", len(task.tsv) - 1), strict=False))
    texts = [row.get(column, "").strip() for column in task.text]
    if row.get(task.label) not in labels or not all(texts):
        shape = "<TAB>".join(" or ".join(labels) if name == task.label else name or "..." for name in task.tsv)
        raise UserError(f"{path}, line {number}: found {line.strip()[:60]!r}, expected {shape}")
    return texts, int(row[task.label])


def _as_split(rows: list[tuple[list[str], int]]) -> Split:
    """Rows of one text as sentences, of two as pairs."""
    return Split([texts[0] if len(texts) == 1 else tuple(texts) for texts, _ in rows], [label for _, label in rows])


def _read_saved(path: Path, task: Task) -> tuple[Split, Split]:
    from datasets import load_from_disk

    try:
        splits = load_from_disk(str(path))
        train, validation = (
            list(zip(*(list(splits[part][name]) for name in task.columns), strict=True))
            for part in ("train", "validation")
        )
    except Exception as error:  # of several libraries; whichever it is, the data was not read
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--data_dir {path}: cannot be read as a datasets folder with train and validation, "
            f"{', '.join(task.text)} and {task.label} ({reason}); get {task.name} again with: python download_model.py"
        ) from None
    return _checked(path, train, task), _checked(path, validation, task)


def _checked(path: Path, rows: list[tuple[Any, ...]], task: Task) -> Split:
    """Rows of (text, ..., label) whose texts are texts and whose labels are the task's."""
    labels = {label for *_, label in rows}
    texts = (text for *texts, _ in rows for text in texts)
    if not labels <= set(range(len(task.labels))) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(
            f"{path}: found labels {sorted(labels, key=str)[:5]} or empty sentences; "
            f"expected {' and '.join(map(str, range(len(task.labels))))}"
        )
    return _as_split([([text.strip() for text in texts], label) for *texts, label in rows])


def _split_by_film(source: DataSource) -> TaskData:
    """Split the review sentences so that no film is in two parts: a film's reviews echo each other."""
    with bz2.open(source.path, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in ("fresh", "rotten")]
    seen: set[str] = set()
    parts: dict[str, tuple[list[str], list[int]]] = {part: ([], []) for part in ("train", *FILM_SHARES)}
    for row in rows:
        text = " ".join(row["text"].split())
        if not text or text in seen:
            continue
        seen.add(text)
        sentences, labels = parts[part_of_film(row["movie_name"])]
        sentences.append(text)
        labels.append(int(row["category"] == "fresh"))
    return TaskData(source.name, source.source, **{part: Split(*rows) for part, rows in parts.items()})


@dataclass(frozen=True)
class Encoded:
    """Tokenized sentences or pairs, and their labels [rows].

    `inputs` holds by name what the tokenizer gives, rows without padding: input_ids, with pairs token_type_ids, and
    whatever else a tokenizer has for its model.
    """

    inputs: dict[str, list[list[int]]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.inputs["input_ids"]])

    @property
    def weights(self) -> Tensor:
        return torch.ones(len(self), dtype=torch.long)

    def digest(self) -> str:
        """A hash of the inputs: the same for the same data and tokenizer."""
        values = tuple(self.inputs.values())
        return digest_of(repr(values if len(values) > 1 else values[0]))

    def collate(self, rows: list[int], pad_token_id: int) -> dict[str, Tensor]:
        """A batch padded to its longest row: inputs and attention mask [rows, length], labels [rows]."""
        return pad(self.inputs, rows, pad_token_id) | {"labels": self.labels[rows]}


def encode(tokenizer: PreTrainedTokenizerBase, split: Split, max_length: int) -> Encoded:
    """Tokenize sentences or pairs, cutting rows at `max_length` tokens (of a pair the longer sentence first).

    Token types that are all zero, as of single sentences, are left out: models take them so by default.
    """
    found = tokenizer(split.sentences, truncation=True, max_length=max_length, padding=False)
    inputs = {"input_ids": found["input_ids"]} | {
        name: rows
        for name, rows in found.items()
        if name != "attention_mask" and (name != "token_type_ids" or any(map(any, rows)))
    }
    return Encoded(inputs, torch.tensor(split.labels))

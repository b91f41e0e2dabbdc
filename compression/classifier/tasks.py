"""Sentiment data: load, split, tokenize, batch."""

import bz2
import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compression.assets import SentimentSource, ensure_sentiment
from compression.batching import pad
from compression.embedded import FILM_SHARES, part_of_film
from compression.integrity import digest_of
from compression.runtime import UserError
from compression.text_files import read_text

HELD_OUT_ROWS = 1000


@dataclass(frozen=True)
class Split:
    """Sentences, or pairs of them, with their labels: 0 negative, 1 positive."""

    sentences: list[str] | list[tuple[str, str]]
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
class SentimentData:
    """A sentiment data set in three parts.

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


def load_sentiment(data_dir: str | None = None) -> SentimentData:
    """Load SST-2, or where there is none the embedded review sentences.

    Args:
        data_dir: a folder with GLUE's `train.tsv` and `dev.tsv`, or with a `datasets` folder under `glue/sst2`;
            None looks in `./sst2_data`, then asks the hub, then takes the embedded data.

    Raises:
        UserError: the folder holds neither, or a file is malformed.
    """
    source = ensure_sentiment(data_dir)
    if source.kind == "embedded":
        return _split_by_film(source)
    if source.kind == "glue_tsv":
        train, validation = (_read_tsv(source.path / name) for name in ("train.tsv", "dev.tsv"))
    else:
        train, validation = _read_saved_dataset(source.path)
    if len(train) < 10:
        raise UserError(f"{source.path}: {len(train)} training sentences; at least 10 are needed")
    held_out = min(HELD_OUT_ROWS, len(train) // 10)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    selection, rest = (rows.sort().values.tolist() for rows in (order[:held_out], order[held_out:]))
    return SentimentData(source.name, source.source, train.take(rest), train.take(selection), validation)


def _read_tsv(path: Path) -> Split:
    sentences, labels = [], []
    header, *lines = read_text(path, "--data_dir").removesuffix("\n").split("\n")
    if header.split("\t") != ["sentence", "label"]:
        raise UserError(f"{path}: the first line must be 'sentence<TAB>label', as in GLUE's SST-2")
    for number, line in enumerate(lines, start=2):
        sentence, _, label = line.rpartition("\t")
        if label not in ("0", "1") or not sentence.strip():
            raise UserError(f"{path}, line {number}: found {line.strip()[:60]!r}, expected sentence<TAB>0 or 1")
        sentences.append(sentence.strip())
        labels.append(int(label))
    if not sentences:
        raise UserError(f"{path}: holds no sentences; get SST-2 again with: python download_model.py")
    return Split(sentences, labels)


def _read_saved_dataset(path: Path) -> tuple[Split, Split]:
    from datasets import load_from_disk

    try:
        splits = load_from_disk(str(path))
        parts = [(list(splits[name]["sentence"]), list(splits[name]["label"])) for name in ("train", "validation")]
    except Exception as error:  # of several libraries; whichever it is, the data was not read
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--data_dir {path}: cannot be read as a datasets folder with train and validation, sentence and label "
            f"({reason}); get SST-2 again with: python download_model.py"
        ) from None
    for sentences, labels in parts:
        if not set(labels) <= {0, 1} or not all(isinstance(text, str) and text.strip() for text in sentences):
            raise UserError(
                f"{path}: found labels {sorted(set(labels), key=str)[:5]} or empty sentences; expected 0 and 1"
            )
    return tuple(Split([text.strip() for text in sentences], labels) for sentences, labels in parts)


def _split_by_film(source: SentimentSource) -> SentimentData:
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
    return SentimentData(source.name, source.source, **{part: Split(*rows) for part, rows in parts.items()})


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

"""The data that classifiers are trained and evaluated on: a named task, or the user's own; tokenized rows."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compression.batching import pad
from compression.classifier.columns import ColumnFlags
from compression.classifier.glue import GLUE, ensure_glue, load_glue
from compression.classifier.own_data import load_own
from compression.classifier.parts import Split, TaskData
from compression.classifier.reviews import REVIEWS3, load_reviews
from compression.classifier.tasks import check_labels
from compression.config import NO_EFFECT, Between, Settings, pick
from compression.integrity import digest_of
from compression.runtime import UserError

NAMED = (*GLUE, REVIEWS3.name)
COLUMNS = ("text_column", "text_pair_column", "label_column")


@dataclass
class DatasetSettings(Settings):
    """Which data, of which task. What is in it is compared itself, wherever it lies."""

    dataset: Annotated[str, NO_EFFECT] = "sst2"
    """sst2, cola, mrpc, qqp, mnli, qnli, rte, wnli (GLUE), reviews3 (embedded); your own file (.csv, .tsv, .jsonl,
    .parquet) or folder of them; or a data set of the hub, NAME or NAME:CONFIG."""
    data_dir: Annotated[str | None, NO_EFFECT] = None
    """Folder with a GLUE task's files; without it ./sst2_data or ./glue_data, then the hub, then for sst2 the embedded
    review sentences."""
    text_column: Annotated[str | None, NO_EFFECT] = None
    """Column of the text in data of your own, if it has no usual name."""
    text_pair_column: Annotated[str | None, NO_EFFECT] = None
    """Column of the second text of pairs, beside --text_column."""
    label_column: Annotated[str | None, NO_EFFECT] = None
    """Column of the label in data of your own, if it has no usual name."""
    validation_fraction: Annotated[float, Between(0.001, 0.5), NO_EFFECT] = 0.1
    """Share of each class that is held out for validation, where your own data has no such part."""

    def check(self) -> None:
        given = [(name, value) for name in COLUMNS if (value := getattr(self, name)) is not None]
        if self.dataset in NAMED and given:
            name, value = given[0]
            raise UserError(f"--{name} {value}: the columns of {self.dataset} are known; leave it out")
        if self.dataset not in NAMED and self.data_dir is not None:
            raise UserError(
                f"--data_dir {self.data_dir}: is for {', '.join(NAMED)}; leave it out with --dataset {self.dataset}"
            )
        if self.text_pair_column is not None and self.text_column is None:
            raise UserError(f"--text_pair_column {self.text_pair_column}: give --text_column, too")


def load_data(settings: DatasetSettings, use_hub: bool = True) -> TaskData:
    """Load a task's data.

    Args:
        use_hub: False takes what is on the disk or embedded.

    Raises:
        UserError: it is not there, a row is malformed, or no classifier can be trained on it.
    """
    name, data_dir = settings.dataset, settings.data_dir
    if name in GLUE:
        return load_glue(GLUE[name], ensure_glue(GLUE[name], data_dir, use_hub=use_hub)).check()
    if name == REVIEWS3.name:
        return load_reviews(data_dir).check()
    return load_own(name, pick(ColumnFlags, settings), settings.validation_fraction, use_hub).check()


def load_data_for(folders: Iterable[Path], settings: DatasetSettings) -> TaskData:
    """The data that the models in some folders are evaluated on: see `load_data`.

    Raises:
        UserError: also where a model's labels are not the task's.
    """
    data = load_data(settings)
    for folder in folders:
        check_labels(folder, "--models_dir", data.task)
    return data


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
    pairs = bool(split.sentences) and isinstance(split.sentences[0], tuple)
    texts = map(list, zip(*split.sentences, strict=True)) if pairs else [split.sentences]
    found = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
    inputs = {"input_ids": found["input_ids"]} | {
        name: rows
        for name, rows in found.items()
        if name != "attention_mask" and (name != "token_type_ids" or any(map(any, rows)))
    }
    return Encoded(inputs, torch.tensor(split.labels))

"""A task's data in parts: what is trained on, what epochs are chosen by, what is reported."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from compression.classifier.tasks import Task, listed
from compression.integrity import digest_of
from compression.runtime import UserError, log

HELD_OUT_ROWS = 1000
"""At most so many rows of the training data are held out to choose epochs by, and at most a tenth of them."""


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

    def divide(self, share: float, seed: int = 0) -> tuple["Split", "Split"]:
        """Two parts, of which the second one has about this share of each class.

        Rows of one text stay together, in the class of the first of them. A class of two texts or more is in both.
        """
        places: dict[str | tuple[str, ...], list[int]] = {}
        for row, text in enumerate(self.sentences):
            places.setdefault(text, []).append(row)
        classes: dict[int, list[list[int]]] = {}
        for rows in places.values():
            classes.setdefault(self.labels[rows[0]], []).append(rows)
        generator = torch.Generator().manual_seed(seed)
        second: set[int] = set()
        for label in sorted(classes):
            texts = classes[label]
            size = min(max(1, round(share * len(texts))), len(texts) - 1)
            for place in torch.randperm(len(texts), generator=generator)[:size].tolist():
                second.update(texts[place])
        return self.take([row for row in range(len(self)) if row not in second]), self.take(sorted(second))


@dataclass(frozen=True)
class TaskData:
    """A task's data in three parts.

    `selection` is held out of the training data: early stopping and the choice of the best epoch look at it, so that
    `validation` stays what it is reported as, data that no decision has seen. Many of SST-2's training rows are
    phrases of one another, so there the accuracy on `selection` is too high to report; it only compares epochs.
    """

    task: Task
    name: str
    source: str
    train: Split
    selection: Split
    validation: Split

    @cached_property
    def duplicates(self) -> int:
        """Rows of `validation` whose text is in the training data, too."""
        known = {*self.train.sentences, *self.selection.sentences}
        return sum(text in known for text in self.validation.sentences)

    def check(self) -> "TaskData":
        """This data, if a classifier can be trained on it; says how many texts of `validation` are no news.

        Raises:
            UserError: there are too few rows, fewer than two classes, or none of one class to train on.
        """
        task, rows, known = self.task, len(self.train) + len(self.selection), set(self.train.labels)
        if rows < 10:
            raise UserError(f"{self.name}: {rows} training rows; at least 10 are needed")
        if not len(self.validation):
            raise UserError(f"{self.name}: no validation rows; at least 1 is needed")
        if missing := [label for place, label in enumerate(task.labels) if place not in known]:
            raise UserError(f"{self.name}: no training rows of {listed(missing)}; each class needs some")
        if self.duplicates:
            log.warning(
                "%s: %d of %d validation texts are in the training data, too",
                *(self.name, self.duplicates, len(self.validation)),
            )
        return self

    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""
        sizes = {part: len(getattr(self, part)) for part in ("train", "selection", "validation")}
        task = {"labels": list(self.task.labels), "duplicates": self.duplicates}
        return {"name": self.name, "source": self.source} | sizes | task

    def digest(self) -> str:
        """A hash of all sentences and labels, of what the labels mean and what epochs are chosen by."""
        parts = [(part.sentences, part.labels) for part in (self.train, self.selection, self.validation)]
        return digest_of(repr((parts, self.task.labels, self.task.primary)), 16)


def hold_out(train: Split) -> tuple[Split, Split]:
    """Training rows without those that epochs are chosen by, and these: random ones."""
    held_out = min(HELD_OUT_ROWS, len(train) // 10)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    selection, rest = (rows.sort().values.tolist() for rows in (order[:held_out], order[held_out:]))
    return train.take(rest), train.take(selection)

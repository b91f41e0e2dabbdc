"""Several texts in one: which, with what weights, and how many windows of each.

A mixture is written `wikitext2:2,ptb,mine.txt:0.5`: texts separated by commas, each with its weight behind a colon, 1
where there is none. A name that is a file's as it stands is that file, whatever colons or commas are in it.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compression.llm.rows import budgeted
from compression.llm.text import FILES, Part, is_known, load_corpus, sample_windows, tokenize, windows
from compression.runtime import UserError, log


@dataclass(frozen=True)
class Weighted:
    """A text by its name, and its weight among others."""

    name: str
    weight: float = 1.0


def parse_mixture(texts: str, flag: str = "--dataset") -> list[Weighted]:
    """The texts of a mixture.

    Raises:
        UserError: a name that is no text's, one that stands there twice, or a weight that is no number above 0.
    """
    if os.path.isfile(texts):
        return [Weighted(texts)]
    found: list[Weighted] = []
    for entry in texts.split(","):
        text = _parse_entry(entry.strip(), texts, flag)
        if any(same_text(text.name, other.name) for other in found):
            raise UserError(f"{flag} {texts}: names {text.name} twice; give it once, with a weight: {text.name}:2")
        found.append(text)
    return found


def _parse_entry(entry: str, texts: str, flag: str) -> Weighted:
    if not entry:
        raise UserError(f"{flag} {texts!r}: has an empty name; allowed are texts separated by commas")
    if is_known(entry):
        return Weighted(entry)
    name, colon, weight = entry.rpartition(":")
    if not colon or not is_known(name):
        raise UserError(
            f"{flag} {entry}: no such file; allowed are text files, files of instructions (.json, .jsonl) and "
            f"{', '.join(FILES)}, several with commas, each with its weight (ptb:2)"
        )
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{flag} {texts}: the weight of {name} is {weight!r}; allowed is a number above 0")
    return Weighted(name, value)


def check_one_of_each(flag: str, value: int, texts: list[Weighted], window: int = 1) -> None:
    """Raise UserError where a number is too small for a window of each text of --dataset.

    Args:
        flag: that the number was given by.
        window: what a window counts; the last may count less.
    """
    least = (len(texts) - 1) * window + 1
    if value < least:
        raise UserError(f"--{flag} {value}: allowed is at least {least}, for a window of each text of --dataset")


def same_text(one: str, other: str) -> bool:
    """Whether two names are those of one text."""
    if os.path.isfile(one) and os.path.isfile(other):
        return os.path.samefile(one, other)
    return one == other


def shares(weights: list[float], count: int) -> list[int]:
    """How many of some windows each text gives, in proportion to its weight (Webster's method).

    Each gives at least one, unless there are fewer windows than texts: then those of largest weight give one.
    """
    given = [int(count >= len(weights))] * len(weights)
    while sum(given) < count:
        place = max(range(len(weights)), key=lambda place: weights[place] / (given[place] + 0.5))
        given[place] += 1
    return given


class Mixture:
    """One part of several texts, as token ids.

    Args:
        data_dir: folder with the texts; None asks the hub.
        flag: what named them, for error texts.

    Raises:
        UserError: a text that is not there, or two names that stand for one text.
    """

    def __init__(
        self,
        texts: list[Weighted],
        part: Part,
        data_dir: str | None,
        tokenizer: PreTrainedTokenizerBase,
        flag: str = "--dataset",
    ):
        self.texts = texts
        self.corpora = [load_corpus(text.name, part, data_dir, flag=flag) for text in texts]
        for place, corpus in enumerate(self.corpora):
            for earlier, other in zip(texts, self.corpora[:place], strict=False):
                if (corpus.name, corpus.text) == (other.name, other.text):
                    raise UserError(
                        f"{flag}: {earlier.name} and {texts[place].name} are one text here, {corpus.name}; "
                        "leave one of them out"
                    )
        self.ids = [tokenize(tokenizer, corpus) for corpus in self.corpora]
        self.taken: dict[str, list[int]] = {}

    def __str__(self) -> str:
        return ", ".join(f"{corpus.name} ({corpus.source})" for corpus in self.corpora)

    @property
    def name(self) -> str:
        """What the texts are called."""
        return ", ".join(corpus.name for corpus in self.corpora)

    @property
    def source(self) -> str:
        """Where they come from."""
        return ", ".join(dict.fromkeys(corpus.source for corpus in self.corpora))

    def sample(self, use: str, length: int, count: int, seed: int) -> Tensor:
        """Random windows [count, length], as many of each text as its weight says; none of a text overlap.

        Windows of the texts alternate, so that the first of them are a mixture too. A text that is too short for its
        share gives what it has, which is logged.

        Args:
            use: what they are for, as the record says it.

        Raises:
            UserError: a text is shorter than one window.
        """
        wanted = self._wanted(count)
        parts = [
            sample_windows(ids, length, number, seed, corpus.name)
            for ids, number, corpus in zip(self.ids, wanted, self.corpora, strict=True)
        ]
        for corpus, part, number in zip(self.corpora, parts, wanted, strict=True):
            if len(part) < number and len(parts) > 1:
                log.info(
                    "%s has %d windows of %d tokens for %s, %d wanted", corpus.name, len(part), length, use, number
                )
        return self._alternating(use, parts)

    def repeated(self, use: str, length: int, count: int, seed: int) -> Tensor:
        """The same in random order, and always as many as asked for: of a text that is too short for its share none
        comes twice before each was there once."""
        parts = []
        for ids, number, corpus in zip(self.ids, self._wanted(count), self.corpora, strict=True):
            every = windows(ids, length, corpus.name)
            order, _ = budgeted(torch.ones(len(every), dtype=torch.long), number, seed)
            parts.append(every[order])
        return self._alternating(use, parts)

    def _wanted(self, count: int) -> list[int]:
        return shares([text.weight for text in self.texts], count)

    def _alternating(self, use: str, parts: list[Tensor]) -> Tensor:
        self.taken[use] = [len(part) for part in parts]
        places = torch.cat([(torch.arange(len(part)) + 0.5) / max(len(part), 1) for part in parts])
        return torch.cat(parts)[places.argsort(stable=True)]

    def describe(self) -> list[dict[str, Any]]:
        """What a report says of each text: its source and sha256, its weight, how many windows it gave for what."""
        return [
            corpus.describe()
            | {"weight": text.weight, "windows": {use: counts[place] for use, counts in self.taken.items()}}
            for place, (corpus, text) in enumerate(zip(self.corpora, self.texts, strict=True))
        ]

"""More training text for distillation: changed copies of the training rows, which the teacher labels.

Words are replaced by near ones or dropped, texts are cut to a span (Tang et al. 2019, arXiv:1903.12136), single texts
are joined. Near words are those whose embeddings are: TinyBERT takes them from GloVe (Jiao et al. 2020,
arXiv:1909.10351), here they are the teacher's own.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.classifier.parts import Split, TaskData
from compression.config import AtLeast, Between, Settings
from compression.runtime import UserError, log

PIECE = re.compile(r"\s*(?:['’]?\w+(?:['’]\w+)*|[^\w\s]+)")
"""A word with its apostrophes, or marks between words; the space before it says whether it is apart."""
ATTEMPTS = 10
"""How often a copy is drawn that came out empty or is known."""
CHUNK = 1024
"""Words that are compared with all others at once."""
EXAMPLES = 2
"""Copies that the log shows."""


Row = str | tuple[str, ...]
Embed = Callable[[Tensor], Tensor]
"""Token ids [tokens] -> their embeddings [tokens, width]."""


@dataclass
class Augmentation(Settings):
    """Changed copies of the training rows, and how they are changed."""

    augment: Annotated[int, Between(0, 100)] = 0
    """Copies of each training row that are added, each changed otherwise and labelled by the teacher; --num_epochs
    counts passes over all rows, so each has 1 + this number times the steps."""
    augment_replace: Annotated[float, Between(0, 1)] = 0.3
    """Share of the words of a copy that are replaced by near ones."""
    augment_neighbors: Annotated[int, AtLeast(1)] = 10
    """Words nearest in the teacher's embeddings that a word is replaced by one of."""
    augment_drop: Annotated[float, Between(0, 1)] = 0.1
    """Share of the words of a copy that are left out."""
    augment_span: Annotated[float, Between(0, 1)] = 0.2
    """Share of the copies that are cut to a span of words, of any length."""
    augment_join: Annotated[float, Between(0, 1)] = 0.1
    """Share of the copies that the text of another row is appended to; not of pairs."""

    def check(self) -> None:
        if self.augment and not any(self.shares):
            raise UserError(
                f"--augment {self.augment}: changes nothing with --augment_replace, --augment_drop, --augment_span and "
                "--augment_join at 0; one of them must be above 0"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        return self.augment_replace, self.augment_drop, self.augment_span, self.augment_join


def more_rows(
    data: TaskData,
    rows: Split,
    settings: Augmentation,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> list[Row]:
    """Changed copies of some training rows, none of which is in the data: see `changed_copies`. Says how many."""

    def embed(tokens: Tensor) -> Tensor:
        return teacher.get_input_embeddings()(tokens.to(teacher.device))

    known = [*data.train.sentences, *data.selection.sentences, *data.validation.sentences]
    copies, sources = changed_copies(rows.sentences, known, settings, tokenizer, embed, seed)
    log.info("Augmentation: %d changed copies of %d training rows are added", len(copies), len(rows))
    for copy, source in list(zip(copies, sources, strict=True))[:EXAMPLES]:
        log.info("  of %r: %r", rows.sentences[source], copy)
    return copies


def changed_copies(
    rows: Sequence[Row],
    known: Sequence[Row],
    settings: Augmentation,
    tokenizer: PreTrainedTokenizerBase,
    embed: Embed,
    seed: int,
) -> tuple[list[Row], list[int]]:
    """Changed copies of rows, `settings.augment` of each: the first copies of all rows in their order, then the next.

    No copy is one of `known` or comes twice, whatever its case and spaces; a row of which none else is found in some
    attempts has fewer. Texts of a pair are changed each on its own. A language without spaces between words has no
    words to replace.

    Args:
        rows: texts or pairs.
        known: texts or pairs that no copy may be, as all training data and what is held out of it.
        tokenizer, embed: the teacher's.

    Returns:
        The copies, and of which row each one is.
    """
    width = 1 if isinstance(rows[0], str) else len(rows[0])
    changing = _Changing(list(chain.from_iterable(map(_texts, rows))), settings, tokenizer, embed, seed)
    seen = {_key(row) for row in chain(rows, known)}
    copies: list[Row] = []
    sources: list[int] = []
    for _ in range(settings.augment):
        found: dict[int, Row] = {}
        missing = list(range(len(rows)))
        for _ in range(ATTEMPTS):
            places = width * torch.tensor(missing)[:, None] + torch.arange(width)
            changed = changing.draw(places.flatten(), join=width == 1)
            for row, first in zip(missing, range(0, len(changed), width), strict=True):
                copy: Row = changed[first] if width == 1 else tuple(changed[first : first + width])
                key = _key(copy)
                if all(key) and key not in seen:
                    seen.add(key)
                    found[row] = copy
            missing = [row for row in missing if row not in found]
            if not missing:
                break
        sources += sorted(found)
        copies += [found[row] for row in sorted(found)]
    return copies, sources


def _texts(row: Row) -> tuple[str, ...]:
    return (row,) if isinstance(row, str) else row


def _key(row: Row) -> tuple[str, ...]:
    """What two rows have in common that differ in case and spaces alone."""
    return tuple("".join(text.split()).lower() for text in _texts(row))


@torch.inference_mode()
def nearest_words(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, embed: Embed, count: int) -> Tensor:
    """The places of the nearest of these words by the cosine of their embeddings, [words, count].

    Words are compared that consist of letters and are a single token after a space. Of several spellings of one token
    the first is taken. Others have themselves as neighbours. Few words have fewer neighbours than `count`.
    """
    ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    single = [place for place, row in enumerate(ids) if len(row) == 1 and row[0] != tokenizer.unk_token_id]
    single = [place for place in single if words[place].isalpha()]
    tokens, of_word = torch.tensor([ids[place][0] for place in single]).unique(return_inverse=True)
    count = min(count, len(tokens) - 1)
    if count < 1:
        return torch.arange(len(words))[:, None]
    vectors = F.normalize(embed(tokens).float(), dim=-1)
    nearest = torch.cat([_nearest(vectors, chunk, count) for chunk in torch.arange(len(tokens)).split(CHUNK)]).cpu()
    spelling = torch.full_like(tokens, len(words)).scatter_reduce(0, of_word, torch.tensor(single), "amin")
    neighbors = torch.arange(len(words))[:, None].repeat(1, count)
    neighbors[single] = spelling[nearest][of_word]
    return neighbors


def _nearest(vectors: Tensor, chunk: Tensor, count: int) -> Tensor:
    similarity = vectors[chunk] @ vectors.T
    similarity[torch.arange(len(chunk)), chunk] = -torch.inf
    return similarity.topk(count).indices


class _Changing:
    """Texts as places in a list of words, all in one row, from which changed texts are drawn."""

    def __init__(
        self, texts: Sequence[str], settings: Augmentation, tokenizer: PreTrainedTokenizerBase, embed: Embed, seed: int
    ):
        pieces = [PIECE.findall(text) for text in texts]
        words = Counter(piece.strip() for row in pieces for piece in row)
        self.spellings = [word for word, _ in words.most_common()]
        place_of = {word: place for place, word in enumerate(self.spellings)}
        self.texts, self.settings = texts, settings
        self.generator = torch.Generator().manual_seed(seed)
        self.counts = torch.tensor([len(row) for row in pieces])
        self.starts = self.counts.cumsum(0) - self.counts
        self.words = torch.tensor([place_of[piece.strip()] for row in pieces for piece in row])
        self.apart = torch.tensor([piece[0].isspace() for row in pieces for piece in row])
        self.neighbors = nearest_words(self.spellings, tokenizer, embed, settings.augment_neighbors)

    def draw(self, texts: Tensor, join: bool) -> list[str]:
        """A changed copy of each of these texts [texts]; some may be empty or as they were."""
        settings, counts = self.settings, self.counts[texts]
        row = torch.arange(len(texts)).repeat_interleave(counts)
        within = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        place = self.starts[texts][row] + within

        length = torch.where(self._chance(settings.augment_span, len(texts)), self._below(counts) + 1, counts)
        start = self._below(counts - length + 1)
        dropped = self._chance(settings.augment_drop, len(row))
        kept = (within >= start[row]) & (within < (start + length)[row]) & ~dropped
        row, place = row[kept], place[kept]

        words = self.words[place]
        choice = self._below(torch.full_like(words, self.neighbors.shape[1]))
        words = torch.where(self._chance(settings.augment_replace, len(row)), self.neighbors[words, choice], words)
        spaced = zip(self.apart[place].tolist(), words.tolist(), strict=True)
        spelled = [f" {self.spellings[word]}" if apart else self.spellings[word] for apart, word in spaced]
        ends = row.bincount(minlength=len(texts)).cumsum(0).tolist()
        changed = ["".join(spelled[begin:end]).strip() for begin, end in zip([0, *ends], ends, strict=False)]
        if not join:
            return changed
        joined = self._chance(settings.augment_join, len(texts)).tolist()
        others = self._below(torch.full_like(texts, len(self.texts))).tolist()
        tails = (f" {self.texts[other]}" if also else "" for also, other in zip(joined, others, strict=True))
        return [text + tail for text, tail in zip(changed, tails, strict=True)]

    def _chance(self, share: float, count: int) -> Tensor:
        """True with a probability of `share`, [count]."""
        return torch.rand(count, generator=self.generator) < share

    def _below(self, limits: Tensor) -> Tensor:
        """Random whole numbers from 0 to under each limit (0 where it is 0)."""
        return (torch.rand(len(limits), generator=self.generator, dtype=torch.float64) * limits).long()

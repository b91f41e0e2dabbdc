"""What a language model learns from: a teacher that runs on every batch, or what it said of the data, kept on disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.batching import TrainingData
from compression.checkpoint import folder_of_all
from compression.decoder import Decoder, decoder_of
from compression.distillation import largest_label_losses, soft_label_losses
from compression.integrity import is_sound
from compression.llm.head import LOGIT_ROWS, before_predicted
from compression.llm.layerwise import final_states
from compression.runtime import log, processes
from compression.weights import MAX_SHARD_SIZE, Shards, ShardWriter

# Rows that a teacher goes through together: of an offloaded one each layer is fetched once for them.
ROWS_TOGETHER = 256
LOGS, WORDS = "logs", "words"


class Teacher(Protocol):
    """Knows something of each predicted token of a batch, and what a student's logits lack by that."""

    @property
    def layers(self) -> Sequence[int]:
        """Its layers whose states are the last of what it knows: one for each layer of the student, or none."""

    def known(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Tensors [tokens, ...] with a row for each predicted token of a batch, see `rows.Sequences.collate`."""

    def losses(self, student_logits: Tensor, *known: Tensor) -> Tensor:
        """T^2 * KL(teacher || student) of some of these tokens [tokens], from the student's logits [tokens, words]."""


@dataclass(frozen=True)
class LiveTeacher:
    """A model that runs on every batch; its logits are computed where the student's are, a few tokens at a time.

    Attributes:
        layers: whose states are to be known too.
    """

    model: PreTrainedModel
    temperature: float
    layers: Sequence[int] = ()

    @torch.no_grad()
    def known(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The model's last states [tokens, hidden], then those behind each of the layers."""
        decoder = decoder_of(self.model)
        # Rows are padded behind their end: what is before the padding does not see it.
        with decoder.recorded(self.layers) as found:
            states = decoder.final_states(batch["input_ids"], batch.get("position_ids"))
        every = (states, *(found[layer] for layer in self.layers))
        return tuple(before_predicted(state, batch["targets"]) for state in every)

    def losses(self, student_logits: Tensor, *known: Tensor) -> Tensor:
        """See `Teacher`."""
        with torch.no_grad():
            logits = decoder_of(self.model).logits(*known)
        return soft_label_losses(student_logits, logits, self.temperature)


class KeptTeacher:
    """The K largest log-probabilities of a teacher for each predicted token of the training data, from the disk.

    The loss is the divergence of K + 1 outcomes, see `distillation.largest_label_losses`: a lower bound of the whole
    divergence, and equal to it where K is the size of the vocabulary.

    Args:
        folder: see `keep_largest`.
        temperature: at which they were computed.
    """

    layers: Sequence[int] = ()

    def __init__(self, folder: Path, temperature: float):
        self.temperature = temperature
        self.places: dict[str, tuple[Shards, Shards]] = {}
        for part in sorted(folder.glob("part_*")):
            shards = Shards(part / LOGS), Shards(part / WORDS)
            self.places |= dict.fromkeys(shards[0].shapes, shards)

    def known(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The log-probabilities [tokens, K], and whose they are [tokens, K]."""
        device, found = batch["input_ids"].device, []
        for row in map(str, batch["rows"].tolist()):
            found.append([shards.tensors([row])[row] for shards in self.places[row]])
        logs, words = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
        return logs, words.long()

    def losses(self, student_logits: Tensor, *known: Tensor) -> Tensor:
        """See `Teacher`."""
        logs, words = known
        return largest_label_losses(student_logits, logs, words, self.temperature)


def keep_largest(
    folder: Path,
    load: Callable[[], PreTrainedModel],
    train: TrainingData,
    largest: int,
    temperature: float,
    batch_size: int,
) -> None:
    """Put a teacher's largest log-probabilities on the disk, unless they are there; each process computes its share.

    Args:
        folder: where; its name must tell other teachers, data and settings apart.
        load: gives the teacher, which is let go of at the end.
        largest: how many of each predicted token, K.
        batch_size: rows per forward pass.
    """
    there = is_sound(folder) and folder.is_dir()
    processes().wait_for_everyone()  # all of them look before one writes
    if there:
        return
    log.info("Computing the teacher's %d largest log-probabilities of %d rows, once", largest, len(train))
    with folder_of_all(folder, {"stage": "teacher_logits"}) as temporary:
        part = temporary / f"part_{processes().process_index:05}"
        _write_largest(part, load(), train, largest, temperature, batch_size)


@torch.no_grad()
def _write_largest(
    part: Path, model: PreTrainedModel, train: TrainingData, largest: int, temperature: float, batch_size: int
) -> None:
    decoder, writers = decoder_of(model), []
    for name in (LOGS, WORDS):
        (part / name).mkdir(parents=True)
        writers.append(ShardWriter(part / name, MAX_SHARD_SIZE, len(train)))
    for rows in train.lengths.argsort(stable=True).split(ROWS_TOGETHER):
        batch = train.collate(rows.tolist(), 0)
        for place, ids, states in final_states(model, batch["input_ids"], batch_size, "teacher"):
            here = slice(place, place + len(ids))
            for row, state, target in zip(rows[here].tolist(), states, batch["targets"][here], strict=True):
                known = before_predicted(state[None], target[None].to(state.device))
                for writer, values in zip(writers, _largest(decoder, known, largest, temperature), strict=True):
                    writer.add(str(row), values)
    for writer in writers:
        writer.close()


def _largest(decoder: Decoder, states: Tensor, largest: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The largest log-probabilities [tokens, K] behind states [tokens, hidden], and whose they are, as int32."""
    found = []
    for block in states.split(LOGIT_ROWS):
        found.append((decoder.logits(block).float() / temperature).log_softmax(-1).topk(largest))
    return torch.cat([logs for logs, _ in found]), torch.cat([words for _, words in found]).int()

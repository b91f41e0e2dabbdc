"""What a language model learns from: a teacher that runs on every batch."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.distillation import soft_label_losses
from compression.llm.head import before_predicted


class Teacher(Protocol):
    """Knows something of each predicted token of a batch, and what a student's logits lack by that."""

    def known(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Tensors [tokens, ...] with a row for each predicted token of a batch, see `rows.Sequences.collate`."""

    def losses(self, student_logits: Tensor, *known: Tensor) -> Tensor:
        """T^2 * KL(teacher || student) of some of these tokens [tokens], from the student's logits [tokens, words]."""


@dataclass(frozen=True)
class LiveTeacher:
    """A model that runs on every batch; its logits are computed where the student's are, a few tokens at a time."""

    model: PreTrainedModel
    temperature: float

    @torch.no_grad()
    def known(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The model's last states [tokens, hidden]."""
        # Rows are padded behind their end: what is before the padding does not see it.
        return (before_predicted(decoder_of(self.model).final_states(batch["input_ids"]), batch["targets"]),)

    def losses(self, student_logits: Tensor, *known: Tensor) -> Tensor:
        """See `Teacher`."""
        with torch.no_grad():
            logits = decoder_of(self.model).logits(*known)
        return soft_label_losses(student_logits, logits, self.temperature)

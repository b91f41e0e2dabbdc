"""Quantization-aware training with distillation: the student computes with 4-bit weights while it learns."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.batching import model_inputs
from compression.distillation import hidden_state_loss, layer_map, soft_label_loss
from compression.fake_quantization import add_fake_quantization, remove_fake_quantization
from compression.quantization import Format
from compression.training import Recipe, Training


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three losses, and the temperature of the soft labels."""

    beta_ce: float
    beta_logits: float
    beta_hidden: float
    temperature: float


class QuantizationAwareDistillation(Recipe):
    """The recipe of stage 10: beta_ce * cross-entropy + beta_logits * soft labels + beta_hidden * hidden states.

    While it is in use the model has fake-quantized layers and, where teacher and student differ in width, a projection
    of hidden states that is trained with it; `finish` takes both away.

    Args:
        model: the student, trained in place; it must be on its device.
        weights: of the losses.
        storage: the format that the weights are quantized to.
        rows: training sentences.
        teacher: runs on every batch; needed where hidden states count.
        teacher_logits: [rows, classes], instead of a teacher.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        training: Training,
        weights: LossWeights,
        storage: Format,
        rows: int,
        teacher: PreTrainedModel | None = None,
        teacher_logits: Tensor | None = None,
    ):
        super().__init__(training, rows)
        self.model, self.weights, self.teacher = model, weights, teacher
        self.teacher_logits = None if teacher_logits is None else teacher_logits.to(model.device)
        self.layers = add_fake_quantization(model, storage)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self.layer_map = layer_map(teacher.config.num_hidden_layers, model.config.num_hidden_layers)
            self._add_projection(model.config.hidden_size, teacher.config.hidden_size)

    def _add_projection(self, width: int, teacher_width: int) -> None:
        """A part of the model, so that it is trained, saved to resume from, and shared by several processes."""
        if width != teacher_width:
            self.model.hidden_projection = nn.Linear(width, teacher_width, bias=False, device=self.model.device)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        weights = self.weights
        student = model(**model_inputs(model, batch), output_hidden_states=self.teacher is not None)
        teacher = self._teacher(batch)
        terms = {
            "cross_entropy": nn.functional.cross_entropy(student.logits.float(), batch["labels"]),
            "soft_label_loss": soft_label_loss(student.logits, teacher["logits"], weights.temperature),
        }
        loss = weights.beta_ce * terms["cross_entropy"] + weights.beta_logits * terms["soft_label_loss"]
        if self.teacher is not None:
            terms["hidden_state_loss"] = hidden_state_loss(
                student.hidden_states[1:],
                [teacher["hidden_states"][layer] for layer in self.layer_map],
                batch["attention_mask"],
                getattr(self.model, "hidden_projection", None),
            )
            loss = loss + weights.beta_hidden * terms["hidden_state_loss"]
        return {"loss": loss} | terms

    @torch.no_grad()
    def _teacher(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        if self.teacher is not None:
            return self.teacher(**model_inputs(self.teacher, batch), output_hidden_states=True)
        assert self.teacher_logits is not None, "neither a teacher nor its logits were given"
        return {"logits": self.teacher_logits[batch["rows"]]}

    def after_step(self, step: int) -> None:
        for layer in self.layers.values():
            layer.refresh()

    def finish(self) -> dict[str, Tensor]:
        """Give the model its plain fp32 layers back; returns the 4-bit values it was trained with, by layer name."""
        values = {name: layer.values for name, layer in self.layers.items()}
        remove_fake_quantization(self.model)
        if hasattr(self.model, "hidden_projection"):
            del self.model.hidden_projection
        return values

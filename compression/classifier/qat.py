"""Quantization-aware training with distillation: the student computes with 4-bit weights while it learns."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.batching import model_inputs
from compression.distillation import hidden_state_loss, layer_map, soft_label_loss
from compression.fake_quantization import add_fake_quantization, remove_fake_quantization
from compression.quantization import StorageFields
from compression.runtime import UserError
from compression.training import Recipe, TrainingConfig


@dataclass
class QuantizationAwareConfig(StorageFields, TrainingConfig):
    """Fields of quantization-aware training with distillation."""

    batch_size: int = 16
    """Sentences per optimizer step, over all processes."""
    learning_rate: float = 1e-5
    """Highest learning rate of AdamW."""
    num_epochs: int = 2
    """Passes over the training data."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    beta_ce: float = 0.3
    """Weight of the cross-entropy on the labels."""
    beta_logits: float = 0.5
    """Weight of the soft-label loss."""
    beta_hidden: float = 0.2
    """Weight of the hidden-state loss; with 0 the teacher's outputs are computed once and kept."""
    temperature: float = 4.0
    """Softening of both models' logits."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": dict(num_epochs=1, batch_size=32, train_fraction=0.3, max_length=64, beta_hidden=0.0, amp="auto"),
    }

    def check(self) -> None:
        super().check()
        betas = ("beta_ce", "beta_logits", "beta_hidden")
        for name in betas:
            self.check_range(name, 0)
        if not any(getattr(self, name) for name in betas):
            raise UserError("--beta_ce 0 --beta_logits 0 --beta_hidden 0: one of them must be above 0")
        self.check_range("temperature", 0.1, 100)


class QuantizationAwareDistillation(Recipe):
    """The recipe of stage 10: beta_ce * cross-entropy + beta_logits * soft labels + beta_hidden * hidden states.

    While it is in use the model has fake-quantized layers and, where teacher and student differ in width, a projection
    of hidden states that is trained with it; `finish` takes both away.

    Args:
        model: the student, trained in place; it must be on its device.
        rows: training sentences.
        teacher: runs on every batch; needed where hidden states count.
        teacher_logits: [rows, classes], instead of a teacher.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: QuantizationAwareConfig,
        rows: int,
        teacher: PreTrainedModel | None = None,
        teacher_logits: Tensor | None = None,
    ):
        super().__init__(config, rows)
        self.model, self.teacher = model, teacher
        self.teacher_logits = None if teacher_logits is None else teacher_logits.to(model.device)
        self.layers = add_fake_quantization(model, config.storage())
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self.layer_map = layer_map(teacher.config.num_hidden_layers, model.config.num_hidden_layers)
            self._add_projection(model.config.hidden_size, teacher.config.hidden_size)

    def _add_projection(self, width: int, teacher_width: int) -> None:
        """A part of the model, so that it is trained, saved to resume from, and shared by several processes."""
        if width != teacher_width:
            self.model.hidden_projection = nn.Linear(width, teacher_width, bias=False, device=self.model.device)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        config = self.config
        student = model(**model_inputs(model, batch), output_hidden_states=self.teacher is not None)
        teacher = self._teacher(batch)
        terms = {
            "cross_entropy": nn.functional.cross_entropy(student.logits.float(), batch["labels"]),
            "soft_label_loss": soft_label_loss(student.logits, teacher["logits"], config.temperature),
        }
        loss = config.beta_ce * terms["cross_entropy"] + config.beta_logits * terms["soft_label_loss"]
        if self.teacher is not None:
            terms["hidden_state_loss"] = hidden_state_loss(
                student.hidden_states[1:],
                [teacher["hidden_states"][layer] for layer in self.layer_map],
                batch["attention_mask"],
                getattr(self.model, "hidden_projection", None),
            )
            loss = loss + config.beta_hidden * terms["hidden_state_loss"]
        return {"loss": loss} | terms

    @torch.no_grad()
    def _teacher(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        if self.teacher is None:
            return {"logits": self.teacher_logits[batch["rows"]]}
        return self.teacher(**model_inputs(self.teacher, batch), output_hidden_states=True)

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

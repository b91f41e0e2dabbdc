"""Quantization-aware training with distillation: the student computes with 4-bit weights while it learns."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.batching import model_inputs
from compression.classifier.hidden_states import HiddenStates
from compression.distillation import soft_label_loss
from compression.fake_quantization import add_fake_quantization, remove_fake_quantization
from compression.quantization import Format
from compression.training import Recipe, Training


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses on logits, and the temperature of the soft labels."""

    beta_ce: float
    beta_logits: float
    temperature: float


class QuantizationAwareDistillation(Recipe):
    """The recipe of stage 10: beta_ce * cross-entropy + beta_logits * soft labels, and hidden states by their weight.

    While it is in use the model has fake-quantized layers; `finish` takes them away, and what `hidden_states` added.

    Args:
        model: the student, trained in place; it must be on its device.
        weights: of the losses.
        storage: the format that the weights are quantized to.
        teacher_logits: [rows, classes].
        hidden_states: what the student's hidden states learn from the teacher's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        training: Training,
        weights: LossWeights,
        storage: Format,
        teacher_logits: Tensor,
        hidden_states: HiddenStates,
    ):
        super().__init__(training, len(teacher_logits))
        self.model, self.weights, self.hidden_states = model, weights, hidden_states
        self.teacher_logits = teacher_logits.to(model.device)
        self.layers = add_fake_quantization(model, storage)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        weights = self.weights
        student = model(**model_inputs(model, batch), output_hidden_states=self.hidden_states.wanted)
        cross_entropy = nn.functional.cross_entropy(student.logits.float(), batch["labels"])
        soft_labels = soft_label_loss(student.logits, self.teacher_logits[batch["rows"]], weights.temperature)
        loss = weights.beta_ce * cross_entropy + weights.beta_logits * soft_labels
        terms = {"loss": loss, "cross_entropy": cross_entropy, "soft_label_loss": soft_labels}
        return self.hidden_states.added(terms, student, batch)

    def after_step(self, step: int) -> None:
        for layer in self.layers.values():
            layer.refresh()

    def finish(self) -> dict[str, Tensor]:
        """Give the model its plain fp32 layers back; returns the 4-bit values it was trained with, by layer name."""
        values = {name: layer.values for name, layer in self.layers.items()}
        remove_fake_quantization(self.model)
        self.hidden_states.finish()
        return values

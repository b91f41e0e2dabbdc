"""What a student's hidden states learn from its teacher's, token by token."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.batching import model_inputs
from compression.classifier.data import Encoded
from compression.distillation import hidden_state_loss, layer_map
from compression.structures import layers_of


class LiveTeacher:
    """A teacher that runs on every batch.

    Args:
        model: the teacher, on the student's device.
        encoded: the rows that the student is trained on, as the teacher's tokenizer splits them.
        pad_token_id: the teacher's.
    """

    def __init__(self, model: PreTrainedModel, encoded: Encoded, pad_token_id: int):
        self.model, self.encoded, self.pad_token_id = model.eval().requires_grad_(False), encoded, pad_token_id

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Any:
        """What it makes of a batch's rows: `logits` [rows, classes], and `hidden_states` of embeddings and layers."""
        own = self.encoded.collate(batch["rows"].tolist(), self.pad_token_id)
        own = {name: tensor.to(self.model.device) for name, tensor in own.items()}
        return self.model(**model_inputs(self.model, own), output_hidden_states=True)


class HiddenStates:
    """The hidden-state loss, over all layers of the student that have not lost everything.

    The i-th of these learns from the teacher's layer that `layer_map` gives, so the map follows when layers go. Where
    teacher and student differ in width, a projection is trained with the student, as a part of it, so that it is saved
    to resume from and shared by several processes; `finish` takes it away.

    Args:
        model: the student.
        teacher: None: hidden states do not count.
        weight: of the loss, beside the others.
        projection: the one to use where they differ; by default a new one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: LiveTeacher | None = None,
        weight: float = 0.0,
        projection: nn.Module | None = None,
    ):
        self.model, self.teacher, self.weight = model, teacher, weight
        if teacher is not None:
            width, teacher_width = model.config.hidden_size, teacher.model.config.hidden_size
            if width != teacher_width:
                new = nn.Linear(width, teacher_width, bias=False, device=model.device)
                model.hidden_projection = new if projection is None else projection
            self.match_layers()

    @property
    def wanted(self) -> bool:
        """Whether they count."""
        return self.teacher is not None

    def match_layers(self) -> None:
        """Map the student's layers to the teacher's anew."""
        if self.teacher is not None:
            self.layers = [place for place, parts in enumerate(layers_of(self.model), 1) if not parts.empty]
            self.teachers_layers = layer_map(self.teacher.model.config.num_hidden_layers, len(self.layers))

    def added(self, terms: dict[str, Tensor], student: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss terms with this one among them, where it counts: `loss` is the sum that is minimised.

        Args:
            student: what the student gave for the batch, with its hidden states where they are wanted.
        """
        if self.teacher is None:
            return terms
        states, teachers = student.hidden_states, self.teacher(batch).hidden_states
        loss = hidden_state_loss(
            [states[layer] for layer in self.layers],
            [teachers[layer] for layer in self.teachers_layers],
            batch["attention_mask"],
            getattr(self.model, "hidden_projection", None),
        )
        return terms | {"loss": terms["loss"] + self.weight * loss, "hidden_state_loss": loss}

    def finish(self) -> nn.Module | None:
        """Take the projection away; returns it."""
        projection = getattr(self.model, "hidden_projection", None)
        if projection is not None:
            del self.model.hidden_projection
        return projection

    def moved_to(self, model: PreTrainedModel, projection: nn.Module | None) -> "HiddenStates":
        """The same for a model that was made from this one, with the projection that `finish` gave."""
        return HiddenStates(model, self.teacher, self.weight, projection)

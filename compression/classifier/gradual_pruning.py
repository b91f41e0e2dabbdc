"""Distillation-aware gradual structured pruning (KGSP), in two recipes that follow one schedule.

`GradualPruning`: while a student trains on its teacher's soft labels, the least important structures are masked at
regular events, more of them at each event, following a cubic schedule. Importance is measured on the same distillation
loss. A part of which no structure is to stay is taken out of the model, for good. What is masked is cut away at the
end, or after each epoch, and not computed any more. `Finetuning`: the physically smaller model is trained on, and its
best epoch kept.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.batching import model_inputs
from compression.classifier.curvature import CURVATURE_STEPS, Curvature
from compression.classifier.hidden_states import HiddenStates
from compression.classifier.masks import add_masks, remove_masks
from compression.classifier.structure_scores import Importance, StructureScores
from compression.classifier.targets import Target
from compression.distillation import distillation_loss
from compression.runtime import UserError, log
from compression.schedule import EarlyStopping, cubic_sparsity, linear, warmup_then_linear_decay
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, LayerParts, layers_of
from compression.surgery import remove_part, shrink
from compression.training import BestEpoch, Recipe, Training

MIN_EVENTS = 10


@dataclass(frozen=True)
class PruningSchedule:
    """When structures are removed: epochs from 1, both included; steps between events."""

    pruning_start_epoch: int
    pruning_end_epoch: int
    pruning_frequency: int
    finetuning_learning_rate: float


@dataclass(frozen=True)
class DistillationSchedule:
    """Temperature and weight of the soft-label loss, linear from the first step to the last."""

    temperature_start: float
    temperature_end: float
    alpha_start: float
    alpha_end: float


@dataclass(frozen=True)
class Lesson:
    """What is learned in all phases, and when: the teacher's logits [rows, classes], settings and schedules."""

    teacher_logits: Tensor
    training: Training
    schedule: PruningSchedule
    distillation: DistillationSchedule


class ScheduledDistillation(Recipe):
    """What the phases Warmup, Pruning and Finetuning share: the loss, and which phase and values a step has.

    Args:
        model: the student, trained in place; it must be on its device.
        lesson: what all phases have alike.
        hidden_states: what the student's hidden states learn from the teacher's.
        epochs: the first and the last that this recipe trains.
    """

    def __init__(self, model: PreTrainedModel, lesson: Lesson, hidden_states: HiddenStates, epochs: tuple[int, int]):
        super().__init__(lesson.training, len(lesson.teacher_logits), *epochs)
        self.model, self.schedule, self.distillation = model, lesson.schedule, lesson.distillation
        self.teacher_logits, self.hidden_states = lesson.teacher_logits.to(model.device), hidden_states

    def phase(self, epoch: int) -> str:
        """Warmup, Pruning or Finetuning."""
        if epoch < self.schedule.pruning_start_epoch:
            return "Warmup"
        return "Pruning" if epoch <= self.schedule.pruning_end_epoch else "Finetuning"

    def temperature(self, step: int) -> float:
        return linear(self._progress(step), self.distillation.temperature_start, self.distillation.temperature_end)

    def alpha(self, step: int) -> float:
        return linear(self._progress(step), self.distillation.alpha_start, self.distillation.alpha_end)

    def _progress(self, step: int) -> float:
        return step / max(self.total_steps - 1, 1)

    def learning_rate(self, step: int) -> float:
        finetuning = self.schedule.pruning_end_epoch * self.steps_per_epoch
        if step >= finetuning:
            remaining = self.total_steps - finetuning
            return self.schedule.finetuning_learning_rate * warmup_then_linear_decay(step - finetuning, remaining, 0)
        warmup = int(self.training.warmup_ratio * finetuning)
        return self.training.learning_rate * min(1.0, (step + 1) / max(warmup, 1))

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        student = model(**model_inputs(model, batch), output_hidden_states=self.hidden_states.wanted)
        teacher = self.teacher_logits[batch["rows"]]
        terms = distillation_loss(student.logits, teacher, batch["labels"], self.temperature(step), self.alpha(step))
        return self.hidden_states.added(terms, student, batch)

    def after_epoch(self, epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
        last = epoch * self.steps_per_epoch - 1
        return {
            "phase": self.phase(epoch),
            "learning_rate": self.learning_rate(last),
            "temperature": self.temperature(last),
            "alpha": self.alpha(last),
        }


def sections(schedule: PruningSchedule, cuts: bool) -> list[tuple[int, int]]:
    """First and last epoch of each section of Warmup and Pruning, at whose end what is masked is cut away.

    Args:
        cuts: after each epoch of Pruning; else there is one section, so that structures can come back.
    """
    start, end = schedule.pruning_start_epoch, schedule.pruning_end_epoch
    if not cuts:
        return [(1, end)]
    return [(1, start), *((epoch, epoch) for epoch in range(start + 1, end + 1))]


def extent(layers: list[LayerParts], kept: dict[str, list[Tensor]] | None = None) -> dict[str, int]:
    """How many heads and neurons there are, and the parameters of both.

    Args:
        kept: those that count, bool [structures] per layer; by default all.
    """
    if kept is None:
        counts = {kind: [parts.count(kind) for parts in layers] for kind in ENCODER_KINDS}
    else:
        counts = {kind: [int(stays.sum()) for stays in masks] for kind, masks in kept.items()}
    parameters = sum(
        count * parts.structure_parameters(kind)
        for kind, of_kind in counts.items()
        for count, parts in zip(of_kind, layers, strict=True)
    )
    return {kind: sum(of_kind) for kind, of_kind in counts.items()} | {"parameters": parameters}


class Finetuning(ScheduledDistillation):
    """The last phase: the smaller model is trained on; the epoch that is best by a metric is kept in `best`.

    Args:
        criterion: the metric.
        sparsity: what the history says of each epoch, besides.
    """

    best: BestEpoch

    def __init__(
        self,
        model: PreTrainedModel,
        lesson: Lesson,
        hidden_states: HiddenStates,
        early_stopping: EarlyStopping,
        criterion: str,
        sparsity: dict[str, float],
    ):
        epochs = lesson.schedule.pruning_end_epoch + 1, lesson.training.num_epochs
        super().__init__(model, lesson, hidden_states, epochs)
        self.best, self.criterion, self.sparsity = BestEpoch(model, early_stopping), criterion, sparsity

    def after_epoch(self, epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
        self.best.update(metrics[self.criterion])
        return super().after_epoch(epoch, metrics) | self.sparsity

    def finish(self) -> None:
        """Go back to the best epoch, and leave nothing but the model."""
        self.best.restore()
        self.hidden_states.finish()


class GradualPruning(ScheduledDistillation):
    """Epochs of the phases Warmup and Pruning, with masks that become surgery at their end.

    Args:
        target: what the last pruning event has to reach.
        whole: what there was before anything was pruned, see `extent`.
        epochs: the first and the last of those that the model is trained before it is cut, see `sections`.
    """

    removes_weights = True

    def __init__(
        self,
        model: PreTrainedModel,
        lesson: Lesson,
        hidden_states: HiddenStates,
        importance: Importance,
        target: Target,
        whole: dict[str, int],
        epochs: tuple[int, int],
    ):
        super().__init__(model, lesson, hidden_states, epochs)
        self.target, self.whole = target, whole
        self.layers = layers_of(model)
        self.masked = add_masks(model)
        self.removed: list[tuple[str, int]] = []
        self.scores = StructureScores(self.layers, self.masked, importance)
        self.events = self._events()

    def _events(self) -> list[int]:
        start = (self.schedule.pruning_start_epoch - 1) * self.steps_per_epoch
        end = self.schedule.pruning_end_epoch * self.steps_per_epoch
        frequency = max(1, min(self.schedule.pruning_frequency, (end - start) // MIN_EVENTS))
        if frequency < self.schedule.pruning_frequency:
            log.info("Pruning events every %d steps: the phase has only %d steps", frequency, end - start)
        # Counted back from the end of the phase, whose last step is always an event.
        return sorted(range(end - 1, start + frequency - 2, -frequency))

    def _way(self, step: int) -> float:
        """Share of the way to the target that is gone after an event."""
        start = (self.schedule.pruning_start_epoch - 1) * self.steps_per_epoch
        return cubic_sparsity((step + 1 - start) / (self.events[-1] + 1 - start), 1.0)

    # The loop's hooks.

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        curvature = self._curvature(step)
        if curvature is None:
            return super().loss(model, batch, step)
        with curvature.watching(batch["attention_mask"]):
            terms = super().loss(model, batch, step)
        curvature.weigh(terms["loss"], len(batch["rows"]))
        return terms

    def _next_event(self, step: int) -> int | None:
        """The step of the first event from a step on, if there is one."""
        place = bisect_left(self.events, step)
        return self.events[place] if place < len(self.events) else None

    def _curvature(self, step: int) -> Curvature | None:
        """What takes in the curvature of a step, if the next event needs it."""
        event = self._next_event(step)
        near = event is not None and event - step < CURVATURE_STEPS
        return self.scores.curvature_at(event == self.events[-1]) if near else None

    def after_backward(self, step: int) -> None:
        event = self._next_event(step)
        if event is not None and event - step < self.scores.settings.pruning_window_steps:
            self.scores.accumulate(step)
        if curvature := self._curvature(step):
            curvature.take_in()
        for layer in self.scores.masked_layers:
            layer.freeze_pruned()

    def after_step(self, step: int) -> None:
        if step == self._next_event(step):
            self._prune(step)

    def after_epoch(self, epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
        return super().after_epoch(epoch, metrics) | self.sparsity()

    # Pruning.

    def _prune(self, step: int) -> None:
        scores: dict[str, dict[int, Tensor]] = {}
        for kinds in self.target.rankings:
            scores |= self.scores.densities(kinds)
        chosen = self.target.choose(self.layers, scores, self._way(step))
        stays = {(kind, index): stay for kind, layers in chosen.items() for index, stay in layers.items()}
        for place in [place for place, stay in stays.items() if not stay.any()]:
            self._take_out(*place)
            del stays[place]
        self._mask(stays, last=step == self.events[-1])

    def _mask(self, stays: dict[tuple[str, int], Tensor], last: bool) -> None:
        """Mask all structures but these, at the last event or one before it."""
        curvature = self.scores.curvature_at(last)
        if curvature and self.scores.repairs_at(last):
            curvature.repair(stays)
        for (kind, index), stay in stays.items():
            self.masked[kind][index].keep(stay)
        if curvature:
            curvature.fade()

    def _take_out(self, kind: str, index: int) -> None:
        """Take a layer's attention or FFN out of the model, in which the state passes by it from now on."""
        self.scores.forget(kind, index)
        del self.masked[kind][index]
        remove_part(self.model, kind, index)
        self.removed.append((kind, index))
        self.hidden_states.match_layers()

    def kept(self) -> dict[str, list[Tensor]]:
        """For each kind and layer a bool tensor [structures], True where the structure is in use."""
        gone = torch.zeros(0, dtype=torch.bool)
        return {
            kind: [layers[index].kept if index in layers else gone for index in range(len(self.layers))]
            for kind, layers in self.masked.items()
        }

    def sparsity(self) -> dict[str, float]:
        """Share of heads, of neurons, and of the parameters of both that is masked or taken out; what is reached."""
        kept = self.kept()
        now = extent(self.layers, kept)
        gone = {name: (whole - now[name]) / whole for name, whole in self.whole.items()}
        named = {"head_sparsity": gone[HEADS], "neuron_sparsity": gone[NEURONS], "total_sparsity": gone["parameters"]}
        return named | self.target.reached(self.layers, kept)

    def finish(self) -> tuple[PreTrainedModel, HiddenStates]:
        """Take the masks off the model; the physically smaller one, and what its hidden states learn."""
        kept, projection = self.kept(), self.hidden_states.finish()
        remove_masks(self.model)
        small = shrink(self.model, kept)
        return small, self.hidden_states.moved_to(small, projection)

    # Resume.

    def state(self) -> dict[str, Any]:
        return {"removed": self.removed}

    def tensors(self) -> dict[str, Tensor]:
        named = self.scores.tensors()
        for kind, layers in self.masked.items():
            named |= {f"mask.{kind}.{index}": layer.mask for index, layer in layers.items()}
        return named

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for kind, index in state["removed"]:
            self._take_out(kind, index)
        for name, tensor in self.tensors().items():
            if name not in tensors:
                raise UserError(
                    f"--resume: the saved state lacks {name}, it is of an older version; leave the flag out"
                )
            tensor.copy_(tensors[name])

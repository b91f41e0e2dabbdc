"""Distillation-aware gradual structured pruning (KGSP) with separate targets for heads and neurons (MSP).

While a student trains on its teacher's soft labels, the least important structures are masked at regular events, more
of them at each event, following a cubic schedule. Importance is measured on the same distillation loss.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.allocation import Pool, keep, reachable_sparsity
from compression.batching import model_inputs
from compression.classifier.masks import add_masks, remove_masks
from compression.classifier.structure_scores import Importance, StructureScores
from compression.distillation import distillation_loss
from compression.runtime import UserError, log
from compression.schedule import EarlyStopping, cubic_sparsity, linear, warmup_then_linear_decay
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, layers_of
from compression.surgery import shrink
from compression.training import BestEpoch, Recipe, Training

MIN_EVENTS = 10


@dataclass(frozen=True)
class Targets:
    """How much is removed, and what stays in every layer."""

    enable_multi_granularity: bool
    head_final_sparsity: float
    ffn_final_sparsity: float
    target_sparsity: float
    min_heads: int
    neuron_multiple: int


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


class GradualPruning(Recipe):
    """The recipe of stage 8: phases Warmup, Pruning and Finetuning, with masks that become surgery at the end."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_logits: Tensor,
        training: Training,
        schedule: PruningSchedule,
        distillation: DistillationSchedule,
        importance: Importance,
        targets: Targets,
        early_stopping: EarlyStopping,
        criterion: str = "selection_accuracy",
    ):
        super().__init__(training, len(teacher_logits))
        self.model, self.schedule, self.distillation, self.targets = model, schedule, distillation, targets
        self.teacher_logits = teacher_logits.to(model.device)
        self.masked = add_masks(model)
        self.layers = layers_of(model)
        self.scores = StructureScores(self.layers, self.masked, importance)
        self.events = self._events()
        self.best, self.criterion = BestEpoch(model, early_stopping), criterion
        self._check_reachable()

    # The schedule: which phase, event, temperature and rate a step has.

    def _events(self) -> list[int]:
        start = (self.schedule.pruning_start_epoch - 1) * self.steps_per_epoch
        end = self.schedule.pruning_end_epoch * self.steps_per_epoch
        frequency = max(1, min(self.schedule.pruning_frequency, (end - start) // MIN_EVENTS))
        if frequency < self.schedule.pruning_frequency:
            log.info("Pruning events every %d steps: the phase has only %d steps", frequency, end - start)
        # Counted back from the end of the phase, whose last step is always an event.
        return sorted(range(end - 1, start + frequency - 2, -frequency))

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

    def _sparsity(self, step: int, final: float) -> float:
        start = (self.schedule.pruning_start_epoch - 1) * self.steps_per_epoch
        return cubic_sparsity((step + 1 - start) / (self.events[-1] + 1 - start), final)

    # The loop's hooks.

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        logits = model(**model_inputs(model, batch)).logits
        teacher = self.teacher_logits[batch["rows"]]
        return distillation_loss(logits, teacher, batch["labels"], self.temperature(step), self.alpha(step))

    def after_backward(self, step: int) -> None:
        place = bisect_left(self.events, step)
        if place < len(self.events) and self.events[place] - step < self.scores.settings.pruning_window_steps:
            self.scores.accumulate(step)
        for layers in self.masked.values():
            for layer in layers:
                layer.freeze_pruned()

    def after_step(self, step: int) -> None:
        place = bisect_left(self.events, step)
        if place < len(self.events) and self.events[place] == step:
            self._prune(step)

    def after_epoch(self, epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
        last = epoch * self.steps_per_epoch - 1
        if self.phase(epoch) == "Finetuning":
            self.best.update(metrics[self.criterion])
        return {
            "phase": self.phase(epoch),
            **self.sparsity(),
            "learning_rate": self.learning_rate(last),
            "temperature": self.temperature(last),
            "alpha": self.alpha(last),
        }

    @property
    def stop(self) -> bool:
        return self.best.stopping.stop

    # Pruning.

    def _groups(self) -> list[tuple[tuple[str, ...], str]]:
        """Kinds that are ranked together, and the field that holds their final sparsity."""
        if self.targets.enable_multi_granularity:
            return [((HEADS,), "head_final_sparsity"), ((NEURONS,), "ffn_final_sparsity")]
        return [(ENCODER_KINDS, "target_sparsity")]

    def _pools(self, kinds: tuple[str, ...], scores: dict[str, list[Tensor]]) -> list[Pool]:
        limits = {HEADS: (self.targets.min_heads, 1), NEURONS: (1, self.targets.neuron_multiple)}
        return [
            Pool(score, parts.structure_parameters(kind), *limits[kind])
            for kind in kinds
            for parts, score in zip(self.layers, scores[kind], strict=True)
        ]

    def _check_reachable(self) -> None:
        for kinds, field in self._groups():
            zeros = {kind: [torch.zeros(parts.count(kind)) for parts in self.layers] for kind in kinds}
            most = reachable_sparsity(self._pools(kinds, zeros))
            if getattr(self.targets, field) > most:
                raise UserError(
                    f"--{field} {getattr(self.targets, field)}: with --min_heads {self.targets.min_heads} and "
                    f"--neuron_multiple {self.targets.neuron_multiple} at most {math.floor(most * 1000) / 1000} can go"
                )

    def _prune(self, step: int) -> None:
        for kinds, field in self._groups():
            pools = self._pools(kinds, self.scores.densities(kinds))
            kept = iter(keep(pools, self._sparsity(step, getattr(self.targets, field))))
            for kind in kinds:
                for layer in self.masked[kind]:
                    layer.keep(next(kept))

    def kept(self) -> dict[str, list[Tensor]]:
        """For each kind and layer a bool tensor [structures], True where the structure is in use."""
        return {kind: [layer.kept for layer in layers] for kind, layers in self.masked.items()}

    def sparsity(self) -> dict[str, float]:
        """Share of heads, of neurons, and of the parameters of both that is masked."""
        removed, total, shares = 0, 0, {}
        for kind, masks in self.kept().items():
            gone = [int((~mask).sum()) for mask in masks]
            shares[kind] = sum(gone) / sum(len(mask) for mask in masks)
            sizes = [parts.structure_parameters(kind) for parts in self.layers]
            removed += sum(count * size for count, size in zip(gone, sizes, strict=True))
            total += sum(len(mask) * size for mask, size in zip(masks, sizes, strict=True))
        return {"head_sparsity": shares[HEADS], "neuron_sparsity": shares[NEURONS], "total_sparsity": removed / total}

    def finish(self) -> PreTrainedModel:
        """Take the masks off the model and return the physically smaller one."""
        kept = self.kept()
        remove_masks(self.model)
        return shrink(self.model, kept)

    # Resume.

    def state(self) -> dict[str, Any]:
        return self.best.state()

    def tensors(self) -> dict[str, Tensor]:
        return self.best.tensors() | self._in_place()

    def _in_place(self) -> dict[str, Tensor]:
        """Masks and window, whose tensors are written to when a state is loaded."""
        named = self.scores.tensors()
        for kind, layers in self.masked.items():
            named |= {f"mask.{kind}.{index}": layer.mask for index, layer in enumerate(layers)}
        return named

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.best.load(state, tensors)
        for name, tensor in self._in_place().items():
            if name not in tensors:
                raise UserError(
                    f"--resume: the saved state lacks {name}, it is of an older version; leave the flag out"
                )
            tensor.copy_(tensors[name])

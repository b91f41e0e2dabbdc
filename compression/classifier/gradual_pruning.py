"""Distillation-aware gradual structured pruning (KGSP) with separate targets for heads and neurons (MSP).

While a student trains on its teacher's soft labels, the least important structures are masked at regular events, more
of them at each event, following a cubic schedule. Importance is measured on the same distillation loss.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression import importance
from compression.allocation import Pool, keep, reachable_sparsity
from compression.batching import model_inputs
from compression.classifier.masks import MaskedLinear, add_masks, gradient_of, remove_masks
from compression.config import choice_of
from compression.distillation import distillation_loss
from compression.runtime import UserError, log
from compression.schedule import EarlyStopping, cubic_sparsity, linear, warmup_then_linear_decay
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, LayerParts, Rows, layers_of
from compression.surgery import shrink
from compression.training import Recipe, Training

MIN_EVENTS = 10


# Importance of structures while a model is trained.


@dataclass(frozen=True)
class Mode:
    """One way to score structures.

    Attributes:
        help: what it is, in a few words.
        weights: the weight of the norm of a structure's weights and of its gradient score, each on one scale.
        measure: what one step's gradients add to the gradient score: given the matrices of the structures' rows, the
            output projection and the number of structures, the shares of rows and of columns [structures]. None: no
            gradients are needed.
        completed: a pruned structure's share of rows cannot be measured and is estimated from those in use.
    """

    help: str
    weights: Callable[["Importance"], tuple[float, float]]
    measure: Callable[[tuple[Rows, ...], nn.Linear, int], tuple[Tensor, Tensor]] | None
    completed: bool = True


def _weight_times_gradient(rows: tuple[Rows, ...], outer: nn.Linear, count: int) -> tuple[Tensor, Tensor]:
    gradients = [share for row in rows for share in row.split(gradient_of(row.module))]
    inner = importance.taylor(_weights(rows), gradients, count)
    return inner, importance.taylor_columns(outer.weight, gradient_of(outer), count)


def _weights(rows: tuple[Rows, ...]) -> list[Tensor]:
    return [share for row in rows for share in row.split(row.module.weight)]


def _squared_mask_gradient(_: tuple[Rows, ...], outer: nn.Linear, count: int) -> tuple[Tensor, Tensor]:
    gradient = importance.mask_gradient(outer.weight, gradient_of(outer), count)
    return torch.zeros_like(gradient), gradient.square()


MODES = {
    "l2": Mode("norm of the weights", lambda _: (1.0, 0.0), None),
    "kd_grad": Mode("|weight * gradient| of the distillation loss", lambda _: (0.0, 1.0), _weight_times_gradient),
    "l2+kd_grad": Mode(
        "both, weighted by lambda_mag and lambda_grad",
        lambda settings: (settings.lambda_mag, settings.lambda_grad),
        _weight_times_gradient,
    ),
    "fisher": Mode(
        "squared gradient of a mask on each structure, per step (Kwon et al. 2022, arXiv:2204.09656)",
        lambda _: (0.0, 1.0),
        _squared_mask_gradient,
        completed=False,
    ),
}
if TYPE_CHECKING:
    ModeName = str
else:
    ModeName = choice_of(MODES, "Score of a structure")


@dataclass(frozen=True)
class Importance:
    """How structures are scored: a mode of `MODES`, its weights, and the steps whose gradients count."""

    importance_mode: ModeName
    lambda_mag: float
    lambda_grad: float
    pruning_window_steps: int


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


class StructureScores:
    """Importance of every structure, from the weights and the gradients of the last steps.

    The gradients of a sliding window count: the last `pruning_window_steps` steps, also those before the last pruning
    event. In the two tables of the window a step has a row, and all structures stand in one row, kind by kind and
    layer by layer.
    """

    def __init__(self, layers: list[LayerParts], masked: dict[str, list[MaskedLinear]], settings: Importance):
        self.layers, self.masked, self.settings = layers, masked, settings
        self.mode = MODES[settings.importance_mode]
        self.places = [(kind, index) for kind in ENCODER_KINDS for index in range(len(layers))]
        self.counts = [masked[kind][index].count for kind, index in self.places]
        device = masked[HEADS][0].weight.device
        steps = settings.pruning_window_steps if self.mode.measure else 0
        self.inner, self.outer = (torch.zeros(steps, sum(self.counts), device=device) for _ in range(2))
        self.newest = -1
        # Steps since each structure was last out of use.
        self.in_use = torch.full((sum(self.counts),), steps, device=device)

    @torch.no_grad()
    def accumulate(self, step: int) -> None:
        """Take in the gradients of one step."""
        measure = self.mode.measure
        if measure is None:
            return
        halves = [measure(*self._matrices(kind, index)) for kind, index in self.places]
        inner, outer = (torch.cat(half) for half in zip(*halves, strict=True))
        # A step whose gradients overflow (fp16) is skipped by the optimizer and must not count here either.
        finite = (inner.sum() + outer.sum()).isfinite()
        self.newest = row = step % len(self.inner)
        self.inner[row], self.outer[row] = torch.where(finite, inner, 0.0), torch.where(finite, outer, 0.0)
        kept = torch.cat([self.masked[kind][index].kept for kind, index in self.places])
        self.in_use.add_(1).mul_(kept)

    def _matrices(self, kind: str, index: int) -> tuple[tuple[Rows, ...], nn.Linear, int]:
        """The matrices of a layer's structures of a kind: of their rows, of their columns; and how many they are."""
        outer = self.masked[kind][index]
        rows, _ = self.layers[index].split(kind)
        return rows, outer, outer.count

    @torch.no_grad()
    def densities(self, kinds: tuple[str, ...]) -> dict[str, list[Tensor]]:
        """Score per parameter of the structures of these kinds, on one scale over all of them."""
        parameters = [parts.structure_parameters(kind) for kind in kinds for parts in self.layers]
        terms = []
        for weight, measured in zip(self.mode.weights(self.settings), (self._norms, self._gradients), strict=True):
            if weight:
                terms.append([weight * score for score in importance.on_one_scale(measured(kinds), parameters)])
        scores = iter([sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)])
        return {kind: [next(scores) for _ in self.layers] for kind in kinds}

    def _norms(self, kinds: tuple[str, ...]) -> list[Tensor]:
        """Root of the mean squared weight: the L2 norm, free of the structure's size."""
        return [self._norm(kind, index) for kind, index in self.places if kind in kinds]

    def _norm(self, kind: str, index: int) -> Tensor:
        rows, outer, count = self._matrices(kind, index)
        squares = importance.l2(_weights(rows), outer.weight, count)
        return (squares / self.layers[index].structure_parameters(kind)).sqrt()

    def _gradients(self, kinds: tuple[str, ...]) -> list[Tensor]:
        """Gradient score per parameter over the window."""
        wanted = torch.tensor([kind in kinds for kind, _ in self.places])
        columns = wanted.repeat_interleave(torch.tensor(self.counts)).to(self.in_use.device)
        sums = self._over_window(self.inner[:, columns]), self._over_window(self.outer[:, columns])
        counts = list(compress(self.counts, wanted))
        measured = (values.split(counts) for values in (*sums, self.in_use[columns]))
        scores = []
        for (kind, index), inner, outer, in_use in zip(compress(self.places, wanted), *measured, strict=True):
            # What was out of use at a step of the window is estimated over all of it.
            throughout = in_use >= len(self.inner)
            score = importance.complete_pruned(inner, outer, throughout) if self.mode.completed else outer
            scores.append(score / self.layers[index].structure_parameters(kind))
        return scores

    def _over_window(self, rows: Tensor) -> Tensor:
        """Sum over the steps of the window, one after the other from the oldest: rounding depends on nothing else."""
        return reduce(torch.add, rows.roll(-self.newest - 1, 0))

    def tensors(self) -> dict[str, Tensor]:
        """The window, to resume from."""
        return {"window.inner": self.inner, "window.outer": self.outer, "window.in_use": self.in_use}


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
        self.early_stopping, self.criterion = early_stopping, criterion
        self.best: dict[str, Tensor] = {}
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
        if self.phase(epoch) == "Finetuning" and self.early_stopping.update(metrics[self.criterion]):
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        return {
            "phase": self.phase(epoch),
            **self.sparsity(),
            "learning_rate": self.learning_rate(last),
            "temperature": self.temperature(last),
            "alpha": self.alpha(last),
        }

    @property
    def stop(self) -> bool:
        return self.early_stopping.stop

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

    def load_best(self) -> None:
        """Go back to the weights of the best epoch with the final masks."""
        if self.best:
            self.model.load_state_dict(self.best)

    def finish(self) -> PreTrainedModel:
        """Take the masks off the model and return the physically smaller one."""
        kept = self.kept()
        remove_masks(self.model)
        return shrink(self.model, kept)

    # Resume.

    def state(self) -> dict[str, Any]:
        stopping = self.early_stopping
        best = None if stopping.best == float("-inf") else stopping.best
        return {"best_metric": best, "waited": stopping.waited}

    def tensors(self) -> dict[str, Tensor]:
        named = {f"best.{name}": tensor for name, tensor in self.best.items()}
        return named | self._in_place()

    def _in_place(self) -> dict[str, Tensor]:
        """Masks and window, whose tensors are written to when a state is loaded."""
        named = self.scores.tensors()
        for kind, layers in self.masked.items():
            named |= {f"mask.{kind}.{index}": layer.mask for index, layer in enumerate(layers)}
        return named

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.early_stopping.waited = state["waited"]
        if state["best_metric"] is not None:
            self.early_stopping.best = state["best_metric"]
        self.best = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        for name, tensor in self._in_place().items():
            if name not in tensors:
                raise UserError(
                    f"--resume: the saved state lacks {name}, it is of an older version; leave the flag out"
                )
            tensor.copy_(tensors[name])

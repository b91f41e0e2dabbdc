"""Distillation-aware gradual structured pruning (KGSP) with separate targets for heads and neurons (MSP).

While a student trains on its teacher's soft labels, the least important structures are masked at regular events, more
of them at each event, following a cubic schedule. Importance is measured on the same distillation loss.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression import importance
from compression.allocation import Pool, keep, reachable_sparsity
from compression.batching import model_inputs
from compression.classifier.masks import MaskedLinear, add_masks, remove_masks
from compression.distillation import distillation_loss
from compression.runtime import UserError, log
from compression.schedule import EarlyStopping, cubic_sparsity, linear, warmup_then_linear_decay
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, LayerParts, layers_of
from compression.surgery import shrink
from compression.training import Recipe, TrainingConfig

MIN_EVENTS = 10


@dataclass
class GradualPruningConfig(TrainingConfig):
    """Fields of gradual structured pruning."""

    num_epochs: int = 15
    """Passes over the training data, all phases together."""
    temperature_start: float = 10.0
    """Softening of the logits at the first step."""
    temperature_end: float = 2.0
    """Softening of the logits at the last step."""
    alpha_start: float = 0.9
    """Weight of the soft-label loss at the first step; cross-entropy has the rest."""
    alpha_end: float = 0.2
    """Weight of the soft-label loss at the last step."""
    pruning_start_epoch: int = 2
    """First epoch of the Pruning phase (epochs count from 1); before it is Warmup."""
    pruning_end_epoch: int = 8
    """Last epoch of the Pruning phase; after it comes Finetuning."""
    finetuning_learning_rate: float = 1e-5
    """Learning rate at the start of Finetuning; it falls linearly to zero."""
    patience: int = 5
    """Finetuning stops after so many epochs without a better accuracy on the held-out training sentences."""
    min_delta: float = 0.001
    """An accuracy is better if it is higher by more than this."""
    pruning_frequency: int = 20
    """Steps between pruning events (fewer where the phase is too short for ten events)."""
    importance_mode: Literal["l2", "kd_grad", "l2+kd_grad", "fisher"] = "l2+kd_grad"
    """What importance is: weight norm, |weight * gradient| of the distillation loss, both, or Fisher of a mask."""
    lambda_mag: float = 0.5
    """Weight of the norm in l2+kd_grad."""
    lambda_grad: float = 0.5
    """Weight of the gradient term in l2+kd_grad."""
    pruning_window_steps: int = 50
    """Gradients count for importance over at most so many steps before an event (never beyond the event before)."""
    enable_multi_granularity: bool = True
    """MSP: rank heads and neurons apart, each to its own target; off: one ranking by score per parameter."""
    head_final_sparsity: float = 0.30
    """Share of the heads to remove (with MSP)."""
    ffn_final_sparsity: float = 0.20
    """Share of the FFN neurons to remove (with MSP)."""
    target_sparsity: float = 0.20
    """Share of the parameters of all heads and neurons to remove (without MSP)."""
    min_heads: int = 1
    """At least so many heads stay in every layer."""
    neuron_multiple: int = 8
    """A multiple of so many neurons stays in every layer."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": dict(
            num_epochs=4, pruning_start_epoch=1, pruning_end_epoch=2, batch_size=64, train_fraction=0.3, max_length=64,
            pruning_frequency=100, pruning_window_steps=20, amp="auto", patience=2,
        ),
        "conservative": dict(
            lambda_mag=0.6, lambda_grad=0.4, head_final_sparsity=0.20, ffn_final_sparsity=0.15,
            pruning_window_steps=100,
        ),
        "aggressive": dict(head_final_sparsity=0.40, ffn_final_sparsity=0.35),
    }  # fmt: skip

    @classmethod
    def conservative(cls):
        """Remove less, and trust the weights' norm more."""
        return cls.preset("conservative")

    @classmethod
    def aggressive(cls):
        """Remove more."""
        return cls.preset("aggressive")

    def check(self) -> None:
        super().check()
        for name in ("alpha_start", "alpha_end"):
            self.check_range(name, 0, 1)
        for name in ("temperature_start", "temperature_end"):
            self.check_range(name, 0.1, 100)
        for name in ("head_final_sparsity", "ffn_final_sparsity", "target_sparsity"):
            self.check_range(name, 0, 0.99)
        for name in ("lambda_mag", "lambda_grad", "min_delta", "finetuning_learning_rate"):
            self.check_range(name, 0)
        for name in ("patience", "pruning_frequency", "pruning_window_steps", "min_heads", "neuron_multiple"):
            self.check_range(name, 1)
        if self.pruning_end_epoch > self.num_epochs:
            raise UserError(
                f"--num_epochs {self.num_epochs}: allowed is at least --pruning_end_epoch {self.pruning_end_epoch}; "
                "set both"
            )
        self.check_range("pruning_end_epoch", 1)
        self.check_range("pruning_start_epoch", 1, self.pruning_end_epoch)
        if self.importance_mode == "l2+kd_grad" and self.lambda_mag + self.lambda_grad == 0:
            raise UserError(
                "--lambda_mag 0 --lambda_grad 0: one of them must be above 0 with --importance_mode l2+kd_grad"
            )


class StructureScores:
    """Importance of every structure, from the weights and the gradients of the steps since the last event."""

    def __init__(self, layers: list[LayerParts], masked: dict[str, list[MaskedLinear]], config: GradualPruningConfig):
        self.layers, self.masked, self.config = layers, masked, config
        self.inner = {kind: [torch.zeros_like(layer.kept.float()) for layer in masked[kind]] for kind in ENCODER_KINDS}
        self.outer = {kind: [torch.zeros_like(layer.kept.float()) for layer in masked[kind]] for kind in ENCODER_KINDS}

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take in the gradients of one step."""
        if self.config.importance_mode == "l2":
            return
        totals, terms = [], []
        for kind in ENCODER_KINDS:
            totals += self.inner[kind] + self.outer[kind]
            halves = [self._halves(kind, index) for index in range(len(self.layers))]
            terms += [inner for inner, _ in halves] + [outer for _, outer in halves]
        # A step whose gradients overflow (fp16) is skipped by the optimizer and must not count here either.
        finite = torch.cat(terms).sum().isfinite()
        torch._foreach_add_(totals, [torch.where(finite, term, 0.0) for term in terms])

    def _halves(self, kind: str, index: int) -> tuple[Tensor, Tensor]:
        """What one step adds to the scores of a layer: from the structures' rows, and from their columns."""
        outer = self.masked[kind][index]
        if self.config.importance_mode == "fisher":
            gradient = importance.mask_gradient(outer.weight, outer.weight.grad, outer.count)
            return torch.zeros_like(gradient), gradient.square()
        rows, _ = self.layers[index].split(kind)
        inner = importance.taylor([row.weight for row in rows], [row.weight.grad for row in rows], outer.count)
        return inner, importance.taylor_columns(outer.weight, outer.weight.grad, outer.count)

    def reset(self) -> None:
        """Start a new window."""
        for half in (self.inner, self.outer):
            for scores in half.values():
                for score in scores:
                    score.zero_()

    @torch.no_grad()
    def densities(self, kinds: tuple[str, ...]) -> dict[str, list[Tensor]]:
        """Score per parameter of the structures of these kinds, on one scale over all of them."""
        mode = self.config.importance_mode
        if mode == "l2":
            return self._scaled(self._norms, kinds)
        if mode != "l2+kd_grad":
            return self._scaled(self._gradients, kinds)
        norms, gradients = self._scaled(self._norms, kinds), self._scaled(self._gradients, kinds)
        return {
            kind: [
                self.config.lambda_mag * norm + self.config.lambda_grad * gradient
                for norm, gradient in zip(norms[kind], gradients[kind], strict=True)
            ]
            for kind in kinds
        }

    def _scaled(self, measure, kinds: tuple[str, ...]) -> dict[str, list[Tensor]]:
        parameters = [parts.structure_parameters(kind) for kind in kinds for parts in self.layers]
        scores = [measure(kind, index) for kind in kinds for index in range(len(self.layers))]
        scaled = iter(importance.on_one_scale(scores, parameters))
        return {kind: [next(scaled) for _ in self.layers] for kind in kinds}

    def _norms(self, kind: str, index: int) -> Tensor:
        """Root of the mean squared weight: the L2 norm, free of the structure's size."""
        parts, outer = self.layers[index], self.masked[kind][index]
        rows, _ = parts.split(kind)
        squares = importance.l2([linear.weight for linear in rows], outer.weight, outer.count)
        return (squares / parts.structure_parameters(kind)).sqrt()

    def _gradients(self, kind: str, index: int) -> Tensor:
        outer, parameters = self.outer[kind][index], self.layers[index].structure_parameters(kind)
        if self.config.importance_mode == "fisher":
            return outer / parameters
        kept = self.masked[kind][index].kept
        return importance.complete_pruned(self.inner[kind][index], outer, kept) / parameters


class GradualPruning(Recipe):
    """The recipe of stage 8: phases Warmup, Pruning and Finetuning, with masks that become surgery at the end."""

    def __init__(self, model: PreTrainedModel, teacher_logits: Tensor, config: GradualPruningConfig):
        super().__init__(config, len(teacher_logits))
        self.model = model
        self.teacher_logits = teacher_logits.to(model.device)
        self.masked = add_masks(model)
        self.layers = layers_of(model)
        self.scores = StructureScores(self.layers, self.masked, config)
        self.events = self._events()
        self.early_stopping = EarlyStopping(config.patience, config.min_delta)
        self.best: dict[str, Tensor] = {}
        self._check_reachable()

    # The schedule: which phase, event, temperature and rate a step has.

    def _events(self) -> list[int]:
        start = (self.config.pruning_start_epoch - 1) * self.steps_per_epoch
        end = self.config.pruning_end_epoch * self.steps_per_epoch
        frequency = max(1, min(self.config.pruning_frequency, (end - start) // MIN_EVENTS))
        if frequency < self.config.pruning_frequency:
            log.info("Pruning events every %d steps: the phase has only %d steps", frequency, end - start)
        # Counted back from the end of the phase, whose last step is always an event.
        return sorted(range(end - 1, start + frequency - 2, -frequency))

    def phase(self, epoch: int) -> str:
        """Warmup, Pruning or Finetuning."""
        if epoch < self.config.pruning_start_epoch:
            return "Warmup"
        return "Pruning" if epoch <= self.config.pruning_end_epoch else "Finetuning"

    def temperature(self, step: int) -> float:
        return linear(self._progress(step), self.config.temperature_start, self.config.temperature_end)

    def alpha(self, step: int) -> float:
        return linear(self._progress(step), self.config.alpha_start, self.config.alpha_end)

    def _progress(self, step: int) -> float:
        return step / max(self.total_steps - 1, 1)

    def learning_rate(self, step: int) -> float:
        finetuning = self.config.pruning_end_epoch * self.steps_per_epoch
        if step >= finetuning:
            remaining = self.total_steps - finetuning
            return self.config.finetuning_learning_rate * warmup_then_linear_decay(step - finetuning, remaining, 0)
        warmup = int(self.config.warmup_ratio * finetuning)
        return self.config.learning_rate * min(1.0, (step + 1) / max(warmup, 1))

    def _sparsity(self, step: int, final: float) -> float:
        start = (self.config.pruning_start_epoch - 1) * self.steps_per_epoch
        return cubic_sparsity((step + 1 - start) / (self.events[-1] + 1 - start), final)

    # The loop's hooks.

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        logits = model(**model_inputs(model, batch)).logits
        teacher = self.teacher_logits[batch["rows"]]
        return distillation_loss(logits, teacher, batch["labels"], self.temperature(step), self.alpha(step))

    def after_backward(self, step: int) -> None:
        place = bisect_left(self.events, step)
        if place < len(self.events) and self.events[place] - step < self.config.pruning_window_steps:
            self.scores.accumulate()
        for layers in self.masked.values():
            for layer in layers:
                layer.freeze_pruned()

    def after_step(self, step: int) -> None:
        place = bisect_left(self.events, step)
        if place < len(self.events) and self.events[place] == step:
            self._prune(step)
            self.scores.reset()

    def after_epoch(self, epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
        last = epoch * self.steps_per_epoch - 1
        if self.phase(epoch) == "Finetuning" and self.early_stopping.update(metrics["selection_accuracy"]):
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
        if self.config.enable_multi_granularity:
            return [((HEADS,), "head_final_sparsity"), ((NEURONS,), "ffn_final_sparsity")]
        return [(ENCODER_KINDS, "target_sparsity")]

    def _pools(self, kinds: tuple[str, ...], scores: dict[str, list[Tensor]]) -> list[Pool]:
        limits = {HEADS: (self.config.min_heads, 1), NEURONS: (1, self.config.neuron_multiple)}
        return [
            Pool(score, parts.structure_parameters(kind), *limits[kind])
            for kind in kinds
            for parts, score in zip(self.layers, scores[kind], strict=True)
        ]

    def _check_reachable(self) -> None:
        for kinds, field in self._groups():
            zeros = {kind: [torch.zeros(parts.count(kind)) for parts in self.layers] for kind in kinds}
            most = reachable_sparsity(self._pools(kinds, zeros))
            if getattr(self.config, field) > most:
                raise UserError(
                    f"--{field} {getattr(self.config, field)}: with --min_heads {self.config.min_heads} and "
                    f"--neuron_multiple {self.config.neuron_multiple} at most {math.floor(most * 1000) / 1000} can go"
                )

    def _prune(self, step: int) -> None:
        for kinds, field in self._groups():
            pools = self._pools(kinds, self.scores.densities(kinds))
            kept = iter(keep(pools, self._sparsity(step, getattr(self.config, field))))
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
        return {
            "head_sparsity": shares[HEADS],
            "neuron_sparsity": shares[NEURONS],
            "total_sparsity": removed / total,
        }

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
        for kind in ENCODER_KINDS:
            for index, layer in enumerate(self.masked[kind]):
                named[f"mask.{kind}.{index}"] = layer.mask
                named[f"inner.{kind}.{index}"] = self.scores.inner[kind][index]
                named[f"outer.{kind}.{index}"] = self.scores.outer[kind][index]
        return named

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.early_stopping.waited = state["waited"]
        if state["best_metric"] is not None:
            self.early_stopping.best = state["best_metric"]
        self.best = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        for kind in ENCODER_KINDS:
            for index, layer in enumerate(self.masked[kind]):
                layer.mask.copy_(tensors[f"mask.{kind}.{index}"])
                self.scores.inner[kind][index].copy_(tensors[f"inner.{kind}.{index}"])
                self.scores.outer[kind][index].copy_(tensors[f"outer.{kind}.{index}"])

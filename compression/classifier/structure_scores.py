"""Importance of an encoder's structures while it is trained: modes of scoring, and a sliding window of gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import compress
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from compression import importance
from compression.classifier.curvature import Curvature
from compression.classifier.masks import MaskedLinear, Masks, gradient_of
from compression.config import choice_of
from compression.structures import ENCODER_KINDS, LayerParts, Rows


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
        second_order: the score is what a removal costs by the `Curvature` of the steps before an event, and nothing
            else; what is out of use costs nothing and does not come back.
    """

    help: str
    weights: Callable[["Importance"], tuple[float, float]]
    measure: Callable[[tuple[Rows, ...], nn.Linear, int], tuple[Tensor, Tensor]] | None
    completed: bool = True
    second_order: bool = False


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
    "obs": Mode(
        "loss that its removal adds, to second order, when all cheaper ones of its layer and kind are gone and those "
        "that stay are fitted anew (ZipLM, Kurtic et al. 2023, arXiv:2302.04089)",
        lambda _: (0.0, 1.0),
        None,
        second_order=True,
    ),
}
if TYPE_CHECKING:
    ModeName = str
else:
    ModeName = choice_of(MODES, "Score of a structure")
RepairName = Literal["none", "events", "end"]


@dataclass(frozen=True)
class Importance:
    """How structures are scored: a mode of `MODES`, its weights, and the steps whose gradients count.

    And the events at which those that stay make up for those that go.
    """

    importance_mode: ModeName
    lambda_mag: float
    lambda_grad: float
    pruning_window_steps: int
    repair: RepairName


class StructureScores:
    """Importance of every structure, from the weights and the gradients of the last steps.

    The gradients of a sliding window count: the last `pruning_window_steps` steps, also those before the last pruning
    event. In the two tables of the window a step has a row, and all structures stand in one row, kind by kind and
    layer by layer.
    """

    def __init__(self, layers: list[LayerParts], masked: Masks, settings: Importance):
        self.layers, self.masked, self.settings = layers, masked, settings
        self.mode = MODES[settings.importance_mode]
        self.places = [(kind, index) for kind in ENCODER_KINDS for index in masked[kind]]
        self.counts = [masked[kind][index].count for kind, index in self.places]
        device = self.masked_layers[0].weight.device
        steps = settings.pruning_window_steps if self.mode.measure else 0
        self.inner, self.outer = (torch.zeros(steps, sum(self.counts), device=device) for _ in range(2))
        self.newest = -1
        # Steps since each structure was last out of use.
        self.in_use = torch.full((sum(self.counts),), steps, device=device)
        watched = self.mode.second_order or settings.repair != "none"
        self.curvature = Curvature(masked, self.mode.second_order) if watched else None

    @property
    def masked_layers(self) -> list[MaskedLinear]:
        """The masked layer of each place."""
        return [self.masked[kind][index] for kind, index in self.places]

    def forget(self, kind: str, index: int) -> None:
        """Leave out a part that was taken out of the model, and what its structures have in the window."""
        place = self.places.index((kind, index))
        stay = torch.arange(len(self.places)).ne(place).repeat_interleave(torch.tensor(self.counts))
        stay = stay.to(self.in_use.device)
        self.inner, self.outer, self.in_use = self.inner[:, stay], self.outer[:, stay], self.in_use[stay]
        del self.places[place], self.counts[place]
        if self.curvature:
            self.curvature.forget((kind, index))

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
        kept = torch.cat([layer.kept for layer in self.masked_layers])
        self.in_use.add_(1).mul_(kept)

    def _matrices(self, kind: str, index: int) -> tuple[tuple[Rows, ...], nn.Linear, int]:
        """The matrices of a layer's structures of a kind: of their rows, of their columns; and how many they are."""
        outer = self.masked[kind][index]
        rows, _ = self.layers[index].split(kind)
        return rows, outer, outer.count

    def repairs_at(self, last: bool) -> bool:
        """Whether what a pruning event masks, perhaps the last one, is made up for."""
        return self.settings.repair == "events" or (self.settings.repair == "end" and last)

    def curvature_at(self, last: bool) -> Curvature | None:
        """The curvature where a pruning event, perhaps the last one, needs it."""
        return self.curvature if self.mode.second_order or self.repairs_at(last) else None

    @torch.no_grad()
    def densities(self, kinds: tuple[str, ...]) -> dict[str, dict[int, Tensor]]:
        """Score per parameter of the structures of these kinds by layer, on one scale over all of them."""
        places = [place for place in self.places if place[0] in kinds]
        found = self._removal_costs(places) if self.mode.second_order else self._first_order(kinds, places)
        scores: dict[str, dict[int, Tensor]] = {kind: {} for kind in kinds}
        for (kind, index), score in zip(places, found, strict=True):
            # What was made up for at an event is gone for good.
            scores[kind][index] = score * self.masked[kind][index].kept if self.settings.repair == "events" else score
        return scores

    def _removal_costs(self, places: list[tuple[str, int]]) -> list[Tensor]:
        """Loss per parameter along each part's path: the sum of the least is what the removal of these costs."""
        assert self.curvature is not None
        costs = zip(places, self.curvature.removal_costs(places), strict=True)
        return [cost / self.layers[index].structure_parameters(kind) for (kind, index), cost in costs]

    def _first_order(self, kinds: tuple[str, ...], places: list[tuple[str, int]]) -> list[Tensor]:
        """Norm and gradient score per parameter, each relative to its mean, by the mode's weights."""
        parameters = [self.layers[index].structure_parameters(kind) for kind, index in places]
        terms = []
        for weight, measured in zip(self.mode.weights(self.settings), (self._norms, self._gradients), strict=True):
            if weight:
                terms.append([weight * score for score in importance.on_one_scale(measured(kinds), parameters)])
        return [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]

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
        """Window and curvature, to resume from."""
        window = {"window.inner": self.inner, "window.outer": self.outer, "window.in_use": self.in_use}
        return window | (self.curvature.tensors() if self.curvature else {})

"""How much goes, and so which structures stay: separate targets for heads and neurons (MSP), or one budget.

Both are asked at every pruning event with the scores of that moment and the share of the way that is gone.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compression.allocation import Cost, Pool, Widths, all_but_least, best_widths, keep, reachable_sparsity
from compression.classifier.budget import Budget
from compression.runtime import UserError
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, LayerParts

Scores = dict[str, dict[int, Tensor]]
"""By kind and layer the score per parameter of each structure, [structures]; parts that are gone are not there."""
Kept = dict[str, dict[int, Tensor]]
"""By kind and layer which structures stay, bool [structures]."""


class Target(Protocol):
    """What a pruning event aims at."""

    @property
    def rankings(self) -> list[tuple[str, ...]]:
        """The kinds whose scores are compared with one another, for each comparison."""

    def choose(self, layers: list[LayerParts], scores: Scores, progress: float) -> Kept:
        """Which structures stay after a share `progress` of the way; where none of a part does, it is taken out."""

    def reached(self, layers: list[LayerParts], kept: dict[str, list[Tensor]]) -> dict[str, float]:
        """What is said, besides how many structures are gone, of a model of which these stay."""

    @property
    def cuts(self) -> bool:
        """Whether what is masked may be cut away after each epoch, since how much goes is no share of what is there."""

    @property
    def files(self) -> dict[str, Any]:
        """What belongs beside a result, JSON by file name."""


# What the dynamic program may add to costs when it rounds them, see `allocation.best_widths`.
ROUNDED_UP = 1.005


@dataclass(frozen=True)
class Floors:
    """What stays in every part that is not taken out."""

    min_heads: int
    neuron_multiple: int

    def of(self, kind: str) -> tuple[int, int]:
        """The least number of structures, and the number of which it is a multiple."""
        return (self.min_heads, 1) if kind == HEADS else (1, self.neuron_multiple)


@dataclass(frozen=True)
class SeparateTargets:
    """MSP: heads and neurons are ranked apart, each to its own sparsity; or all together, by score per parameter."""

    floors: Floors
    enable_multi_granularity: bool
    head_final_sparsity: float
    ffn_final_sparsity: float
    target_sparsity: float

    @property
    def rankings(self) -> list[tuple[str, ...]]:
        return [(HEADS,), (NEURONS,)] if self.enable_multi_granularity else [ENCODER_KINDS]

    def _fields(self) -> list[str]:
        """The field that holds the final sparsity of each ranking."""
        return ["head_final_sparsity", "ffn_final_sparsity"] if self.enable_multi_granularity else ["target_sparsity"]

    def check(self, layers: list[LayerParts]) -> "SeparateTargets":
        """These targets, if the layers allow them.

        Raises:
            UserError: what has to stay in every layer is more than a target leaves.
        """
        for kinds, field in zip(self.rankings, self._fields(), strict=True):
            zeros = {kind: {i: torch.zeros(parts.count(kind)) for i, parts in enumerate(layers)} for kind in kinds}
            most = reachable_sparsity(self._pools(layers, zeros, kinds))
            if getattr(self, field) > most:
                raise UserError(
                    f"--{field} {getattr(self, field)}: with --min_heads {self.floors.min_heads} and "
                    f"--neuron_multiple {self.floors.neuron_multiple} at most {math.floor(most * 1000) / 1000} can go"
                )
        return self

    def reached(self, layers: list[LayerParts], kept: dict[str, list[Tensor]]) -> dict[str, float]:
        return {}

    @property
    def cuts(self) -> bool:
        return False

    @property
    def files(self) -> dict[str, Any]:
        return {}

    def choose(self, layers: list[LayerParts], scores: Scores, progress: float) -> Kept:
        kept: Kept = {}
        for kinds, field in zip(self.rankings, self._fields(), strict=True):
            stay = iter(keep(self._pools(layers, scores, kinds), progress * getattr(self, field)))
            kept |= {kind: {index: next(stay) for index in scores[kind]} for kind in kinds}
        return kept

    def _pools(self, layers: list[LayerParts], scores: Scores, kinds: tuple[str, ...]) -> list[Pool]:
        return [
            Pool(score, Cost(layers[index].structure_parameters(kind)), *self.floors.of(kind))
            for kind in kinds
            for index, score in scores[kind].items()
        ]


@dataclass(frozen=True)
class OneBudget:
    """One budget for heads, neurons and whole parts: the choice that costs least by the scores of what goes.

    The loss that a choice adds is taken to be the sum of the scores of all that goes, which is less than what a whole
    part is worth: its structures can stand in for each other until the last. A part that stays keeps at least
    `min_part_share` of the structures that the widest one had: parts that are nearly empty cost more time than they are
    worth.

    Args:
        drop_parts: whether parts may go whole.
        widest: by kind the number of structures of the widest part, before anything was pruned.
    """

    floors: Floors
    min_part_share: float
    drop_parts: bool
    widest: dict[str, int]
    budget: Budget

    def check(self, layers: list[LayerParts]) -> "OneBudget":
        """This target, if the layers allow it.

        Raises:
            UserError: the least that has to stay, one attention or something of each part, takes more than the budget.
        """
        least = {kind: self._least_costs(kind, layers) for kind in ENCODER_KINDS}
        taken = min(least[HEADS]) if self.drop_parts else ROUNDED_UP * sum(sum(costs) for costs in least.values())
        if taken > self.budget.final:
            lowest = math.ceil(1e4 * (self.budget.base + taken) / self.budget.whole) / 1e4
            fields = f"--min_part_share {self.min_part_share}, --min_heads {self.floors.min_heads}"
            what = f"one attention takes ({fields})"
            if not self.drop_parts:
                what = f"the least of every part takes ({fields}); lower these, or let parts go whole: --drop_parts"
            raise UserError(
                f"--target {self.budget.quantity} {self.budget.share}: allowed is at least {lowest}, which {what}"
            )
        return self

    def _least_costs(self, kind: str, layers: list[LayerParts]) -> list[float]:
        """What each part of a kind costs at least, if it stays."""
        counted = [(parts, torch.zeros(parts.count(kind))) for parts in layers if parts.count(kind)]
        return [float(self._widths(kind, parts, none).costs[int(self.drop_parts)]) for parts, none in counted]

    @property
    def rankings(self) -> list[tuple[str, ...]]:
        return [ENCODER_KINDS]

    def choose(self, layers: list[LayerParts], scores: Scores, progress: float) -> Kept:
        places = [(kind, index) for kind in ENCODER_KINDS for index in scores[kind]]
        losses = [scores[kind][index] * layers[index].structure_parameters(kind) for kind, index in places]
        widths = [self._widths(kind, layers[at], loss) for (kind, at), loss in zip(places, losses, strict=True)]
        if self.drop_parts:
            self._keep_one_attention(places, widths)
        chosen = best_widths(widths, self.budget.allowed(progress))
        kept: Kept = {kind: {} for kind in ENCODER_KINDS}
        for (kind, index), width, which in zip(places, widths, chosen, strict=True):
            score = scores[kind][index]
            kept[kind][index] = all_but_least(score, len(score) - int(width.counts[which]))
        return kept

    def reached(self, layers: list[LayerParts], kept: dict[str, list[Tensor]]) -> dict[str, float]:
        return {f"{self.budget.quantity}_share": self.budget.reached(layers, kept)}

    @property
    def cuts(self) -> bool:
        return True

    @property
    def files(self) -> dict[str, Any]:
        return self.budget.files

    def _widths(self, kind: str, parts: LayerParts, losses: Tensor) -> Widths:
        count, (minimum, multiple) = len(losses), self.floors.of(kind)
        least = max(minimum, math.ceil(self.min_part_share * self.widest[kind]))
        least = min(-(-least // multiple) * multiple, count)
        none = [0] if self.drop_parts else []
        counts = torch.tensor(sorted({*none, *range(least, count, multiple), count}))
        added = torch.cat([torch.zeros(1), losses.double().cpu().sort().values.cumsum(0)])
        return Widths(counts, added[count - counts], self.budget.costs(parts, kind)[counts])

    def _keep_one_attention(self, places: list[tuple[str, int]], widths: list[Widths]) -> None:
        """Take from the attention that would be missed most the width 0: without any, tokens never meet."""
        missed = [w.losses[0] if kind == HEADS else -torch.inf for (kind, _), w in zip(places, widths, strict=True)]
        most = max(range(len(missed)), key=missed.__getitem__)
        stays = widths[most]
        widths[most] = Widths(stays.counts[1:], stays.losses[1:], stays.costs[1:])

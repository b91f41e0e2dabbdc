"""Search over H-GSP's allocation: from the sizes that the scores chose to those that keep the model nearest to itself.

What candidates are is said in `levels`, `evolution` and `exchange`, how they are put together in `stitching`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.allocation import Cost, Pool, all_but_least, keep
from compression.llm.agreement import divergence, last_states
from compression.llm.evolution import evolve
from compression.llm.exchange import exchange
from compression.llm.expansion import Expansion
from compression.llm.levels import Found, Part, Search, levels_of, rungs_of
from compression.llm.repair import LocalChoice
from compression.llm.repair_text import RepairText
from compression.llm.stitching import Counts, Solutions, choices_of, layer_of, solutions_of, stitched
from compression.llm.text import CalibrationText
from compression.progress import progress
from compression.runtime import log, log_phase
from compression.saved_parts import Cached
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS

Kept = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Space:
    """What a search may choose.

    Args:
        densities: by kind, of each layer the score per unit of cost [structures].
        costs: by kind, of each layer.
        fixed: layers whose sizes stay as they are.
        keep_attention: a layer that has attention keeps some.
        round_to: what numbers of channels are multiples of.
    """

    densities: Kept
    costs: dict[str, list[Cost]]
    fixed: frozenset[int]
    keep_attention: bool
    round_to: int

    def parts(self, start: Counts, levels: int) -> Iterator[Part]:
        """The attentions and MLPs whose sizes are searched for."""
        for layer, counts in enumerate(start):
            for kind, count in counts.items():
                every = len(self.densities[kind][layer])
                if every and layer not in self.fixed:
                    least = int(kind == GROUPS and self.keep_attention)
                    multiple = self.round_to if kind == CHANNELS else 1
                    sizes = levels_of(count, every, least, levels, multiple)
                    yield Part(layer, kind, self.costs[kind][layer], sizes)

    def stays(self, layer: int, kind: str, count: int) -> Tensor:
        """The structures of largest score of a layer, bool [structures]."""
        density = self.densities[kind][layer]
        return all_but_least(density, len(density) - count)

    def kept(self, counts: Counts) -> Kept:
        """Which structures stay in an allocation."""
        return {
            kind: [self.stays(layer, kind, sizes[kind]) for layer, sizes in enumerate(counts)] for kind in DECODER_KINDS
        }

    def cost(self, counts: Counts) -> float:
        """What stays costs."""
        return sum(
            self.costs[kind][layer].of(count) for layer, sizes in enumerate(counts) for kind, count in sizes.items()
        )

    def filled(self, counts: Counts, budget: float) -> Counts:
        """The allocation with as many more channels as the budget allows, in MLPs of which some are gone: those of
        largest score."""
        filled = [dict(sizes) for sizes in counts]
        some = [
            layer
            for layer, sizes in enumerate(counts)
            if layer not in self.fixed and 0 < sizes[CHANNELS] < len(self.densities[CHANNELS][layer])
        ]
        densities, costs = self.densities[CHANNELS], self.costs[CHANNELS]
        pools = [Pool(densities[layer], costs[layer], counts[layer][CHANNELS], self.round_to) for layer in some]
        if pools:
            every = sum(pool.whole for pool in pools)
            mine = sum(pool.cost.of(pool.minimum) for pool in pools)
            gone = max(0.0, 1 - (mine + budget - self.cost(counts)) / every)
            for layer, stays in zip(some, keep(pools, gone), strict=True):
                filled[layer][CHANNELS] = int(stays.sum())
        return filled


@dataclass(frozen=True)
class Searched:
    """An allocation that a search chose.

    Attributes:
        before, after: what the scores chose, and what it chose.
        divergence: of the start, and of what was found, both repaired, on all held-out text.
        history: see `levels.Found`.
    """

    before: Counts
    after: Counts
    divergence: dict[str, float]
    history: list[dict[str, float | None]]


class AllocationSearch:
    """The search for one model's allocation.

    Args:
        model: dense, or as an earlier step left it; stays as it is.
        repair_text: makes what repairs are fitted to, given the share of errors, see `repair`.
        error_share: what that is.
        choice: what chooses within a layer, see `repair`.
        cached: see `saved_parts.Cached`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        space: Space,
        settings: Search,
        text: CalibrationText,
        repair_text: Callable[[float], RepairText],
        error_share: float,
        choice: LocalChoice | None,
        cached: Cached,
    ):
        self.model, self.space, self.settings, self.text = model, space, settings, text
        self.repair_text, self.error_share, self.choice, self.cached = repair_text, error_share, choice, cached
        self.dense_states = last_states(model, text.held_out, text.batch_size)

    def search(self, start: Kept) -> tuple[Searched, list[Solutions]]:
        """The allocation that diverges least from the model on the held-out text, of all that were tried; and each
        layer's output projections in it, repaired on what its own layers give.

        Args:
            start: what the scores chose.
        """
        before = [
            {kind: int(start[kind][layer].sum()) for kind in DECODER_KINDS} for layer in range(len(start[GROUPS]))
        ]
        parts = list(self.space.parts(before, self.settings.search_levels))
        log_phase("sizes of layers")
        # What is owed to the layers before depends on their sizes: here each layer makes up for its own losses alone.
        sizes = self._solutions("sizes", before, parts, 0.0)
        log_phase("search")
        found = self._improved(parts, before, sizes)
        after = self.space.filled(_at(parts, found.levels, before), self.space.cost(before))
        log_phase("comparison of what was found")
        start_solutions, start_divergence = sizes, found.divergence[0]
        if self.error_share:
            start_solutions = self._solutions("start", before, [], self.error_share)
            start_divergence = self._divergence(before, start_solutions)
        solutions, divergence = start_solutions, {"start": start_divergence, "found": start_divergence}
        if after != before:
            solutions = self._solutions("found", after, [], self.error_share)
            divergence["found"] = self._divergence(after, solutions)
        log.info("Search: divergence %.4f at the start, %.4f of what was found", *divergence.values())
        if divergence["found"] > divergence["start"]:
            log.info("Search: what was found is no better once it is repaired: the start stays")
            after, solutions = before, start_solutions
        return Searched(before, after, divergence, found.history), solutions

    def _solutions(self, name: str, path: Counts, parts: list[Part], error_share: float) -> list[Solutions]:
        """Of each layer, at the sizes of the path and at all of the parts'."""
        counts = [{kind: {count} for kind, count in sizes.items()} for sizes in path]
        for part in parts:
            counts[part.layer][part.kind] |= set(part.counts)
        choices = choices_of(counts, self.space.stays)
        text = partial(self.repair_text, error_share)
        return solutions_of(text, choices, path, self.choice, partial(self._cached, name))

    def _cached(self, name: str, number: str, make: Any) -> dict[str, Tensor]:
        return self.cached(f"{name}_{number}", make)

    def _improved(self, parts: list[Part], before: Counts, solutions: list[Solutions]) -> Found:
        def fitness(levels: list[int], count: int) -> float:
            return self._divergence(_at(parts, levels, before), solutions, count)

        start = [part.counts.index(before[part.layer][part.kind]) for part in parts]
        windows, length = self.text.held_out.shape
        rungs = rungs_of(windows, length, self.settings.search_tokens)
        cached = partial(self._cached, "generation")
        if self.settings.search == "evolutionary":
            return evolve(parts, start, fitness, rungs, self.settings, cached)
        steps = partial(self._steps, parts, before, solutions, rungs[0])
        return exchange(parts, start, fitness, steps, rungs, self.settings, cached)

    def _steps(
        self, parts: list[Part], before: Counts, solutions: list[Solutions], windows: int, levels: list[int], share: int
    ) -> Tensor:
        """See `exchange.exchange`; a share of the held-out text has so many windows."""
        counts, text, here = _at(parts, levels, before), self.text, slice(share * windows, (share + 1) * windows)
        with stitched(self.model, counts, solutions):
            expansion = Expansion(
                self.model, text.held_out[here], self.dense_states[here], text.batch_size, text.seed + share
            )
        changes = torch.full((len(parts), 2), torch.inf, dtype=torch.double)
        for place, part in progress(list(enumerate(parts)), "steps in sizes"):
            for side, level in enumerate((levels[place] - 1, levels[place] + 1)):
                if 0 <= level < len(part.counts):
                    sizes = counts[part.layer] | {part.kind: part.counts[level]}
                    changed = layer_of(self.model, part.layer, sizes, solutions[part.layer])
                    changes[place, side] = expansion.change(part.layer, changed)
        return changes

    def _divergence(self, counts: Counts, solutions: list[Solutions], windows: int | None = None) -> float:
        if not any(sizes[GROUPS] for sizes in counts):
            return float("inf")  # a model without any attention is not made
        with stitched(self.model, counts, solutions):
            return divergence(self.model, self.text.held_out[:windows], self.dense_states, self.text.batch_size)


def _at(parts: list[Part], levels: list[int], counts: Counts) -> Counts:
    """An allocation with its parts at these levels."""
    changed = [dict(sizes) for sizes in counts]
    for part, level in zip(parts, levels, strict=True):
        changed[part.layer][part.kind] = part.counts[level]
    return changed

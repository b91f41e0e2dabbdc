"""What searches over an allocation have in common: how many structures each layer's attention and MLP keep.

A candidate is a size for each attention and each MLP, one of a handful that were pruned and repaired once, its levels;
it is judged by its divergence from the dense model on held-out text. From generation to generation one parent is kept:
candidates that differ from it by a few levels and keep the budget are all judged on little text, the best of them on
more, and the best of these takes the parent's place where it is better on all of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Annotated, Literal

import torch
from torch import Tensor

from compression.allocation import Cost
from compression.config import AtLeast, Settings
from compression.progress import progress
from compression.runtime import UserError, log
from compression.saved_parts import Cached

# Of the candidates that are judged on some text, the share that is judged on `MORE_TEXT` times as much.
PASSED_ON = 0.25
MORE_TEXT = 4
# The divergence from the dense model, of levels on a number of windows; the lower the better.
Fitness = Callable[[list[int], int], float]


@dataclass
class Search(Settings):
    """Whether and how the allocation is searched for."""

    search: Literal["none", "exchange", "evolutionary"] = "none"
    """How sizes of layers are searched for, from those that the scores choose on, by the divergence from the dense
    model on held-out text (--held_out_samples windows). exchange: what a step in each is worth is estimated, and the
    best exchanges are made together; evolutionary: children of one parent differ in sizes at random."""
    search_levels: Annotated[int, AtLeast(2)] = 8
    """Steps between nothing and all of an MLP or attention that it is pruned and repaired at."""
    search_generations: Annotated[int, AtLeast(1)] = 30
    """Generations that are tried, one after the other; exchange ends before where nothing better is found."""
    search_population: Annotated[int, AtLeast(1)] = 16
    """Candidates in each generation of evolutionary."""
    search_tokens: Annotated[int, AtLeast(1)] = 2048
    """Tokens of held-out text that all candidates are judged on, in whole windows; the best of them on all of it."""
    search_seed: int = 0
    """Fixes which candidates evolutionary tries."""


@dataclass(frozen=True)
class Part:
    """A layer's attention or MLP in a search.

    Args:
        layer: its layer's index.
        kind: of its structures.
        cost: of its structures, in whole numbers.
        counts: how many structures it may keep, from fewest to most.
    """

    layer: int
    kind: str
    cost: Cost
    counts: tuple[int, ...]

    def cost_at(self, level: int) -> float:
        """What it costs at a level, an index of `counts`."""
        return self.cost.of(self.counts[level])

    def step_to(self, level: int) -> float:
        """What it costs more at a level than at the one below."""
        return self.cost_at(level) - self.cost_at(level - 1)


def levels_of(start: int, every: int, least: int, levels: int, multiple: int = 1) -> tuple[int, ...]:
    """The sizes that a part is tried at: equal steps up and down from where it starts, its least size, and all of it.

    Steps are the same for parts of the same size, so that what one gives up is what another can take.

    Args:
        every: structures that the part has.
        levels: steps between none and all.
        multiple: sizes are multiples of it, but for the start and all of it.
    """
    step = max(round(every / levels / multiple), 1) * multiple
    first = start // multiple * multiple
    between = range(first % step, every, step)
    return tuple(sorted({start, every, least} | {count for count in between if least < count}))


def cost_of(parts: list[Part], levels: list[int]) -> float:
    """What all parts together cost at these levels."""
    return sum(part.cost_at(level) for part, level in zip(parts, levels, strict=True))


def raise_within(left: float, parts: list[Part], levels: list[int], order: Iterable[int]) -> None:
    """Raise some parts by a level each, one after the other, where what is left of the budget allows it; in place."""
    for place in order:
        part, level = parts[place], levels[place] + 1
        if level < len(part.counts) and part.step_to(level) <= left:
            left -= part.step_to(level)
            levels[place] = level


def rungs_of(windows: int, length: int, tokens: int) -> list[int]:
    """Numbers of windows that candidates are judged on, one after the other; the last is all of them."""
    rungs = [min(-(-tokens // length), windows)]
    while rungs[-1] < windows:
        rungs.append(min(MORE_TEXT * rungs[-1], windows))
    return rungs


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        levels: the best candidate's.
        divergence: of the start and of the best candidate, on all windows.
        history: of each generation, the start being the first, `best`: the parent's divergence on all windows by the
            start's; `mean`: that of the candidates on the first rung's windows, by the start's on these, None where it
            is infinite.
    """

    levels: list[int]
    divergence: tuple[float, float]
    history: list[dict[str, float | None]]


def improve(
    parts: list[Part],
    start: list[int],
    propose: Callable[[int, list[int], float], list[list[int]]],
    fitness: Fitness,
    rungs: list[int],
    settings: Search,
    cached: Cached,
    patience: int | None = None,
) -> Found:
    """Search from a start on; the result is never worse than it on all windows.

    Args:
        start: the levels that the search begins with; no candidate costs more.
        propose: candidates, given the number of the generation, from 1, the parent's levels, and the budget.
        rungs: see `rungs_of`.
        cached: by the number of a generation.
        patience: generations without a better candidate, one after the other, that end the search; None: it goes on.

    Raises:
        UserError: the start's fitness is not finite.
    """
    budget = cost_of(parts, start)
    first = cached(
        "0", lambda: {"start": torch.tensor([fitness(start, count) for count in (rungs[0], rungs[-1])]).double()}
    )
    on_few, on_all = first["start"].tolist()
    if not (isfinite(on_few) and isfinite(on_all)):
        raise UserError(
            f"--search {settings.search}: the divergence of what it starts from is not finite; try --dtype float32"
        )
    levels, best, stuck = start, on_all, 0
    history: list[dict[str, float | None]] = [{"best": 1.0, "mean": 1.0}]
    for generation in progress(range(1, settings.search_generations + 1), "search"):

        def make(generation: int = generation, parent: list[int] = levels, best: float = best) -> dict[str, Tensor]:
            candidates = propose(generation, parent, budget)
            chosen, fit, mean = _select(candidates, fitness, rungs) if candidates else (parent, best, inf)
            if fit >= best:
                chosen, fit = parent, best
            return {"levels": torch.tensor(chosen), "fitness": torch.tensor([fit, mean], dtype=torch.double)}

        made, before = cached(str(generation), make), levels
        levels, (best, mean) = made["levels"].tolist(), made["fitness"].tolist()
        history.append({"best": best / on_all, "mean": mean / on_few if isfinite(mean) else None})
        log.info(
            "Search, generation %d of %d: divergence %.4f, %.3f of the start's; the candidates' mean %.3f of that",
            *(generation, settings.search_generations, best, best / on_all, mean / on_few),
        )
        stuck = stuck + 1 if levels == before else 0
        if stuck == patience:
            break
    return Found(levels, (on_all, best), history)


def _select(candidates: list[list[int]], fitness: Fitness, rungs: list[int]) -> tuple[list[int], float, float]:
    """The best candidate, by ever more text; its fitness on all of it, and the mean of all on the first rung."""
    judged: list[tuple[float, list[int]]] = []
    means = []
    for count in rungs:
        judged = sorted((fitness(candidate, count), candidate) for candidate in candidates)
        means.append(sum(fit for fit, _ in judged) / len(judged))
        candidates = [candidate for _, candidate in judged[: max(int(PASSED_ON * len(judged)), 1)]]
    fit, best = judged[0]
    return best, fit, means[0]

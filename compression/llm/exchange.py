"""Search over an allocation by exchange: what a step in each size is worth is estimated, the best exchanges are made.

For each size of the parent, what the divergence from the dense model changes by when it alone is one level smaller or
larger is estimated (see `expansion`): what a step costs or brings per unit of the budget. A candidate raises the sizes
that bring most and pays with those that cost least, as if steps added up; candidates differ in how many they raise at
once, and their own divergence says which of them goes too far for that. So a generation learns about all sizes, where a
random child tries a few, and moves as many as pay.
"""

from collections.abc import Callable
from itertools import accumulate, repeat, takewhile

from torch import Tensor

from compression.llm.levels import Fitness, Found, Part, Search, cost_of, improve, raise_within
from compression.saved_parts import Cached

# A candidate raises this many times as many sizes as the one before.
GROWTH = 1.5
# Shares of the text by which nothing better is found, one after the other, that end the search.
PATIENCE = 4


def exchange(
    parts: list[Part],
    start: list[int],
    fitness: Fitness,
    steps: Callable[[list[int], int], Tensor],
    rungs: list[int],
    settings: Search,
    cached: Cached,
) -> Found:
    """As `levels.improve`, by exchanges.

    Args:
        steps: of levels, what the divergence changes by when one part alone is a level lower, and when it is a level
            higher, [parts, 2], infinite where that is no level; by a share of the text, of which there are as many as
            the last of `rungs` has windows for. Each generation has the next.
    """
    shares = max(rungs[-1] // rungs[0], 1)

    def exchanged(generation: int, parent: list[int], budget: float) -> list[list[int]]:
        return exchanges(parts, parent, steps(parent, generation % shares), budget)

    return improve(parts, start, exchanged, fitness, rungs, settings, cached, patience=min(shares, PATIENCE))


def exchanges(parts: list[Part], levels: list[int], changes: Tensor, budget: float) -> list[list[int]]:
    """Candidates that raise the 1, 2, 3, ... parts that gain most by it, and pay with those that lose least.

    Args:
        changes: see `exchange`.
        budget: what all parts together may cost.
    """
    losses, gains = {}, {}
    for place, (part, level, (lower, higher)) in enumerate(zip(parts, levels, changes.tolist(), strict=True)):
        if level > 0:
            losses[place] = lower / part.step_to(level)
        if level + 1 < len(part.counts) and higher < 0:
            gains[place] = -higher / part.step_to(level + 1)
    raised, lowered = sorted(gains, key=lambda place: -gains[place]), sorted(losses, key=losses.__getitem__)
    candidates = (_exchanged(parts, levels, raised, lowered, count, budget) for count in _counts(len(raised)))
    return [candidate for candidate in candidates if candidate is not None]


def _counts(most: int) -> list[int]:
    """How many parts the candidates raise."""
    grown = accumulate(repeat(GROWTH), lambda count, growth: max(count + 1, round(count * growth)), initial=1)
    return list(takewhile(lambda count: count <= most, grown))


def _exchanged(
    parts: list[Part], levels: list[int], raised: list[int], lowered: list[int], count: int, budget: float
) -> list[int] | None:
    """The levels with the first `count` of some parts one higher, and as many others, the first of them, one lower as
    the budget needs; what it leaves goes to the next parts to raise. None where the others do not suffice."""
    changed, higher, paid = list(levels), raised[:count], set[int]()
    for place in higher:
        changed[place] += 1
    left = budget - cost_of(parts, changed)
    for place in lowered:
        if left >= 0:
            break
        if place not in higher:
            left += parts[place].step_to(changed[place])
            changed[place] -= 1
            paid.add(place)
    if left < 0:
        return None
    raise_within(left, parts, changed, (place for place in raised[count:] if place not in paid))
    return changed

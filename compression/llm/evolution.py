"""Evolutionary search over an allocation: children differ from their parent by a few sizes, drawn at random.

After Sieberling et al. 2024 ("EvoPress", level switches and selection in several steps) and Li et al. 2025
("Tyr-the-Pruner", layers pruned once at several sizes).
"""

import random

from compression.llm.levels import Fitness, Found, Part, Search, cost_of, improve, raise_within
from compression.saved_parts import Cached

MOST_SWITCHES = 3
"""Sizes that become smaller in a child, at most."""


def child(parts: list[Part], levels: list[int], budget: float, draw: random.Random) -> list[int]:
    """Levels of which a few are one lower and others, where the budget allows, one higher.

    Args:
        budget: what all parts together may cost.
    """
    changed = list(levels)
    lower = [place for place, level in enumerate(levels) if level > 0]
    lowered = draw.sample(lower, min(draw.randint(1, MOST_SWITCHES), len(lower)))
    for place in lowered:
        changed[place] -= 1
    left = budget - cost_of(parts, changed)
    others = [place for place in range(len(parts)) if place not in lowered]
    raise_within(left, parts, changed, draw.sample(others, len(others)))
    return changed


def evolve(
    parts: list[Part], start: list[int], fitness: Fitness, rungs: list[int], settings: Search, cached: Cached
) -> Found:
    """As `levels.improve`, by random children of the parent."""

    def children(generation: int, parent: list[int], budget: float) -> list[list[int]]:
        draw = random.Random(f"{settings.search_seed} {generation}")
        return [child(parts, parent, budget, draw) for _ in range(settings.search_population)]

    return improve(parts, start, children, fitness, rungs, settings, cached)

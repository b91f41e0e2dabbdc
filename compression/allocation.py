"""Scores and a budget -> which structures stay."""

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Of a part that could have more widths, so many evenly spaced ones are looked at.
MOST_WIDTHS = 512


@dataclass(frozen=True)
class Cost:
    """What a part costs by how many structures it has, in the unit of the budget.

    Args:
        one: what one structure costs, on average where `together` is given.
        together: [structures + 1] whole numbers, what each number of them costs, never less than fewer do; None: each
            costs the same.
    """

    one: float
    together: Tensor | None = None

    def of(self, count: int) -> float:
        """What so many structures cost."""
        return count * self.one if self.together is None else int(self.together[count])


@dataclass(frozen=True)
class Pool:
    """The structures of one kind in one layer.

    Args:
        scores: [structures], score per unit of cost.
        cost: of the structures.
        minimum: least number that stays; with 0 all of them may go.
        multiple: the number that stays is a multiple of this, unless nothing is removed.
    """

    scores: Tensor
    cost: Cost
    minimum: int = 1
    multiple: int = 1

    @property
    def floor(self) -> int:
        """The least number of structures that may stay."""
        return min(-(-self.minimum // self.multiple) * self.multiple, len(self.scores))

    @property
    def whole(self) -> float:
        """What all of them cost."""
        return self.cost.of(len(self.scores))

    def blocks(self) -> list[int]:
        """Sizes of the blocks that are removed whole, least important first; the floor is in none of them."""
        removable = len(self.scores) - self.floor
        first = removable % self.multiple
        return [first] * (first > 0) + [self.multiple] * (removable // self.multiple)


def reachable_sparsity(pools: list[Pool]) -> float:
    """The largest share of the cost that can be removed with every pool at its floor."""
    total = _whole(pools)
    return (total - sum(pool.cost.of(pool.floor) for pool in pools)) / total if total else 0.0


def _whole(pools: Iterable[Pool]) -> float:
    return sum(pool.whole for pool in pools)


def _check_reach(pools: list[Pool], sparsity: float) -> None:
    if sparsity > reachable_sparsity(pools) + 1e-9:
        raise ValueError(f"sparsity {sparsity} is out of reach: the floors allow {reachable_sparsity(pools):.4f}")


def keep(pools: list[Pool], sparsity: float) -> list[Tensor]:
    """Remove the structures that are worth least for what they cost, over all pools, until a share of the cost is gone.

    Within a pool, structures are grouped into blocks in the order of their scores. Where all structures of each pool
    cost the same, the blocks of least score per cost go: the target is reached with the fewest that do, so the result
    overshoots by less than one block. Else the widths are chosen for which the scores of all that goes, each times what
    a structure of its pool costs on average, sum up to least (see `best_widths`).

    Args:
        pools: one per layer and kind; kinds that are ranked together come in one call.
        sparsity: share of what all pools cost to remove, 0 to 1.

    Returns:
        For each pool a bool tensor [structures], True where the structure stays.

    Raises:
        ValueError: the floors do not allow that sparsity.
    """
    _check_reach(pools, sparsity)
    if all(pool.cost.together is None for pool in pools):
        return _keep_by_blocks(pools, sparsity)
    widths = [_widths(pool) for pool in pools]
    # Counted from the least that each pool costs, the floors always fit: no rounding stands in their way.
    least = [width.costs.min() for width in widths]
    above = [replace(width, costs=width.costs - low) for width, low in zip(widths, least, strict=True)]
    budget = (1 - sparsity) * _whole(pools) - sum(map(float, least))
    chosen = best_widths(above, max(budget, 0.0))
    return [
        all_but_least(pool.scores, len(pool.scores) - int(width.counts[index]))
        for pool, width, index in zip(pools, widths, chosen, strict=True)
    ]


def _widths(pool: Pool) -> "Widths":
    """The widths that a pool may have, from its floor on."""
    count = len(pool.scores)
    counts = count - torch.tensor([0, *pool.blocks()]).cumsum(0).flip(0)
    if len(counts) > MOST_WIDTHS:
        counts = counts[torch.linspace(0, len(counts) - 1, MOST_WIDTHS).round().long()]
    ranked = pool.scores.double().cpu().sort(stable=True).values
    lost = torch.cat([torch.zeros(1, dtype=torch.double), ranked.cumsum(0)]) * pool.cost.one
    costs = torch.tensor([pool.cost.of(int(width)) for width in counts], dtype=torch.double)
    return Widths(counts, lost[count - counts], costs)


def _keep_by_blocks(pools: list[Pool], sparsity: float) -> list[Tensor]:
    sizes = [torch.tensor(pool.blocks(), dtype=torch.long) for pool in pools]
    block_scores, block_costs, block_pools = [], [], []
    for index, (pool, size) in enumerate(zip(pools, sizes, strict=True)):
        owner = torch.repeat_interleave(torch.arange(len(size)), size)
        ranked = pool.scores.sort(stable=True).values[: len(owner)].double().cpu()
        block_scores.append(torch.zeros(len(size), dtype=torch.double).index_add_(0, owner, ranked) / size)
        block_costs.append(size * pool.cost.one)
        block_pools.append(torch.full((len(size),), index))
    cheapest = torch.cat(block_scores).argsort(stable=True)
    removed = torch.cat(block_costs)[cheapest].cumsum(0)
    budget = sparsity * _whole(pools)
    # The small slack keeps a target that is met exactly from taking one more block through rounding.
    blocks = int((removed < budget * (1 - 1e-9)).sum()) + 1 if budget > 0 else 0
    chosen = torch.bincount(torch.cat(block_pools)[cheapest[:blocks]], minlength=len(pools))
    return [
        all_but_least(pool.scores, int(size[: int(count)].sum()))
        for pool, size, count in zip(pools, sizes, chosen, strict=True)
    ]


def all_but_least(scores: Tensor, removed: int) -> Tensor:
    """Which structures stay when so many of least score go, of equal ones the first: bool [structures]."""
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(stable=True)[:removed]] = False
    return kept


def keep_or_drop_layers(
    layers: list[list[Pool]], sparsity: float, epsilon: float, lasting: Set[int] = frozenset()
) -> list[list[Tensor]]:
    """As `keep`, but a layer that would keep less than a share epsilon of its cost goes altogether.

    The weakest such layer goes first and the budget is met again with the others, so that what it had left is kept
    elsewhere instead; and so on. A layer stays that is larger than the whole budget. The floors of its pools are those
    of a layer that stays.

    Args:
        layers: for each layer its pools.
        lasting: indices of the layers that may not go altogether.

    Returns:
        For each layer and pool a bool tensor [structures], True where the structure stays.

    Raises:
        ValueError: the floors do not allow that sparsity.
    """
    budget = sparsity * sum(map(_whole, layers))
    dropped: set[int] = set()
    staying = set(lasting)
    while True:
        left = [pool for index, pools in enumerate(layers) if index not in dropped for pool in pools]
        gone = sum(_whole(layers[index]) for index in dropped)
        rest = max(budget - gone, 0.0) / max(_whole(left), 1)
        kept_of_pools = iter(keep(left, min(rest, reachable_sparsity(left))))
        kept = [
            [torch.zeros_like(pool.scores, dtype=torch.bool) for pool in pools]
            if index in dropped
            else [next(kept_of_pools) for _ in pools]
            for index, pools in enumerate(layers)
        ]
        shares = {index: _kept_share(layers[index], kept[index]) for index in range(len(layers))}
        weak = [index for index, share in shares.items() if 0 < share < epsilon and index not in staying | dropped]
        if not weak:
            _check_reach(left, rest)
            return kept
        weakest = min(weak, key=shares.__getitem__)
        fits = sum(_whole(layers[index]) for index in dropped | {weakest}) <= budget
        (dropped if fits else staying).add(weakest)


def _kept_share(pools: list[Pool], kept: list[Tensor]) -> float:
    left = sum(pool.cost.of(int(stay.sum())) for pool, stay in zip(pools, kept, strict=True))
    return left / max(_whole(pools), 1)


# One budget over parts of different widths.


@dataclass(frozen=True)
class Widths:
    """The widths that a part may have, and what each means.

    Args:
        counts: [widths], structures that stay.
        losses: [widths], what their choice adds to the loss.
        costs: [widths], in the unit of the budget, at least 0.
    """

    counts: Tensor
    losses: Tensor
    costs: Tensor


def best_widths(parts: list[Widths], budget: float, cells: int = 10_000) -> list[int]:
    """A width for each part: the least sum of losses of all choices whose costs fit the budget.

    By dynamic programming over the budget, cut into cells; costs are rounded up to them, so that the budget holds. So
    that no cell is wasted on every part, more of them are taken where there are many parts.

    Args:
        budget: what the costs may sum up to.
        cells: the least number of them.

    Returns:
        For each part the index of its width.

    Raises:
        ValueError: even the cheapest widths do not fit.
    """
    # Where all fits as it is, rounding must not take anything.
    free = [int(part.losses.argmin()) for part in parts]
    if sum(float(part.costs[index]) for part, index in zip(parts, free, strict=True)) <= budget * (1 + 1e-9):
        return free
    cells = max(cells, 200 * len(parts))
    least = torch.zeros(cells + 1, dtype=torch.double)
    choices = []
    for part in parts:
        spent = (part.costs.double() / max(budget, 1e-30) * cells * (1 - 1e-9)).ceil().clamp(max=cells + 1).long()
        before = torch.arange(cells + 1) - spent[:, None]  # [widths, cells + 1]: what the parts before may take
        sums = torch.where(before >= 0, least[before.clamp(min=0)], torch.inf) + part.losses.double()[:, None]
        least, choice = sums.min(0)
        choices.append((choice, spent))
    if not least[cells].isfinite():
        raise ValueError(f"a budget of {budget} is out of reach: the cheapest widths cost {_cheapest(parts)}")
    chosen, left = [], cells
    for choice, spent in reversed(choices):
        chosen.append(int(choice[left]))
        left -= int(spent[chosen[-1]])
    return chosen[::-1]


def _cheapest(parts: list[Widths]) -> float:
    return sum(float(part.costs.min()) for part in parts)


# Rates of layers that are pruned one by one.


def spread_rates(preference: Tensor, weights: Tensor, target: float, low: Tensor, high: Tensor) -> Tensor:
    """Rates in proportion to a preference, cut to bounds, whose weighted mean is the target.

    The rates are clip(s * preference, low, high); their mean grows with s, piecewise linearly with a bend where a rate
    meets a bound, so the s that meets the target lies between two bends and is found exactly.

    Args:
        preference: [layers], above 0; for the inverse strategy 1 / importance.
        weights: [layers], parameters of each layer.
        target: weighted mean of the rates.
        low, high: [layers], bounds of each rate.

    Returns:
        [layers] float64.

    Raises:
        ValueError: the target lies outside the weighted means of the bounds.
    """
    preference, weights, low, high = (values.double() for values in (preference, weights, low, high))
    bends = torch.cat([low / preference, high / preference]).sort().values
    rates = (bends[:, None] * preference).clamp(low, high)
    means = (rates * weights).sum(1) / weights.sum()
    if not means[0] - 1e-8 <= target <= means[-1] + 1e-8:
        raise ValueError(f"a mean rate of {target} is out of reach: the bounds allow {means[0]:.4f} to {means[-1]:.4f}")
    after = int(torch.searchsorted(means, target).clamp(1, len(means) - 1))
    step = means[after] - means[after - 1]
    share = ((target - means[after - 1]) / step).clamp(0, 1) if step > 0 else 1.0
    return rates[after - 1] + share * (rates[after] - rates[after - 1])


def split_budget(
    budget: float,
    groups: int,
    group_parameters: int,
    channels: int,
    channel_parameters: int,
    groups_wanted: int,
    multiple: int = 1,
) -> tuple[int, int]:
    """How many attention groups and MLP channels of one layer go to remove a number of parameters.

    A group is coarse, so the MLP takes what the groups leave of the budget: it is met by less than `multiple` channels
    too much. Fewer groups than wanted go where they alone would exceed the budget, more where the channels do not
    suffice. One group and `multiple` channels stay, where there are as many.

    Args:
        budget: parameters to remove.
        groups, channels: structures that the layer has. group_parameters, channel_parameters: of one of them.
        groups_wanted: groups that would go by their share of the budget.
        multiple: the number of channels that stay is a multiple of this, unless none go.
    """
    spare_groups, spare_channels = max(groups - 1, 0), max(channels - multiple, 0)
    if budget <= 0:
        return 0, 0
    least = most = 0
    if spare_groups:
        least = _at_least(budget - spare_channels * channel_parameters, group_parameters)
        most = int(budget / group_parameters)
    removed = max(min(groups_wanted, most), least)
    removed = max(0, min(removed, spare_groups))
    rest = budget - removed * group_parameters
    if rest <= 0 or not spare_channels:
        return removed, 0
    stay = channels - min(_at_least(rest, channel_parameters), spare_channels)
    return removed, channels - stay // multiple * multiple


def _at_least(budget: float, one: int) -> int:
    """The least number of structures that reach a budget; the slack is for rounding, as in `keep`."""
    return -int(-(budget * (1 - 1e-9)) // one)


def largest_ratio(passes: Callable[[float], bool], low: float, high: float, steps: int) -> float | None:
    """The largest ratio in a range that passes, by bisection; None where none that was tried does.

    Args:
        passes: whether a ratio is good; taken to be so for all ratios below a good one.
        steps: trials; the answer is exact to (high - low) / 2^steps.
    """
    best = None
    for _ in range(steps):
        middle = (low + high) / 2
        if passes(middle):
            best = low = middle
        else:
            high = middle
    return best

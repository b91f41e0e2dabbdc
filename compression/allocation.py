"""Scores and a budget -> which structures stay."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pool:
    """The structures of one kind in one layer.

    Args:
        scores: [structures], score per parameter.
        parameters: parameters of one structure.
        minimum: at least so many stay.
        multiple: the number that stays is a multiple of this, unless nothing is removed.
    """

    scores: Tensor
    parameters: int
    minimum: int = 1
    multiple: int = 1

    @property
    def floor(self) -> int:
        """The least number of structures that may stay."""
        wanted = max(self.minimum, 1)
        return min(-(-wanted // self.multiple) * self.multiple, len(self.scores))

    def blocks(self) -> list[int]:
        """Sizes of the blocks that are removed whole, least important first; the floor is in none of them."""
        removable = len(self.scores) - self.floor
        first = removable % self.multiple
        return [first] * (first > 0) + [self.multiple] * (removable // self.multiple)


def reachable_sparsity(pools: list[Pool]) -> float:
    """The largest share of parameters that can be removed with every pool at its floor."""
    total = sum(pool.parameters * len(pool.scores) for pool in pools)
    return sum(pool.parameters * (len(pool.scores) - pool.floor) for pool in pools) / total


def keep(pools: list[Pool], sparsity: float) -> list[Tensor]:
    """Remove the blocks of least score per parameter, over all pools, until a share of the parameters is gone.

    The target is reached with the fewest blocks that do, so the result overshoots by less than one block. Within a
    pool, structures are grouped into blocks in the order of their scores.

    Args:
        pools: one per layer and kind; kinds that are ranked together come in one call.
        sparsity: share of all parameters in the pools to remove, 0 to 1.

    Returns:
        For each pool a bool tensor [structures], True where the structure stays.

    Raises:
        ValueError: the floors do not allow that sparsity.
    """
    if sparsity > reachable_sparsity(pools) + 1e-9:
        raise ValueError(f"sparsity {sparsity} is out of reach: the floors allow {reachable_sparsity(pools):.4f}")
    orders = [pool.scores.argsort(stable=True) for pool in pools]
    sizes = [torch.tensor(pool.blocks(), dtype=torch.long) for pool in pools]
    block_scores, block_costs, block_pools = [], [], []
    for index, (pool, order, size) in enumerate(zip(pools, orders, sizes, strict=True)):
        owner = torch.repeat_interleave(torch.arange(len(size)), size)
        ranked = pool.scores[order][: len(owner)].double().cpu()
        block_scores.append(torch.zeros(len(size), dtype=torch.double).index_add_(0, owner, ranked) / size)
        block_costs.append(size * pool.parameters)
        block_pools.append(torch.full((len(size),), index))
    cheapest = torch.cat(block_scores).argsort(stable=True)
    removed = torch.cat(block_costs)[cheapest].cumsum(0)
    budget = sparsity * sum(pool.parameters * len(pool.scores) for pool in pools)
    # The small slack keeps a target that is met exactly from taking one more block through rounding.
    blocks = int((removed < budget * (1 - 1e-9)).sum()) + 1 if budget > 0 else 0
    chosen = torch.bincount(torch.cat(block_pools)[cheapest[:blocks]], minlength=len(pools))
    return [
        _all_but(order, int(size[: int(count)].sum())) for order, size, count in zip(orders, sizes, chosen, strict=True)
    ]


def _all_but(order: Tensor, removed: int) -> Tensor:
    mask = torch.ones(len(order), dtype=torch.bool, device=order.device)
    mask[order[:removed]] = False
    return mask

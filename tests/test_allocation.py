"""Which structures stay under a budget."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from compression.allocation import Cost, Pool, keep, keep_or_drop_layers, reachable_sparsity


def pools(*rows, parameters=1, **limits):
    return [Pool(torch.tensor(row, dtype=torch.float), Cost(parameters), **limits) for row in rows]


def test_lowest_scores_go_first_over_all_layers():
    masks = keep(pools([5, 1, 6, 2], [9, 8, 3, 7]), sparsity=3 / 8)
    assert masks[0].tolist() == [True, False, True, False]
    assert masks[1].tolist() == [True, True, False, True]


def test_target_is_reached_with_the_fewest_structures():
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    for sparsity in (0, 0.1, 0.25, 0.3, 0.5):
        removed = sum(int((~mask).sum()) for mask in keep([Pool(row, Cost(7)) for row in scores], sparsity))
        assert removed >= sparsity * 72 > removed - 1


def test_every_layer_keeps_its_minimum():
    masks = keep(pools([0, 0, 0, 0], [9, 9, 9, 9]), sparsity=0.5)
    assert [int(mask.sum()) for mask in masks] == [1, 3]
    masks = keep(pools([0, 0, 0, 0], [9, 9, 9, 9], minimum=2), sparsity=0.5)
    assert [int(mask.sum()) for mask in masks] == [2, 2]


@pytest.mark.parametrize("count", [48, 45])
def test_a_multiple_stays_in_every_layer_that_lost_something(count):
    generator = torch.Generator().manual_seed(0)
    masks = keep([Pool(torch.rand(count, generator=generator), Cost(3), multiple=8) for _ in range(4)], sparsity=0.4)
    kept = [int(mask.sum()) for mask in masks]
    assert all(number % 8 == 0 or number == count for number in kept)
    assert min(kept) >= 8 and sum(kept) <= 0.6 * 4 * count


def test_joint_ranking_weighs_structures_by_their_parameters():
    heads = Pool(torch.tensor([0.1, 5.0, 5.0]), Cost(100))
    neurons = Pool(torch.tensor([1.0, 2.0, 3.0, 4.0]), Cost(1))
    masks = keep([heads, neurons], sparsity=100 / 304)
    assert masks[0].tolist() == [False, True, True] and masks[1].all()


def test_unreachable_target_is_refused():
    layers = pools([1, 2, 3, 4])
    assert reachable_sparsity(layers) == 0.75
    with pytest.raises(ValueError, match="out of reach"):
        keep(layers, 0.8)


def test_a_pool_without_a_minimum_can_be_emptied():
    masks = keep(pools([0, 0, 0, 0], [9, 9, 9, 9], minimum=0), sparsity=0.5)
    assert [int(mask.sum()) for mask in masks] == [0, 4]


def layers_of_pools(scores, minimum=0):
    """Per layer two heads of 30 parameters and four neurons of 10."""
    return [
        [Pool(row[:2], Cost(30), minimum=minimum), Pool(row[2:], Cost(10), minimum=minimum)]
        for row in torch.tensor(scores, dtype=torch.float)
    ]


def kept_parameters(kept):
    return [30 * int(heads.sum()) + 10 * int(neurons.sum()) for heads, neurons in kept]


def test_a_weak_layer_goes_and_the_budget_is_met_with_the_others():
    weak, strong = [1, 1, 1, 1, 1, 9], [7, 8, 5, 6, 5, 6]
    layers = layers_of_pools([weak, strong, strong])
    assert kept_parameters(keep_or_drop_layers(layers, 0.3, epsilon=0.05)) == [10, 100, 100]
    # Without the weak layer's last neuron, the same budget leaves one more structure elsewhere.
    assert kept_parameters(keep_or_drop_layers(layers, 0.4, epsilon=0.0)) == [10, 80, 90]
    assert kept_parameters(keep_or_drop_layers(layers, 0.4, epsilon=0.15)) == [0, 80, 100]


def test_layers_that_last_are_not_dropped():
    layers = layers_of_pools([[1] * 6, [5] * 6], minimum=1)
    sizes = [
        kept_parameters(keep_or_drop_layers(layers, 0.5, epsilon=0.9, lasting=lasting)) for lasting in ((), {0}, {0, 1})
    ]
    assert sizes == [[0, 100], [100, 0], [40, 60]]


def test_floors_hold_in_the_layers_that_stay_and_the_budget_is_met_all_the_same():
    layers = layers_of_pools([[1, 1, 9, 9, 9, 9], [1, 1, 1, 1, 1, 1], [5, 5, 9, 9, 9, 9]])
    layers = [[replace(heads, minimum=1), neurons] for heads, neurons in layers]
    heads = [int(heads.sum()) for heads, _ in keep_or_drop_layers(layers, 0.5, epsilon=0.0)]
    assert heads == [1, 1, 1]
    kept = keep_or_drop_layers(layers, 0.5, epsilon=0.35)
    assert kept_parameters(kept) == [70, 0, 70] and [int(heads.sum()) for heads, _ in kept] == [1, 0, 1]


def test_what_the_floors_do_not_allow_is_met_with_whole_layers_or_refused():
    layers = [[replace(heads, minimum=1), neurons] for heads, neurons in layers_of_pools([[2] * 6, [1] * 6])]
    assert kept_parameters(keep_or_drop_layers(layers, 0.65, epsilon=0.5)) == [70, 0]
    with pytest.raises(ValueError, match="0.75 is out of reach: the floors allow 0.7"):
        keep_or_drop_layers(layers, 0.75, epsilon=0.3)
    assert kept_parameters(keep_or_drop_layers(layers, 0.75, epsilon=0.31)) == [0, 50]


def test_budget_is_met_to_within_one_structure_whatever_the_settings():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        layers = layers_of_pools(torch.rand(8, 6, generator=generator).tolist())
        sparsity, epsilon = torch.rand(2, generator=generator).tolist()
        sparsity *= 0.9
        removed = 8 * 100 - sum(kept_parameters(keep_or_drop_layers(layers, sparsity, epsilon)))
        assert 0 <= removed - sparsity * 800 < 30


# What numbers of structures cost together.


def priced(seed, minimum=0, multiple=1):
    """Pools of which the first structure is dear and some are for nothing."""
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for count in (3, 4, 6, 2):
        steps = torch.randint(0, 5, (count,), generator=generator)
        steps[0] += 4
        together = torch.cat([torch.zeros(1, dtype=torch.long), steps.cumsum(0)])
        cost = Cost(int(together[-1]) / count, together)
        pools.append(Pool(torch.rand(count, generator=generator), cost, minimum, multiple))
    return pools


def lost(pool, count):
    """The scores of what goes where so many stay."""
    return float(pool.scores.sort().values[: len(pool.scores) - count].sum()) * pool.cost.one


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_widths_within_the_budget_loses_less(seed, share):
    pools = priced(seed)
    whole = sum(pool.whole for pool in pools)
    budget = min(int(share * whole) + 0.1, whole)  # what one costs is a whole number, rounded up to cells of the budget
    masks = keep(pools, 1 - budget / whole)
    counts = [int(mask.sum()) for mask in masks]
    losses = {
        choice: sum(map(lost, pools, choice))
        for choice in product(*(range(len(pool.scores) + 1) for pool in pools))
        if sum(pool.cost.of(count) for pool, count in zip(pools, choice, strict=True)) <= budget
    }
    assert losses[tuple(counts)] == pytest.approx(min(losses.values()))
    for pool, mask in zip(pools, masks, strict=True):
        assert pool.scores[mask].sum() == pytest.approx(float(pool.scores.sort().values[int((~mask).sum()) :].sum()))


def test_floors_and_multiples_hold_where_the_budget_is_met_exactly_by_them():
    pools = priced(0, minimum=1, multiple=2)
    masks = keep(pools, reachable_sparsity(pools))
    least = sum(pool.cost.of(pool.floor) for pool in pools)
    assert [int(mask.sum()) for mask in masks] == [2, 2, 2, 2]
    assert sum(pool.cost.of(int(mask.sum())) for pool, mask in zip(pools, masks, strict=True)) == least
    with pytest.raises(ValueError, match="out of reach"):
        keep(pools, reachable_sparsity(pools) + 0.01)


def test_a_layer_that_keeps_little_of_its_cost_goes_altogether():
    even = torch.arange(5) * 10
    layers = [[Pool(torch.tensor(row), Cost(10, even), 0)] for row in ([1.0, 1, 1, 9], [8.0, 7, 6, 5], [8.0, 7, 6, 5])]
    sizes = [
        [int(mask.sum()) for (mask,) in keep_or_drop_layers(layers, 4 / 12, epsilon)] for epsilon in (0.0, 0.2, 0.3)
    ]
    assert sizes == [[1, 4, 3], [1, 4, 3], [0, 4, 4]]


def test_of_very_many_widths_some_are_looked_at():
    generator = torch.Generator().manual_seed(0)
    pools = [Pool(torch.rand(5000, generator=generator), Cost(3, torch.arange(5001) * 3), 0) for _ in range(2)]
    kept = sum(int(mask.sum()) for mask in keep(pools, 0.37))
    assert 0.63 * 10_000 - 40 < kept <= 0.63 * 10_000

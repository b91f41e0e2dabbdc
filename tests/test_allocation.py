"""Which structures stay under a budget."""

import pytest
import torch

from compression.allocation import Pool, keep, reachable_sparsity


def pools(*rows, parameters=1, **limits):
    return [Pool(torch.tensor(row, dtype=torch.float), parameters, **limits) for row in rows]


def test_lowest_scores_go_first_over_all_layers():
    masks = keep(pools([5, 1, 6, 2], [9, 8, 3, 7]), sparsity=3 / 8)
    assert masks[0].tolist() == [True, False, True, False]
    assert masks[1].tolist() == [True, True, False, True]


def test_target_is_reached_with_the_fewest_structures():
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    for sparsity in (0, 0.1, 0.25, 0.3, 0.5):
        removed = sum(int((~mask).sum()) for mask in keep([Pool(row, 7) for row in scores], sparsity))
        assert removed >= sparsity * 72 > removed - 1


def test_every_layer_keeps_its_minimum():
    masks = keep(pools([0, 0, 0, 0], [9, 9, 9, 9]), sparsity=0.5)
    assert [int(mask.sum()) for mask in masks] == [1, 3]
    masks = keep(pools([0, 0, 0, 0], [9, 9, 9, 9], minimum=2), sparsity=0.5)
    assert [int(mask.sum()) for mask in masks] == [2, 2]


@pytest.mark.parametrize("count", [48, 45])
def test_a_multiple_stays_in_every_layer_that_lost_something(count):
    generator = torch.Generator().manual_seed(0)
    masks = keep([Pool(torch.rand(count, generator=generator), 3, multiple=8) for _ in range(4)], sparsity=0.4)
    kept = [int(mask.sum()) for mask in masks]
    assert all(number % 8 == 0 or number == count for number in kept)
    assert min(kept) >= 8 and sum(kept) <= 0.6 * 4 * count


def test_joint_ranking_weighs_structures_by_their_parameters():
    heads = Pool(torch.tensor([0.1, 5.0, 5.0]), parameters=100)
    neurons = Pool(torch.tensor([1.0, 2.0, 3.0, 4.0]), parameters=1)
    masks = keep([heads, neurons], sparsity=100 / 304)
    assert masks[0].tolist() == [False, True, True] and masks[1].all()


def test_unreachable_target_is_refused():
    layers = pools([1, 2, 3, 4])
    assert reachable_sparsity(layers) == 0.75
    with pytest.raises(ValueError, match="out of reach"):
        keep(layers, 0.8)

"""Gradual pruning on a tiny model: schedule, targets, structures that come back, modes."""

import pytest
import torch
from conftest import VOCABULARY, load_script, tiny_bert, tiny_distilbert

from compression.classifier.hidden_states import HiddenStates
from compression.classifier.structure_scores import MODES
from compression.runtime import UserError
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, layers_of

ROWS = 40
stage = load_script("8_pruning_with_finetuning")


def config(**changes):
    defaults = dict(
        num_epochs=3, pruning_start_epoch=1, pruning_end_epoch=2, batch_size=4, pruning_frequency=1, learning_rate=1e-3
    )
    return stage.GradualPruningWithFinetuningConfig.make(**(defaults | changes))


def pruning_of(model, logits, settings):
    return stage.make_recipe(model, logits, settings, stage.make_target(model, settings), HiddenStates(model))


@pytest.fixture
def recipe_of():
    def build(**changes):
        logits = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0))
        return pruning_of(tiny_distilbert(), logits, config(**changes))

    return build


def train_step(recipe, step, optimizer=None):
    generator = torch.Generator().manual_seed(step)
    batch = {
        "input_ids": torch.randint(1, VOCABULARY, (4, 6), generator=generator),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "labels": torch.randint(0, 2, (4,), generator=generator),
        "rows": torch.randint(0, ROWS, (4,), generator=generator),
    }
    recipe.model.zero_grad()
    recipe.loss(recipe.model, batch, step)["loss"].backward()
    recipe.after_backward(step)
    if optimizer:
        optimizer.step()
    recipe.after_step(step)


@pytest.mark.parametrize("mode", MODES)
def test_targets_are_met_at_the_end_of_the_pruning_phase(recipe_of, mode):
    recipe = recipe_of(importance_mode=mode)
    sparsities = []
    for step in range(2 * recipe.steps_per_epoch):
        train_step(recipe, step)
        sparsities.append(recipe.sparsity()["neuron_sparsity"])
    assert sparsities == sorted(sparsities) and sparsities[0] < 0.15
    kept = recipe.kept()
    heads, neurons = torch.cat(kept[HEADS]), torch.cat(kept[NEURONS])
    assert 0.30 <= 1 - heads.float().mean() < 0.30 + 1 / 12
    assert 0.20 <= 1 - neurons.float().mean() < 0.20 + 8 / 144
    assert all(int(mask.sum()) % 8 == 0 for mask in kept[NEURONS])
    assert all(mask.any() for mask in kept[HEADS])


def test_one_ranking_removes_its_share_of_the_parameters(recipe_of):
    recipe = recipe_of(enable_multi_granularity=False, target_sparsity=0.25)
    for step in range(2 * recipe.steps_per_epoch):
        train_step(recipe, step)
    largest = max(parts.structure_parameters(kind) for parts in recipe.layers for kind in ENCODER_KINDS)
    total = sum(
        parts.structure_parameters(kind) * parts.count(kind) for parts in recipe.layers for kind in ENCODER_KINDS
    )
    assert 0.25 <= recipe.sparsity()["total_sparsity"] < 0.25 + 8 * largest / total


def test_a_pruned_head_comes_back_when_it_matters(recipe_of):
    recipe = recipe_of(importance_mode="kd_grad", pruning_frequency=1)
    train_step(recipe, 0)
    before = recipe.kept()[HEADS]
    pruned_layer = next(index for index, mask in enumerate(before) if not mask.all())
    # Make the output columns of the pruned heads large: their gradient score rises above all others.
    outer = recipe.masked[HEADS][pruned_layer]
    with torch.no_grad():
        outer.weight.mul_(torch.where(outer.mask > 0, 1.0, 100.0))
    train_step(recipe, 1)
    came_back = recipe.kept()[HEADS][pruned_layer] & ~before[pruned_layer]
    assert came_back.any()


def test_mask_holds_after_every_optimizer_step(recipe_of, batch):
    recipe = recipe_of()
    optimizer = torch.optim.SGD(recipe.model.parameters(), lr=1e-2)
    for step in range(2 * recipe.steps_per_epoch + 2):
        before = [(layer.mask.clone(), layer.weight.detach().clone()) for layer in recipe.masked[NEURONS].values()]
        train_step(recipe, step, optimizer)
        for (mask, weight), layer in zip(before, recipe.masked[NEURONS].values(), strict=True):
            assert torch.equal(layer.weight[:, mask == 0], weight[:, mask == 0]), "a pruned column was trained"
    with torch.no_grad():
        masked = recipe.model.eval()(**batch).logits
        small, _ = recipe.finish()
        torch.testing.assert_close(small(**batch).logits, masked, atol=1e-5, rtol=0)
    assert sum(parts.heads for parts in layers_of(small)) == 8


def test_events_end_with_the_phase_and_are_enough(recipe_of):
    recipe = recipe_of(pruning_start_epoch=2, pruning_end_epoch=3, pruning_frequency=100)
    assert recipe.events[0] >= recipe.steps_per_epoch
    assert recipe.events[-1] == 3 * recipe.steps_per_epoch - 1
    assert len(recipe.events) >= 10
    assert [recipe.phase(epoch) for epoch in (1, 2, 3)] == ["Warmup", "Pruning", "Pruning"]


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_window_slides_over_the_last_steps_also_behind_an_event(recipe_of, window):
    recipe = recipe_of(pruning_frequency=2, pruning_window_steps=window, num_epochs=2, importance_mode="fisher")
    assert recipe.events == list(range(1, 20, 2))
    accumulate, steps = recipe.scores.accumulate, []

    def noting(step):  # before the gradients of what is pruned are dropped
        layers = recipe.masked[NEURONS].values()
        gradients = [(layer.weight * layer.weight.grad).sum(0).view(layer.count, -1).sum(1) for layer in layers]
        steps.append(torch.cat(gradients).square())
        accumulate(step)

    recipe.scores.accumulate = noting
    for step in range(8):
        train_step(recipe, step)
    scores = torch.cat(list(recipe.scores.densities((NEURONS,))[NEURONS].values()))
    expected = sum(steps[-window:])
    torch.testing.assert_close(scores / scores.sum(), expected / expected.sum())


def test_what_was_out_of_use_in_the_window_is_estimated_over_all_of_it(recipe_of):
    recipe = recipe_of(pruning_frequency=2, pruning_window_steps=3, importance_mode="kd_grad")
    for step in range(3):
        train_step(recipe, step)
    masked, scores = list(recipe.masked[NEURONS].values()), recipe.scores
    out = ~torch.cat([layer.kept for layer in masked])
    assert out.any(), "the event at step 1 has removed some"
    for layer in masked:
        layer.keep(torch.ones_like(layer.kept))
    train_step(recipe, 3)
    offset = sum(layer.count for layer in recipe.masked[HEADS].values())
    assert torch.equal(scores.in_use[offset:] >= 3, ~out), "one step in use is not three"
    inner, outer = scores.inner.sum(0)[offset:], scores.outer.sum(0)[offset:]
    found = torch.cat(list(scores.densities((NEURONS,))[NEURONS].values()))
    place, count = int(out.nonzero()[0]), masked[0].count
    layer = torch.arange(len(out)) // count == place // count
    in_use = layer & ~out
    ratio = inner[in_use].sum() / outer[in_use].sum()
    other = int(in_use.nonzero()[0])
    expected = outer[place] * (1 + ratio) / (inner[other] + outer[other])
    torch.testing.assert_close(found[place] / found[other], expected)


def test_overflowing_step_does_not_count(recipe_of):
    recipe = recipe_of(pruning_frequency=2, pruning_window_steps=2)
    train_step(recipe, 0)
    recipe.masked[NEURONS][1].weight.grad[0, 0] = float("inf")
    recipe.scores.accumulate(1)
    assert recipe.scores.outer[0].any() and not recipe.scores.outer[1].any() and not recipe.scores.inner[1].any()


def test_scores_follow_the_lambdas(recipe_of):
    def scores(**changes):
        recipe = recipe_of(**changes)
        train_step(recipe, 0)
        train_step(recipe, 1)
        return torch.cat(list(recipe.scores.densities((NEURONS,))[NEURONS].values()))

    both, norm = scores(lambda_mag=1.0, lambda_grad=0.0), scores(importance_mode="l2")
    torch.testing.assert_close(both, norm)
    assert not torch.allclose(scores(), norm)


def test_unreachable_sparsity_names_flag_and_limit(recipe_of):
    with pytest.raises(UserError, match="--head_final_sparsity 0.9: .*at most 0.75 can go"):
        recipe_of(head_final_sparsity=0.9)


def test_temperature_alpha_and_rate_follow_the_schedule(recipe_of):
    recipe = recipe_of()
    assert (recipe.temperature(0), recipe.alpha(0)) == (10.0, 0.9)
    assert (recipe.temperature(29), recipe.alpha(29)) == (2.0, pytest.approx(0.2)), "the last step"
    assert recipe.learning_rate(19) == 1e-3
    assert recipe.learning_rate(20) == 1e-5
    assert recipe.learning_rate(29) < 2e-6


def test_state_round_trip_gives_the_same_next_decision(recipe_of):
    first, second = recipe_of(pruning_frequency=2), recipe_of(pruning_frequency=2)
    for step in range(6):
        train_step(first, step)
    second.model.load_state_dict(first.model.state_dict())
    second.load(first.state(), {name: tensor.clone() for name, tensor in first.tensors().items()})
    for recipe in (first, second):
        for step in range(6, 10):
            train_step(recipe, step)
    for kind in ENCODER_KINDS:
        for one, other in zip(first.kept()[kind], second.kept()[kind], strict=True):
            assert torch.equal(one, other)


def test_a_bert_is_pruned_with_the_token_types_of_pairs():
    recipe = pruning_of(tiny_bert(), torch.zeros(ROWS, 2), config())
    ids = torch.randint(1, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([0, 1, 0, 1]),
        "rows": torch.arange(4),
    }
    types = (torch.arange(6) > 2).long().expand(4, 6)
    losses = [recipe.loss(recipe.model, seen, 0)["loss"] for seen in (batch, batch | {"token_type_ids": types})]
    assert losses[0] != losses[1]

"""One budget for heads, neurons and whole parts: what stays fits it, and costs least by the scores."""

from itertools import product

import pytest
import torch
from conftest import VOCABULARY, load_script, tiny_bert, tiny_distilbert

from compression.allocation import Widths, best_widths
from compression.classifier import latency
from compression.classifier.budget import latency_budget, macs_budget, parameters_budget
from compression.classifier.data import Encoded
from compression.classifier.hidden_states import HiddenStates, LiveTeacher
from compression.classifier.latency import LatencyTable, latency_table
from compression.classifier.targets import Floors, OneBudget
from compression.flops import count_parameters, encoder_macs_formula
from compression.runtime import UserError
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, layers_of

ROWS, LENGTH = 16, 8
stage = load_script("8_pruning_with_finetuning")
TABLE = LatencyTable(
    batch_size=32,
    sequence_length=LENGTH,
    device="cpu",
    threads=1,
    teacher=40.0,
    rest=4.0,
    parts={HEADS: {1: 3.0, 2: 3.5, 3: 5.0, 4: 6.0}, NEURONS: {8: 1.0, 16: 3.0, 32: 5.0, 48: 6.0}},
)

WIDEST = {HEADS: 4, NEURONS: 48}


@pytest.fixture
def rows():
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return Encoded({"input_ids": ids.tolist()}, torch.arange(ROWS) % 2)


def random_widths(seed):
    generator = torch.Generator().manual_seed(seed)
    for count in (3, 4, 2, 4):
        losses = torch.rand(count, generator=generator)
        yield Widths(torch.arange(count), losses, torch.randint(0, 9, (count,), generator=generator).double())


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_within_the_budget_loses_less(seed):
    parts, budget = list(random_widths(seed)), 14.1  # costs are whole numbers, rounded up to cells
    choices = [
        (sum(float(part.losses[i]) for part, i in zip(parts, choice, strict=True)), choice)
        for choice in product(*(range(len(part.counts)) for part in parts))
        if sum(float(part.costs[i]) for part, i in zip(parts, choice, strict=True)) <= budget
    ]
    assert tuple(best_widths(parts, budget)) == min(choices)[1]


def test_what_fits_the_budget_exactly_stays_as_it_is():
    costs = torch.tensor([0, 1 / 3, 2 / 3], dtype=torch.double)
    whole = Widths(torch.tensor([0, 1, 2]), torch.tensor([2.0, 1.0, 0.0]), costs)
    assert best_widths([whole] * 7, 7 * 2 / 3) == [2] * 7


def test_a_budget_below_the_cheapest_widths_is_refused():
    with pytest.raises(ValueError, match="out of reach"):
        best_widths([Widths(torch.tensor([1, 2]), torch.zeros(2), torch.tensor([3.0, 4.0]))] * 2, 5.0)


def pruned(model, budget, rows, states=None, **changes):
    """Both what is pruned, all in one epoch, and the recipe that did it."""
    settings = dict(num_epochs=1, pruning_start_epoch=1, pruning_end_epoch=1, batch_size=1, pruning_frequency=1)
    settings |= dict(min_part_share=0.2, target=(budget.quantity, budget.share))
    config = stage.GradualPruningWithFinetuningConfig.make(**(settings | changes))
    target, states = stage.make_target(model, config, budget), states or HiddenStates(model)
    recipe = stage.make_recipe(model, torch.zeros(ROWS, 2), config, target, states)
    for step in range(ROWS):
        batch = rows.collate([step], 0) | {"rows": torch.tensor([step])}
        model.zero_grad()
        recipe.loss(model, batch, step)["loss"].backward()
        recipe.after_backward(step)
        recipe.after_step(step)
    return recipe


SPENT = {
    "mac": lambda model: encoder_macs_formula(layers_of(model), LENGTH),
    "parameters": lambda model: count_parameters(model)["encoder"],
}


@pytest.mark.parametrize("share", [0.06, 0.15, 0.5])
@pytest.mark.parametrize("quantity", SPENT)
@pytest.mark.parametrize("make", [tiny_bert, tiny_distilbert])
def test_the_smaller_model_takes_its_share_of_the_teachers(make, quantity, share, rows):
    model, teacher = make(), tiny_bert()
    inputs = (share, model, teacher, LENGTH)
    budget = macs_budget(*inputs) if quantity == "mac" else parameters_budget(*inputs[:3])
    recipe = pruned(model, budget, rows)
    reached = recipe.sparsity()[f"{quantity}_share"]
    small, _ = recipe.finish()
    assert SPENT[quantity](small) / SPENT[quantity](teacher) == pytest.approx(reached, rel=1e-6)
    assert share - 0.1 < reached <= share
    assert any(parts.heads for parts in layers_of(small))


def test_parts_go_while_training_and_the_smaller_model_computes_the_same(rows):
    model = tiny_bert()
    recipe = pruned(model, macs_budget(0.1, model, tiny_bert(), LENGTH), rows)
    assert recipe.removed
    batch = rows.collate(list(range(4)), 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        small, _ = recipe.finish()
        torch.testing.assert_close(small(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert len(layers_of(small)) <= len(layers_of(model))


def test_the_layer_map_follows_when_layers_go(rows):
    model = tiny_bert()
    states = HiddenStates(model, LiveTeacher(tiny_bert(seed=1), rows, 0), 1.0)
    assert (states.layers, states.teachers_layers) == ([1, 2, 3], [1, 2, 3])
    recipe = pruned(model, macs_budget(0.05, model, tiny_bert(), LENGTH), rows, states, beta_hidden=1.0)
    left = [i for i, parts in enumerate(layers_of(model), 1) if not parts.empty]
    assert len(left) < 3 and states.layers == left and states.teachers_layers[-1] == 3
    small, moved = recipe.finish()
    assert moved.layers == list(range(1, len(left) + 1)) and moved.teachers_layers == states.teachers_layers


def scores_of(model):
    generator = torch.Generator().manual_seed(0)
    return {
        kind: {i: torch.rand(parts.count(kind), generator=generator) for i, parts in enumerate(layers_of(model))}
        for kind in ENCODER_KINDS
    }


def test_latency_chooses_widths_that_were_measured():
    model = tiny_bert()
    layers = layers_of(model)
    target = OneBudget(Floors(1, 1), 0.0, True, WIDEST, latency_budget(0.5, model, TABLE))
    kept = target.choose(layers, scores_of(model), 1.0)
    widths = {kind: [int(mask.sum()) for mask in masks.values()] for kind, masks in kept.items()}
    assert all(width in (0, *TABLE.parts[kind]) for kind in ENCODER_KINDS for width in widths[kind])
    times = [TABLE.parts[kind].get(width, 0.0) for kind in ENCODER_KINDS for width in widths[kind]]
    assert sum(times) + TABLE.rest <= 0.5 * TABLE.teacher
    reached = target.reached(layers, {kind: list(masks.values()) for kind, masks in kept.items()})
    assert reached == {"latency_share": pytest.approx((sum(times) + TABLE.rest) / TABLE.teacher)}


def test_between_measured_widths_the_next_wider_counts():
    assert TABLE.costs(NEURONS, 48)[[0, 1, 8, 9, 33, 48]].tolist() == [0, 1, 1, 3, 6, 6]


@pytest.mark.parametrize(
    ("quantity", "share", "message"),
    [
        ("latency", 0.1, "--target latency 0.1: allowed is more than 0.100, which embeddings and head alone take"),
        ("latency", 0.12, "--target latency 0.12: allowed is at least 0.175, which one attention takes"),
        ("mac", 0.01, r"--target mac 0.01: allowed is at least 0.0\d+, which one attention takes"),
    ],
)
def test_a_budget_for_less_than_one_attention_is_refused(quantity, share, message):
    model = tiny_bert()
    with pytest.raises(UserError, match=message):
        budget = (
            latency_budget(share, model, TABLE) if quantity == "latency" else macs_budget(share, model, model, LENGTH)
        )
        OneBudget(Floors(1, 8), 0.25, True, WIDEST, budget).check(layers_of(model))


@pytest.mark.parametrize("drop_parts", [True, False])
def test_parts_go_whole_only_where_they_may(drop_parts):
    model = tiny_bert()
    target = OneBudget(Floors(1, 8), 0.0, drop_parts, WIDEST, macs_budget(0.3, model, model, LENGTH))
    layers = layers_of(model)
    # By its score the first layer is worth nothing at all.
    scores = {kind: {i: torch.full((p.count(kind),), float(i)) for i, p in enumerate(layers)} for kind in ENCODER_KINDS}
    kept = target.check(layers).choose(layers, scores, 1.0)
    widths = [int(kept[kind][index].sum()) for index in range(len(layers)) for kind in ENCODER_KINDS]
    assert min(widths) == (0 if drop_parts else 1)
    assert drop_parts or widths[:2] == [1, 8]
    every = {kind: [kept[kind][index] for index in range(len(layers))] for kind in ENCODER_KINDS}
    assert target.reached(layers, every)["mac_share"] <= 0.3


def test_a_budget_for_less_than_something_of_each_part_is_refused():
    model = tiny_bert()
    budget = macs_budget(0.1, model, model, LENGTH)
    OneBudget(Floors(1, 8), 0.0, True, WIDEST, budget).check(layers_of(model))
    message = r"--target mac 0.1: allowed is at least 0.\d+, which the least of every part takes .*: --drop_parts"
    with pytest.raises(UserError, match=message):
        OneBudget(Floors(1, 8), 0.0, False, WIDEST, budget).check(layers_of(model))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.2])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(UserError, match=f"--target mac {share}: allowed is a share of the teacher's, above 0"):
        stage.GradualPruningWithFinetuningConfig.make(target=("mac", share))


def test_times_are_measured_once_and_kept(tmp_path, monkeypatch):
    model, teacher = tiny_distilbert(), tiny_bert()
    monkeypatch.setattr(latency, "ROUNDS", 1)
    table = latency_table(model, teacher, LENGTH, tmp_path)
    assert list(table.parts[HEADS]) == [1, 2, 3, 4] and max(table.parts[NEURONS]) == 48
    assert table.teacher > 0 and all(time >= 0 for times in table.parts.values() for time in times.values())
    assert [parts.count(kind) for parts in layers_of(model) for kind in ENCODER_KINDS] == [4, 48] * 3, "left as it was"
    monkeypatch.setattr(latency, "measure_table", None)
    assert latency_table(model, teacher, LENGTH, tmp_path) == table
    with pytest.raises(TypeError):
        latency_table(tiny_distilbert(n_layers=2), teacher, LENGTH, tmp_path)

"""Second moments while training: what is summed up, what removal costs by them, and the repair of projections."""

import pytest
import torch
from conftest import VOCABULARY, load_script, tiny_bert, tiny_distilbert

from compression.classifier.curvature import CURVATURE_STEPS, FADE, TOGETHER, Curvature
from compression.classifier.hidden_states import HiddenStates
from compression.classifier.masks import add_masks
from compression.distillation import distillation_loss
from compression.importance import RIDGE
from compression.structures import HEADS, NEURONS
from compression.training import recompute_activations

ROWS = 40
stage = load_script("8_pruning_with_finetuning")


def a_batch(step=0, rows=4):
    """Rows of 3 to 6 tokens."""
    draw = torch.Generator().manual_seed(step)
    lengths = torch.tensor([6, 3, 5, 4])[:rows, None]
    return {
        "input_ids": torch.randint(1, VOCABULARY, (rows, 6), generator=draw),
        "attention_mask": (torch.arange(6) < lengths).long(),
        "labels": torch.randint(0, 2, (rows,), generator=draw),
        "rows": torch.randint(0, ROWS, (rows,), generator=draw),
    }


def part_of(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.fixture(params=[tiny_bert, tiny_distilbert])
def recipe(request):
    return make(request.param())


def make(model, **changes):
    fields = dict(num_epochs=3, pruning_start_epoch=1, pruning_end_epoch=2, batch_size=4, pruning_frequency=1)
    settings = stage.GradualPruningWithFinetuningConfig.make(**(fields | dict(importance_mode="obs") | changes))
    logits = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0))
    model = without_dropout(model)
    return stage.make_recipe(model, logits, settings, stage.make_target(model, settings), HiddenStates(model))


def backward(recipe, batch, step, factor=1.0):
    (recipe.loss(recipe.model, batch, step)["loss"] * factor).backward()


def train_step(recipe, step, optimizer=None):
    recipe.model.zero_grad()
    backward(recipe, a_batch(step), step)
    recipe.after_backward(step)
    if optimizer:
        optimizer.step()
    recipe.after_step(step)


def moments_by_hand(recipe, place, batch, step):
    """Sums of x, x x^T and g g^T over tokens, row by row without padding."""
    kind, index = place
    layer, sums, inputs, gradients = recipe.masked[kind][index], 0.0, 0.0, 0.0
    for row in range(len(batch["rows"])):
        one = part_of(batch, slice(row, row + 1))
        length = int(one["attention_mask"].sum())
        kept = {}

        def note(_, given, output, kept=kept):
            output.retain_grad()
            kept.update(x=given[0][0], output=output)

        with layer.register_forward_hook(note):
            logits = recipe.model(one["input_ids"][:, :length], one["attention_mask"][:, :length]).logits
        teacher = recipe.teacher_logits[one["rows"]]
        terms = distillation_loss(logits, teacher, one["labels"], recipe.temperature(step), recipe.alpha(step))
        terms["loss"].backward()
        x, g = kept["x"], kept["output"].grad[0]
        sums, inputs, gradients = sums + x.sum(0), inputs + x.T @ x, gradients + g.T @ g
    return sums.detach(), inputs.detach(), gradients


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1, 2], [3]]])
def test_sums_are_those_of_each_rows_own_loss_over_its_real_tokens(recipe, parts):
    """However the batch is cut, and whatever the loss is scaled with."""
    place, batch = (NEURONS, 1), a_batch()
    expected = moments_by_hand(recipe, place, batch, 0)
    for rows in parts:
        backward(recipe, part_of(batch, rows), 0, factor=len(rows) / 4 * 1024.0)
    backward(recipe, part_of(batch, [0]), 0, factor=0.0)  # of a process without a share
    recipe.after_backward(0)
    curvature = recipe.scores.curvature
    assert curvature.tokens == 18
    for found, table in zip((curvature.sums, curvature.inputs, curvature.gradients), expected, strict=True):
        torch.testing.assert_close(found[place], table, atol=1e-4 * table.abs().max().item(), rtol=1e-3)


def test_recomputed_activations_are_counted_once():
    found = []
    for recompute in (False, True):
        recipe = make(tiny_distilbert())
        if recompute:
            recompute_activations(recipe.model, True)
        backward(recipe, a_batch(), 0)
        recipe.after_backward(0)
        found.append(recipe.scores.curvature)
    for name, expected in found[0].tensors().items():
        torch.testing.assert_close(found[1].tensors()[name], expected)


@pytest.mark.parametrize("settings, events", [(dict(repair="events"), 10), (dict(repair="end"), 1), ({}, 0)])
def test_only_the_steps_before_an_event_that_needs_it_are_watched(settings, events):
    recipe = make(tiny_distilbert(), importance_mode="l2", num_epochs=12, pruning_end_epoch=10, **settings)
    recipe.events = list(range(9, 100, 10))
    watched = [step for step in range(100) if recipe._curvature(step)]
    last = recipe.events[10 - events :]
    assert watched == [step for event in last for step in range(event - CURVATURE_STEPS + 1, event + 1)]
    layer = recipe.masked[NEURONS][0]
    for step in (0, 99):
        recipe.loss(recipe.model, a_batch(), step)
        assert not layer._forward_hooks, "nothing is left behind"


def test_an_overflowing_step_does_not_count(recipe):
    curvature = recipe.scores.curvature
    train_step(recipe, 0)
    before = {name: tensor.clone() for name, tensor in curvature.tensors().items()}
    assert before["curvature.tokens"] > 0
    backward(recipe, a_batch(1), 1)
    recipe.masked[HEADS][1].weight.grad[0, 0] = float("inf")
    curvature.take_in()
    assert all(torch.equal(tensor, before[name]) for name, tensor in curvature.tensors().items())
    backward(recipe, a_batch(1), 1)
    recipe.model.zero_grad()
    backward(recipe, a_batch(1), 1)
    curvature.take_in()
    assert curvature.tokens > before["curvature.tokens"], "the next one does"


def test_a_token_counts_half_at_the_next_event(recipe):
    assert recipe.events[:2] == [0, 1]
    for step in range(2):
        train_step(recipe, step)
    assert recipe.scores.curvature.tokens == 18 * (FADE + FADE**2)


def loss_added(curvature, place, gone):
    """1/2 * E[(g^T dW x)^2], x with a one for the bias, dW of the best fit without some columns, solved for alone.

    Without any column there is no bias either: the part is taken out.
    """
    layer, tokens = curvature.masked[place], curvature.tokens
    used = layer.mask > 0
    square, gradients = (table[place].double() / tokens for table in (curvature.inputs, curvature.gradients))
    square, mean = square[used][:, used], curvature.sums[place][used].double() / tokens
    variances = square.diagonal() - mean.square()
    square = square + RIDGE * variances.diag()
    moments = torch.cat([torch.cat([square, mean[:, None]], 1), torch.cat([mean, torch.ones(1)])[None]])
    whole = torch.cat([layer.weight[:, used], layer.bias[:, None]], 1).detach().double()
    left = [column for column in range(len(moments)) if column not in gone]
    if left == [len(square)]:
        gone, left = [*gone, *left], []
    change = torch.zeros_like(whole)
    change[:, gone] = -whole[:, gone]
    lost = whole[:, gone] @ moments[gone][:, left]
    change[:, left] = torch.linalg.solve(moments[left][:, left], lost.T).T
    return 0.5 * (gradients @ change @ moments * change).sum().item()


@pytest.mark.parametrize("kind", [HEADS, NEURONS])
def test_sums_of_scores_are_the_loss_of_what_goes(kind):
    recipe = make(tiny_distilbert(), pruning_frequency=100)
    curvature, place = recipe.scores.curvature, (kind, 1)
    layer = recipe.masked[kind][1]
    torch.nn.init.normal_(layer.bias)
    layer.keep(torch.arange(layer.count) % 3 > 0)  # some are out of use, and take no part
    for step in range(2):
        recipe.model.zero_grad()
        backward(recipe, a_batch(step), step)
        curvature.take_in()
    scores = recipe.scores.densities((kind,))[kind][1] * recipe.layers[1].structure_parameters(kind)
    assert not scores[~layer.kept].any() and (scores[layer.kept] > 0).all()
    scores = scores[layer.kept]
    order, size = scores.argsort(stable=True).tolist(), layer.in_features // layer.count
    for number in (1, len(order)) if kind == HEADS else (TOGETHER, 2 * TOGETHER, len(order)):
        gone = [place * size + column for place in order[:number] for column in range(size)]
        assert scores[order[:number]].sum().item() == pytest.approx(loss_added(curvature, place, gone), rel=1e-2)


@torch.no_grad()
def repaired_layer(bias):
    """A projection of which a few neurons are out of use and more go, repaired, and what went in."""
    model = tiny_distilbert()
    model.distilbert.transformer.layer[1].ffn.lin2.bias = torch.nn.Parameter(torch.randn(32)) if bias else None
    masked = add_masks(model)
    curvature, place, layer = Curvature(masked, gradients=False), (NEURONS, 1), masked[NEURONS][1]
    layer.keep(torch.arange(layer.count) % 12 > 0)
    x = torch.randn(300, layer.in_features) @ torch.randn(layer.in_features, layer.in_features)
    x = x + 5 * torch.randn(layer.in_features)
    curvature.inputs[place] += x.T @ x
    curvature.sums[place] += x.sum(0)
    curvature.tokens += len(x)
    return masked, curvature, layer, x


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_those_that_stay_and_the_bias_take_over_what_the_masked_ones_gave(bias):
    masked, curvature, layer, x = repaired_layer(bias)
    before, wanted, untouched = layer.weight.clone(), layer(x), masked[HEADS][0].weight.clone()
    bias_before = layer.bias.clone() if bias else None
    stay = torch.arange(layer.count) % 4 > 0
    given = {(NEURONS, 1): stay, (HEADS, 0): masked[HEADS][0].kept}
    before = before * layer.mask
    plain = wanted - x @ (before * ~stay).T
    curvature.repair(given)
    layer.keep(stay)
    assert not layer.weight[:, ~stay].any()
    assert torch.equal(masked[HEADS][0].weight, untouched), "a layer that lost nothing was changed"
    assert (layer(x) - wanted).square().mean() < 0.5 * (plain - wanted).square().mean()
    # Ordinary least squares with the ridge on the change as further rows; the bias has a column of ones and no ridge.
    columns, lost = x[:, stay], x[:, ~stay] @ before[:, ~stay].T
    ridge = RIDGE * (columns - columns.mean(0) * bias).square().sum(0)
    rows = torch.cat([columns, ridge.sqrt().diag()])
    ones = torch.cat([torch.ones(len(x), bias), torch.zeros(columns.shape[1], bias)])
    sides = torch.cat([lost, torch.zeros(columns.shape[1], layer.out_features)])
    solved = torch.linalg.lstsq(torch.cat([rows, ones], 1), sides).solution.T
    expected = before[:, stay] + solved[:, : columns.shape[1]]
    torch.testing.assert_close(layer.weight[:, stay], expected, atol=2e-3, rtol=1e-2)
    if bias:
        gained = layer.bias - bias_before
        torch.testing.assert_close(gained, solved[:, -1], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("mode, repair", [("kd_grad", "events"), ("obs", "events"), ("obs", "none")])
def test_what_was_made_up_for_does_not_come_back(mode, repair):
    recipe = make(tiny_distilbert(), importance_mode=mode, repair=repair, head_final_sparsity=0.5)
    optimizer = torch.optim.AdamW(recipe.model.parameters(), lr=1e-2)
    before, changed = recipe.kept(), 0
    for step in range(2 * recipe.steps_per_epoch):
        train_step(recipe, step, optimizer)
        kept = recipe.kept()
        for kind, masks in kept.items():
            for index, (new, old) in enumerate(zip(masks, before[kind], strict=True)):
                assert not (new & ~old).any()
                if not torch.equal(new, old):
                    changed += 1
                    layer = recipe.masked[kind][index]
                    assert layer.weight[:, layer.mask == 0].any() == (repair == "none")
        before = kept
    assert changed > 4 and bool(recipe.scores.curvature.gradients) == (mode == "obs")


@pytest.mark.parametrize("repair", ["events", "end"])
def test_repaired_masked_and_smaller_model_agree(batch, repair):
    recipe = make(tiny_distilbert(), repair=repair)
    repaired, repair_curvature = [], recipe.scores.curvature.repair

    def noting(stays):
        repaired.append(step)
        repair_curvature(stays)

    recipe.scores.curvature.repair = noting
    for step in range(2 * recipe.steps_per_epoch):
        train_step(recipe, step)
    assert repaired == (recipe.events if repair == "events" else recipe.events[-1:])
    with torch.no_grad():
        masked = recipe.model.eval()(**batch).logits
        torch.testing.assert_close(recipe.finish()[0](**batch).logits, masked, atol=1e-5, rtol=0)


def test_what_was_taken_out_is_forgotten(recipe):
    train_step(recipe, 0)
    recipe._take_out(HEADS, 0)
    assert not any(name.endswith("heads.0") for name in recipe.tensors())
    tokens = recipe.scores.curvature.tokens.clone()
    train_step(recipe, 1)
    assert recipe.scores.curvature.tokens > tokens
    assert recipe.scores.densities((HEADS,))[HEADS].keys() == {1, 2}

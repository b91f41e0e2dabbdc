"""Least-squares repair of output projections."""

import copy

import pytest
import torch
from conftest import everything, repair, tiny_decoder

from compression.decoder import decoder_of
from compression.importance import contributions, keep_in_rounds
from compression.least_squares import RIDGE, refit
from compression.llm.repair import LocalChoice
from compression.llm.repair_text import RepairText
from compression.structures import CHANNELS, GROUPS, layers_of, spread
from compression.surgery import shrink_decoder


@torch.no_grad()
def test_what_others_can_do_is_taken_over(model, windows):
    """Channels and groups that are copies of others can go with no other trace than the ridge's."""
    kept = everything(model)
    for index in (1, 3):
        parts = layers_of(model)[index]
        for kind, half in ((CHANNELS, 24), (GROUPS, 2)):
            for linear in (rows.module for rows in parts.split(kind)[0]):
                rows = linear.out_features // 2
                linear.weight[rows:] = linear.weight[:rows]
                if linear.bias is not None:
                    linear.bias[rows:] = linear.bias[:rows]
            kept[kind][index] = torch.arange(2 * half) < half
    expected = model(windows).logits
    plain = shrink_decoder(copy.deepcopy(model), kept)(windows).logits
    repair(model, kept, windows, batch_size=8, ridge=RIDGE / 100)
    repaired = shrink_decoder(model, kept)(windows).logits
    assert (plain - expected).std() > 0.1 * expected.std()
    assert (repaired - expected).std() < 0.01 * expected.std()


@torch.no_grad()
def test_projection_is_the_ridge_solution_on_what_comes_in(windows):
    model = tiny_decoder()
    kept = everything(model)
    kept[CHANNELS][0] = torch.arange(48) % 3 > 0
    kept[CHANNELS][2] = torch.arange(48) % 4 > 0
    down = [parts.down for parts in layers_of(model)]
    whole = [linear.weight.clone() for linear in down]
    inputs = {}

    def note(linear, given):
        inputs[linear] = given[0].flatten(0, 1).double()

    repair(model, kept, windows, batch_size=7)
    for linear in (down[0], down[2]):
        linear.register_forward_pre_hook(note)
    model(windows)  # what comes into layer 2 here has gone through the repaired layer 0
    for index in (0, 2):
        columns, x = kept[CHANNELS][index], inputs[down[index]]
        gram = x[:, columns].T @ x[:, columns]
        gram += RIDGE * gram.diagonal().diag()
        missing = x[:, ~columns] @ whole[index][:, ~columns].T.double()
        solution = whole[index][:, columns].double() + torch.linalg.solve(gram, x[:, columns].T @ missing).T
        torch.testing.assert_close(down[index].weight[:, columns].double(), solution, rtol=1e-3, atol=1e-4)
        assert not down[index].weight[:, ~columns].any()
    assert torch.equal(down[1].weight, whole[1]), "a layer that lost nothing was changed"


@torch.no_grad()
@pytest.mark.parametrize("kind", [GROUPS, CHANNELS])
@pytest.mark.parametrize("loses", [True, False], ids=["loses some", "loses nothing"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "phi3", "gemma2", "olmo2"])
def test_a_share_of_earlier_errors_is_made_up_for(windows, family, kind, loses):
    """The solution's target is that share of the way to the state that the whole model has behind it; where a norm is
    behind the projection, to what that gives in the whole model."""
    model, dense, kept, share = tiny_decoder(family), tiny_decoder(family), everything(tiny_decoder(family)), 0.4
    kept[CHANNELS][0], kept[GROUPS][1] = torch.arange(48) % 2 > 0, torch.tensor([1, 0, 1, 1]).bool()
    if loses:
        kept[kind][2] = torch.arange(len(kept[kind][2])) % 4 > 0
    repair(model, kept, windows, batch_size=7, error_share=share)

    def seen(model):
        """What goes into the projection and what it gives; the states before and behind its branch."""
        found, decoder, outer = [], decoder_of(model), layers_of(model)[2].split(kind)[1]
        state, options = decoder.first_input(windows)
        for index in (0, 1):
            state = decoder.layers[index](state, **options[index])
        if kind == CHANNELS:
            state = state + decoder.attention_branch(decoder.layers[2], state, options[2])
        with outer.register_forward_hook(lambda _, given, output: found.extend([given[0], output])):
            behind = state + decoder.branch(decoder.layers[2], kind, state, options[2])
        return [values.flatten(0, 1).double() for values in (*found, state, behind)]

    outer, whole = (layers_of(each)[2].split(kind)[1] for each in (model, dense))
    columns = spread(kept[kind][2], outer.in_features)
    inputs, _, before, _ = seen(model)
    _, wanted, _, behind = seen(dense)
    given = inputs @ whole.weight.double().T
    if family not in ("gemma2", "olmo2"):
        wanted = (behind - before) / (model.config.residual_multiplier if family == "granite" else 1)
    x, biased = inputs[:, columns], outer.bias is not None
    start, ridge = whole.weight[:, columns].double().T, RIDGE * (x - biased * x.mean(0)).square().sum(0)
    if biased:  # an input that is always one; the ridge is on the change of the weights, none on that of the bias
        x, start = torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat([start, whole.bias.double()[None]])
        ridge, given = torch.cat([ridge, ridge.new_zeros(1)]), given + whole.bias.double()
    target = given + share * (wanted - given)
    solution = start + torch.linalg.solve(x.T @ x + ridge.diag(), x.T @ (target - x @ start))
    found = torch.cat([outer.weight[:, columns].T, outer.bias[None]]) if biased else outer.weight[:, columns].T
    assert (wanted - given).abs().max() > 1e-2
    torch.testing.assert_close(found.double(), solution, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_repair_of_layers_that_lose_a_whole_part(model, windows):
    kept = everything(model)
    kept[GROUPS][1] = torch.zeros(4).bool()
    kept[CHANNELS][2] = torch.zeros(48).bool()
    kept[GROUPS][3] = torch.tensor([1, 0, 1, 1]).bool()
    expected = model(windows).logits
    plain = shrink_decoder(copy.deepcopy(model), kept)(windows).logits
    repair(model, kept, windows)
    repaired = shrink_decoder(model, kept)(windows).logits
    assert (repaired - expected).square().mean() < (plain - expected).square().mean()


def test_a_gram_matrix_that_is_off_by_rounding_is_solved_all_the_same():
    """In 16 bits it can have a direction that counts below zero, and then no Cholesky factor."""
    draw = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(64, 40, generator=draw), torch.randn(2100, 40, generator=draw)
    gram, kept = inputs.T @ inputs, torch.arange(40) < 25
    gram[0, 0] -= 200
    solved = refit(weight, gram, kept)
    damped = gram[kept][:, kept].double()
    damped.diagonal().add_(RIDGE * damped.diagonal().clamp_min(0))
    assert torch.linalg.eigvalsh(damped)[0] < 0
    lost = gram[kept][:, ~kept].double() @ weight[:, ~kept].double().T
    expected = weight[:, kept].double() + torch.linalg.solve(damped, lost).T
    torch.testing.assert_close(solved[:, kept], expected.float())
    assert not solved[:, ~kept].any()


@torch.no_grad()
@pytest.mark.parametrize(("count", "ridge"), [(1600, 0.24), (3200, 0.12), (320, 0.5), (64000, RIDGE)])
def test_the_ridge_is_what_suits_hidden_size_and_tokens(count, ridge):
    """Twelve times the hidden size per token, from the least to the largest; or what is given."""
    model, expected, given = tiny_decoder(), tiny_decoder(), tiny_decoder()
    assert model.config.hidden_size == 32
    ids = torch.randint(100, (count // 32, 32), generator=torch.Generator().manual_seed(1))
    kept = everything(model)
    kept[CHANNELS][1] = torch.arange(48) % 3 > 0
    for each, value in ((model, None), (expected, ridge), (given, 2 * ridge)):
        repair(each, {kind: list(stays) for kind, stays in kept.items()}, ids, 50, ridge=value)
    found, same, other = (layers_of(each)[1].down.weight for each in (model, expected, given))
    assert torch.equal(found, same)
    assert not torch.equal(found, other)


# Biases of output projections.


@torch.no_grad()
@pytest.mark.parametrize("kind", [GROUPS, CHANNELS])
@pytest.mark.parametrize("left", [0, 2])
def test_a_bias_takes_over_what_is_constant(windows, kind, left):
    """What always gives the same can go, also all of it, with no other trace than rounding's."""
    model = tiny_decoder("llama", mlp_bias=True)
    parts, kept = layers_of(model)[1], everything(model)
    kept[kind][1] = stays = torch.arange(parts.count(kind)) < left
    for rows in parts.attention[2:] if kind == GROUPS else parts.ffn:  # the values, or gate and up
        rows.module.weight[~rows.spread(stays)] = 0.0
    expected = model(windows).logits
    plain = shrink_decoder(copy.deepcopy(model), kept)(windows).logits
    repair(model, kept, windows, batch_size=8, ridge=1e-6)
    repaired = shrink_decoder(model, kept)(windows).logits
    assert (plain - expected).abs().max() > 0.05
    torch.testing.assert_close(repaired, expected, atol=2e-3, rtol=0)


@torch.no_grad()
def test_weights_and_bias_are_the_least_squares_of_inputs_and_a_one(windows):
    model = tiny_decoder("llama", mlp_bias=True)
    kept, inputs = everything(model), []
    kept[CHANNELS][0] = torch.arange(48) % 3 > 0
    down = layers_of(model)[0].down
    whole = down.weight.double().clone(), down.bias.double().clone()
    handle = down.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1).double()))
    model(windows)
    handle.remove()
    repair(model, kept, windows, batch_size=7)
    columns = kept[CHANNELS][0]
    x, wanted = inputs[0], inputs[0] @ whole[0].T + whole[1]
    # The ridge is on the change of the weights, none on that of the bias.
    ridge = RIDGE * (x - x.mean(0))[:, columns].square().sum(0)
    ones = torch.cat([x[:, columns], torch.ones(len(x), 1)], 1)
    start = torch.cat([whole[0][:, columns], whole[1][:, None]], 1).T
    penalty = torch.cat([ridge, ridge.new_zeros(1)]).diag()
    solution = start + torch.linalg.solve(ones.T @ ones + penalty, ones.T @ (wanted - ones @ start))
    torch.testing.assert_close(down.weight[:, columns].double(), solution[:-1].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(down.bias.double(), solution[-1], rtol=1e-3, atol=1e-4)
    assert layers_of(tiny_decoder("qwen2"))[0].down.bias is None


# Which structures go, where it is known how many.


def local(model, kept, windows, *choice):
    repair(model, kept, windows, 8, LocalChoice(*choice))


def moments_at(model, windows, index, kind):
    """The moments of a text that has gone through a model as it is."""
    text = RepairText(model, windows, 8)
    while text.layer < index:
        text.leave(GROUPS, changed=False)
        text.leave(CHANNELS, changed=False)
    if kind == CHANNELS:
        text.leave(GROUPS, changed=False)
    return text.enter(kind)


@torch.no_grad()
def test_local_choice_is_by_what_comes_in_and_keeps_the_numbers(windows):
    """Each layer's choice sees what the layers before it, chosen and repaired, give."""
    model, dense, kept = tiny_decoder(), tiny_decoder(), everything(tiny_decoder())
    for index in range(4):
        kept[CHANNELS][index] = torch.arange(48) < (30, 48, 0, 17)[index]
        kept[GROUPS][index] = torch.arange(4) < (4, 2, 3, 0)[index]
    counts = {kind: [int(stays.sum()) for stays in kept[kind]] for kind in kept}
    local(model, kept, windows, 5)
    assert {kind: [int(stays.sum()) for stays in kept[kind]] for kind in kept} == counts
    moments = moments_at(model, windows, 3, CHANNELS)
    expected = keep_in_rounds(layers_of(dense)[3].down.weight, moments.gram, 48, 31, 5)
    assert torch.equal(kept[CHANNELS][3], expected)
    columns = spread(kept[CHANNELS][3], 48)
    torch.testing.assert_close(
        layers_of(model)[3].down.weight, refit(layers_of(dense)[3].down.weight, moments.gram, columns)
    )


@torch.no_grad()
def test_product_weighs_scores_with_what_others_cannot_make_up_for(windows):
    model, kept = tiny_decoder("qwen2"), everything(tiny_decoder("qwen2"))
    for kind, count in ((CHANNELS, 48), (GROUPS, 4)):
        kept[kind][0] = torch.arange(count) > 0
    draw = torch.Generator().manual_seed(5)
    scores = {kind: [torch.rand(len(stays), generator=draw) for stays in kept[kind]] for kind in kept}
    parts = layers_of(tiny_decoder("qwen2"))[0]
    gram = moments_at(model, windows, 0, GROUPS).gram
    damped = gram.double() + RIDGE * gram.diagonal().diag()
    given = contributions(parts.o.weight, gram, 4)
    shares = []
    for group in range(4):
        columns = torch.arange(32) // 8 == group
        block = torch.linalg.inv(torch.linalg.inv(damped)[columns][:, columns])
        shares.append((parts.o.weight[:, columns].double() @ block * parts.o.weight[:, columns]).sum() / given[group])
    local(model, kept, windows, 1, scores)
    assert (~kept[GROUPS][0]).nonzero().item() == (torch.stack(shares) * scores[GROUPS][0]).argmin()


@torch.no_grad()
def test_rounds_leave_less_error_than_scores(model, windows):
    """With half of a layer's channels copies of the others, and scores that say nothing."""
    for linear in (rows.module for rows in layers_of(model)[1].ffn):
        linear.weight[24:] = linear.weight[:24]
    expected, errors = model(windows).logits, {}
    for name, choice in (("none", None), ("one", LocalChoice(1)), ("many", LocalChoice(24))):
        copied, kept = copy.deepcopy(model), everything(model)
        kept[CHANNELS][1] = torch.arange(48) % 24 < 12
        repair(copied, kept, windows, 8, choice)
        errors[name] = (shrink_decoder(copied, kept)(windows).logits - expected).square().mean().item()
    assert errors["many"] < 0.2 * min(errors["none"], errors["one"])

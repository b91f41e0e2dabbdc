"""Least-squares repair of output projections."""

import copy

import pytest
import torch
from conftest import DECODERS, repair, tiny_decoder

from compression.least_squares import RIDGE, refit
from compression.structures import CHANNELS, GROUPS, layers_of
from compression.surgery import shrink_decoder


@pytest.fixture
def windows():
    return torch.randint(3, 120, (40, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=sorted(DECODERS))
def model(request):
    return tiny_decoder(request.param)


def everything(model):
    return {kind: [torch.ones(parts.count(kind)).bool() for parts in layers_of(model)] for kind in (GROUPS, CHANNELS)}


@torch.no_grad()
def test_what_others_can_do_is_taken_over(model, windows, monkeypatch):
    """Channels and groups that are copies of others can go with no other trace than the ridge's."""
    monkeypatch.setattr("compression.least_squares.RIDGE", RIDGE / 100)
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
    repair(model, kept, windows, batch_size=8)
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
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        missing = x[:, ~columns] @ whole[index][:, ~columns].T.double()
        solution = whole[index][:, columns].double() + torch.linalg.solve(gram, x[:, columns].T @ missing).T
        torch.testing.assert_close(down[index].weight[:, columns].double(), solution, rtol=1e-3, atol=1e-4)
        assert not down[index].weight[:, ~columns].any()
    assert torch.equal(down[1].weight, whole[1]), "a layer that lost nothing was changed"


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
    damped.diagonal().add_(RIDGE * damped.diagonal().mean())
    assert torch.linalg.eigvalsh(damped)[0] < 0
    lost = gram[kept][:, ~kept].double() @ weight[:, ~kept].double().T
    expected = weight[:, kept].double() + torch.linalg.solve(damped, lost).T
    torch.testing.assert_close(solved[:, kept], expected.float())
    assert not solved[:, ~kept].any()

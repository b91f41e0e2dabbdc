"""Rounds of the repair that solve for what MLPs read."""

import copy

import pytest
import torch
from conftest import everything, repair, tiny_decoder

from compression.llm.mlp_repair import _conjugate_gradients, _Linear, solve_inputs
from compression.llm.repair_text import RepairText
from compression.structures import CHANNELS, GROUPS, layers_of
from compression.surgery import shrink_decoder
from gqa_aware_pruning import GQAAwarePruningConfig
from run_global_pruning import GlobalPruningConfig


def pruned(model):
    """What stays where the MLPs of two layers lose two thirds, and an attention a group."""
    kept = everything(model)
    kept[CHANNELS][1], kept[CHANNELS][2] = torch.arange(48) % 3 == 0, torch.arange(48) % 3 == 1
    kept[GROUPS][2][0] = False
    return kept


def before_the_mlp(model, windows, layer=1):
    """A text that has come to the MLP of a layer, which is whole, and what its projection is to give."""
    text = RepairText(model, windows, 7)
    targets = text.decoder.states()
    while text.layer < layer:
        for kind in (GROUPS, CHANNELS):
            text.leave(kind, changed=False)
    text.leave(GROUPS, changed=False)
    text.enter(CHANNELS, targets=targets)
    return text, targets


@torch.no_grad()
def test_rounds_bring_the_states_nearer_to_those_of_the_whole_model(model, windows):
    kept, expected, errors = pruned(model), model.model(windows).last_hidden_state, []
    for rounds in (0, 1, 3):
        repaired = copy.deepcopy(model)
        repair(repaired, kept, windows, batch_size=7, error_share=0.5, mlp_rounds=rounds)
        errors.append((repaired.model(windows).last_hidden_state - expected).square().mean().item())
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.95 * errors[1]


@torch.no_grad()
def test_what_goes_can_be_cut_off_and_nothing_else_changes(model, windows):
    dense, kept = copy.deepcopy(model), pruned(model)
    repair(model, kept, windows, batch_size=7, mlp_rounds=2)
    changed = 0
    for mine, before, channels in zip(layers_of(model), layers_of(dense), kept[CHANNELS], strict=True):
        for now, then in zip(mine.split(CHANNELS)[0], before.split(CHANNELS)[0], strict=True):
            gone = now.spread(~channels)
            assert torch.equal(now.module.weight[gone], then.module.weight[gone])
            changed += not torch.equal(now.module.weight, then.module.weight)
        for now, then in zip(mine.split(GROUPS)[0], before.split(GROUPS)[0], strict=True):
            assert torch.equal(now.module.weight, then.module.weight)
    assert changed == 2 * len(layers_of(model)[0].split(CHANNELS)[0])
    expected = model(windows).logits
    torch.testing.assert_close(shrink_decoder(model, kept)(windows).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_input_that_is_next_to_nothing_gets_no_large_weights(model, windows):
    nothing = 5
    model.model.layers[1].post_attention_layernorm.weight[nothing] = 1e-4
    before = copy.deepcopy(model.model.layers[1].mlp)
    repair(model, pruned(model), windows, batch_size=7, mlp_rounds=1)
    now = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        change = (now.get_submodule(name).weight - before.get_submodule(name).weight).abs()
        assert change[:, nothing].max() < 0.1 * change.max(), name


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_the_gradient_is_that_of_the_squared_error(family, windows):
    model = tiny_decoder(family)
    text, targets = before_the_mlp(model, windows)
    stays = torch.arange(48) % 2 > 0
    inner, outer = layers_of(model)[1].split(CHANNELS)
    with torch.no_grad():
        outer.weight[:, ~stays] = 0
        problem = _Linear(text, targets, stays)
        found = problem.gradient()
    batches = range(len(text.options))
    error = sum(text.residual(CHANNELS, number, targets)[1].square().sum() for number in batches)
    gradients = torch.autograd.grad(error, [rows.module.weight for rows in inner])
    expected = torch.cat([each[rows.spread(stays)] for each, rows in zip(gradients, inner, strict=True)])
    torch.testing.assert_close(found, -expected / 2, rtol=1e-3, atol=1e-5)
    assert problem.start == pytest.approx(error.item(), rel=1e-4)


@torch.no_grad()
def test_a_round_that_does_not_help_changes_nothing(model, windows, monkeypatch):
    text, targets = before_the_mlp(model, windows)
    stays, weights = torch.arange(48) % 2 > 0, copy.deepcopy(model.state_dict())
    assert not solve_inputs(text, targets, torch.ones(48).bool()), "nothing is missing"
    layers_of(model)[1].split(CHANNELS)[1].weight[:, ~stays] = 0
    monkeypatch.setattr(
        "compression.llm.mlp_repair._conjugate_gradients", lambda problem, steps: -1e3 * problem.gradient()
    )
    assert not solve_inputs(text, targets, stays)
    for name, tensor in model.state_dict().items():
        if "down" not in name and "o_proj" not in name:
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


@torch.no_grad()
def test_many_steps_give_the_least_squares_solution(windows):
    model = tiny_decoder()
    text, targets = before_the_mlp(model, windows)
    stays = torch.arange(48) < 4
    layers_of(model)[1].split(CHANNELS)[1].weight[:, ~stays] = 0
    problem = _Linear(text, targets, stays)
    inputs, slopes, residuals = (
        torch.cat([states.get(number) for number in range(len(text.options))]).double()
        for states in (problem.inputs, problem.slopes, problem.residuals)
    )
    projection = problem.projection.double().repeat(1, problem.shares)
    linear = torch.einsum("or,tr,ti->tori", projection, slopes, inputs).flatten(0, 1).flatten(1)
    residuals = residuals.flatten()
    best = residuals - linear @ torch.linalg.lstsq(linear, residuals[:, None]).solution[:, 0]
    left = residuals - linear @ _conjugate_gradients(problem, 60).double().flatten()
    assert best.square().sum() < 0.99 * residuals.square().sum()
    assert left.square().sum() < 1.001 * best.square().sum()


@pytest.mark.parametrize("settings", [GlobalPruningConfig, GQAAwarePruningConfig])
def test_what_is_made_up_for_is_recorded(settings):
    shares = [settings.make(**fields).as_dict()["error_share"] for fields in ({}, {"mlp_rounds": 1})]
    assert shares == [0.5, 0.25]
    assert settings.make(mlp_rounds=1, error_share=0.4).as_dict()["error_share"] == 0.4

"""Scores, repair and removal analysis of models whose layers differ in what they attend to, beyond their window."""

import copy

import pytest
import torch
from conftest import LAYOUTS, MIXED, repair, tiny_decoder

from compression.decoder import decoder_of
from compression.importance import RIDGE
from compression.llm.layerwise import LayerStream
from compression.llm.perplexity import perplexity
from compression.llm.removal import removal_perplexities
from compression.llm.score_passes import score_layer, score_structures
from compression.llm.scoring import SCORES
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of
from compression.surgery import shrink_decoder


@pytest.fixture(params=sorted(LAYOUTS))
def model(request):
    family, fields = LAYOUTS[request.param]
    return tiny_decoder(family, **fields)


@pytest.fixture
def windows():
    return torch.randint(3, 120, (6, 20), generator=torch.Generator().manual_seed(5))


def all_but(model, index, gone):
    """Everything stays but these kinds of one layer."""
    layers = list(enumerate(layers_of(model)))
    return {
        kind: [torch.full((parts.count(kind),), layer != index or kind not in gone) for layer, parts in layers]
        for kind in DECODER_KINDS
    }


@torch.no_grad()
def test_states_between_layers_are_the_models_own(model, windows):
    seen, handles = [], []
    for layer in model.model.layers:
        handles.append(layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])))
    last = model.model(windows, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    stream = LayerStream(model, windows, batch_size=4)
    for expected in seen:
        torch.testing.assert_close(torch.cat([state for _, state, _ in stream]), expected)
        stream.advance()
    torch.testing.assert_close(torch.cat([model.model.norm(state) for _, state, _ in stream]), last)


@torch.no_grad()
def test_removal_analysis_is_that_of_smaller_models(model, windows):
    found = removal_perplexities(model, windows, batch_size=4)
    assert found["dense"] == pytest.approx(perplexity(model, windows), rel=1e-5)
    for name, gone in (("layer", DECODER_KINDS), ("attention", (GROUPS,)), ("mlp", (CHANNELS,))):
        expected = [
            perplexity(shrink_decoder(copy.deepcopy(model), all_but(model, index, gone)), windows) for index in range(4)
        ]
        assert found[name] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("method", SCORES)
def test_scores_of_one_layer_are_those_of_the_whole_model(model, windows, method):
    every = score_structures(model, windows, method, batch_size=2)
    for index in (0, 1, 3):
        one = score_layer(model, index, LayerStream(model, windows, 2, layer=index), method)
        for kind in DECODER_KINDS:
            torch.testing.assert_close(one[kind], every[kind][index], rtol=1e-3, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 3])
def test_repair_is_fitted_to_what_comes_in(model, windows, index):
    kept = all_but(model, index, ())
    kept[GROUPS][index] = torch.tensor([1, 0, 1, 1]).bool()
    outer, inputs = layers_of(model)[index].o, []
    whole = outer.weight.clone()
    handle = outer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1).double()))
    model(windows)
    handle.remove()
    before = None if outer.bias is None else outer.bias.clone().double()
    repair(model, kept, windows, batch_size=4)
    x, columns = inputs[0], kept[GROUPS][index].repeat_interleave(outer.in_features // 4)
    mean, bias = x.mean(0), outer.bias
    if bias is not None:  # takes over the mean
        x = x - mean
    gram = x[:, columns].T @ x[:, columns]
    gram += RIDGE * gram.diagonal().diag()
    missing = x[:, ~columns] @ whole[:, ~columns].T.double()
    solution = whole[:, columns].double() + torch.linalg.solve(gram, x[:, columns].T @ missing).T
    torch.testing.assert_close(outer.weight[:, columns].double(), solution, rtol=1e-3, atol=1e-4)
    if bias is not None:
        gained = whole.double() @ mean - solution @ mean[columns]
        torch.testing.assert_close(bias.double(), before + gained, rtol=1e-3, atol=1e-4)


def test_no_layer_is_run_to_learn_what_layers_are_given(windows):
    model = tiny_decoder("qwen2", **MIXED)
    decoder_of(model)  # whose check runs layers
    runs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    stream = LayerStream(model, windows, batch_size=6)
    assert not runs
    stream.advance()
    assert len(runs) == 1
    masks = [options["attention_mask"] for _, _, given in stream for options in given]
    assert masks[0] is masks[2] and masks[1] is masks[3] and masks[0] is not masks[1]

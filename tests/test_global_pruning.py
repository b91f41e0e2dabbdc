"""H-GSP: the budget, the correction by removal perplexities, protection, steps, repair, and the command line."""

import pytest
import torch
from conftest import tiny_decoder

from compression.calibration import removal_perplexities, score_structures
from compression.evaluation.perplexity import perplexity
from compression.global_pruning import CalibrationText, GlobalPruning, PruningFields, masked
from compression.runtime import UserError
from compression.structures import HEADS, KINDS, NEURONS, layers_of
from compression.surgery import shrink_decoder


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(3, 120, (12, 16), generator=torch.Generator().manual_seed(4))
    return CalibrationText(scores=ids[:4], repair=ids, held_out=ids[4:8], batch_size=2)


def config(**fields):
    return PruningFields(**dict(protect_first=0, protect_last=0, pruning_ratio=0.4) | fields)


def parameters(model):
    return sum(parts.count(kind) * parts.structure_parameters(kind) for parts in layers_of(model) for kind in KINDS)


def largest(model):
    return max(parts.structure_parameters(kind) for parts in layers_of(model) for kind in KINDS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("seed", range(5))
def test_budget_is_met_to_within_one_structure(text, family, seed):
    draw = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    model = tiny_decoder(family)
    total, one = parameters(model), largest(model)
    settings = config(
        pruning_ratio=0.1 + 0.7 * draw[0], epsilon=draw[1], iterative_steps=1 + int(3 * draw[2]),
        importance_method=("fisher", "taylor", "wanda", "magnitude", "taylor_2nd")[seed],
        compensation=("none", "lstsq")[seed % 2],
    )  # fmt: skip
    small = GlobalPruning(model, settings, text).prune()
    removed = total - parameters(small)
    assert 0 <= removed - settings.pruning_ratio * total < one
    assert all(parts.query_heads == 2 * parts.heads for parts in layers_of(small))


def test_formula_of_the_paper(text):
    model = tiny_decoder()
    removal = removal_perplexities(model, text.held_out)
    scores = score_structures(model, text.scores, "taylor", text.batch_size)
    tau = sorted(removal["layer"])[1]  # one layer of four lies under it
    settings = PruningFields.preset("paper")
    settings.tau, settings.temperature = tau, 1.5
    pruning = GlobalPruning(model, settings, text, removal)
    densities = pruning._densities(scores)
    for layer, parts in enumerate(layers_of(model)):
        for kind, block in ((HEADS, "attention"), (NEURONS, "mlp")):
            value = removal["layer"][layer] if removal["layer"][layer] < tau else removal[block][layer]
            expected = scores[kind][layer] / parts.structure_parameters(kind) * torch.tensor(value).log1p() ** 1.5
            torch.testing.assert_close(densities[kind][layer], expected)


def test_no_temperature_is_the_plain_score(text):
    model = tiny_decoder()
    scores = score_structures(model, text.scores, "taylor", text.batch_size)
    densities = GlobalPruning(model, config(importance_method="taylor"), text)._densities(scores)
    parts = layers_of(model)[2]
    torch.testing.assert_close(densities[HEADS][2], scores[HEADS][2] / parts.structure_parameters(HEADS))


def test_normalized_scores_make_layers_share_the_budget(text):
    sizes = {}
    for normalize in ("none", "layer"):
        model = tiny_decoder()
        with torch.no_grad():
            layers_of(model)[1].down.weight.mul_(0.01)  # by magnitude, all that is cheap is here
        settings = config(importance_method="magnitude", normalize=normalize, pruning_ratio=0.2, epsilon=0.0)
        sizes[normalize] = [parts.neurons for parts in layers_of(GlobalPruning(model, settings, text).prune())]
    assert max(sizes["none"]) - min(sizes["none"]) > max(sizes["layer"]) - min(sizes["layer"])


def test_protected_layers_stay_as_they_are(text):
    model = tiny_decoder()
    small = GlobalPruning(model, config(protect_first=1, protect_last=1), text).prune()
    sizes = [(parts.heads, parts.neurons) for parts in layers_of(small)]
    assert sizes[0] == sizes[-1] == (4, 48) and len(sizes) <= 4
    with pytest.raises(UserError, match="--pruning_ratio 0.6: with 1 and 1 protected layers at most 0.500 can go"):
        GlobalPruning(tiny_decoder(), config(pruning_ratio=0.6, protect_first=1, protect_last=1), text)


def test_masked_model_is_the_smaller_one(text):
    model = tiny_decoder("qwen3")
    settings = config(pruning_ratio=0.5, attention_factors=(1.0,))
    pruning = GlobalPruning(model, settings, text)
    kept = pruning._choose(1, 0.5)
    with masked(model, kept):
        expected = perplexity(model, text.held_out)
    assert expected != pytest.approx(perplexity(model, text.held_out)), "the mask came off"
    assert perplexity(shrink_decoder(model, kept), text.held_out) == pytest.approx(expected, rel=1e-4)


def test_factor_of_least_perplexity_is_taken(text, monkeypatch):
    model = tiny_decoder()
    pruning = GlobalPruning(model, config(attention_factors=(0.001, 1.0, 1000.0)), text)
    answers = iter([30.0, 20.0, 10.0])
    monkeypatch.setattr("compression.global_pruning.perplexity", lambda *_: next(answers))
    kept = pruning._choose(1, 0.4)
    assert all(mask.all() for mask in kept[HEADS]), "with the largest factor no attention goes"


def test_table_says_what_went_when(text):
    model = tiny_decoder()
    total = parameters(model)
    pruning = GlobalPruning(model, config(iterative_steps=2, pruning_ratio=0.5), text)
    small = pruning.prune()
    rows = list(pruning.table.values())
    assert len(rows) == 4 * (4 + 48)
    gone = sum(row["parameters"] for row in rows if row["removed_in_step"])
    assert total - gone == parameters(small)
    assert {row["removed_in_step"] for row in rows} == {None, 1, 2}
    for index, layer in enumerate(pruning.origin):
        left = [row for row in rows if row["layer"] == layer and row["removed_in_step"] is None]
        parts = layers_of(small)[index]
        assert [sum(row["kind"] == kind for row in left) for kind in KINDS] == [parts.heads, parts.neurons]


def test_what_is_kept_is_where_the_table_says(text):
    """Weights of the smaller model are those of the dense one at the places that the table names."""
    dense = tiny_decoder()
    pruning = GlobalPruning(tiny_decoder(), config(iterative_steps=3, pruning_ratio=0.6, epsilon=0.3), text)
    small = pruning.prune()
    for index, layer in enumerate(pruning.origin):
        places = pruning.places[NEURONS][index]
        if len(places):
            assert torch.equal(layers_of(small)[index].up.weight, layers_of(dense)[layer].up.weight[places])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pruning_ratio": 1.2}, "--pruning_ratio 1.2: allowed is 0 to 0.95"),
        ({"epsilon": -0.1}, "--epsilon -0.1: allowed is 0 to 1"),
        ({"temperature": -1}, "--temperature -1: allowed is 0 to 10"),
        ({"iterative_steps": 0}, "--iterative_steps 0: allowed is at least 1"),
        ({"attention_factors": ()}, "allowed are one or more above 0"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)

"""The loss behind scores: of the text's tokens, or of tokens drawn from the dense model's predictions."""

import copy
import json

import pytest
import torch
from conftest import pruning_flags, save_decoder, tiny_decoder
from scripts import run_killed, run_script

from compression.checkpoint import load_language_model
from compression.config import pick
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring
from compression.llm.gqa_pruning import Cuts, LayerwisePruning
from compression.llm.layerwise import LayerStream
from compression.llm.score_passes import draw_labels, score_layer, score_structures
from compression.llm.text import CalibrationText
from compression.runtime import UserError
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of
from gqa_aware_pruning import GQAAwarePruningConfig
from run_global_pruning import GlobalPruningConfig

GRADIENTS = ["fisher", "obs", "taylor"]


def token_ids(count, length=12, seed=2):
    return torch.randint(3, 120, (count, length), generator=torch.Generator().manual_seed(seed))


def same(found, expected, **tolerance):
    for kind in DECODER_KINDS:
        for one, other in zip(found[kind], expected[kind], strict=True):
            torch.testing.assert_close(one, other, **tolerance)


@torch.no_grad()
def test_labels_are_drawn_from_the_models_predictions():
    """Of the same window very often: each place's tokens come as often as they are predicted."""
    model, draws = tiny_decoder(initializer_range=0.5), 4000
    windows = token_ids(1, 6).repeat(draws, 1)
    labels = draw_labels(model, windows, seed=3, batch_size=500)
    expected = model(windows[:1]).logits[0, :-1].softmax(-1)
    assert labels.shape == (draws, 5)
    for place in range(5):
        found = labels[:, place].bincount(minlength=120) / draws
        # Five standard errors of a share, and what a token in 4,000 amounts to.
        assert ((found - expected[place]).abs() <= 5 * (expected[place] / draws).sqrt() + 1 / draws).all()
    assert len({tuple(row) for row in labels[:50].tolist()}) > 10, "windows are drawn for independently"


def test_labels_depend_on_the_seed_and_not_on_the_batches(tmp_path):
    folder, windows = save_decoder(tmp_path / "model", tiny_decoder()), token_ids(5)
    model = tiny_decoder()
    labels = draw_labels(model, windows, seed=3)
    assert torch.equal(labels, draw_labels(model, windows, seed=3, batch_size=2))
    assert not torch.equal(labels, draw_labels(model, windows, seed=4))
    offloaded = load_language_model(folder, dtype=torch.float32, offload="disk")[0]
    assert torch.equal(labels, draw_labels(offloaded, windows, seed=3, batch_size=2))


@pytest.mark.parametrize("method", GRADIENTS)
def test_the_texts_own_tokens_as_labels_are_the_text(method):
    model, windows = tiny_decoder(), token_ids(4)
    found = score_structures(model, windows, method, 2, labels=windows[:, 1:])
    same(found, score_structures(model, windows, method, 2), rtol=0, atol=0)


@pytest.mark.parametrize("method", GRADIENTS)
def test_labels_count_wherever_scores_come_from(method, tmp_path):
    """In memory, layer by layer, and of one layer alone."""
    folder, windows = save_decoder(tmp_path / "model", tiny_decoder()), token_ids(5)
    model = tiny_decoder()
    labels = draw_labels(model, windows, seed=3)
    expected = score_structures(model, windows, method, 2, labels=labels)
    offloaded = load_language_model(folder, dtype=torch.float32, offload="disk")[0]
    same(score_structures(offloaded, windows, method, 2, labels=labels), expected, rtol=1e-4, atol=1e-7)
    for loaded in (model, offloaded):
        one = score_layer(loaded, 2, LayerStream(loaded, windows, 2, layer=2), method, labels=labels)
        same({kind: [one[kind]] for kind in one}, {kind: [expected[kind][2]] for kind in one}, rtol=1e-4, atol=1e-7)
    text = score_structures(model, windows, method, 2)
    assert not torch.allclose(text[CHANNELS][1], expected[CHANNELS][1], rtol=0.01)


def test_fisher_scores_of_drawn_tokens_are_the_divergences_curvature():
    """By finite differences of KL(dense || gated) in the gate of one channel or group at one token."""
    model, ids = tiny_decoder(initializer_range=0.3).double(), token_ids(1, 5)
    draws = 3000
    windows = ids.repeat(draws, 1)
    labels = draw_labels(model, windows, seed=1, batch_size=500)
    # All draws of one window as one batch: the mean over tokens is the mean over draws and over places.
    found = score_structures(model, windows, "fisher", 500, labels=labels)
    with torch.no_grad():
        dense = model(ids).logits[0, :-1].log_softmax(-1)

        def divergence(outer, size, index, place, gate):
            def scale(_, given):
                changed = given[0].clone()
                changed[:, place, index * size : (index + 1) * size] *= gate
                return changed

            with outer.register_forward_pre_hook(scale):
                pruned = model(ids).logits[0, :-1].log_softmax(-1)
            return (dense.exp() * (dense - pruned)).sum().item()

        step = 1e-3
        for kind, layer, index in ((GROUPS, 1, 2), (CHANNELS, 2, 5), (CHANNELS, 3, 40)):
            parts = layers_of(model)[layer]
            outer, size = parts.split(kind)[1], parts.split(kind)[1].in_features // parts.count(kind)
            curvature = sum(
                (divergence(outer, size, index, place, 1 + step) + divergence(outer, size, index, place, 1 - step))
                / step**2
                for place in range(5)
            )
            assert found[kind][layer][index].item() == pytest.approx(curvature / 5, rel=0.15), (kind, layer)


def pruned_globally(model, text, cached, **fields):
    settings = GlobalPruningConfig.make(pruning_ratio=0.5, round_to=1, iterative_steps=2, **fields)
    pruning = GlobalPruning(model, pick(Scoring, settings), pick(Budget, settings), text, cached=cached)
    return pruning.prune()


def pruned_by_layers(model, text, cached, **fields):
    settings = GQAAwarePruningConfig.make(round_to=1, iterative_steps=2, **fields)
    return LayerwisePruning(model, [0.3] * 4, pick(Cuts, settings), text, cached).prune()


@pytest.mark.parametrize("prune", [pruned_globally, pruned_by_layers])
def test_later_steps_are_measured_against_the_dense_models_predictions(prune, monkeypatch):
    """What is drawn from the dense model is drawn once, and every score is of these tokens."""
    ids, seen, kept = token_ids(8, 16), [], {}

    def watching(score):
        def watched(*given, **more):
            seen.append(more.get("labels", given[-1]))
            return score(*given, **more)

        return watched

    monkeypatch.setattr("compression.llm.global_pruning.score_structures", watching(score_structures))
    monkeypatch.setattr("compression.llm.gqa_pruning.score_layer", watching(score_layer))
    dense = tiny_decoder()
    text = CalibrationText(ids, ids, ids, 2, seed=7)
    prune(copy.deepcopy(dense), text, lambda name, make: kept.setdefault(name, make()), importance_method="fisher")
    expected = draw_labels(dense, ids, seed=7)
    assert len(seen) > 1 and all(torch.equal(labels, expected) for labels in seen)
    assert torch.equal(kept["labels"]["labels"], expected)
    seen.clear()
    prune(dense, text, lambda _, make: make(), importance_method="fisher", score_loss="text")
    assert len(seen) > 1 and all(labels is None for labels in seen)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("config", [GlobalPruningConfig, GQAAwarePruningConfig])
def test_scores_without_a_loss_have_none_to_choose(config, method):
    with pytest.raises(UserError, match=f"--score_loss kl: {method} looks at no loss; allowed are auto and text"):
        config.make(importance_method=method, score_loss="kl")


def words(base, output, *flags):
    return ["run_global_pruning.py", *pruning_flags(base, output), "--output_name", "one", "--round_to", "8", *flags]


def test_a_killed_run_has_the_same_labels(base, tmp_path):
    flags = ["--pruning_ratio", "0.5", "--score_loss", "kl"]
    run_script(*words(base, tmp_path / "whole", *flags))
    killed = words(base, tmp_path / "killed", *flags, "--resume")
    run_killed(*killed, at="compression.llm.global_pruning.score_structures")
    run_script(*killed)
    name = "one/models/model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_loss_decides_and_results_of_the_other_stay(base, tmp_path):
    weights = {}
    for loss in ("text", "kl"):
        flags = ["--pruning_ratio", "0.5", "--score_loss", loss]
        result = run_script(*words(base, tmp_path, *flags), expect=2 if weights else 0)
        if weights:
            assert "other settings" in result.stderr and "--overwrite" in result.stderr
            run_script(*words(base, tmp_path, *flags, "--overwrite"))
        weights[loss] = (tmp_path / "one" / "models" / "model.safetensors").read_bytes()
        record = json.loads((tmp_path / "one" / "run.json").read_text())
        assert record["config"]["score_loss"] == loss
    assert weights["text"] != weights["kl"]

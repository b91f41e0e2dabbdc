"""What is not finite stops a run of the language-model track in one line that says where it began."""

import math

import pytest
import torch
from conftest import everything, repair, tiny_decoder

from compression.config import pick
from compression.decoder import Decoder
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring
from compression.llm.layerwise import LayerStream
from compression.llm.perplexity import exp_of_mean, perplexity
from compression.llm.removal import removal_perplexities
from compression.llm.score_passes import score_layer, score_structures
from compression.llm.scoring import SCORES
from compression.llm.text import CalibrationText
from compression.runtime import UserError
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of
from compression.surgery import shrink_decoder
from run_global_pruning import GlobalPruningConfig

WEIGHT = r"models/broken has values that are not finite in model\.layers\.2\.mlp\.down_proj\.weight"


@pytest.fixture
def windows():
    return torch.randint(3, 120, (4, 12), generator=torch.Generator().manual_seed(6))


@pytest.fixture
def broken():
    model = tiny_decoder()
    model.config.name_or_path = model.name_or_path = "models/broken"
    with torch.no_grad():
        layers_of(model)[2].down.weight[3, 5] = torch.nan
    return model


def one_line(error):
    assert "\n" not in str(error.value)


def test_perplexity_names_the_window(broken, windows):
    with pytest.raises(UserError, match=f"perplexity: the loss of window 0 is not finite; {WEIGHT}") as error:
        perplexity(broken, windows, batch_size=2)
    one_line(error)
    sound = tiny_decoder()
    with torch.no_grad():
        sound.model.embed_tokens.weight[7] = torch.inf
        sound.lm_head.weight = torch.nn.Parameter(torch.randn(120, 32))
    windows[windows == 7] = 8
    windows[3, 2] = 7
    with pytest.raises(UserError, match="perplexity: the loss of window 3 is not finite; .*embed_tokens"):
        perplexity(sound, windows, batch_size=2)


def test_a_large_loss_is_a_large_perplexity():
    model = tiny_decoder()
    assert exp_of_mean(model, 3000.0, 10, "the model") == pytest.approx(math.exp(300))
    with pytest.raises(UserError, match="perplexity of the model: the mean loss is 800; the weights of .* are finite"):
        exp_of_mean(model, 8000.0, 10, "the model")


@pytest.mark.parametrize("method", [name for name, score in SCORES.items() if score.loss])
def test_methods_with_a_loss_name_its_window(broken, windows, method):
    with pytest.raises(UserError, match=f"calibration: the loss of window 0 is not finite; {WEIGHT}") as error:
        score_structures(broken, windows, method)
    one_line(error)


@pytest.mark.parametrize("method", [name for name, score in SCORES.items() if not score.loss])
def test_methods_without_a_loss_name_layer_and_kind(broken, windows, method):
    line = f"--importance_method {method}: scores of the channels of layer 2 are not finite; {WEIGHT}"
    with pytest.raises(UserError, match=line) as error:
        score_layer(broken, 2, LayerStream(broken, windows, layer=2), method)
    one_line(error)
    with pytest.raises(UserError, match=f"--importance_method {method}: scores of the .* are not finite; {WEIGHT}"):
        text = CalibrationText(windows, windows, windows)
        config = GlobalPruningConfig.make(importance_method=method)
        GlobalPruning(broken, pick(Scoring, config), pick(Budget, config), text).prune()


def test_removal_analysis_names_the_part(broken, windows):
    with pytest.raises(UserError, match=f"perplexity of the dense model: the mean loss is nan; {WEIGHT}"):
        removal_perplexities(broken, windows)


def test_removal_analysis_names_what_the_model_cannot_do_without(windows, monkeypatch):
    monkeypatch.setattr(Decoder, "constant", lambda _, layer, kind: torch.nan if layer is third else 0.0)
    model = tiny_decoder("qwen3")
    third = model.model.layers[2]
    with pytest.raises(UserError, match="perplexity of the model without layer 2: the mean loss is nan; the weights"):
        removal_perplexities(model, windows)
    with pytest.raises(UserError, match="perplexity of the model without the mlp of layer 2: the mean loss is nan"):
        removal_perplexities(model, windows, parts=("mlp",))


def test_repair_names_the_layer(broken, windows):
    kept = everything(broken)
    kept[CHANNELS][2] = torch.arange(48) < 40
    line = f"--compensation lstsq: what repairs the channels of layer 2 is not finite; {WEIGHT}"
    with pytest.raises(UserError, match=line) as error:
        repair(broken, kept, windows)
    one_line(error)


@torch.no_grad()
def test_a_part_that_nothing_comes_into_is_no_error(windows):
    """Its Gram matrix is zero: there is nothing to fit, and nothing is lost."""
    model = tiny_decoder()
    for linear in (rows[-1].module for rows in (layers_of(model)[1].attention, layers_of(model)[1].ffn)):
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.zero_()
    expected = model(windows).logits
    kept = everything(model)
    kept[GROUPS][1], kept[CHANNELS][1] = torch.tensor([1, 0, 1, 0]).bool(), torch.arange(48) < 9
    repair(model, kept, windows)
    with torch.enable_grad():
        scores = score_structures(model, windows, "obs")
    assert max(scores[kind][1].max() for kind in DECODER_KINDS) < 1e-20
    torch.testing.assert_close(shrink_decoder(model, kept)(windows).logits, expected, atol=1e-5, rtol=0)

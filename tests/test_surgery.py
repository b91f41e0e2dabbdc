"""Masks, the physically smaller model, and the checkpoint it travels in."""

import pytest
import torch
from conftest import KEPT
from safetensors.torch import save_file
from scripts import run_elsewhere
from transformers import GPT2Config, GPT2ForSequenceClassification

from compression.checkpoint import load_classifier, save_checkpoint
from compression.classifier.masks import add_masks, remove_masks
from compression.runtime import UserError
from compression.structures import HEADS, NEURONS, layers_of
from compression.surgery import shrink


def mask(model, kept=KEPT):
    masked = add_masks(model)
    for kind, layers in masked.items():
        for index, layer in layers.items():
            layer.keep(kept[kind][index])
    return masked


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_masked_logits_equal_those_of_the_smaller_model(tiny_model, batch):
    dense = logits(tiny_model, batch)
    mask(tiny_model)
    masked = logits(tiny_model, batch)
    assert (masked - dense).abs().max() > 1e-3
    remove_masks(tiny_model)
    small = shrink(tiny_model, KEPT)
    torch.testing.assert_close(logits(small, batch), masked, atol=1e-5, rtol=0)


def test_smaller_model_has_smaller_layers(tiny_model):
    small = shrink(tiny_model, KEPT)
    assert [layer.heads for layer in layers_of(small)] == [4, 2, 1]
    assert [layer.neurons for layer in layers_of(small)] == [24, 8, 48]
    layer = layers_of(small)[1]
    assert layer.attention[0].module.weight.shape == (16, 32) and layer.o.weight.shape == (32, 16)
    assert layer.ffn[-1].module.weight.shape == (8, 32) and layer.down.weight.shape == (32, 8)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in tiny_model.parameters())
    assert layers_of(tiny_model)[1].heads == 4, "the dense model was changed"


def test_pruning_a_pruned_model_again(tiny_model, batch):
    small = shrink(tiny_model, KEPT)
    again = {
        HEADS: [torch.tensor([1, 0, 1, 1]).bool(), torch.tensor([1, 0]).bool(), torch.tensor([True])],
        NEURONS: [torch.arange(24) < 16, torch.ones(8, dtype=torch.bool), torch.arange(48) >= 8],
    }
    smaller = shrink(small, again)
    masked = mask(small, again)
    assert [len(layer.kept) for layer in masked[HEADS].values()] == [4, 2, 1]
    torch.testing.assert_close(logits(smaller, batch), logits(small, batch), atol=1e-5, rtol=0)


def test_gradient_reaches_pruned_columns_until_frozen(tiny_model, batch):
    masked = mask(tiny_model)
    tiny_model(**batch, labels=torch.tensor([0, 1, 0, 1, 1])).loss.backward()
    layer = masked[NEURONS][1]
    assert layer.weight.grad[:, 8:].abs().max() > 0, "a pruned neuron could never come back"
    layer.freeze_pruned()
    assert layer.weight.grad[:, 8:].abs().max() == 0
    assert layer.weight.grad[:, :8].abs().max() > 0


def test_unsupported_architecture_names_the_supported_ones(batch):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, pad_token_id=0)
    with pytest.raises(UserError, match="'gpt2' is not supported here; supported: bert, camembert, deberta-v2"):
        add_masks(GPT2ForSequenceClassification(config))


def test_some_layers_attention_has_to_stay(tiny_model):
    for count in (4, 0):  # taken out now, or before
        kept = KEPT | {HEADS: [torch.zeros(count).bool()] * 3}
        with pytest.raises(UserError, match="nothing is left of any layer's attention: choose a lower pruning ratio"):
            shrink(tiny_model, kept)


def test_checkpoint_loads_elsewhere_with_the_same_logits(tiny_model, batch, tokenizer, tmp_path):
    small = shrink(tiny_model, KEPT)
    folder = save_checkpoint(tmp_path / "small", small, tokenizer, {"stage": "pruned"})
    expected = logits(small, batch)

    inside, _ = load_classifier(folder)
    torch.testing.assert_close(logits(inside, batch), expected, atol=0, rtol=0)

    save_file(batch | {"logits": expected}, tmp_path / "expected.safetensors")
    program = (
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        f"folder = {str(folder)!r}\n"
        "assert AutoTokenizer.from_pretrained(folder)('a')['input_ids'] == [2, 5, 3]\n"
        "model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()\n"
        f"saved = load_file({str(tmp_path / 'expected.safetensors')!r})\n"
        "logits = saved.pop('logits')\n"
        "difference = (model(**saved).logits - logits).abs().max().item()\n"
        "print('difference', difference)\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = run_elsewhere(program, elsewhere).check()
    assert float(result.stdout.split()[-1]) < 1e-6


def test_checkpoint_holds_exactly_these_files(tiny_model, tokenizer, tmp_path):
    small = shrink(tiny_model, KEPT)
    folder = save_checkpoint(tmp_path / "small", small, tokenizer, {"stage": "pruned"}, {"history.json": []})
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "stage.json",
        "history.json",
        "pruned_encoder.py",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "a temporary folder was left"

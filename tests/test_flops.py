"""MACs and parameters: counter against closed formula and against sums done by hand."""

import pytest
import torch
from conftest import HEAD_SIZE, HEADS, HIDDEN, LAYERS, NEURONS
from torch import nn

from compression.flops import count_macs, count_parameters, count_thop, encoder_macs_formula
from compression.formats import EightBit
from compression.quantization import Format, pack
from compression.runtime import UserError
from compression.structures import HEADS as HEAD_KIND
from compression.structures import NEURONS as NEURON_KIND
from compression.structures import layers_of
from compression.surgery import shrink

LENGTH = 16
KEPT_HEADS, KEPT_NEURONS = (4, 2, 1), (24, 8, 48)


@pytest.fixture
def pruned_model(tiny_model):
    return shrink(
        tiny_model,
        {
            HEAD_KIND: [torch.arange(HEADS) < kept for kept in KEPT_HEADS],
            NEURON_KIND: [torch.arange(NEURONS) < kept for kept in KEPT_NEURONS],
        },
    )


@pytest.mark.parametrize("length", [1, 7, 16])
def test_formula_equals_counter(tiny_model, pruned_model, length):
    for model in (tiny_model, pruned_model):
        assert encoder_macs_formula(layers_of(model), length) == count_macs(model, length).encoder
    assert count_macs(pruned_model, length).encoder < count_macs(tiny_model, length).encoder


def test_parts_of_a_dense_model(tiny_model):
    macs = count_macs(tiny_model, LENGTH)
    assert macs.linear == LENGTH * LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * NEURONS)
    assert macs.attention == 2 * LENGTH * LENGTH * LAYERS * HEADS * HEAD_SIZE
    # Both families put one hidden layer and two logits on the first token.
    assert macs.classifier == HIDDEN * HIDDEN + 2 * HIDDEN
    assert macs.total == macs.linear + macs.attention + macs.classifier
    assert macs.gflops == 2 * macs.total / 1e9
    assert macs.as_dict()["sequence_length"] == LENGTH and macs.as_dict()["total"] == macs.total


def test_parts_of_a_pruned_model(pruned_model):
    macs = count_macs(pruned_model, LENGTH)
    width = sum(KEPT_HEADS) * HEAD_SIZE
    assert macs.attention == 2 * LENGTH * LENGTH * width
    assert macs.linear == LENGTH * HIDDEN * (4 * width + 2 * sum(KEPT_NEURONS))


def test_a_batch_costs_as_much_as_its_sequences(tiny_model):
    one, three = count_macs(tiny_model, LENGTH), count_macs(tiny_model, LENGTH, batch_size=3)
    assert (three.linear, three.attention, three.classifier) == (3 * one.linear, 3 * one.attention, 3 * one.classifier)


def test_model_is_left_as_it_was(tiny_model):
    tiny_model.set_attn_implementation("sdpa")
    tiny_model.train()
    frozen = layers_of(tiny_model)[0].attention[0].module
    frozen.eval()
    modes = {name: module.training for name, module in tiny_model.named_modules()}
    count_macs(tiny_model, LENGTH)
    assert tiny_model.config._attn_implementation == "sdpa"
    assert {name: module.training for name, module in tiny_model.named_modules()} == modes
    assert tiny_model.training and not frozen.training


def test_model_is_left_as_it_was_by_a_failed_count(tiny_model, monkeypatch):
    tiny_model.set_attn_implementation("sdpa")
    tiny_model.train()
    monkeypatch.setattr(tiny_model, "forward", lambda **inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        count_macs(tiny_model, LENGTH)
    assert tiny_model.config._attn_implementation == "sdpa" and tiny_model.training


def test_more_tokens_than_positions_are_refused(tiny_model):
    with pytest.raises(UserError, match="sequence length 65: allowed is 1 to 64"):
        count_macs(tiny_model, 65)


def test_parameters_by_part(tiny_model, pruned_model):
    dense, pruned = count_parameters(tiny_model), count_parameters(pruned_model)
    for model, counts in ((tiny_model, dense), (pruned_model, pruned)):
        assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
        assert counts["total"] == counts["embeddings"] + counts["encoder"] + counts["head"]
        embeddings = sum(parameter.numel() for parameter in model.base_model.embeddings.parameters())
        assert counts["embeddings"] == embeddings
    layer = 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * NEURONS + NEURONS + HIDDEN + 2 * 2 * HIDDEN
    assert dense["encoder"] == LAYERS * layer
    assert dense["head"] == HIDDEN * HIDDEN + HIDDEN + 2 * HIDDEN + 2
    assert (pruned["embeddings"], pruned["head"]) == (dense["embeddings"], dense["head"])
    heads_gone = LAYERS * HEADS - sum(KEPT_HEADS)
    neurons_gone = LAYERS * NEURONS - sum(KEPT_NEURONS)
    removed = heads_gone * HEAD_SIZE * (4 * HIDDEN + 3) + neurons_gone * (2 * HIDDEN + 1)
    assert dense["encoder"] - pruned["encoder"] == removed


def test_tied_weights_count_once_and_packed_ones_by_shape():
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(10, 4), "lm_head": nn.Linear(4, 10, bias=False)})
    model["lm_head"].weight = model["embed_tokens"].weight
    assert count_parameters(model) == {"total": 40, "embeddings": 40, "encoder": 0, "head": 0}

    packed = nn.Linear(4, 10)
    packed.weight = nn.Parameter(torch.zeros(20, 1, dtype=torch.uint8), requires_grad=False)
    assert count_parameters(nn.ModuleDict({"classifier": packed}))["head"] == 50


@pytest.mark.parametrize("stored", [None, Format(), Format(EightBit())], ids=["fp32", "4 bits", "8 bits"])
@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_thop_counts_all_but_attentions_products_and_embedding_tables(kind, stored, tiny_model, pruned_model, capfd):
    model = {"dense": tiny_model, "pruned": pruned_model}[kind]
    tables = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    model = pack(model, stored, torch.float32) if stored else model
    thop, ours = count_thop(model, LENGTH), count_macs(model, LENGTH)
    attention = 2 * LENGTH**2 * sum(layer.heads * layer.head_size for layer in layers_of(model))
    assert ours.total == thop["macs"] + attention
    assert count_parameters(model)["total"] == thop["params"] + tables
    assert capfd.readouterr() == ("", "")


def test_thop_leaves_nothing_on_the_model(tiny_model):
    tiny_model.train()
    before = {name: weight.data_ptr() for name, weight in tiny_model.state_dict().items()}
    count_thop(tiny_model, LENGTH)
    assert {name: weight.data_ptr() for name, weight in tiny_model.state_dict().items()} == before
    assert tiny_model.training and not any(module._forward_hooks for module in tiny_model.modules())

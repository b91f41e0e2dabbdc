"""The sizes of published models, and the formulas of what they take."""

import pytest
import torch
from transformers import LlamaForCausalLM

from compression.decoder import decoder_of
from compression.llm import memory
from compression.llm.memory import SHAPES, Shape
from compression.llm.mlp_repair import _Linear
from compression.llm.repair_text import RepairText
from compression.structures import CHANNELS, GROUPS

# Parameters that the models' cards state, in billions.
PUBLISHED = {"Llama-3.2-1B": 1.24, "Llama-3-8B": 8.03, "Llama-3-70B": 70.6, "Llama-3.1-405B": 406}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_as_many_weights_as_the_published_models(name):
    shape = SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    weights = {id(weight): weight for weight in model.parameters()}.values()
    assert sum(weight.numel() for weight in weights if weight.dim() > 1) == shape.weights
    assert sum(weight.numel() for weight in weights) == pytest.approx(1e9 * PUBLISHED[name], rel=4e-3)
    adapted = [layer.weight.shape for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    assert memory.adapter_weights(shape, rank=4) == 4 * sum(rows + columns for rows, columns in adapted)


@pytest.mark.parametrize(("hidden", "intermediate", "groups"), [(256, 512, 2), (256, 1024, 8), (512, 768, 4)])
def test_a_layer_keeps_about_as_much_as_the_formula_says(hidden, intermediate, groups):
    shape, length = Shape(hidden, 1, 8, groups, intermediate, vocabulary=100), 64
    model = LlamaForCausalLM(shape.config()).to(torch.bfloat16).eval()
    decoder, kept = decoder_of(model), {}
    state, options = decoder.first_input(torch.zeros(1, length, dtype=torch.long))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder.layers[0](state.detach().requires_grad_(), **options[0])
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert memory.layer_activations(shape, length) == pytest.approx(found, rel=0.06)


@torch.no_grad()
def test_a_round_for_gates_and_ups_keeps_as_much_of_the_text_as_the_formula_says():
    shape, windows, length = Shape(64, 1, 4, 2, 96, vocabulary=100), 4, 32
    model = LlamaForCausalLM(shape.config()).to(torch.bfloat16).eval()
    text = RepairText(model, torch.randint(100, (windows, length)))
    targets = text.decoder.states()
    text.leave(GROUPS, changed=False)
    text.enter(CHANNELS, targets=targets)
    problem = _Linear(text, targets, torch.ones(shape.intermediate, dtype=torch.bool))
    kept = [targets, problem.inputs, problem.slopes, problem.residuals]
    found = sum(tensor.nbytes for states in kept for tensor in states._held.values())
    of_a_change = 2 * windows * length * shape.hidden  # while one is tried
    assert memory.rounds_states(shape, length, windows) == found + of_a_change


def test_rounds_take_more():
    for name in ("Llama-3.2-1B", "Llama-3-8B"):
        for peak in (memory.pruning_in_memory, memory.pruning_streamed):
            assert peak(SHAPES[name], rounds=True) > 1.2 * peak(SHAPES[name])


def test_a_streamed_run_takes_less_and_does_not_grow_with_depth():
    shallow, deep = (Shape(1024, layers, 16, 8, 4096) for layers in (8, 80))
    assert memory.pruning_streamed(deep) == memory.pruning_streamed(shallow) < memory.pruning_in_memory(shallow)
    assert memory.pruning_in_memory(deep) > 3 * memory.pruning_in_memory(shallow)


def test_more_devices_and_fewer_bits_take_less():
    shape = SHAPES["Llama-3-8B"]
    peaks = [memory.full_recovery(shape, devices) for devices in (1, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)
    assert memory.lora_recovery(shape, four_bits=True) < memory.lora_recovery(shape) < peaks[0]


def test_a_share_of_the_card_is_left_free():
    assert memory.fits(90, 100) and not memory.fits(91, 100)

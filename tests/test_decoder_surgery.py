"""Pruned language models: masked logits, the ratio of query to key-value heads, the cache, loading elsewhere."""

import copy
import json

import pytest
import torch
from conftest import DECODERS, MIXED, tiny_decoder
from safetensors.torch import save_file
from scripts import run_elsewhere
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from compression.llm.global_pruning import masked
from compression.modeling import add_modeling_code
from compression.runtime import UserError
from compression.structures import CHANNELS, GROUPS, layers_of
from compression.surgery import shrink_decoder, to_stock

# Layer 1 loses its attention, layer 2 its MLP, layer 3 both.
KEPT = {
    GROUPS: [torch.tensor(row).bool() for row in ([1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0])],
    CHANNELS: [torch.arange(48) % 2 == 0, torch.arange(48) < 8, torch.zeros(48).bool(), torch.zeros(48).bool()],
}
SAME = {GROUPS: [torch.tensor([1, 0, 0, 1]).bool()] * 4, CHANNELS: [torch.arange(48) < 40] * 4}


@pytest.fixture(params=sorted(DECODERS))
def model(request):
    return tiny_decoder(request.param)


@pytest.fixture
def ids():
    return torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def masked_logits(model, kept, ids):
    """Logits with the outputs of pruned structures zeroed; the model is left as it is."""
    masked = copy.deepcopy(model)
    for index, parts in enumerate(layers_of(masked)):
        for kind, masks in kept.items():
            outer = parts.split(kind)[1]
            outer.weight.mul_(masks[index].repeat_interleave(outer.in_features // len(masks[index])))
    return masked(ids).logits


@torch.no_grad()
def test_smaller_model_computes_what_the_masked_one_does(model, ids):
    dense, expected = model(ids).logits, masked_logits(model, KEPT, ids)
    assert (dense - expected).abs().max() > 1e-3
    small = shrink_decoder(model, KEPT)
    torch.testing.assert_close(small(ids).logits, expected, atol=1e-5, rtol=0)
    sizes = [(parts.query_heads, parts.groups, parts.channels) for parts in layers_of(small)]
    assert sizes[:3] == [(6, 3, 24), (0, 0, 8), (4, 2, 0)], (
        "two query heads for each key-value head, as in the dense model"
    )
    assert sizes[3:] == [(0, 0, 0)] * (model.config.model_type == "llama"), "a layer is left as its bias or not at all"
    eager = copy.deepcopy(small)
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(eager(ids).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pruning_a_pruned_model_again(model, ids):
    small = shrink_decoder(model, KEPT)
    again = {
        GROUPS: [torch.tensor([1, 0, 1]).bool(), torch.zeros(0).bool(), torch.tensor([0, 1]).bool()],
        CHANNELS: [torch.arange(24) < 16, torch.arange(8) % 2 == 0, torch.zeros(0).bool()],
    }
    for masks in again.values():  # a layer that is left as its biases
        masks.extend([torch.zeros(0).bool()] * (len(layers_of(small)) - 3))
    masked = copy.deepcopy(small)
    for index, parts in enumerate(layers_of(masked)):
        for kind in (GROUPS, CHANNELS):
            if parts.count(kind):
                outer = parts.split(kind)[1]
                outer.weight.mul_(again[kind][index].repeat_interleave(outer.in_features // len(again[kind][index])))
    expected = masked(ids).logits
    torch.testing.assert_close(shrink_decoder(small, again)(ids).logits, expected, atol=1e-5, rtol=0)


def test_generation_with_the_cache_gives_the_same_tokens(model, ids):
    kept = KEPT | {GROUPS: [torch.zeros(4).bool(), *KEPT[GROUPS][:1], *KEPT[GROUPS][2:]]}
    small = shrink_decoder(model, kept)
    tokens = [
        small.generate(ids, max_new_tokens=16, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert tokens[0].shape == (2, 25) and torch.equal(*tokens), "the first layer has no attention"


def save_elsewhere(model, folder):
    """Save a model as small/ with its modeling file."""
    (folder / "small").mkdir()
    add_modeling_code(model, folder / "small")
    model.save_pretrained(folder / "small")


@torch.no_grad()
def difference_elsewhere(model, ids, folder):
    """How far a new process that loads small/ outside the project is from the model's logits."""
    save_file({"ids": ids, "logits": model(ids).logits}, folder / "expected.safetensors")
    program = (
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('small', trust_remote_code=True).eval()\n"
        "saved = load_file('expected.safetensors')\n"
        "print((model(saved['ids']).logits - saved['logits']).abs().max().item())\n"
    )
    return float(run_elsewhere(program, folder).check().stdout.split()[-1])


@torch.no_grad()
def test_checkpoint_loads_here_and_elsewhere(model, ids, tmp_path):
    small = shrink_decoder(model, KEPT)
    expected = small(ids).logits
    save_elsewhere(small, tmp_path)
    inside = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(inside) is type(small)
    torch.testing.assert_close(inside(ids).logits, expected, atol=0, rtol=0)
    assert difference_elsewhere(small, ids, tmp_path) < 1e-6


LAYOUTS = {
    "llama": ("llama", dict(attention_bias=False, tie_word_embeddings=False)),
    "llama, tied": ("llama", dict(attention_bias=False, mlp_bias=True)),
    "llama, biases": ("llama", dict(mlp_bias=True, tie_word_embeddings=False)),
    "llama, wide heads": ("llama", dict(mlp_bias=True, head_dim=16)),
    "mistral, window": ("mistral", dict(sliding_window=4)),
    "mistral, tied, wide heads": ("mistral", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen2, mixed": ("qwen2", MIXED),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3, mixed, biases": ("qwen3", MIXED | dict(attention_bias=True)),
    "qwen3, mixed, tied, wide heads": ("qwen3", MIXED | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3, biases": ("qwen3", dict(attention_bias=True)),
}


@torch.no_grad()
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_masked_smaller_and_saved_model_of_every_layout_compute_the_same(layout, ids, tmp_path):
    """Also where whole parts and layers go whose output projections have biases."""
    family, fields = LAYOUTS[layout]
    model = tiny_decoder(family, **fields)
    with masked(model, KEPT):
        expected = model(ids).logits
    small = shrink_decoder(model, KEPT)
    torch.testing.assert_close(small(ids).logits, expected, atol=1e-5, rtol=0)
    small.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    torch.testing.assert_close(loaded(ids).logits, small(ids).logits, atol=0, rtol=0)
    assert not any(report.values())


@torch.no_grad()
def test_biases_of_removed_parts_stay_elsewhere(ids, tmp_path):
    small = shrink_decoder(tiny_decoder("llama", mlp_bias=True), KEPT)
    kept = [name for name, _ in small.named_parameters() if name.endswith(("self_attn.bias", "mlp.bias"))]
    assert kept == [f"model.layers.{place}.bias" for place in ("1.self_attn", "2.mlp", "3.self_attn", "3.mlp")]
    save_elsewhere(small, tmp_path)
    assert difference_elsewhere(small, ids, tmp_path) < 1e-6


def test_uniform_model_is_one_of_the_stock_class(model, ids, tmp_path):
    stock_class = type(model)
    small = shrink_decoder(model, SAME)
    expected = small(ids).logits
    to_stock(small).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    loaded = stock_class.from_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is stock_class
    torch.testing.assert_close(loaded(ids).logits, expected, atol=0, rtol=0)


def test_what_the_stock_class_cannot_hold_is_refused():
    with pytest.raises(UserError, match="layers of different sizes"):
        to_stock(shrink_decoder(tiny_decoder("llama"), KEPT))
    three = {GROUPS: [torch.tensor([1, 1, 0, 1]).bool()] * 4, CHANNELS: SAME[CHANNELS]}
    with pytest.raises(UserError, match="stock llama class refuses.*multiple of the number of attention heads"):
        to_stock(shrink_decoder(tiny_decoder("llama"), three))


def test_nothing_to_attend_with_is_refused():
    nothing = {GROUPS: [torch.zeros(4).bool()] * 4, CHANNELS: SAME[CHANNELS]}
    with pytest.raises(UserError, match="nothing is left of any layer's attention"):
        shrink_decoder(tiny_decoder("llama"), nothing)


def test_unsupported_architecture_is_refused_by_name():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)
    with pytest.raises(UserError, match="'gpt2' is not supported here; supported: gemma2, gemma3_text"):
        shrink_decoder(GPT2LMHeadModel(config), SAME)


def test_tied_embeddings_stay_tied(tmp_path):
    small = shrink_decoder(tiny_decoder("llama"), KEPT)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

"""Pruned language models meet the contract of vLLM's Transformers modeling backend; vllm_backend.py plays its part."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MIXED, save_decoder, tiny_decoder
from safetensors.torch import load_file, save_file
from scripts import run_elsewhere

from compression.structures import CHANNELS, GROUPS, layers_of
from compression.surgery import shrink_decoder

BACKEND = (Path(__file__).parent / "vllm_backend.py").read_text(encoding="utf-8")
# Groups and channels of layers of different widths; the third has no MLP, the last goes altogether.
SIZES = ((4, 24), (1, 8), (2, 0), (0, 0))
# Where projections have biases, these would stay of the last.
BIASED = (*SIZES[:3], (3, 0))
WITHOUT_ATTENTION = ((4, 24), (0, 8), (2, 0), (3, 48))
CASES = {
    "llama": ("llama", dict(attention_bias=False, tie_word_embeddings=False), SIZES),
    "llama, tied, biases": ("llama", dict(mlp_bias=True), BIASED),
    "mistral, window": ("mistral", dict(sliding_window=4), SIZES),
    "mistral, tied, wide heads": ("mistral", dict(tie_word_embeddings=True, head_dim=16), SIZES),
    "qwen2, mixed": ("qwen2", MIXED, SIZES),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True), SIZES),
    "qwen3, mixed, biases": ("qwen3", MIXED | dict(attention_bias=True), BIASED),
    "qwen3, tied": ("qwen3", dict(tie_word_embeddings=True), SIZES),
}


def pruned(family, fields, sizes):
    kept = {
        kind: [torch.arange(count) >= count - size[place] for size in sizes]
        for place, (kind, count) in enumerate(((GROUPS, 4), (CHANNELS, 48)))
    }
    return shrink_decoder(tiny_decoder(family, **fields), kept)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_vllms_part_gives_the_models_logits(case, tmp_path):
    model = pruned(*CASES[case])
    assert [parts.groups for parts in layers_of(model)][:3] == [4, 1, 2]
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    save_decoder(tmp_path / "model", model)
    save_file({"ids": ids}, tmp_path / "text.safetensors")
    run_elsewhere(BACKEND, tmp_path).check()
    for how, logits in load_file(tmp_path / "logits.safetensors").items():
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5, msg=how)


def test_layers_without_attention_are_refused_there(tmp_path):
    save_decoder(tmp_path / "model", pruned("qwen2", {}, WITHOUT_ATTENTION))
    save_file({"ids": torch.full((1, 9), 5)}, tmp_path / "text.safetensors")
    result = run_elsewhere(BACKEND, tmp_path).check(1)
    assert result.stderr.splitlines()[-1].startswith("ValueError: Layer 1 does not dispatch")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_the_checkpoint_says(family, tmp_path):
    model = pruned(family, {}, SIZES)
    config = json.loads((save_decoder(tmp_path / "model", model) / "config.json").read_text())
    stem = f"pruned_decoder.Pruned{family.capitalize()}"
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    assert config["auto_map"] == {auto: stem + ending for auto, ending in names.items()}
    assert config["architectures"] == [f"Pruned{family.capitalize()}ForCausalLM"], "by its ending, a language model"
    assert config["head_dim"] == layers_of(model)[0].head_size
    for index, parts in enumerate(layers_of(model)):
        layer, attention = model.config.per_layer_config[index], model.model.layers[index].self_attn
        if parts.groups:
            assert (layer.num_attention_heads, layer.num_key_value_heads) == (parts.query_heads, parts.groups)
            assert (attention.layer_idx, attention.is_causal, attention.num_key_value_groups) == (index, True, 2)
            assert attention.scaling == parts.head_size**-0.5


@torch.no_grad()
def test_the_base_model_compiles_to_one_graph():
    model = pruned("llama", dict(attention_bias=False), SIZES).model
    inputs = dict(input_ids=torch.arange(5, 14)[None], position_ids=torch.arange(9)[None])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    (states,) = compiled(**inputs, use_cache=False, return_dict=False)
    torch.testing.assert_close(states, model(**inputs).last_hidden_state)

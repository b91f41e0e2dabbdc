"""The interface to a language model's parts, and what is refused because it computes something else."""

import json

import pytest
import torch
from conftest import DECODERS, MIXED, MORE_DECODERS, repair, tiny_decoder
from test_decoder_surgery import KEPT
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Glm4Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Phi3Config,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from compression import structures
from compression.config import pick
from compression.decoder import decoder_of
from compression.inputs import require_language_model
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring
from compression.llm.gqa_pruning import Cuts, LayerwisePruning, compute_gqa_group_importance
from compression.llm.perplexity import perplexity
from compression.llm.removal import removal_perplexities
from compression.llm.score_passes import score_structures
from compression.llm.text import CalibrationText
from compression.runtime import UserError
from compression.surgery import shrink_decoder
from gqa_aware_pruning import GQAAwarePruningConfig
from run_global_pruning import GlobalPruningConfig

SIZES = dict(
    hidden_size=32,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=48,
    num_hidden_layers=2,
    vocab_size=120,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    head_dim=4,
)
# Model type -> its configuration, and what is wrong with it where it is taken for LLaMA's layout.
OTHERS = {
    "glm4": (Glm4Config(**SIZES), "layer 0 has post_mlp_layernorm, post_self_attn_layernorm"),
    "gemma2": (Gemma2Config(**SIZES), "layer 0 has post_feedforward_layernorm, pre_feedforward_layernorm"),
    "olmo2": (Olmo2Config(**SIZES), "layer 0 has post_feedforward_layernorm and lacks input_layernorm"),
    "phi3": (Phi3Config(**SIZES), "layer 0 has resid_attn_dropout, resid_mlp_dropout"),
    "cohere": (CohereConfig(**SIZES), "layer 0 lacks post_attention_layernorm"),
    "granite": (GraniteConfig(**SIZES, residual_multiplier=0.5), "layer 0 computes something else than state"),
}


@pytest.fixture
def ids():
    return torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))


class ScaledLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, **options):
        return hidden_states + 1.01 * (super().forward(hidden_states, **options) - hidden_states)


class CappedLlama(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output


def with_more_norm(model):
    model.model.layers[1].post_feedforward_layernorm = nn.Identity()


def with_a_scaled_layer(model):
    model.model.layers[2].__class__ = ScaledLayer


def with_a_gain(model):
    model.model.layers[3].gain = nn.Parameter(torch.ones(32))


def with_a_cap(model):
    model.__class__ = CappedLlama


def with_a_step_behind_the_layers(model):
    model.model.layers[3].register_forward_hook(lambda layer, given, output: output * 1.01)


def with_a_view_of_what_follows(model):
    model.config.use_bidirectional_attention = True


CHANGES = {
    with_a_view_of_what_follows: "it looks at the tokens behind too",
    with_more_norm: "layer 1 has post_feedforward_layernorm",
    with_a_scaled_layer: "layer 2 computes something else than state",
    with_a_gain: "layer 3 has gain",
    with_a_cap: "its logits are not those of the head",
    with_a_step_behind_the_layers: "layer 3 computes something else than state",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_computes_something_else_is_refused(change):
    model = tiny_decoder()
    change(model)
    with pytest.raises(UserError, match=f"model type 'llama'.*{CHANGES[change]}.*allowed are models that compute"):
        decoder_of(model)


@pytest.mark.parametrize("family", OTHERS)
def test_models_of_another_layout_are_refused_even_if_they_are_listed(family, monkeypatch):
    config, wrong = OTHERS[family]
    model = AutoModelForCausalLM.from_config(config).eval()
    if family not in structures.DECODERS:
        with pytest.raises(UserError, match=f"model type '{family}' is not supported here; supported: gemma2, gemma3"):
            decoder_of(model)
    monkeypatch.setitem(structures.DECODERS, family, structures.DECODER)
    with pytest.raises(UserError, match=f"model type '{family}'.*: {wrong}"):
        decoder_of(model)


USES = {
    "perplexity": lambda model, ids: perplexity(model, ids),
    "removal": lambda model, ids: removal_perplexities(model, ids),
    "scores": lambda model, ids: score_structures(model, ids, "magnitude"),
    "one layer's scores": lambda model, ids: compute_gqa_group_importance(model, 1, ids),
    "repair": lambda model, ids: repair(model, KEPT, ids),
    "surgery": lambda model, ids: shrink_decoder(model, KEPT),
    "GQA-aware": lambda model, ids: LayerwisePruning(
        model, [0.4] * 4, pick(Cuts, GQAAwarePruningConfig()), CalibrationText(ids, ids, ids)
    ),
    "H-GSP": lambda model, ids: GlobalPruning(
        model, pick(Scoring, GlobalPruningConfig()), pick(Budget, GlobalPruningConfig()), CalibrationText(ids, ids, ids)
    ),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_refuses(use, ids):
    model = tiny_decoder()
    with_a_scaled_layer(model)
    with pytest.raises(UserError, match="layer 2 computes something else"):
        USES[use](model, ids)


@torch.no_grad()
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", DECODERS | MORE_DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supported_models_fit_and_are_left_as_they_were(family, pruned, dtype, ids):
    fields = MIXED if family.startswith("qwen") else {}
    model = tiny_decoder(family, attention_dropout=0.5, **fields)
    if pruned:
        model = shrink_decoder(model, KEPT)
    model = model.to(dtype)
    model.train()
    torch.manual_seed(7)
    draw = torch.rand(3)
    torch.manual_seed(7)
    decoder = decoder_of(model)
    assert torch.equal(torch.rand(3), draw), "random numbers were drawn"
    assert all(module.training for module in model.modules())
    model.eval()
    torch.testing.assert_close(decoder.logits(decoder.final_states(ids)), model(ids).logits, atol=0, rtol=0)


def test_a_model_is_checked_once(monkeypatch):
    model = tiny_decoder()
    decoder_of(model)
    checked = []
    monkeypatch.setattr("compression.decoder.check_layout", checked.append)
    decoder_of(model)
    assert not checked
    decoder_of(tiny_decoder())
    assert len(checked) == 1


def test_unsupported_architecture_is_refused_by_name():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)
    with pytest.raises(UserError, match="'gpt2' is not supported here; supported: gemma2, gemma3_text"):
        decoder_of(AutoModelForCausalLM.from_config(config))
    assert LlamaConfig.model_type in structures.DECODERS


REFUSED = {
    "mixtral": "it is a mixture of experts, and these are not supported",
    "qwen3_moe": "it is a mixture of experts, and these are not supported",
    "gemma3": "save its text part, whose model type is gemma3_text",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_others_are_refused_with_a_reason(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError) as caught:
        require_language_model(tmp_path, "--base_model")
    assert REFUSED[model_type] in str(caught.value)
    assert "supported: gemma2, gemma3_text, granite, llama, mistral, olmo2, phi3" in str(caught.value)
    assert "\n" not in str(caught.value)

"""Decoders whose layers differ in width or lack a part. Self-contained: needs torch and transformers only.

The dense model's sizes stay in the config; `per_layer_config` says what each layer has instead, for example
`{"3": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}, "5": {"skip": ["attention"]}}`.
Heads keep the dense model's size, `head_dim`. Of a skipped part nothing is there but the bias of its output projection,
where the dense model has one, with the norm behind it; the norms around it are gone else.
"""

import copy
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

# Older versions know no `per_layer_config`, and do not say so.
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 14):
    found = transformers.__version__
    raise ImportError(f"pruned_decoder.py needs transformers 5.14 or newer, found {found}: pip install -U transformers")

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

# Names of what the state passes on its way into a layer's attention and MLP, and what they give on its way out.
Around = dict[str, tuple[str | None, str | None]]
BEFORE: Around = {"self_attn": ("input_layernorm", None), "mlp": ("post_attention_layernorm", None)}
BEHIND: Around = {"self_attn": (None, "post_attention_layernorm"), "mlp": (None, "post_feedforward_layernorm")}
BOTH: Around = {
    "self_attn": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
DROPOUT: Around = {
    "self_attn": ("input_layernorm", "resid_attn_dropout"),
    "mlp": ("post_attention_layernorm", "resid_mlp_dropout"),
}


class Removed(nn.Module):
    """In the place of a removed part: gives the bias of its output projection, if it had one."""

    def __init__(self, projection):
        super().__init__()
        self.register_parameter("bias", projection.bias)

    def forward(self, hidden_states):
        return 0 if self.bias is None else self.bias


# An attention class that derived from nn.Module itself would, to transformers, be one that only knows its own kernel:
# models of this file could not switch to another.
class NoAttention(Removed):
    """Keeps its place in the key-value cache, so that every layer's place is that of its index.

    The length of the text so far is read off any place, the first most of all, and a place without numbers counts as
    unused: it gets one number for each token.
    """

    def __init__(self, attention):
        super().__init__(attention.o_proj)
        self.layer_idx = attention.layer_idx

    def forward(self, hidden_states, past_key_values=None, **_):
        if past_key_values is not None:
            batch, length, _ = hidden_states.shape
            heads, size = self.cached_shape(past_key_values)
            nothing = hidden_states.new_zeros(batch, heads, length, size)
            past_key_values.update(nothing, nothing, self.layer_idx)
        return super().forward(hidden_states), None

    def cached_shape(self, cache):
        """Heads and their width in this layer's place: as they are where the cache was made in advance."""
        keys = cache.layers[self.layer_idx].keys if self.layer_idx < len(cache.layers) else None
        return (1, 1) if keys is None or keys.ndim < 4 else (keys.shape[1], keys.shape[3])


class NoMLP(Removed):
    def __init__(self, mlp):
        super().__init__(mlp.down_proj)


# As `skip` names them.
PARTS = {"attention": "self_attn", "mlp": "mlp"}
REMOVED = {"self_attn": NoAttention, "mlp": NoMLP}


def remove(layer, part, around):
    """Take a layer's attention or MLP out, and what is around it; but what a bias passes stays with it.

    Args:
        part: self_attn or mlp.
        around: names of what is before and behind each part.
    """
    left, (before, behind) = REMOVED[part](getattr(layer, part)), around[part]
    setattr(layer, part, left)
    for name in (before, behind if left.bias is None else None):
        if name is not None:
            setattr(layer, name, nn.Identity())


class AttentionConfig:
    """The whole model's config, but for the numbers of heads of one layer, which some read when they compute.

    Which attention kernel to use is asked of the whole model's config, where it can be changed.
    """

    def __init__(self, whole, heads, groups):
        self.__dict__.update(whole=whole, num_attention_heads=heads, num_key_value_heads=groups)

    def __getattr__(self, name):
        if name == "whole":  # while it is copied
            raise AttributeError(name)
        return getattr(self.whole, name)


def set_heads(attention, config, heads, groups):
    """Tell an attention its numbers of query heads and key-value heads.

    Args:
        config: the whole model's.
    """
    attention.config = AttentionConfig(config, heads, groups)
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = groups


def pruned_layers(config, layer_class, around):
    """The layers that a config describes."""
    layers = nn.ModuleList()
    for index, layer_config in enumerate(config.per_layer_config):
        layer = layer_class(layer_config, index)
        set_heads(layer.self_attn, config, layer_config.num_attention_heads, layer_config.num_key_value_heads)
        for skipped in getattr(layer_config, "skip", ()):
            remove(layer, PARTS[skipped], around)
        layers.append(layer)
    return layers


def dense_config(config):
    """The dense model's config: a copy without what is said of single layers."""
    dense = copy.deepcopy(config)
    dense.per_layer_config = None
    return dense


def without_layers(config):
    """The config that a stock constructor makes everything but the layers from."""
    dense = dense_config(config)
    dense.num_hidden_layers = 0  # what else has an entry for each layer stays
    return dense


# These two functions are those of pruned_encoder.py: each file travels alone.
def fix_4bit_layers(model, *_):
    """Work around two faults of bitsandbytes 0.50 in 4-bit layers on CPUs with AVX-512.

    It repacks weights where there are bf16 instructions, which rounds their scales, computes in bf16 whatever the
    compute dtype, and fails on widths that are no multiples of 32 and 64. And where the rows of a weight are no
    multiple of the blocksize, it reads the wrong scales. Pruned layers have such widths.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if layer.weight.device.type == "cpu" and layer.in_features % layer.weight.blocksize:
                layer.forward = partial(forward_4bit, layer)


def forward_4bit(layer, input):
    """The forward pass of a 4-bit layer, its weight taken as one row: so it was quantized."""
    state, operators = layer.weight.quant_state, torch.ops.bitsandbytes
    absmax, dtype = state.absmax, layer.compute_dtype or input.dtype
    if state.nested:
        scale = state.state2
        absmax = operators.dequantize_blockwise(absmax, scale.absmax, scale.code, scale.blocksize, torch.float32)
        absmax = absmax + state.offset
    shape = [1, layer.out_features * layer.in_features]
    weight = operators.dequantize_4bit(layer.weight.data, absmax, state.blocksize, state.quant_type, shape, dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return nn.functional.linear(input.to(dtype), weight.view(layer.out_features, -1), bias).to(input.dtype)


class PrunedConfig:
    def validate(self):
        """Check the dense model's fields, but not that its number of heads divides the hidden size: see `head_dim`."""
        PreTrainedConfig.validate(dense_config(self))  # type: ignore[attr-defined]


class PrunedModel:
    """A stock model, all but its layers; these are in the place of none."""

    around = BEFORE

    def __init__(self: Any, config):
        super().__init__(without_layers(config))  # type: ignore[call-arg]
        config._attn_implementation = self.config._attn_implementation
        self.config = config
        self.layers = pruned_layers(config, self.layer_class, self.around)
        if getattr(config, "quantization_config", None) is not None:
            self.register_forward_pre_hook(fix_4bit_layers)
        self.post_init()


class PrunedForCausalLM:
    """A stock language model, all but the model under its head."""

    def __init__(self: Any, config):
        super().__init__(without_layers(config))  # type: ignore[call-arg]
        config._attn_implementation = self.config._attn_implementation
        self.config = config
        self.model = self.model_class(config)
        self.post_init()


class PrunedLlamaConfig(PrunedConfig, LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaModel(PrunedModel, LlamaModel):
    config_class = PrunedLlamaConfig
    layer_class = LlamaDecoderLayer


class PrunedLlamaForCausalLM(PrunedForCausalLM, LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    model_class = PrunedLlamaModel


class PrunedMistralConfig(PrunedConfig, MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralModel(PrunedModel, MistralModel):
    config_class = PrunedMistralConfig
    layer_class = MistralDecoderLayer


class PrunedMistralForCausalLM(PrunedForCausalLM, MistralForCausalLM):
    config_class = PrunedMistralConfig
    model_class = PrunedMistralModel


class PrunedQwen2Config(PrunedConfig, Qwen2Config):
    model_type = "pruned_qwen2"
    head_dim: int = 128


class PrunedQwen2Model(PrunedModel, Qwen2Model):
    config_class = PrunedQwen2Config
    layer_class = Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(PrunedForCausalLM, Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    model_class = PrunedQwen2Model


class PrunedQwen3Config(PrunedConfig, Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Model(PrunedModel, Qwen3Model):
    config_class = PrunedQwen3Config
    layer_class = Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(PrunedForCausalLM, Qwen3ForCausalLM):
    config_class = PrunedQwen3Config
    model_class = PrunedQwen3Model


class PrunedSmolLM3Config(PrunedConfig, SmolLM3Config):
    model_type = "pruned_smollm3"
    head_dim: int = 128


class PrunedSmolLM3Model(PrunedModel, SmolLM3Model):
    config_class = PrunedSmolLM3Config
    layer_class = SmolLM3DecoderLayer


class PrunedSmolLM3ForCausalLM(PrunedForCausalLM, SmolLM3ForCausalLM):
    config_class = PrunedSmolLM3Config
    model_class = PrunedSmolLM3Model


class PrunedGraniteConfig(PrunedConfig, GraniteConfig):
    model_type = "pruned_granite"
    head_dim: int = 128


class PrunedGraniteModel(PrunedModel, GraniteModel):
    config_class = PrunedGraniteConfig
    layer_class = GraniteDecoderLayer


class PrunedGraniteForCausalLM(PrunedForCausalLM, GraniteForCausalLM):
    config_class = PrunedGraniteConfig
    model_class = PrunedGraniteModel


class PrunedGemma2Config(PrunedConfig, Gemma2Config):
    model_type = "pruned_gemma2"


class PrunedGemma2Model(PrunedModel, Gemma2Model):
    config_class = PrunedGemma2Config
    layer_class = Gemma2DecoderLayer
    around = BOTH


class PrunedGemma2ForCausalLM(PrunedForCausalLM, Gemma2ForCausalLM):
    config_class = PrunedGemma2Config
    model_class = PrunedGemma2Model


class PrunedGemma3TextConfig(PrunedConfig, Gemma3TextConfig):
    model_type = "pruned_gemma3_text"


class PrunedGemma3TextModel(PrunedModel, Gemma3TextModel):
    config_class = PrunedGemma3TextConfig
    layer_class = Gemma3DecoderLayer
    around = BOTH


class PrunedGemma3ForCausalLM(PrunedForCausalLM, Gemma3ForCausalLM):
    config_class = PrunedGemma3TextConfig
    model_class = PrunedGemma3TextModel


class PrunedPhi3Config(PrunedConfig, Phi3Config):
    model_type = "pruned_phi3"
    head_dim: int = 128


class PrunedPhi3Model(PrunedModel, Phi3Model):
    config_class = PrunedPhi3Config
    layer_class = Phi3DecoderLayer
    around = DROPOUT


class PrunedPhi3ForCausalLM(PrunedForCausalLM, Phi3ForCausalLM):
    config_class = PrunedPhi3Config
    model_class = PrunedPhi3Model


class PrunedOlmo2Config(PrunedConfig, Olmo2Config):
    model_type = "pruned_olmo2"
    head_dim: int = 128


class PrunedOlmo2Model(PrunedModel, Olmo2Model):
    config_class = PrunedOlmo2Config
    layer_class = Olmo2DecoderLayer
    around = BEHIND


class PrunedOlmo2ForCausalLM(PrunedForCausalLM, Olmo2ForCausalLM):
    config_class = PrunedOlmo2Config
    model_class = PrunedOlmo2Model


# Configuration -> the model's class and the language model's.
CLASSES = {
    PrunedLlamaConfig: (PrunedLlamaModel, PrunedLlamaForCausalLM),
    PrunedMistralConfig: (PrunedMistralModel, PrunedMistralForCausalLM),
    PrunedQwen2Config: (PrunedQwen2Model, PrunedQwen2ForCausalLM),
    PrunedQwen3Config: (PrunedQwen3Model, PrunedQwen3ForCausalLM),
    PrunedSmolLM3Config: (PrunedSmolLM3Model, PrunedSmolLM3ForCausalLM),
    PrunedGraniteConfig: (PrunedGraniteModel, PrunedGraniteForCausalLM),
    PrunedGemma2Config: (PrunedGemma2Model, PrunedGemma2ForCausalLM),
    PrunedGemma3TextConfig: (PrunedGemma3TextModel, PrunedGemma3ForCausalLM),
    PrunedPhi3Config: (PrunedPhi3Model, PrunedPhi3ForCausalLM),
    PrunedOlmo2Config: (PrunedOlmo2Model, PrunedOlmo2ForCausalLM),
}

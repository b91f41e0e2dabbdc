"""LLaMA-class decoders whose layers differ in width or lack a part. Self-contained: needs torch and transformers only.

The dense model's sizes stay in the config; `per_layer_config` says what each layer has instead, for example
`{"3": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}, "5": {"skip": ["attention"]}}`.
Heads keep the dense model's size, `head_dim`. Of a skipped part nothing is there but the bias of its output projection,
where the dense model has one; the norm before it is gone too.
"""

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
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding


class Removed(nn.Module):
    """In the place of a removed part: adds to the residual stream the bias of its output projection, if it had one."""

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


def remove_attention(layer):
    """Take a layer's attention out, and the norm before it."""
    layer.input_layernorm, layer.self_attn = nn.Identity(), NoAttention(layer.self_attn)


def remove_mlp(layer):
    """Take a layer's MLP out, and the norm before it."""
    layer.post_attention_layernorm, layer.mlp = nn.Identity(), NoMLP(layer.mlp)


def pruned_layers(config, layer_class):
    """The layers that a config describes."""
    layers = nn.ModuleList()
    for index, layer_config in enumerate(config.per_layer_config):
        layer = layer_class(layer_config, index)
        # Which attention kernel to use is asked of the whole model's config, where it can be changed.
        layer.self_attn.config = config
        skip = getattr(layer_config, "skip", ())
        if "attention" in skip:
            remove_attention(layer)
        if "mlp" in skip:
            remove_mlp(layer)
        layers.append(layer)
    return layers


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


class PrunedModel:
    """What the stock models' constructors do, with layers that differ."""

    def __init__(self: Any, config):
        PreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = pruned_layers(config, self.layer_class)
        self.norm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if getattr(config, "quantization_config", None) is not None:
            self.register_forward_pre_hook(fix_4bit_layers)
        self.post_init()


class PrunedForCausalLM:
    """What the stock language models' constructors do."""

    def __init__(self: Any, config):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"

    def validate(self):
        PreTrainedConfig.validate(self)  # type: ignore[attr-defined]

    def validate_architecture(self):
        """Without the check that the number of heads divides the hidden size: `head_dim` says how wide they are."""


class PrunedLlamaModel(PrunedModel, LlamaModel):
    config_class = PrunedLlamaConfig
    layer_class, norm_class, rotary_class = LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding


class PrunedLlamaForCausalLM(PrunedForCausalLM, LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    model_class = PrunedLlamaModel


class PrunedMistralConfig(MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralModel(PrunedModel, MistralModel):
    config_class = PrunedMistralConfig
    layer_class, norm_class, rotary_class = MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding


class PrunedMistralForCausalLM(PrunedForCausalLM, MistralForCausalLM):
    config_class = PrunedMistralConfig
    model_class = PrunedMistralModel


class PrunedQwen2Config(Qwen2Config):
    model_type = "pruned_qwen2"
    head_dim: int = 128


class PrunedQwen2Model(PrunedModel, Qwen2Model):
    config_class = PrunedQwen2Config
    layer_class, norm_class, rotary_class = Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding


class PrunedQwen2ForCausalLM(PrunedForCausalLM, Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    model_class = PrunedQwen2Model


class PrunedQwen3Config(Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Model(PrunedModel, Qwen3Model):
    config_class = PrunedQwen3Config
    layer_class, norm_class, rotary_class = Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding


class PrunedQwen3ForCausalLM(PrunedForCausalLM, Qwen3ForCausalLM):
    config_class = PrunedQwen3Config
    model_class = PrunedQwen3Model


# Configuration -> the model's class and the language model's.
CLASSES = {
    PrunedLlamaConfig: (PrunedLlamaModel, PrunedLlamaForCausalLM),
    PrunedMistralConfig: (PrunedMistralModel, PrunedMistralForCausalLM),
    PrunedQwen2Config: (PrunedQwen2Model, PrunedQwen2ForCausalLM),
    PrunedQwen3Config: (PrunedQwen3Model, PrunedQwen3ForCausalLM),
}

"""LLaMA-class decoders whose layers differ in width or lack a part. Self-contained: needs torch and transformers only.

The dense model's sizes stay in the config; `per_layer_config` says what each layer has instead, for example
`{"3": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}, "5": {"skip": ["attention"]}}`.
Heads keep the dense model's size, `head_dim`. A skipped part is not there at all, nor is the norm before it.
"""

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralPreTrainedModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)


class Removed(nn.Module):
    """In the place of a removed part: adds nothing to the residual stream."""


# An attention class that derived from nn.Module itself would, to transformers, be one that only knows its own kernel:
# models of this file could not switch to another.
class NoAttention(Removed):
    def forward(self, hidden_states, **_):
        return 0, None


class NoMLP(Removed):
    def forward(self, hidden_states):
        return 0


def pruned_layers(config, layer_class):
    """The layers that a config describes.

    The key-value cache has places for the layers that have attention and no others: the length of the text so far is
    read off its first place, which must be in use.
    """
    layers, place = nn.ModuleList(), 0
    for layer_config in config.per_layer_config:
        layer = layer_class(layer_config, place)
        skip = getattr(layer_config, "skip", ())
        if "attention" in skip:
            layer.input_layernorm, layer.self_attn = nn.Identity(), NoAttention()
        else:
            # Which attention kernel to use is asked of the whole model's config, where it can be changed.
            layer.self_attn.config = config
            place += 1
        if "mlp" in skip:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), NoMLP()
        layers.append(layer)
    return layers


def build_model(model, config, layer_class, norm_class, rotary_class):
    """What the stock model's constructor does, with layers that differ."""
    model.padding_idx, model.vocab_size = config.pad_token_id, config.vocab_size
    model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    model.layers = pruned_layers(config, layer_class)
    model.norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
    model.rotary_emb = rotary_class(config=config)
    model.gradient_checkpointing = False
    model.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    model.post_init()


def build_language_model(model, config, model_class):
    """What the stock language model's constructor does."""
    model.model = model_class(config)
    model.vocab_size = config.vocab_size
    model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    model.post_init()


class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"

    def validate(self):
        PreTrainedConfig.validate(self)

    def validate_architecture(self):
        """Without the check that the number of heads divides the hidden size: `head_dim` says how wide they are."""


class PrunedLlamaModel(LlamaModel):
    config_class = PrunedLlamaConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        build_model(self, config, LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding)


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    config_class = PrunedLlamaConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        build_language_model(self, config, PrunedLlamaModel)


class PrunedMistralConfig(MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralModel(MistralModel):
    config_class = PrunedMistralConfig

    def __init__(self, config):
        MistralPreTrainedModel.__init__(self, config)
        build_model(self, config, MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding)


class PrunedMistralForCausalLM(MistralForCausalLM):
    config_class = PrunedMistralConfig

    def __init__(self, config):
        MistralPreTrainedModel.__init__(self, config)
        build_language_model(self, config, PrunedMistralModel)


class PrunedQwen2Config(Qwen2Config):
    model_type = "pruned_qwen2"
    head_dim: int = 128


class PrunedQwen2Model(Qwen2Model):
    config_class = PrunedQwen2Config

    def __init__(self, config):
        Qwen2PreTrainedModel.__init__(self, config)
        build_model(self, config, Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding)


class PrunedQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = PrunedQwen2Config

    def __init__(self, config):
        Qwen2PreTrainedModel.__init__(self, config)
        build_language_model(self, config, PrunedQwen2Model)


class PrunedQwen3Config(Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Model(Qwen3Model):
    config_class = PrunedQwen3Config

    def __init__(self, config):
        Qwen3PreTrainedModel.__init__(self, config)
        build_model(self, config, Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding)


class PrunedQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = PrunedQwen3Config

    def __init__(self, config):
        Qwen3PreTrainedModel.__init__(self, config)
        build_language_model(self, config, PrunedQwen3Model)

"""BERT whose layers differ in width. Self-contained: needs torch and transformers only.

The dense model's sizes stay in the config; `per_layer_config` says what each layer has instead, for example
`{"3": {"num_attention_heads": 6, "intermediate_size": 1024}}`. Heads keep the dense model's size, `head_size`, so the
attention of a pruned layer is `num_attention_heads * head_size` wide, less than `hidden_size`.
"""

import math
from functools import partial

import torch
import transformers
from torch import nn

# Older versions know no `per_layer_config`, and do not say so.
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 14):
    found = transformers.__version__
    raise ImportError(f"pruned_bert.py needs transformers 5.14 or newer, found {found}: pip install -U transformers")

from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertEncoder,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertPooler,
    BertPreTrainedModel,
    BertSelfAttention,
    BertSelfOutput,
)


class PrunedBertConfig(BertConfig):
    """BertConfig plus `per_layer_config`, `head_size` (width of one attention head) and `embedding_bits`."""

    model_type = "pruned_bert"
    head_size: int = 64
    embedding_bits: int = 32


class PackedEmbedding(nn.Module):
    """An embedding table stored in 16 bits per value, or in 8 or 4 with one scale for each block of a row."""

    def __init__(self, num_embeddings, embedding_dim, bits):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        width, kind = (embedding_dim, torch.half) if bits == 16 else (embedding_dim * bits // 8, torch.uint8)
        self.register_buffer("codes", torch.zeros(num_embeddings, width, dtype=kind))
        if bits < 16:
            blocks = embedding_dim // math.gcd(embedding_dim, 64)
            self.register_buffer("scales", torch.zeros(num_embeddings, blocks, dtype=torch.bfloat16))
            # What a code stands for, in units of the scale.
            self.register_buffer("numbers", torch.zeros(2**bits))

    def forward(self, input):
        codes = self.codes[input]
        if self.bits == 16:
            return codes.float()
        if self.bits == 4:
            codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(-2)
        scales = self.scales[input].to(self.numbers.dtype)
        return (self.numbers[codes.int()].unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def pack_embeddings(embeddings, bits):
    """Give a model's embeddings empty packed tables, for the weights of a checkpoint."""
    for name in ("word_embeddings", "position_embeddings"):
        table = getattr(embeddings, name)
        setattr(embeddings, name, PackedEmbedding(table.num_embeddings, table.embedding_dim, bits))


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


class PrunedSelfAttention(BertSelfAttention):
    def __init__(self, config, num_attention_heads, layer_idx):
        nn.Module.__init__(self)
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.attention_head_size = config.head_size
        self.all_head_size = num_attention_heads * config.head_size
        self.scaling = config.head_size**-0.5
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.is_decoder = False
        self.is_causal = False
        self.layer_idx = layer_idx


class PrunedSelfOutput(BertSelfOutput):
    def __init__(self, config, width):
        nn.Module.__init__(self)
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class PrunedAttention(BertAttention):
    def __init__(self, config, num_attention_heads, layer_idx):
        nn.Module.__init__(self)
        self.is_cross_attention = False
        self.self = PrunedSelfAttention(config, num_attention_heads, layer_idx)
        self.output = PrunedSelfOutput(config, self.self.all_head_size)


class PrunedIntermediate(BertIntermediate):
    def __init__(self, config, intermediate_size):
        nn.Module.__init__(self)
        self.dense = nn.Linear(config.hidden_size, intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]


class PrunedOutput(BertOutput):
    def __init__(self, config, intermediate_size):
        nn.Module.__init__(self)
        self.dense = nn.Linear(intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class PrunedLayer(BertLayer):
    def __init__(self, config, layer_config, layer_idx):
        nn.Module.__init__(self)
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.seq_len_dim = 1
        self.is_decoder = False
        self.add_cross_attention = False
        self.attention = PrunedAttention(config, layer_config.num_attention_heads, layer_idx)
        self.intermediate = PrunedIntermediate(config, layer_config.intermediate_size)
        self.output = PrunedOutput(config, layer_config.intermediate_size)


class PrunedEncoder(BertEncoder):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config
        layers = enumerate(config.per_layer_config)
        self.layer = nn.ModuleList([PrunedLayer(config, layer, index) for index, layer in layers])


class PrunedBertModel(BertModel):
    config_class = PrunedBertConfig

    def __init__(self, config, add_pooling_layer=True):
        BertPreTrainedModel.__init__(self, config)
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(config)
        if config.embedding_bits < 32:
            pack_embeddings(self.embeddings, config.embedding_bits)
        self.encoder = PrunedEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.register_forward_pre_hook(fix_4bit_layers)
        self.post_init()


class PrunedBertForSequenceClassification(BertForSequenceClassification):
    config_class = PrunedBertConfig

    def __init__(self, config):
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.config = config
        self.bert = PrunedBertModel(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

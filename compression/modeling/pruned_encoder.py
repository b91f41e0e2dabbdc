"""BERT and DistilBERT whose layers differ in width. Self-contained: needs torch and transformers only.

The dense model's sizes stay in the config; `per_layer_config` says what each layer has instead, for example
`{"3": {"num_attention_heads": 6, "intermediate_size": 1024}}`. Heads keep the dense model's size, `head_size`, so the
attention of a pruned layer is `num_attention_heads * head_size` wide, less than `hidden_size`.
"""

import copy
import math
from functools import partial

import torch
import transformers
from torch import nn

# Older versions know no `per_layer_config`, and do not say so.
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 14):
    found = transformers.__version__
    raise ImportError(f"pruned_encoder.py needs transformers 5.14 or newer, found {found}: pip install -U transformers")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
)
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    BertPooler,
    BertPreTrainedModel,
)
from transformers.models.distilbert.modeling_distilbert import (
    DistilBertPreTrainedModel,
    Embeddings,
    Transformer,
    TransformerBlock,
)


class PackedEmbedding(nn.Module):
    """An embedding table stored in 16 bits per value, or in 8 or 4 with one scale for each block of a row."""

    codes: torch.Tensor
    scales: torch.Tensor
    numbers: torch.Tensor

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


def stock_config(config, index):
    """What a stock layer is built from: a layer's config with the dense model's heads, which fill the hidden size."""
    layer_config = copy.copy(config.per_layer_config[index])
    layer_config.num_attention_heads = config.hidden_size // config.head_size
    return layer_config


def narrow_linears(config, heads):
    """Query, key, value and output projections of so many heads."""
    width = heads * config.head_size
    return *(nn.Linear(config.hidden_size, width) for _ in range(3)), nn.Linear(width, config.hidden_size)


class PrunedBertConfig(BertConfig):
    """BertConfig plus `per_layer_config`, `head_size` (width of one attention head) and `embedding_bits`."""

    model_type = "pruned_bert"
    head_size: int = 64
    embedding_bits: int = 32


class PrunedBertLayer(BertLayer):
    def __init__(self, config, index):
        super().__init__(stock_config(config, index), index)
        heads, attention = config.per_layer_config[index].num_attention_heads, self.attention.self
        # Which attention kernel to use is asked of the whole model's config, where it can be changed.
        attention.config = config
        attention.num_attention_heads, attention.all_head_size = heads, heads * config.head_size
        linears = narrow_linears(config, heads)
        attention.query, attention.key, attention.value, self.attention.output.dense = linears


class PrunedBertEncoder(BertEncoder):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList(PrunedBertLayer(config, index) for index in range(config.num_hidden_layers))


class PrunedBertModel(BertModel):
    config_class = PrunedBertConfig

    def __init__(self, config, add_pooling_layer=True):
        BertPreTrainedModel.__init__(self, config)
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(config)
        if config.embedding_bits < 32:
            pack_embeddings(self.embeddings, config.embedding_bits)
        self.encoder = PrunedBertEncoder(config)
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


class PrunedDistilBertConfig(DistilBertConfig):
    """DistilBertConfig plus `per_layer_config`, `head_size` (width of one attention head) and `embedding_bits`."""

    model_type = "pruned_distilbert"
    attribute_map = DistilBertConfig.attribute_map | {"intermediate_size": "hidden_dim"}
    head_size: int = 64
    embedding_bits: int = 32

    def to_dict(self):
        """The config with the sizes also under their general names.

        Without `trust_remote_code` AutoTokenizer reads the file as a plain config, which knows no other names and
        needs them to make sense of `per_layer_config`.
        """
        names = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
        return super().to_dict() | {name: getattr(self, name) for name in names}


class PrunedDistilBertBlock(TransformerBlock):
    def __init__(self, config, index):
        super().__init__(stock_config(config, index))
        heads, attention = config.per_layer_config[index].num_attention_heads, self.attention
        attention.config = config  # as in BERT's layers
        attention.n_heads = heads
        attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin = narrow_linears(config, heads)


class PrunedDistilBertTransformer(Transformer):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.n_layers = config.n_layers
        self.layer = nn.ModuleList(PrunedDistilBertBlock(config, index) for index in range(config.n_layers))
        self.gradient_checkpointing = False


class PrunedDistilBertModel(DistilBertModel):
    config_class = PrunedDistilBertConfig

    def __init__(self, config):
        DistilBertPreTrainedModel.__init__(self, config)
        self.embeddings = Embeddings(config)
        if config.embedding_bits < 32:
            pack_embeddings(self.embeddings, config.embedding_bits)
        self.transformer = PrunedDistilBertTransformer(config)
        self.register_forward_pre_hook(fix_4bit_layers)
        self.post_init()


class PrunedDistilBertForSequenceClassification(DistilBertForSequenceClassification):
    config_class = PrunedDistilBertConfig

    def __init__(self, config):
        DistilBertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.distilbert = PrunedDistilBertModel(config)
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.dropout = nn.Dropout(config.seq_classif_dropout)
        self.post_init()

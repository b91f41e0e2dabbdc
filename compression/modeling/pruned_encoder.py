"""Encoders whose layers differ in width or lack a part. Self-contained: needs torch and transformers only.

The dense model's sizes stay in the config; `per_layer_config` says what each layer has instead, for example
`{"3": {"num_attention_heads": 6, "intermediate_size": 1024}, "5": {"skip": ["attention"]}}`. Heads keep the dense
model's size, `head_size`, so the attention of a pruned layer is `num_attention_heads * head_size` wide, less than
`hidden_size`. Of a skipped part nothing is there, its norm included: the hidden states pass by it unchanged.

A family is an entry of `LAYOUTS`, three classes, and an entry of `CLASSES`.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any

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
    CamembertConfig,
    CamembertForSequenceClassification,
    CamembertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    ElectraModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)


class PassedOn(nn.Module):
    """In the place of an attention with its residual connection: the state goes on as it came."""

    def forward(self, hidden_states, *_, **__):
        return hidden_states, None


class PassedBy(nn.Module):
    """In the place of an FFN's output projection with its residual connection: what passes by it goes on."""

    def forward(self, hidden_states, input_tensor):
        return input_tensor


class NothingAttended(nn.Module):
    """In the place of an attention: adds nothing to what passes by it."""

    def forward(self, hidden_states, *_, **__):
        return 0, None


class Nothing(nn.Module):
    """In the place of an FFN: adds nothing to what passes by it."""

    def forward(self, hidden_states):
        return 0


@dataclass(frozen=True)
class Layout:
    """Where a stock model keeps its layers, and a layer its Linear modules (dotted paths)."""

    layers: str
    attention: tuple[str, ...]
    """Those whose rows belong to heads, an equal share to each."""
    o: str
    """The one whose columns do."""
    ffn: tuple[str, ...]
    """Those whose rows belong to neurons."""
    down: str
    """The one whose columns do."""
    removed: dict[str, dict[str, type[nn.Module]]] = field(default_factory=dict)
    """Of each part, as `skip` names them: the layer's modules that go with it, and what is in their place then."""
    behind_padding: bool = False
    """Whether positions are counted from behind the padding token's id."""


BERT = Layout(
    layers="base_model.encoder.layer",
    attention=("attention.self.query", "attention.self.key", "attention.self.value"),
    o="attention.output.dense",
    ffn=("intermediate.dense",),
    down="output.dense",
    removed={"attention": {"attention": PassedOn}, "mlp": {"intermediate": nn.Identity, "output": PassedBy}},
)
ROBERTA = replace(BERT, behind_padding=True)
DEBERTA = replace(
    BERT, attention=tuple(f"attention.self.{name}_proj" for name in ("query", "key", "value", "pos_key", "pos_query"))
)
DISTILBERT = Layout(
    layers="base_model.transformer.layer",
    attention=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    o="attention.out_lin",
    ffn=("ffn.lin1",),
    down="ffn.lin2",
    removed={
        "attention": {"attention": NothingAttended, "sa_layer_norm": nn.Identity},
        "mlp": {"ffn": Nothing, "output_layer_norm": nn.Identity},
    },
)
MODERNBERT = Layout(
    layers="base_model.layers",
    attention=("attn.Wqkv",),
    o="attn.Wo",
    ffn=("mlp.Wi",),
    down="mlp.Wo",
    removed={
        "attention": {"attn": NothingAttended, "attn_norm": nn.Identity},
        "mlp": {"mlp": Nothing, "mlp_norm": nn.Identity},
    },
)
# By the stock model type.
LAYOUTS = {
    "bert": BERT,
    "camembert": ROBERTA,
    "deberta-v2": DEBERTA,
    "distilbert": DISTILBERT,
    "electra": BERT,
    "modernbert": MODERNBERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}


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


class FactorizedEmbedding(nn.Module):
    """An embedding table as the product of a narrower one, [rows, rank], and a projection to its width."""

    def __init__(self, num_embeddings, embedding_dim, rank, padding_idx=None):
        super().__init__()
        self.table = nn.Embedding(num_embeddings, rank, padding_idx)
        self.projection = nn.Linear(rank, embedding_dim, bias=False)

    @property
    def num_embeddings(self):
        return self.table.num_embeddings

    @property
    def embedding_dim(self):
        return self.projection.out_features

    def forward(self, input):
        return self.projection(self.table(input))


def factorize_embeddings(model, rank):
    """Give a model a table of word embeddings in two factors, for the weights of a checkpoint."""
    table = model.get_input_embeddings()
    factors = FactorizedEmbedding(table.num_embeddings, table.embedding_dim, rank, table.padding_idx)
    model.set_input_embeddings(factors)


def pack_embeddings(embeddings, bits):
    """Give a model's embeddings empty packed tables, for the weights of a checkpoint."""
    for name, table in list(embeddings.named_modules()):
        if isinstance(table, nn.Embedding) and name != "token_type_embeddings":
            embeddings.set_submodule(name, PackedEmbedding(table.num_embeddings, table.embedding_dim, bits))


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


def dense_config(config):
    """The config of the dense model, which has all layers alike."""
    dense = copy.copy(config)
    dense.per_layer_config = None
    return dense


def narrow(layer, rows, columns, kept, whole):
    """Give a dense layer new Linear modules, in which it has `kept` of its `whole` heads or neurons."""
    for path in rows:
        parent, _, name = path.rpartition(".")
        if hasattr(layer.get_submodule(parent), name):
            linear = layer.get_submodule(path)
            layer.set_submodule(path, resized(linear, linear.in_features, linear.out_features * kept // whole))
    linear = layer.get_submodule(columns)
    layer.set_submodule(columns, resized(linear, linear.in_features * kept // whole, linear.out_features))


def resized(linear, inputs, outputs):
    return nn.Linear(inputs, outputs, bias=linear.bias is not None)


def remove(layer, layout, part):
    """Take a layer's attention or FFN out in place, with its residual connection and norm: it becomes the identity.

    Args:
        layer: of a stock or a pruned model.
        part: attention or mlp, as `skip` names them.
    """
    for name, left in layout.removed[part].items():
        setattr(layer, name, left())


def set_heads(layer, layout, heads, head_size):
    """Tell a layer's attention how many heads it has; returns it."""
    attention = layer.get_submodule(layout.attention[0].rpartition(".")[0])
    counts = {"num_attention_heads": heads, "n_heads": heads, "all_head_size": heads * head_size}
    for name in counts.keys() & vars(attention).keys():
        setattr(attention, name, counts[name])
    return attention


class Pruned:
    """A stock model, bare or a classifier, whose layers were made narrower."""

    def __init__(self: Any, config, *inputs, **options):
        dense, layout = dense_config(config), LAYOUTS[config.model_type.removeprefix("pruned_")]
        super().__init__(dense, *inputs, **options)  # type: ignore[call-arg]  # of the stock class
        config._attn_implementation = dense._attn_implementation
        base = self.base_model
        self.config = base.config = config
        for layer, sizes in zip(attrgetter(layout.layers)(self), config.per_layer_config, strict=True):
            heads, neurons = sizes.num_attention_heads, sizes.intermediate_size
            narrow(layer, layout.attention, layout.o, heads, dense.num_attention_heads)
            narrow(layer, layout.ffn, layout.down, neurons, dense.intermediate_size)
            # Which attention kernel to use is asked of the whole model's config, where it can be changed.
            set_heads(layer, layout, heads, config.head_size).config = config
            for part in getattr(sizes, "skip", ()):
                remove(layer, layout, part)
        if config.embedding_rank is not None:
            factorize_embeddings(base, config.embedding_rank)
        if config.embedding_bits < 32:
            pack_embeddings(base.embeddings, config.embedding_bits)
        base.register_forward_pre_hook(fix_4bit_layers)
        self.post_init()


# A config of a pruned model has `per_layer_config`, `head_size` (width of one attention head), `embedding_bits` and
# `embedding_rank` (of the table of word embeddings; None: it is whole).
class PrunedBertConfig(BertConfig):
    model_type = "pruned_bert"
    head_size: int = 64
    embedding_bits: int = 32
    embedding_rank: int | None = None


class PrunedBertModel(Pruned, BertModel):
    config_class = PrunedBertConfig


class PrunedBertForSequenceClassification(Pruned, BertForSequenceClassification):
    config_class = PrunedBertConfig


class PrunedCamembertConfig(CamembertConfig):
    model_type = "pruned_camembert"
    head_size: int = 64
    embedding_bits: int = 32
    embedding_rank: int | None = None


class PrunedCamembertModel(Pruned, CamembertModel):
    config_class = PrunedCamembertConfig


class PrunedCamembertForSequenceClassification(Pruned, CamembertForSequenceClassification):
    config_class = PrunedCamembertConfig


class PrunedDebertaV2Config(DebertaV2Config):
    model_type = "pruned_deberta-v2"
    head_size: int = 64
    embedding_bits: int = 32
    embedding_rank: int | None = None


class PrunedDebertaV2Model(Pruned, DebertaV2Model):
    config_class = PrunedDebertaV2Config


class PrunedDebertaV2ForSequenceClassification(Pruned, DebertaV2ForSequenceClassification):
    config_class = PrunedDebertaV2Config


class PrunedDistilBertConfig(DistilBertConfig):
    model_type = "pruned_distilbert"
    attribute_map = DistilBertConfig.attribute_map | {"intermediate_size": "hidden_dim"}
    head_size: int = 64
    embedding_bits: int = 32
    embedding_rank: int | None = None

    def to_dict(self):
        """The config with the sizes also under their general names.

        Without `trust_remote_code` AutoTokenizer reads the file as a plain config, which knows no other names and
        needs them to make sense of `per_layer_config`.
        """
        names = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
        return super().to_dict() | {name: getattr(self, name) for name in names}


class PrunedDistilBertModel(Pruned, DistilBertModel):
    config_class = PrunedDistilBertConfig


class PrunedDistilBertForSequenceClassification(Pruned, DistilBertForSequenceClassification):
    config_class = PrunedDistilBertConfig


class PrunedElectraConfig(ElectraConfig):
    model_type = "pruned_electra"
    head_size: int = 64
    embedding_bits: int = 32
    embedding_rank: int | None = None


class PrunedElectraModel(Pruned, ElectraModel):
    config_class = PrunedElectraConfig


class PrunedElectraForSequenceClassification(Pruned, ElectraForSequenceClassification):
    config_class = PrunedElectraConfig


class PrunedModernBertConfig(ModernBertConfig):
    model_type = "pruned_modernbert"
    head_size: int = 64
    embedding_bits: int = 32
    embedding_rank: int | None = None


class PrunedModernBertModel(Pruned, ModernBertModel):
    config_class = PrunedModernBertConfig


class PrunedModernBertForSequenceClassification(Pruned, ModernBertForSequenceClassification):
    config_class = PrunedModernBertConfig


class PrunedRobertaConfig(RobertaConfig):
    model_type = "pruned_roberta"
    head_size: int = 64
    embedding_bits: int = 32
    embedding_rank: int | None = None


class PrunedRobertaModel(Pruned, RobertaModel):
    config_class = PrunedRobertaConfig


class PrunedRobertaForSequenceClassification(Pruned, RobertaForSequenceClassification):
    config_class = PrunedRobertaConfig


class PrunedXLMRobertaConfig(XLMRobertaConfig):
    model_type = "pruned_xlm-roberta"
    head_size: int = 64
    embedding_bits: int = 32
    embedding_rank: int | None = None


class PrunedXLMRobertaModel(Pruned, XLMRobertaModel):
    config_class = PrunedXLMRobertaConfig


class PrunedXLMRobertaForSequenceClassification(Pruned, XLMRobertaForSequenceClassification):
    config_class = PrunedXLMRobertaConfig


# Configuration -> the bare model's class and the classifier's.
CLASSES = {
    PrunedBertConfig: (PrunedBertModel, PrunedBertForSequenceClassification),
    PrunedCamembertConfig: (PrunedCamembertModel, PrunedCamembertForSequenceClassification),
    PrunedDebertaV2Config: (PrunedDebertaV2Model, PrunedDebertaV2ForSequenceClassification),
    PrunedDistilBertConfig: (PrunedDistilBertModel, PrunedDistilBertForSequenceClassification),
    PrunedElectraConfig: (PrunedElectraModel, PrunedElectraForSequenceClassification),
    PrunedModernBertConfig: (PrunedModernBertModel, PrunedModernBertForSequenceClassification),
    PrunedRobertaConfig: (PrunedRobertaModel, PrunedRobertaForSequenceClassification),
    PrunedXLMRobertaConfig: (PrunedXLMRobertaModel, PrunedXLMRobertaForSequenceClassification),
}

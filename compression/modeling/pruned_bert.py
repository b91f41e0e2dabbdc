"""BERT whose layers differ in width. Self-contained: needs torch and transformers only.

The dense model's sizes stay in the config; `per_layer_config` says what each layer has instead, for example
`{"3": {"num_attention_heads": 6, "intermediate_size": 1024}}`. Heads keep the dense model's size, `head_size`, so the
attention of a pruned layer is `num_attention_heads * head_size` wide, less than `hidden_size`.
"""

from torch import nn
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

AUTO_MAP = {
    "AutoConfig": "pruned_bert.PrunedBertConfig",
    "AutoModel": "pruned_bert.PrunedBertModel",
    "AutoModelForSequenceClassification": "pruned_bert.PrunedBertForSequenceClassification",
}


class PrunedBertConfig(BertConfig):
    """BertConfig plus `per_layer_config` and `head_size`, the width of one attention head."""

    model_type = "pruned_bert"
    head_size: int = 64


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
        self.encoder = PrunedEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
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

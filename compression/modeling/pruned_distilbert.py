"""DistilBERT whose layers differ in width. Self-contained: needs torch and transformers only.

The dense model's sizes stay in the config; `per_layer_config` says what each layer has instead, for example
`{"3": {"num_attention_heads": 6, "intermediate_size": 1024}}`. Heads keep the dense model's size, `head_size`, so the
attention of a pruned layer is `num_attention_heads * head_size` wide, less than `dim`.
"""

from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel
from transformers.activations import get_activation
from transformers.models.distilbert.modeling_distilbert import (
    FFN,
    DistilBertPreTrainedModel,
    DistilBertSelfAttention,
    Embeddings,
    Transformer,
    TransformerBlock,
)

AUTO_MAP = {
    "AutoConfig": "pruned_distilbert.PrunedDistilBertConfig",
    "AutoModel": "pruned_distilbert.PrunedDistilBertModel",
    "AutoModelForSequenceClassification": "pruned_distilbert.PrunedDistilBertForSequenceClassification",
}


class PrunedDistilBertConfig(DistilBertConfig):
    """DistilBertConfig plus `per_layer_config` and `head_size`, the width of one attention head."""

    model_type = "pruned_distilbert"
    attribute_map = DistilBertConfig.attribute_map | {"intermediate_size": "hidden_dim"}
    head_size: int = 64


class PrunedSelfAttention(DistilBertSelfAttention):
    def __init__(self, config, n_heads):
        nn.Module.__init__(self)
        self.config = config
        self.n_heads = n_heads
        self.dim = config.dim
        self.attention_head_size = config.head_size
        self.scaling = config.head_size**-0.5
        width = n_heads * config.head_size
        self.q_lin = nn.Linear(config.dim, width)
        self.k_lin = nn.Linear(config.dim, width)
        self.v_lin = nn.Linear(config.dim, width)
        self.out_lin = nn.Linear(width, config.dim)
        self.dropout = nn.Dropout(p=config.attention_dropout)
        self.is_causal = False


class PrunedFFN(FFN):
    def __init__(self, config, hidden_dim):
        nn.Module.__init__(self)
        self.dropout = nn.Dropout(p=config.dropout)
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.seq_len_dim = 1
        self.lin1 = nn.Linear(config.dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, config.dim)
        self.activation = get_activation(config.activation)


class PrunedBlock(TransformerBlock):
    def __init__(self, config, layer_config):
        nn.Module.__init__(self)
        self.attention = PrunedSelfAttention(config, layer_config.num_attention_heads)
        self.sa_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.ffn = PrunedFFN(config, layer_config.intermediate_size)
        self.output_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)


class PrunedTransformer(Transformer):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.n_layers = config.n_layers
        self.layer = nn.ModuleList([PrunedBlock(config, layer) for layer in config.per_layer_config])
        self.gradient_checkpointing = False


class PrunedDistilBertModel(DistilBertModel):
    config_class = PrunedDistilBertConfig

    def __init__(self, config):
        DistilBertPreTrainedModel.__init__(self, config)
        self.embeddings = Embeddings(config)
        self.transformer = PrunedTransformer(config)
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

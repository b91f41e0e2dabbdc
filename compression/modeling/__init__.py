"""Model classes whose layers differ in width, registered with the Auto classes.

Each family is one self-contained file (torch and transformers only) that travels inside the checkpoints it describes.
"""

import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from compression.modeling import pruned_bert, pruned_distilbert
from compression.modeling.pruned_bert import (
    PrunedBertConfig,
    PrunedBertForSequenceClassification,
    PrunedBertModel,
)
from compression.modeling.pruned_distilbert import (
    PrunedDistilBertConfig,
    PrunedDistilBertForSequenceClassification,
    PrunedDistilBertModel,
)

AUTO_MAPS = {PrunedBertConfig: pruned_bert.AUTO_MAP, PrunedDistilBertConfig: pruned_distilbert.AUTO_MAP}

BERT = (PrunedBertConfig, PrunedBertForSequenceClassification)
DISTILBERT = (PrunedDistilBertConfig, PrunedDistilBertForSequenceClassification)

# The families' classes for embedding tables in 8 or 4 bits; each modeling file has its own.
PACKED_TABLES = (pruned_bert.PackedEmbedding, pruned_distilbert.PackedEmbedding)

# Model type of a classifier, dense or pruned -> configuration and class of its pruned form.
PRUNED_CLASSES = {
    "bert": BERT,
    "pruned_bert": BERT,
    "distilbert": DISTILBERT,
    "pruned_distilbert": DISTILBERT,
}

AutoModel.register(PrunedBertConfig, PrunedBertModel)
AutoModel.register(PrunedDistilBertConfig, PrunedDistilBertModel)
for _config, _classifier in (BERT, DISTILBERT):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForSequenceClassification.register(_config, _classifier)


def add_modeling_code(model: PreTrainedModel, folder: Path) -> None:
    """Copy a pruned model's modeling file into its checkpoint, which then loads elsewhere with trust_remote_code."""
    if type(model.config) in AUTO_MAPS:
        shutil.copy(sys.modules[type(model).__module__].__file__, folder)

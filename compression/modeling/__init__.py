"""Model classes whose layers differ in width, registered with the Auto classes.

Each file is self-contained (torch and transformers only) and travels inside the checkpoints it describes.
"""

import shutil
import sys
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from compression.modeling import pruned_bert, pruned_decoder, pruned_distilbert

# Configuration -> the model's classes, by the Auto class that finds them.
CLASSES = {
    pruned_bert.PrunedBertConfig: {
        AutoModel: pruned_bert.PrunedBertModel,
        AutoModelForSequenceClassification: pruned_bert.PrunedBertForSequenceClassification,
    },
    pruned_distilbert.PrunedDistilBertConfig: {
        AutoModel: pruned_distilbert.PrunedDistilBertModel,
        AutoModelForSequenceClassification: pruned_distilbert.PrunedDistilBertForSequenceClassification,
    },
    **{
        config: {AutoModel: base, AutoModelForCausalLM: language_model}
        for config, (base, language_model) in pruned_decoder.CLASSES.items()
    },
}
for _config, _classes in CLASSES.items():
    AutoConfig.register(_config.model_type, _config)
    for _auto, _model in _classes.items():
        _auto.register(_config, _model)

# The families' classes for embedding tables in 8 or 4 bits; each modeling file has its own.
PACKED_TABLES = (pruned_bert.PackedEmbedding, pruned_distilbert.PackedEmbedding)


def pruned_classes(model_type: str, auto_class: type) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Configuration and class of the pruned form of a model, dense or pruned.

    Raises:
        KeyError: there is none.
    """
    pruned = {config.model_type: config for config in CLASSES}
    config = pruned[f"pruned_{model_type.removeprefix('pruned_')}"]
    return config, CLASSES[config][auto_class]


def auto_map(config_class: type[PretrainedConfig]) -> dict[str, str]:
    """What `config.json` says about where the classes are: in the file that lies beside it."""
    classes = {"AutoConfig": config_class} | {auto.__name__: model for auto, model in CLASSES[config_class].items()}
    return {name: f"{found.__module__.rpartition('.')[2]}.{found.__name__}" for name, found in classes.items()}


def add_modeling_code(model: PreTrainedModel, folder: Path) -> None:
    """Copy a pruned model's modeling file into its checkpoint, which then loads elsewhere with trust_remote_code."""
    if type(model.config) in CLASSES:
        shutil.copy(sys.modules[type(model).__module__].__file__, folder)

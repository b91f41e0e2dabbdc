"""Model classes whose layers differ in width, registered with the Auto classes.

Each file is self-contained (torch and transformers only) and travels inside the checkpoints it describes.
"""

import inspect
import shutil
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from compression.modeling import pruned_decoder, pruned_encoder
from compression.modeling.pruned_encoder import FactorizedEmbedding, PackedEmbedding, fix_4bit_layers

__all__ = [
    "CLASSES",
    "FactorizedEmbedding",
    "PackedEmbedding",
    "add_modeling_code",
    "fix_4bit_layers",
    "pruned_classes",
]

# Configuration -> the model's classes, by the Auto class that finds them.
CLASSES: dict[type[PretrainedConfig], dict[type[Any], type[PreTrainedModel]]] = {
    **{
        config: {AutoModel: base, AutoModelForSequenceClassification: classifier}
        for config, (base, classifier) in pruned_encoder.CLASSES.items()
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


def pruned_classes(model_type: str, auto_class: type) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Configuration and class of the pruned form of a model, dense or pruned.

    Raises:
        KeyError: there is none.
    """
    pruned = {config.model_type: config for config in CLASSES}
    config = pruned[f"pruned_{model_type.removeprefix('pruned_')}"]
    return config, CLASSES[config][auto_class]


def add_modeling_code(model: PreTrainedModel, folder: Path) -> None:
    """Copy a pruned model's modeling file into its checkpoint, which then loads elsewhere with trust_remote_code.

    To be called before the model is saved there: `auto_map` of its config says from then on where the classes are.
    """
    config = model.config
    if type(config) in CLASSES:
        file = Path(inspect.getfile(type(model)))
        classes: dict[type, type] = {AutoConfig: type(config), **CLASSES[type(config)]}
        config.auto_map = {auto.__name__: f"{file.stem}.{found.__name__}" for auto, found in classes.items()}
        shutil.copy(file, folder)

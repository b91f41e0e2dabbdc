"""Masks -> physically smaller Linear layers."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.modeling import AUTO_MAPS, PRUNED_CLASSES
from compression.structures import HEADS, NEURONS, LayerParts, layers_of


def shrink(model: PreTrainedModel, kept: dict[str, list[Tensor]]) -> PreTrainedModel:
    """Build the physically smaller model.

    Args:
        model: a BERT or DistilBERT classifier, dense or already pruned; it is left as it is.
        kept: for heads and neurons one bool tensor [structures] per layer, True where the structure stays.

    Returns:
        A model of the pruned class of that family, in evaluation mode, whose logits equal the masked model's.

    Raises:
        UserError: an architecture that is not supported.
    """
    small = copy.deepcopy(model)
    for parts, heads, neurons in zip(layers_of(small), kept[HEADS], kept[NEURONS], strict=True):
        _shrink_layer(parts, heads, neurons)
    config_class, model_class = PRUNED_CLASSES[model.config.model_type]
    config = _pruned_config(config_class, model, layers_of(small))
    pruned = model_class(config)
    pruned.load_state_dict(small.state_dict())
    return pruned.to(model.device).eval()


def _shrink_layer(parts: LayerParts, heads: Tensor, neurons: Tensor) -> None:
    for kind, kept in ((HEADS, heads), (NEURONS, neurons)):
        inner, outer = parts.split(kind)
        for linear in inner:
            slice_linear(linear, rows=kept.repeat_interleave(linear.out_features // len(kept)))
        slice_linear(outer, columns=kept.repeat_interleave(outer.in_features // len(kept)))


@torch.no_grad()
def slice_linear(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Cut a Linear layer down in place to the rows (outputs) or columns (inputs) that a bool mask keeps."""
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight[rows].clone())
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows].clone())
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight[:, columns].clone())
    linear.out_features, linear.in_features = linear.weight.shape


def _pruned_config(config_class, model: PreTrainedModel, layers: list[LayerParts]):
    values = model.config.to_dict()
    for name in ("model_type", "architectures", "per_layer_config", "transformers_version"):
        values.pop(name, None)
    values |= {
        "head_size": layers[0].head_size,
        "auto_map": AUTO_MAPS[config_class],
        "per_layer_config": {
            index: {"num_attention_heads": parts.heads, "intermediate_size": parts.neurons}
            for index, parts in enumerate(layers)
        },
    }
    return config_class(**values)

"""Ways that choose nothing or little: small models, and the same share of every layer."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from classifier_pruning_methods.ground import Ground, keep_largest, macs_of, sizes_within
from compression import importance
from compression.structures import ENCODER_KINDS, layers_of
from compression.student_init import with_layers


@torch.no_grad()
def norms(model: PreTrainedModel) -> dict[str, list[Tensor]]:
    """Squared L2 norm of the weights of every structure, by kind and layer [structures]."""
    scores: dict[str, list[Tensor]] = {kind: [] for kind in ENCODER_KINDS}
    for parts in layers_of(model):
        for kind in ENCODER_KINDS:
            inner, outer = parts.split(kind)
            scores[kind].append(importance.l2([rows.module.weight for rows in inner], outer.weight, parts.count(kind)))
    return scores


def narrowed(model: PreTrainedModel, macs: int) -> PreTrainedModel:
    """The model with as many heads and neurons in each layer as the MACs allow, those of the largest norms."""
    parts = layers_of(model)
    return keep_largest(model, norms(model), sizes_within(parts[0], macs / len(parts)))


def evenly_spaced(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model with so many of its layers, evenly spaced from the first."""
    whole = len(layers_of(model))
    return with_layers(model, [place * whole // count for place in range(count)])


def uniform_magnitude(ground: Ground, macs: int) -> PreTrainedModel:
    """Every layer loses the same share of heads and neurons, those of the smallest norms, all at once."""
    return narrowed(ground.teacher, macs)


def small_layers(ground: Ground, macs: int) -> PreTrainedModel:
    """The fewest layers of the teacher that have the MACs, made narrower where they have more."""
    share = macs / macs_of(ground.teacher)
    layers = math.ceil(share * len(layers_of(ground.teacher)) - 1e-9)
    return narrowed(evenly_spaced(ground.teacher, layers), macs)


def small_scratch(ground: Ground, macs: int) -> PreTrainedModel:
    """A small model with random weights, embeddings too: as much less deep as it is less wide."""
    share = macs / macs_of(ground.teacher)
    layers = math.ceil(math.sqrt(share) * len(layers_of(ground.teacher)))
    small = narrowed(evenly_spaced(ground.teacher, layers), macs)
    torch.manual_seed(ground.seed)
    return type(small)(small.config).to(small.device).eval()

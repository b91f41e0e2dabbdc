"""FLAP: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", arXiv:2312.11983.

A column j of an output projection W is worth its fluctuation, the weighted variance of what goes into it (WIFV):
Var(x_j) |W_j|^2. Within each layer's attention and MLP the scores are standardised; a group has the mean over the
columns of its query heads. All structures of all layers compete then, and those of least score go (AL-AM). What goes is
replaced by its mean: the output projection gains the bias W_gone E[x_gone], which counts as parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.allocation import Cost, Pool, keep
from compression.decoder import decoder_of
from compression.structures import DECODER_KINDS, layers_of, spread
from compression.surgery import cut_layer
from llm_pruning_methods.ground import Ground, Kept, layer_parameters, note_inputs

Moments = dict[tuple[str, int], tuple[Tensor, Tensor]]


def flap(ground: Ground, ratio: float) -> PreTrainedModel:
    """Remove what fluctuates least, and put its mean in its place."""
    model = ground.load()
    moments = ground.once("moments of inputs", lambda: moments_of(model, ground.windows))
    kept = chosen(model, moments, ratio)
    compensate(model, moments, kept)
    decoder = decoder_of(model)
    for index in range(len(decoder.layers)):
        cut_layer(decoder, index, {kind: kept[kind][index] for kind in DECODER_KINDS})
    return model


def moments_of(model: PreTrainedModel, windows: Tensor) -> Moments:
    """Mean and variance of what goes into each output projection, [columns] each, by kind and layer.

    Args:
        windows: token ids [count, length].
    """
    sums: dict[tuple[str, int], Any] = {}

    def note(kind: str, index: int, inputs: Tensor) -> None:
        seen = torch.stack([inputs.double().sum(0), inputs.double().square().sum(0)])
        sums[kind, index] = sums.get((kind, index), 0) + seen

    note_inputs(model, windows, note)
    means = {place: seen / windows.numel() for place, seen in sums.items()}
    return {
        place: (mean.float(), (square - mean.square()).clamp_min(0).float()) for place, (mean, square) in means.items()
    }


def chosen(model: PreTrainedModel, moments: Moments, ratio: float) -> Kept:
    """What stays when structures of least standardised fluctuation go, the biases' share of the parameters too."""
    layers, hidden = layers_of(model), model.config.hidden_size
    pools = [
        Pool(fluctuation(parts, kind, moments[kind, index][1]), Cost(parts.structure_parameters(kind)), 0)
        for kind in DECODER_KINDS
        for index, parts in enumerate(layers)
    ]
    biases = hidden * len(pools)
    stays = iter(keep(pools, ratio + biases / layer_parameters(model)))
    return {kind: [next(stays) for _ in layers] for kind in DECODER_KINDS}


def fluctuation(parts: Any, kind: str, variance: Tensor) -> Tensor:
    """Standardised scores [structures] of a layer's groups or channels.

    Args:
        variance: of what goes into the output projection [columns].
    """
    scores = variance * parts.split(kind)[1].weight.detach().float().square().sum(0)
    standard = (scores - scores.mean()) / scores.std().clamp_min(torch.finfo(scores.dtype).tiny)
    return standard.view(parts.count(kind), -1).mean(1).cpu()


@torch.no_grad()
def compensate(model: PreTrainedModel, moments: Moments, kept: Kept) -> None:
    """Give output projections of which columns go the bias that stands for these at their mean."""
    for index, parts in enumerate(layers_of(model)):
        for kind in DECODER_KINDS:
            stays, outer = kept[kind][index], parts.split(kind)[1]
            if not stays.all():
                gone = ~spread(stays, outer.in_features).to(outer.weight.device)
                mean = moments[kind, index][0][gone]
                bias = (outer.weight[:, gone].float() @ mean).to(outer.weight.dtype)
                outer.bias = nn.Parameter(bias if outer.bias is None else outer.bias + bias)

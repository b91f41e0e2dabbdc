"""A text on its way through a model's layers, one layer at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.decoder import decoder_of


def layer_inputs(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The states [windows, length, hidden] that enter each layer and leave the last one, and each layer's options.

    Args:
        ids: token ids [windows, length].
    """
    decoder = decoder_of(model)
    state, options = decoder.first_input(ids)
    states = [state]
    for layer, option in zip(decoder.layers, options, strict=True):
        states.append(layer(states[-1], **option))
    return states, options


class LayerStream:
    """Text on its way through a model's layers: the states that enter one layer, batch by batch, without gradients.

    A pruner that goes from the first layer to the last runs each layer once for what is behind it.

    Args:
        windows: token ids [count, length]. The states of all of them are held.
        layer: which layer the text stands before at first.

    Iterating gives (token ids [windows, length], states [windows, length, hidden], each layer's options) of each batch.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, batch_size: int = 1, layer: int = 0):
        self.decoder, self.layer = decoder_of(model), 0
        with torch.no_grad():
            batches = windows.to(model.device).split(batch_size)
            self.batches = [(ids, *self.decoder.first_input(ids)) for ids in batches]
        for _ in range(layer):
            self.advance()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[dict[str, Any]]]]:
        return iter(self.batches)

    @torch.no_grad()
    def advance(self) -> None:
        """Go through the layer that the text stands before."""
        layer, place = self.decoder.layers[self.layer], self.layer
        self.batches = [(ids, layer(state, **options[place]), options) for ids, state, options in self.batches]
        self.layer += 1

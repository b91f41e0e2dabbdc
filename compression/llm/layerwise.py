"""A text on its way through a model's layers, one layer at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class _Noting(nn.Module):
    """In a layer's place: notes what the layer is given, and runs nothing."""

    def forward(self, state: Tensor, **options: Any) -> Tensor:
        self.state, self.options = state, options
        return state


def first_input(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The state [windows, length, hidden] that enters the first layer, and each layer's options; no layer is run.

    Layers differ in their options where some attend to a sliding window and others to all.

    Args:
        ids: token ids [windows, length].
    """
    layers, noting = model.model.layers, nn.ModuleList(_Noting() for _ in model.model.layers)
    model.model.layers = noting
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        model.model.layers = layers
    return noting[0].state, [layer.options for layer in noting]


def layer_inputs(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The states [windows, length, hidden] that enter each layer and leave the last one, and each layer's options.

    Args:
        ids: token ids [windows, length].
    """
    state, options = first_input(model, ids)
    states = [state]
    for layer, option in zip(model.model.layers, options, strict=True):
        states.append(layer(states[-1], **option))
    return states, options


class Entering:
    """Text on its way through a model's layers: the states that enter one layer, batch by batch, without gradients.

    A pruner that goes from the first layer to the last runs each layer once for what is behind it.

    Args:
        windows: token ids [count, length]. The states of all of them are held.
        layer: which layer the text stands before at first.

    Iterating gives (token ids [windows, length], states [windows, length, hidden], each layer's options) of each batch.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, batch_size: int = 1, layer: int = 0):
        self.model, self.layer = model, 0
        with torch.no_grad():
            batches = windows.to(model.device).split(batch_size)
            self.batches = [(ids, *first_input(model, ids)) for ids in batches]
        for _ in range(layer):
            self.advance()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[dict[str, Any]]]]:
        return iter(self.batches)

    @torch.no_grad()
    def advance(self) -> None:
        """Go through the layer that the text stands before."""
        layer, place = self.model.model.layers[self.layer], self.layer
        self.batches = [(ids, layer(state, **options[place]), options) for ids, state, options in self.batches]
        self.layer += 1

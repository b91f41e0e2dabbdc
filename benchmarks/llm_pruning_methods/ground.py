"""What every method gets, and how much of a model is left."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.decoder import Decoder
from compression.hooks import hooked
from compression.llm.layerwise import final_states
from compression.llm.text import CalibrationText
from compression.structures import DECODER_KINDS, layers_of
from compression.surgery import shrink_decoder

Kept = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Ground:
    """The one ground that all methods start from.

    Attributes:
        load: gives a fresh copy of the dense model, which a method may use up.
        text: of calibration. Methods that look at it once look at `windows`; choices between models are made by
            `text.held_out`.
        search: settings of a search over the allocation, named as on the command line of run_global_pruning.py.
        known: what was computed of the dense model, for other ratios and methods.
    """

    load: Callable[[], PreTrainedModel]
    text: CalibrationText
    search: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def windows(self) -> Tensor:
        """Token ids [count, length] of all that scores and repairs are computed on."""
        return torch.cat([self.text.scores, self.text.repair])

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed once."""
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]


def layer_parameters(model: PreTrainedModel) -> int:
    """Parameters of the decoder layers, but for their norms: biases, and matrices between layers, count too."""
    named = Decoder(model).layers.named_parameters()
    return sum(parameter.numel() for name, parameter in named if "norm" not in name)


def everything(model: PreTrainedModel) -> Kept:
    """All structures stay, by kind and layer bool [structures]."""
    return {
        kind: [torch.ones(parts.count(kind), dtype=torch.bool) for parts in layers_of(model)] for kind in DECODER_KINDS
    }


def without_layers(model: PreTrainedModel, gone: list[int]) -> PreTrainedModel:
    """The model, which is used up, without these layers."""
    kept = everything(model)
    for kind in DECODER_KINDS:
        for index in gone:
            kept[kind][index][:] = False
    return shrink_decoder(model, kept)


@torch.no_grad()
def note_inputs(model: PreTrainedModel, windows: Tensor, note: Callable[[str, int, Tensor], None]) -> None:
    """Go through a text, window by window, and hand on what goes into the layers' output projections.

    Args:
        windows: token ids [count, length].
        note: called for each window with the kind of structures, the layer, and the inputs [length, columns] in fp32.
    """

    def hook(kind: str, index: int):
        return lambda _, given: note(kind, index, given[0].flatten(0, -2).float())

    places = [
        (kind, index, parts.split(kind)[1])
        for index, parts in enumerate(layers_of(model))
        for kind in DECODER_KINDS
        if parts.count(kind)
    ]
    with hooked(outer.register_forward_pre_hook(hook(kind, index)) for kind, index, outer in places):
        go_through(model, windows)


@torch.no_grad()
def go_through(model: PreTrainedModel, windows: Tensor) -> None:
    """Run the layers on a text, for what hooks see there."""
    for _ in final_states(model, windows, 1, "calibration text"):
        pass

"""A text on its way through a model's layers, one layer at a time.

Of a model whose layers are offloaded each layer is fetched once for the whole text, and the states between layers are
kept where the layers are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.progress import progress
from compression.runtime import own_share, processes
from compression.sharding import is_spread

# Token ids [windows, length], states [windows, length, hidden] and each layer's options of one batch.
Batch = tuple[Tensor, Tensor, list[dict[str, Any]]]


class LayerStream:
    """The states of a text that enter one layer, batch by batch, without gradients.

    A pruner that goes from the first layer to the last runs each layer once for what is behind it.

    Args:
        windows: token ids [count, length]. The states of all of them are kept.
        batch_size: windows per forward pass.
        layer: which layer the text stands before at first.
        places: the first window of each batch; None: of this process's share of all batches.

    Attributes:
        ids: token ids [windows, length] of each batch.
        options: each layer's, of each batch.

    Iterating gives a `Batch` for each batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        batch_size: int = 1,
        layer: int = 0,
        places: list[int] | None = None,
    ):
        self.decoder, self.layer = decoder_of(model), 0
        self.states = self.decoder.states()
        self.ids: list[Tensor] = []
        self.options: list[list[dict[str, Any]]] = []
        self.places = own_batches(windows, batch_size) if places is None else places
        with torch.no_grad():
            for number, place in enumerate(self.places):
                ids = windows[place : place + batch_size].to(model.device)
                state, options = self.decoder.first_input(ids)
                self.ids.append(ids)
                self.options.append(options)
                self.states.put(number, state)
        self.advance_to(layer)

    def __iter__(self) -> Iterator[Batch]:
        for number, (ids, options) in enumerate(zip(self.ids, self.options, strict=True)):
            yield ids, self.states.get(number), options

    @torch.no_grad()
    def advance(self) -> None:
        """Go through the layer that the text stands before."""
        with self.decoder.present(self.layer) as layer:
            for number, options in enumerate(self.options):
                self.states.put(number, layer(self.states.get(number), **options[self.layer]))
        self.layer += 1

    def advance_to(self, layer: int) -> None:
        """Go through the layers before this one."""
        while self.layer < layer:
            self.advance()


def own_batches(windows: Tensor, batch_size: int) -> list[int]:
    """The first window of each batch that this process works on: of several processes each has a share."""
    return own_share(range(0, len(windows), batch_size))


def streams(model: PreTrainedModel, windows: Tensor, batch_size: int, description: str) -> Iterator[LayerStream]:
    """This process's share of a text, in parts that go through the layers one after the other.

    Of an offloaded model the share is one part, so that each layer is fetched once; else each batch is one, so that few
    states are held.

    Args:
        windows: token ids [count, length].
        description: of what is done with it, for the progress bar.
    """
    places = own_batches(windows, batch_size)
    parts = [[place] for place in places] if decoder_of(model).offload is None else [places]
    for part in progress(parts, description):
        yield LayerStream(model, windows, batch_size, places=part)


def final_states(
    model: PreTrainedModel, windows: Tensor, batch_size: int, description: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each batch of this process's share of a text: its first window, its token ids [windows, length], and the
    states [windows, length, hidden] behind the final norm.

    Those of an offloaded model take no gradient.

    Args:
        windows: token ids [count, length].
        description: of what is done with it, for the progress bar.
    """
    decoder = decoder_of(model)
    if decoder.offload is None:
        mine = own_batches(windows, batch_size)
        for place in progress(mine, description):
            ids = windows[place : place + batch_size].to(model.device)
            yield place, ids, decoder.final_states(ids)
        batches = -(-len(windows) // batch_size)
        if is_spread(model) and len(mine) < -(-batches // processes().num_processes):
            # Processes gather a layer together: one that has no batch any more goes along with the others.
            decoder.final_states(windows[:1].to(model.device))
    else:
        for stream in streams(model, windows, batch_size, description):
            stream.advance_to(len(decoder.layers))
            for place, (ids, state, _) in zip(stream.places, stream, strict=True):
                yield place, ids, decoder.norm(state)

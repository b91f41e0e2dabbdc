"""Ways that take out whole layers; each takes the fewest that reach the share.

- By removal perplexity: the layers whose removal alone costs least.
- SLEB (Song et al. 2024, arXiv:2402.09025): one layer after the other, each the one without which what is left has the
  least perplexity.
- ShortGPT (Men et al. 2024, arXiv:2403.03853): the layers of least block influence, 1 - cos(state before, state
  behind), mean over the text's tokens.
"""

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.hooks import hooked
from compression.llm.removal import removal_perplexities
from compression.structures import layers_of
from llm_pruning_methods.ground import Ground, go_through, without_layers


def by_removal(ground: Ground, ratio: float) -> PreTrainedModel:
    """Take out the layers without which the dense model's perplexity is least."""
    model = ground.load()
    costs = ground.once("removal", lambda: removal_perplexities(model, ground.text.held_out))["layer"]
    return without_layers(model, enough(model, torch.tensor(costs).argsort(stable=True).tolist(), ratio))


def short_gpt(ground: Ground, ratio: float) -> PreTrainedModel:
    """Take out the layers that change their input's direction least."""
    model = ground.load()
    influence = ground.once("block influence", lambda: block_influence(model, ground.windows))
    return without_layers(model, enough(model, influence.argsort(stable=True).tolist(), ratio))


def sleb(ground: Ground, ratio: float) -> PreTrainedModel:
    """Take out layer after layer, each time the one that the others miss least."""
    model = ground.load()
    # A smaller share's layers are the first of a larger one's.
    order: list[int] = ground.once("order of SLEB", list)
    while not reached(model, order, ratio):
        order.append(next_to_go(model, order, ground.text.held_out))
    return without_layers(model, enough(model, order, ratio))


def next_to_go(model: PreTrainedModel, gone: list[int], windows: Tensor) -> int:
    """The layer without which the model, already without others, has the least perplexity."""
    decoder = decoder_of(model)
    stay = [index for index in range(len(decoder.layers)) if index not in gone]
    with decoder.in_place_of_layers([decoder.layers[index] for index in stay]):
        costs = removal_perplexities(model, windows, parts=("layer",))["layer"]
    return stay[int(torch.tensor(costs).argmin())]


@torch.no_grad()
def block_influence(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """1 - cos(state before, state behind) of each layer, mean over the tokens of windows [count, length]: [layers]."""
    layers = decoder_of(model).layers
    influence = torch.zeros(len(layers), dtype=torch.double)

    def add(index: int, _: nn.Module, given: tuple[Tensor, ...], state: Tensor) -> None:
        cosines = F.cosine_similarity(given[0].float(), state.float(), dim=-1)
        influence[index] += (1 - cosines).double().sum().cpu()

    with hooked(layer.register_forward_hook(partial(add, index)) for index, layer in enumerate(layers)):
        go_through(model, windows)
    return influence / windows.numel()


def enough(model: PreTrainedModel, order: list[int], ratio: float) -> list[int]:
    """The first layers of an order that make up the share."""
    return next(order[:count] for count in range(len(order) + 1) if reached(model, order[:count], ratio))


def reached(model: PreTrainedModel, gone: Iterable[int], ratio: float) -> bool:
    """Whether these layers have the share of all layers' parameters."""
    sizes = [parts.parameters for parts in layers_of(model)]
    return sum(sizes[index] for index in gone) >= ratio * sum(sizes) * (1 - 1e-9)

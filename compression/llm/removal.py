"""What removing a whole layer, attention or MLP costs: the perplexity without it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.decoder import Decoder, decoder_of
from compression.llm.layerwise import LayerStream, streams
from compression.llm.perplexity import exp_of_mean, token_losses
from compression.runtime import sum_over_processes
from compression.structures import CHANNELS, GROUPS


@torch.no_grad()
def removal_perplexities(
    model: PreTrainedModel, windows: Tensor, batch_size: int = 1, parts: tuple[str, ...] = ("layer", "attention", "mlp")
) -> dict[str, float | list[float]]:
    """Perplexity with one layer, one attention or one MLP removed, for all of them.

    What goes into a layer does not depend on what comes after it, so the text goes through the layers once, and at each
    layer the texts that lack a part of it join those that lack a part of an earlier one. Several processes share the
    windows.

    Args:
        windows: token ids [count, length].
        batch_size: windows per batch; behind a removed part as many for each of `parts`.
        parts: which of layer, attention and mlp are looked at.

    Returns:
        dense: of the model as it is; and each of the parts: a list over layers. What is removed leaves the bias of its
        output projection behind, as in the smaller model.

    Raises:
        UserError: a perplexity is not finite, and without which part.
    """
    depth = len(decoder_of(model).layers)
    dense = torch.zeros((), dtype=torch.double)
    totals = torch.zeros(depth, len(parts), dtype=torch.double)
    for stream in streams(model, windows, batch_size, "removal analysis"):
        dense_here, totals_here = _losses_without(stream, parts)
        dense, totals = dense + dense_here, totals + totals_here
    sum_over_processes(dense, totals)
    tokens = len(windows) * (windows.shape[1] - 1)
    perplexities: dict[str, float | list[float]] = {
        "dense": exp_of_mean(model, dense.item(), tokens, "the dense model")
    }
    for place, part in enumerate(parts):
        removed = ((index, f"the model without {_named(part, index)}") for index in range(depth))
        perplexities[part] = [exp_of_mean(model, totals[index, place].item(), tokens, what) for index, what in removed]
    return perplexities


def _losses_without(stream: LayerStream, parts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The summed losses of a text before the first layer: of the model as it is, and without parts, [layers, parts]."""
    decoder = stream.decoder
    depth = len(decoder.layers)
    lacking = decoder.states()  # by batch and layer: the text without each of the parts, one behind the other
    repeated = [ids.repeat(len(parts), 1) for ids in stream.ids]
    repeated_options = [decoder.first_input(ids)[1] for ids in repeated]
    for index in range(depth):
        with decoder.present(index) as layer:
            for number, (_, state, options) in enumerate(stream):
                for earlier in range(index):
                    passed = layer(lacking.get((number, earlier)), **repeated_options[number][index])
                    lacking.put((number, earlier), passed)
                without = torch.cat([_without(part, decoder, layer, state, options[index]) for part in parts])
                lacking.put((number, index), without)
            stream.advance()
    dense, totals = torch.zeros((), dtype=torch.double), torch.zeros(depth, len(parts), dtype=torch.double)
    for number, (ids, state, _) in enumerate(stream):
        dense += token_losses(decoder.logits, decoder.norm(state), ids).double().sum().cpu()
        for index in range(depth):
            losses = token_losses(decoder.logits, decoder.norm(lacking.take((number, index))), repeated[number])
            totals[index] += losses.double().view(len(parts), -1).sum(1).cpu()
    return dense, totals


def _named(part: str, index: int) -> str:
    return f"layer {index}" if part == "layer" else f"the {part} of layer {index}"


def _without(part: str, decoder: Decoder, layer: nn.Module, state: Tensor, options: dict[str, Any]) -> Tensor:
    """What leaves a layer that lacks the part; the bias of the part's output projection stays."""
    if part == "mlp":
        state = state + decoder.attention_branch(layer, state, options)
    else:
        state = state + decoder.constant(layer, GROUPS)
    if part == "attention":
        return state + decoder.mlp_branch(layer, state)
    return state + decoder.constant(layer, CHANNELS)

"""What removing a whole layer, attention or MLP costs: the perplexity without it."""

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from compression.decoder import Decoder, decoder_of
from compression.llm.layerwise import layer_inputs
from compression.llm.perplexity import exp_of_mean, token_losses
from compression.structures import CHANNELS, GROUPS, output_bias


@torch.no_grad()
def removal_perplexities(
    model: PreTrainedModel, windows: Tensor, batch_size: int = 1, parts: tuple[str, ...] = ("layer", "attention", "mlp")
) -> dict[str, float | list[float]]:
    """Perplexity with one layer, one attention or one MLP removed, for all of them.

    What goes into a layer does not depend on what comes after it: the states that enter each layer are computed once
    per batch, and only the layers behind a removed part are run again, for all parts of one layer at once.

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
    decoder = decoder_of(model)
    layers = decoder.layers
    totals = torch.zeros(len(layers), len(parts), dtype=torch.double)
    dense, tokens = 0.0, 0
    for ids in tqdm(windows.split(batch_size), desc="removal analysis", leave=False, disable=None):
        ids = ids.to(model.device)
        states, options = layer_inputs(model, ids)
        repeated = ids.repeat(len(parts), 1)
        _, repeated_options = decoder.first_input(repeated)
        dense += token_losses(decoder.logits, decoder.norm(states[-1]), ids).double().sum().item()
        tokens += len(ids) * (ids.shape[1] - 1)
        for index, layer in enumerate(layers):
            state = torch.cat([_without(part, decoder, layer, states[index], options[index]) for part in parts])
            for later, option in zip(layers[index + 1 :], repeated_options[index + 1 :], strict=True):
                state = later(state, **option)
            losses = token_losses(decoder.logits, decoder.norm(state), repeated)
            totals[index] += losses.double().view(len(parts), -1).sum(1).cpu()
    perplexities: dict[str, float | list[float]] = {"dense": exp_of_mean(model, dense, tokens, "the dense model")}
    for place, part in enumerate(parts):
        removed = ((index, f"the model without {_named(part, index)}") for index in range(len(layers)))
        perplexities[part] = [exp_of_mean(model, totals[index, place].item(), tokens, what) for index, what in removed]
    return perplexities


def _named(part: str, index: int) -> str:
    return f"layer {index}" if part == "layer" else f"the {part} of layer {index}"


def _without(part: str, decoder: Decoder, layer: nn.Module, state: Tensor, options: dict[str, Any]) -> Tensor:
    """What leaves a layer that lacks the part; the bias of the part's output projection stays."""
    if part == "mlp":
        state = state + decoder.attention_branch(layer, state, options)
    else:
        state = state + output_bias(layer, GROUPS)
    if part == "attention":
        return state + decoder.mlp_branch(layer, state)
    return state + output_bias(layer, CHANNELS)

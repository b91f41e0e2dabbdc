"""What other layers in place of single ones do to the divergence from the dense model, to second order.

With D the divergence summed over a text and d_t the change of what a layer gives at token t, the change of D is

    sum_t g_t d_t + 1/2 sum_t (h_t d_t)^2,

g the gradient of D by what the layer gives, and h that of the loss of tokens drawn from the model's own predictions.
The second sum is the Fisher information's quadratic form with what couples different tokens left out, as in
`scoring.Fisher`; it stands for the second derivative of D around a pruned model as it does around the dense one, where
the first sum is zero. It takes one pass forward, two passes back from the last states, and of each change that layer
alone, not the rest of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.distillation import soft_label_losses
from compression.llm.head import TRAINED_ROWS, in_blocks
from compression.llm.layerwise import LayerStream
from compression.llm.score_passes import drawn_tokens
from compression.runtime import sum_over_processes


@dataclass(frozen=True)
class _Batch:
    """Of some windows, by layer: what it is given with what options, what it gives, and the gradients by that."""

    states: list[Tensor]
    options: list[dict[str, Any]]
    slopes: Sequence[Tensor]
    scatters: Sequence[Tensor]


class Expansion:
    """The divergence around a model as it is when this is made. Several processes share the windows.

    Of each window states and two gradients are kept for each layer.

    Args:
        windows: token ids [count, length].
        dense_states: see `agreement.last_states`; of the same head.
        seed: of the tokens that are drawn.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, dense_states: Tensor, batch_size: int = 1, seed: int = 0
    ):
        self.tokens = windows[:, 1:].numel()
        chances = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed))
        stream = LayerStream(model, windows, batch_size)
        self.batches = [
            _expanded(model, state, options, *(part[place : place + len(ids)] for part in (dense_states, chances)))
            for place, (ids, state, options) in zip(stream.places, stream, strict=True)
        ]

    @torch.no_grad()
    def change(self, index: int, layer: nn.Module) -> float:
        """What another layer in place of one adds to KL(dense || model), the mean over predicted tokens."""
        total = torch.zeros(1, dtype=torch.double)
        for batch in self.batches:
            given = layer(batch.states[index], **batch.options[index]).float() - batch.states[index + 1].float()
            total += (batch.slopes[index] * given).sum().item()
            total += (batch.scatters[index] * given).sum(-1).square().sum().item() / 2
        sum_over_processes(total)
        return total.item() / self.tokens


def _expanded(
    model: PreTrainedModel, state: Tensor, options: list[dict[str, Any]], dense_states: Tensor, chances: Tensor
) -> _Batch:
    """One batch's states and gradients.

    Args:
        state: what enters the first layer, [windows, length, hidden].
        chances: what tokens are drawn by, [windows, length].
    """
    decoder = decoder_of(model)
    states = [state.detach().requires_grad_()]
    with torch.enable_grad():
        for layer, option in zip(decoder.layers, options, strict=True):
            states.append(layer(states[-1], **option))
        last = decoder.norm(states[-1])
    divergence = _by_states(partial(_divergences, decoder.logits), last, dense_states.to(last))
    drawn = _by_states(partial(_losses_of_drawn, decoder.logits), last, chances[..., None].to(last.device))
    slopes = torch.autograd.grad(last, states[1:], divergence, retain_graph=True)
    scatters = torch.autograd.grad(last, states[1:], drawn)
    return _Batch([each.detach() for each in states], options, slopes, scatters)


def _by_states(losses: Callable[[Tensor, Tensor], Tensor], last: Tensor, given: Tensor) -> Tensor:
    """The gradient of the sum of predicted tokens' losses by a model's last states, [windows, length, hidden].

    Args:
        losses: of states and of what is given for them, both [tokens, ...], gives [tokens].
    """
    gradient = torch.zeros_like(last)
    with torch.enable_grad():
        states = last.detach()[:, :-1].flatten(0, 1).requires_grad_()
        total = in_blocks(losses, states, given[:, :-1].flatten(0, 1), size=TRAINED_ROWS).sum()
    gradient[:, :-1] = torch.autograd.grad(total, states)[0].view_as(gradient[:, :-1])
    return gradient


def _divergences(logits_of: Callable[[Tensor], Tensor], states: Tensor, dense_states: Tensor) -> Tensor:
    with torch.no_grad():
        dense = logits_of(dense_states)
    return soft_label_losses(logits_of(states), dense, temperature=1.0)


def _losses_of_drawn(logits_of: Callable[[Tensor], Tensor], states: Tensor, chances: Tensor) -> Tensor:
    labels = drawn_tokens(logits_of, states.detach(), chances)
    return F.cross_entropy(logits_of(states).float(), labels, reduction="none")

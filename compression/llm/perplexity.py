"""Perplexity of a language model on a text, in the standard way.

The text is cut into consecutive windows of one length; in each, every token but the first is predicted from those
before it. The perplexity is exp of the mean negative log-likelihood over all predicted tokens. It depends on the
window's length, which goes with every figure.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.llm.head import in_blocks
from compression.llm.layerwise import final_states
from compression.runtime import UserError, sum_over_processes


def token_losses(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of each token but the first, [windows, length - 1], in fp32.

    Args:
        logits_of: the language-model head, [rows, hidden] -> [rows, vocabulary].
        hidden: [windows, length, hidden], the model's last hidden states. ids: [windows, length].
        labels: [windows, length - 1], other tokens in the place of those that follow.
    """
    rows, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), (ids[:, 1:] if labels is None else labels).reshape(-1)

    def losses(states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(states).float(), labels, reduction="none")

    return in_blocks(losses, rows, targets).view(len(ids), -1)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int = 1) -> float:
    """Perplexity on windows of token ids [count, length]. Several processes share the windows.

    Raises:
        UserError: it is not finite, and from which window on.
    """
    decoder, total = decoder_of(model), torch.zeros((), dtype=torch.double)
    for place, ids, states in final_states(model, windows, batch_size, "perplexity"):
        losses = token_losses(decoder.logits, states, ids)
        check_losses(model, losses, place, "perplexity")
        total += losses.double().sum().cpu()
    sum_over_processes(total)
    return exp_of_mean(model, total.item(), len(windows) * (windows.shape[1] - 1), "the model")


def exp_of_mean(model: PreTrainedModel, total: float, tokens: int, what: str) -> float:
    """Perplexity, from the sum of the losses of a number of tokens.

    Args:
        what: what the losses are those of, as an error says it.

    Raises:
        UserError: it is not finite.
    """
    value = torch.tensor(total / tokens, dtype=torch.double).exp().item()
    if not math.isfinite(value):
        raise UserError(f"perplexity of {what}: the mean loss is {total / tokens:g}; {suspect(model)}")
    return value


def check_losses(model: PreTrainedModel, losses: Tensor, first: int, use: str) -> None:
    """Raise UserError where losses [windows, tokens] are not finite; it names the window, counted from `first`."""
    wrong = ~losses.isfinite().all(1)
    if wrong.any():
        window = first + int(wrong.int().argmax())
        raise UserError(f"{use}: the loss of window {window} is not finite; {suspect(model)}")


def suspect(model: PreTrainedModel) -> str:
    """Why a model's results are not finite, and what to do: the end of an error's line."""
    name, weight = getattr(model, "name_or_path", "") or "the model", broken_weight(model)
    if weight is not None:
        return f"{name} has values that are not finite in {weight}: take a sound checkpoint"
    return f"the weights of {name} are finite, so something overflows in {str(model.dtype)[6:]}: try --dtype float32"


def broken_weight(model: PreTrainedModel) -> str | None:
    """The first parameter that holds a value that is not finite; those of offloaded layers are checked where they are
    fetched."""
    there = ((name, values) for name, values in model.named_parameters() if not values.is_meta)
    return next((name for name, values in there if not values.isfinite().all()), None)

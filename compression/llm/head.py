"""A language model's head, block by block: the logits of all tokens are never held at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Tokens whose logits are held at a time. In fp32 a vocabulary of 49,152 takes 25 MB for them: larger blocks are
# slower on the CPU, for the allocator gives blocks above 32 MB back to the system and asks for them anew each time.
LOGIT_ROWS = 128
# The same in training: with small results kept between them, the allocator finds no place for the next of such blocks,
# so that a step of 32 of them took 2.7 GB; blocks above 32 MB it gives back, and half a GB does.
TRAINED_ROWS = 256


def in_blocks(function: Callable[..., Tensor], *rows: Tensor, size: int = LOGIT_ROWS) -> Tensor:
    """What a function of rows gives, computed for a few rows at a time.

    With gradients, what is computed inside is not kept but computed again in the backward pass.

    Args:
        function: takes as many tensors as are given, each [block, ...], and gives one [block, ...]. It must not draw
            random numbers.
        rows: tensors [rows, ...].
        size: rows of a block.

    Returns:
        [rows, ...].
    """
    blocks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*block) for block in blocks])
    kept = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([kept(*block) for block in blocks])


class Within(nn.Module):
    """A model whose forward pass is whatever is computed with its parts.

    What wraps a model for several processes sees its forward pass alone: a loss that is computed with the head, block
    by block, has to be part of it.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        """`compute` of the model and these inputs."""
        return compute(self.model, *inputs)


def before_predicted(states: Tensor, targets: Tensor) -> Tensor:
    """The states [tokens, hidden] that the predicted tokens are predicted from, each at the place before it.

    Args:
        states: [rows, length, hidden]. targets: bool [rows, length], which tokens are predicted; never a first one.
    """
    return states[:, :-1][targets[:, 1:]]

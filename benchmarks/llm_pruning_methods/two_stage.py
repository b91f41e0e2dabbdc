"""2SSP: Sandri et al. 2025, "2SSP: A Two-Stage Framework for Structured Pruning of LLMs", arXiv:2501.17771.

1. Width: every MLP loses as many channels, those whose activations have the least L2 norm over a window's tokens, mean
   over the windows.
2. Depth: whole attentions go one after the other, each the one without which what is left has the least perplexity.

Of L layers round(L s^(|MLP| / (1.5 |attention|))) lose their attention, s being the share of the layers' parameters to
remove and |.| a part's parameters; the MLPs make up the rest.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.allocation import all_but_least
from compression.llm.removal import removal_perplexities
from compression.runtime import UserError
from compression.structures import CHANNELS, GROUPS, LayerParts, layers_of
from compression.surgery import shrink_decoder
from llm_pruning_methods.ground import Ground, everything, note_inputs

# What the paper calls alpha: the balance of both stages.
BALANCE = 1.5


def two_stage(ground: Ground, ratio: float) -> PreTrainedModel:
    """Narrow all MLPs, then take out attentions.

    Raises:
        UserError: the MLPs cannot make up the share.
    """
    model = ground.load()
    norms = ground.once("norms of activations", lambda: activation_norms(model, ground.windows))
    attentions, channels = balance(layers_of(model), ratio)
    kept = everything(model) | {CHANNELS: [all_but_least(scores, channels) for scores in norms]}
    small = shrink_decoder(model, kept)
    for _ in range(attentions):
        small = without_attention(small, next_to_go(small, ground.text.held_out))
    return small


def activation_norms(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """Of each layer's channels the L2 norm of what goes into the down projection, mean over windows: [channels]."""
    norms = [torch.zeros(parts.channels) for parts in layers_of(model)]

    def note(kind: str, index: int, inputs: Tensor) -> None:
        if kind == CHANNELS:
            norms[index] += inputs.norm(dim=0).cpu() / len(windows)

    note_inputs(model, windows, note)
    return norms


def balance(layers: list[LayerParts], ratio: float) -> tuple[int, int]:
    """How many attentions go, and how many channels of each MLP.

    Raises:
        UserError: no channel would be left.
    """
    attention, mlp = (layers[0].count(kind) * layers[0].structure_parameters(kind) for kind in (GROUPS, CHANNELS))
    attentions = round(len(layers) * ratio ** (mlp / attention / BALANCE))
    rest = ratio * len(layers) * (attention + mlp) - attentions * attention
    channels = max(0, -int(-rest * (1 - 1e-9) // (len(layers) * layers[0].structure_parameters(CHANNELS))))
    if channels >= layers[0].channels:
        raise UserError(f"2SSP leaves no MLP where a share of {ratio:g} goes")
    return attentions, channels


def next_to_go(model: PreTrainedModel, windows: Tensor) -> int:
    """The layer without whose attention the model has the least perplexity, of those that have one."""
    costs = torch.tensor(removal_perplexities(model, windows, parts=("attention",))["attention"])
    has = torch.tensor([parts.groups > 0 for parts in layers_of(model)])
    return int(costs.masked_fill(~has, torch.inf).argmin())


def without_attention(model: PreTrainedModel, index: int) -> PreTrainedModel:
    """The model, which is used up, without a layer's attention."""
    kept = everything(model)
    kept[GROUPS][index][:] = False
    return shrink_decoder(model, kept)

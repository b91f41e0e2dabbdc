"""Hold pruned structures at zero while training goes on.

The output projections of attention and FFN are replaced by layers that zero the columns of pruned structures in the
forward pass. The weights themselves stay, so a structure can come back, and the gradient is taken as if the mask were
one, so that a pruned structure's importance can still be measured.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.structures import ENCODER_KINDS, output_projections, spread


class _StraightThroughMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class MaskedLinear(nn.Linear):
    """A Linear layer [out, columns], with an equal share of the columns for each of `count` structures.

    The columns of pruned structures count as zero.
    It shares the parameters of the layer it replaces; the mask is no part of the state dict.
    """

    mask: Tensor

    def __init__(self, linear: nn.Linear, count: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.count = count
        self.register_buffer("mask", torch.ones_like(linear.weight[0]), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _StraightThroughMask.apply(self.weight, self.mask), self.bias)

    @property
    def kept(self) -> Tensor:
        """[structures], True where the structure is in use."""
        return self.mask.view(self.count, -1)[:, 0] > 0

    def keep(self, kept: Tensor) -> None:
        """Set which structures are in use, [structures] bool."""
        self.mask.copy_(spread(kept, self.in_features))

    def freeze_pruned(self) -> None:
        """Zero the gradient of the pruned columns: it is there to be measured, not to train what is not in use."""
        gradient_of(self).mul_(self.mask)

    def to_linear(self) -> nn.Linear:
        """A plain Linear layer with the same parameters; pruned columns are zero in it."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        with torch.no_grad():
            linear.weight.mul_(self.mask)
        return linear


def gradient_of(linear: nn.Linear) -> Tensor:
    """The gradient of a layer's weight, behind the backward pass."""
    assert linear.weight.grad is not None
    return linear.weight.grad


Masks = dict[str, dict[int, MaskedLinear]]
"""By kind and layer the masked output projection; parts that are gone are not there."""


def add_masks(model: nn.Module) -> Masks:
    """Replace the output projections by masked ones, all structures in use."""
    masked: Masks = {kind: {} for kind in ENCODER_KINDS}
    for kind, index, parent, name, count in output_projections(model):
        masked[kind][index] = MaskedLinear(getattr(parent, name), count)
        setattr(parent, name, masked[kind][index])
    return masked


def remove_masks(model: nn.Module) -> None:
    """Put plain Linear layers back; the columns of pruned structures become zero in the weights."""
    for _, _, parent, name, _ in output_projections(model):
        setattr(parent, name, getattr(parent, name).to_linear())

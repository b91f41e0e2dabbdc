"""Least-squares repair: output projections that make up for the structures that go.

Going through the layers in order, with the inputs that the already pruned and repaired layers before it give, each
output projection is solved anew so that from the structures that stay it gives what it gave from all of them:
minimise |X_kept W' - X W|^2 + ridge * |W' - W_kept|^2. All of it is known from the Gram matrix X^T X alone, so the text
is gone through once, layer by layer, and no activations are stored but the states between layers.
"""

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from compression.calibration import Entering, Seen
from compression.importance import RIDGE
from compression.structures import HEADS, KINDS, layers_of


@torch.no_grad()
def repair(model: PreTrainedModel, kept: dict[str, list[Tensor]], windows: Tensor, batch_size: int = 1) -> None:
    """Solve the output projections of every pruned layer anew, in place; the columns of what goes become zero.

    The text should have many times as many tokens as a layer has neurons: with few it is fitted, not the language.

    Args:
        kept: for heads and neurons one bool tensor [structures] per layer, True where the structure stays.
        windows: token ids [count, length].
    """
    entering = Entering(model, windows, batch_size)
    for index, layer in enumerate(tqdm(model.model.layers, desc="repair", leave=False, disable=None)):
        repair_layer(model, index, {kind: kept[kind][index] for kind in KINDS}, entering)
        entering.advance(layer)


@torch.no_grad()
def repair_layer(model: PreTrainedModel, index: int, kept: dict[str, Tensor], entering: Entering) -> None:
    """As `repair`, of one layer.

    Args:
        kept: for heads and neurons a bool tensor [structures], True where the structure stays.
        entering: the text, standing before that layer.
    """
    layer, parts = model.model.layers[index], layers_of(model)[index]
    for kind in KINDS:
        mask, outer = kept[kind], parts.split(kind)[1] if parts.count(kind) else None
        if outer is not None and not mask.all():
            columns = mask.repeat_interleave(outer.in_features // len(mask)).to(outer.weight.device)
            inputs = ((layer, state, options) for _, state, options in entering)
            outer.weight.copy_(_solve(outer.weight, _gram(outer, inputs, attention=kind == HEADS), columns))


def _gram(outer: nn.Linear, inputs, attention: bool) -> Tensor:
    """X^T X [columns, columns] in fp32 of what goes into an output projection."""
    gram = torch.zeros(outer.in_features, outer.in_features, device=outer.weight.device)

    def add(_, given: tuple[Tensor]) -> None:
        rows = given[0].flatten(0, -2)
        gram.add_(rows.T @ rows)
        if attention:
            raise Seen  # the MLP behind it is of no interest yet

    handle = outer.register_forward_pre_hook(add)
    try:
        for layer, state, option in inputs:
            try:
                layer(state, **option)
            except Seen:
                pass
    finally:
        handle.remove()
    return gram


def _solve(weight: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """The projection [out, in] with these columns only that comes nearest to the whole one.

    The ridge is on the change of the columns that stay: where the text says little, they keep their weights.
    """
    solved = torch.zeros_like(weight)
    if columns.any():
        kept = gram[columns][:, columns].double()
        kept.diagonal().add_(RIDGE * kept.diagonal().mean())
        lost = gram[columns][:, ~columns].double() @ weight[:, ~columns].double().T
        change = torch.linalg.solve(kept, lost).T
        solved[:, columns] = (weight[:, columns].double() + change).to(weight.dtype)
    return solved

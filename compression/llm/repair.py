"""Least-squares repair: output projections that make up for the structures that go.

Going through the layers in order, with the inputs that the already pruned and repaired layers before it give, each
output projection is solved anew so that from the structures that stay it gives what it gave from all of them:
minimise |X_kept W' - X W|^2 + ridge * |W' - W_kept|^2. All of it is known from the Gram matrix X^T X alone, so the text
is gone through once, layer by layer, and no activations are stored but the states between layers.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.least_squares import refit
from compression.llm.layerwise import LayerStream
from compression.llm.perplexity import broken_weight, suspect
from compression.runtime import UserError, sum_over_processes
from compression.structures import DECODER_KINDS, GROUPS, layers_of, spread


class StopForward(Exception):
    """The rest of a layer's forward pass is of no interest."""


def repairing(
    model: PreTrainedModel, kept: dict[str, list[Tensor]], windows: Tensor, batch_size: int = 1
) -> Callable[[int], None]:
    """Solve the output projections of pruned layers anew, in place; the columns of what goes become zero.

    The text should have many times as many tokens as a layer has channels: with few it is fitted, not the language.

    Args:
        kept: for groups and channels one bool tensor [structures] per layer, True where the structure stays.
        windows: token ids [count, length].

    Returns:
        A function of a layer's index, to be called for one layer after the other. It raises UserError where a
        projection has no finite solution.
    """
    stream = LayerStream(model, windows, batch_size)
    progress = tqdm(total=len(layers_of(model)), desc="repair", leave=False, disable=None)

    def step(index: int) -> None:
        with stream.decoder.present(index):
            repair_layer(model, index, {kind: kept[kind][index] for kind in DECODER_KINDS}, stream)
            stream.advance()
        progress.update()

    return step


@torch.no_grad()
def repair_layer(model: PreTrainedModel, index: int, kept: dict[str, Tensor], stream: LayerStream) -> None:
    """As `repairing`, of one layer.

    Args:
        kept: for groups and channels a bool tensor [structures], True where the structure stays.
        stream: the text, standing before that layer, whose weights are on the device.

    Raises:
        UserError: a projection has no finite solution.
    """
    layer, parts = decoder_of(model).layers[index], layers_of(model)[index]
    for kind in DECODER_KINDS:
        stays, outer = kept[kind], parts.split(kind)[1] if parts.count(kind) else None
        if outer is not None and not stays.all():
            columns = spread(stays, outer.in_features).to(outer.weight.device)
            inputs = ((state, options[index]) for _, state, options in stream)
            gram = _gram(layer, outer, inputs, attention=kind == GROUPS)
            sum_over_processes(gram)
            solved = refit(outer.weight, gram, columns)
            if not solved.isfinite().all():
                singular = gram.isfinite().all() and broken_weight(model) is None
                cure = "raise --repair_samples or take --compensation none" if singular else suspect(model)
                raise UserError(f"--compensation lstsq: what repairs the {kind} of layer {index} is not finite; {cure}")
            outer.weight.copy_(solved)


def _gram(
    layer: nn.Module, outer: nn.Linear, inputs: Iterable[tuple[Tensor, dict[str, Any]]], attention: bool
) -> Tensor:
    """X^T X [columns, columns] in fp32 of what goes into a layer's output projection.

    Args:
        inputs: states [windows, length, hidden] that enter the layer, and its options.
        attention: whether it is the attention's.
    """
    gram = torch.zeros(outer.in_features, outer.in_features, device=outer.weight.device)

    def add(_: nn.Module, given: tuple[Tensor]) -> None:
        rows = given[0].flatten(0, -2)
        gram.add_(rows.T @ rows)
        if attention:
            raise StopForward  # the MLP behind it is of no interest yet

    with outer.register_forward_pre_hook(add):
        for state, options in inputs:
            with suppress(StopForward):
                layer(state, **options)
    return gram

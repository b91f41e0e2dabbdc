"""Least-squares repair: output projections that make up for the structures that go.

Going through the layers in order, with the inputs that the already pruned and repaired layers before it give, each
output projection is solved anew so that from the structures that stay it gives what it gave from all of them:
minimise |X_kept W' - X W|^2 + ridge * |D (W' - W_kept)|^2, D^2 the diagonal of X_kept^T X_kept. All of it is known from
the Gram matrix X^T X alone, so the text is gone through once, layer by layer, and no activations are stored but the
states between layers.

Where the projection has a bias, that takes over the mean of what goes (An et al. 2024, "FLAP"), in the same solution:
with inputs counted from their mean, the bias gains (W - W') mean, and the ridge is on W' alone.

Which structures of a layer go is known before, or only how many: then those that what stays makes up for best do.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.importance import contributions, keep_in_rounds
from compression.least_squares import refit
from compression.llm.layerwise import LayerStream
from compression.llm.perplexity import broken_weight, suspect
from compression.progress import progress
from compression.runtime import UserError, sum_over_processes
from compression.structures import DECODER_KINDS, GROUPS, layers_of, spread

LocalRanking = Literal["obs", "product"]


class StopForward(Exception):
    """The rest of a layer's forward pass is of no interest."""


@dataclass(frozen=True)
class Moments:
    """Second moments of what goes into an output projection, over a text.

    Attributes:
        gram: [columns, columns] in fp32, X^T X; of inputs counted from their mean where the projection has a bias.
        mean: [columns] in fp32, where it has one.
    """

    gram: Tensor
    mean: Tensor | None


@dataclass(frozen=True)
class LocalChoice:
    """Which of a layer's structures go when it is known how many: optimal brain surgeon on what comes into the layer.

    Args:
        rounds: see `importance.keep_in_rounds`.
        scores: for groups and channels a score [structures] per layer. A structure's cost is then its score times the
            share of what it gives that the others cannot make up for; with None, it is what they cannot make up for.
    """

    rounds: int
    scores: dict[str, list[Tensor]] | None = None

    def stays(self, kind: str, index: int, weight: Tensor, gram: Tensor, stays: Tensor) -> Tensor:
        """As many structures of a layer as are given, those to keep: bool [structures], on the CPU.

        Args:
            weight: of the layer's output projection. gram: of what goes into it, see `Moments`.
        """
        removed = int((~stays).sum())
        if removed in (0, len(stays)):
            return stays
        factors = None
        if self.scores is not None:
            given = contributions(weight, gram, len(stays))
            factors = self.scores[kind][index].to(gram) / given.clamp_min(torch.finfo(gram.dtype).tiny)
        return keep_in_rounds(weight, gram, len(stays), removed, min(self.rounds, removed), factors).cpu()


def repairing(
    model: PreTrainedModel,
    kept: dict[str, list[Tensor]],
    windows: Tensor,
    batch_size: int = 1,
    choice: LocalChoice | None = None,
) -> Callable[[int], None]:
    """Solve the output projections of pruned layers anew, in place; the columns of what goes become zero.

    The text should have many times as many tokens as a layer has channels: with few it is fitted, not the language.

    Args:
        kept: for groups and channels one bool tensor [structures] per layer, True where the structure stays.
        windows: token ids [count, length].
        choice: chooses anew which structures of a layer stay, as many as `kept` says; it is put right layer by layer.

    Returns:
        A function of a layer's index, to be called for one layer after the other. It raises UserError where a
        projection has no finite solution.
    """
    stream = LayerStream(model, windows, batch_size)
    bar = progress(None, "repair", len(layers_of(model)))

    def step(index: int) -> None:
        with stream.decoder.present(index):
            stays = repair_layer(model, index, {kind: kept[kind][index] for kind in DECODER_KINDS}, stream, choice)
            stream.advance()
        for kind in DECODER_KINDS:
            kept[kind][index] = stays[kind]
        bar.update()

    return step


@torch.no_grad()
def repair_layer(
    model: PreTrainedModel, index: int, kept: dict[str, Tensor], stream: LayerStream, choice: LocalChoice | None = None
) -> dict[str, Tensor]:
    """As `repairing`, of one layer.

    Args:
        kept: for groups and channels a bool tensor [structures], True where the structure stays.
        stream: the text, standing before that layer, whose weights are on the device.

    Returns:
        `kept`, or what was chosen in its place.

    Raises:
        UserError: a projection has no finite solution.
    """
    parts, kept = layers_of(model)[index], dict(kept)
    for kind in DECODER_KINDS:
        if parts.count(kind) and not kept[kind].all():
            outer, moments = parts.split(kind)[1], moments_of(model, index, kind, stream)
            if choice is not None:
                kept[kind] = choice.stays(kind, index, outer.weight, moments.gram, kept[kind])
            weight, bias = refitted(model, index, kind, moments, kept[kind])
            outer.weight.copy_(weight)
            if bias is not None:
                outer.bias.copy_(bias)
    return kept


def refitted(
    model: PreTrainedModel, index: int, kind: str, moments: Moments, stays: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The weight of a layer's output projection with the columns of some structures only, the others zero, see
    `least_squares.refit`; and its bias, if it has one.

    Args:
        stays: bool [structures].

    Raises:
        UserError: it is not finite.
    """
    outer: Any = layers_of(model)[index].split(kind)[1]
    weight, bias = refit(outer.weight, moments.gram, spread(stays, outer.in_features).to(outer.weight.device)), None
    if moments.mean is not None:
        bias = outer.bias + ((outer.weight.float() - weight.float()) @ moments.mean).to(outer.bias.dtype)
    if not all(values.isfinite().all() for values in (weight, bias) if values is not None):
        singular = moments.gram.isfinite().all() and broken_weight(model) is None
        cure = "raise --repair_samples or take --compensation none" if singular else suspect(model)
        raise UserError(f"--compensation lstsq: what repairs the {kind} of layer {index} is not finite; {cure}")
    return weight, bias


def moments_of(model: PreTrainedModel, index: int, kind: str, stream: LayerStream) -> Moments:
    """Moments of what goes into the output projection of a kind's structures, of all processes' text.

    Args:
        stream: the text, standing before the layer `index`, whose weights are on the device.
    """
    layer, outer = decoder_of(model).layers[index], layers_of(model)[index].split(kind)[1]
    inputs = ((state, options[index]) for _, state, options in stream)
    gram, total = _sums(layer, outer, inputs, attention=kind == GROUPS)
    sum_over_processes(gram, total)
    if outer.bias is None:
        return Moments(gram, None)
    mean = (total[:-1] / total[-1]).float()
    return Moments(gram.addr_(mean, total[:-1].float(), alpha=-1), mean)


def _sums(
    layer: nn.Module, outer: nn.Linear, inputs: Iterable[tuple[Tensor, dict[str, Any]]], attention: bool
) -> tuple[Tensor, Tensor]:
    """Of what goes into a layer's output projection: X^T X [columns, columns] in fp32, and the sums [columns + 1] in
    fp64 of its rows and of their number.

    Args:
        inputs: states [windows, length, hidden] that enter the layer, and its options.
        attention: whether it is the attention's.
    """
    gram = torch.zeros(outer.in_features, outer.in_features, device=outer.weight.device)
    total = torch.zeros(outer.in_features + 1, dtype=torch.double, device=outer.weight.device)

    def add(_: nn.Module, given: tuple[Tensor]) -> None:
        rows = given[0].flatten(0, -2)
        gram.add_(rows.T @ rows)
        total[:-1] += rows.sum(0, dtype=torch.double)
        total[-1] += len(rows)
        if attention:
            raise StopForward  # the MLP behind it is of no interest yet

    with outer.register_forward_pre_hook(add):
        for state, options in inputs:
            with suppress(StopForward):
                layer(state, **options)
    return gram, total

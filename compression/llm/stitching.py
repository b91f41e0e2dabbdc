"""Models put together from layers that were pruned and repaired once at each of a few sizes.

Each layer's attention and MLP are solved anew for every size (see `repair`), on the text as it comes through layers
that are pruned as one given allocation says. A model of any sizes then costs no more than to run it, and that of the
given allocation is what pruning and repair would make of it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.llm.repair import LocalChoice, refitted
from compression.llm.repair_text import RepairText
from compression.progress import progress
from compression.saved_parts import Cached
from compression.structures import DECODER_KINDS, layers_of, spread
from compression.surgery import cut_layer

# How many structures stay, by kind; of each layer one.
Counts = list[dict[str, int]]
# Which structures stay, bool [structures], for each number of them; by kind, of each layer one.
Choices = list[dict[str, dict[int, Tensor]]]
# Of one layer, by names such as channels.96.weight: what stays, and the output projection's columns and bias.
Solutions = dict[str, Tensor]


def choices_of(counts: Sequence[dict[str, set[int]]], stays: Callable[[int, str, int], Tensor]) -> Choices:
    """The choices of all sizes that layers are to have.

    Args:
        counts: by kind, of each layer.
        stays: of a layer, a kind and how many, which of its structures stay, bool [structures].
    """
    return [
        {kind: {count: stays(layer, kind, count) for count in sorted(each)} for kind, each in sizes.items()}
        for layer, sizes in enumerate(counts)
    ]


def solutions_of(
    text: Callable[[], RepairText], choices: Choices, path: Counts, choice: LocalChoice | None, cached: Cached
) -> list[Solutions]:
    """Each layer's output projections for all sizes; the model stays as it is.

    Args:
        text: makes what the solutions are fitted to, before the first layer; only where one is not there yet.
        choices: the sizes, and what stays at each; those of `path` are among them.
        path: the sizes that text goes through on its way.
        choice: chooses anew which structures stay at each size.
        cached: by the number of a layer.

    Raises:
        UserError: a projection has no finite solution.
    """
    texts: list[RepairText] = []
    found: list[Solutions] = []

    def make(index: int) -> Solutions:
        if not texts:
            texts.append(text())
        while texts[0].layer < index:  # those that an earlier run made are gone through only where another is needed
            layer = texts[0].layer
            _solve(texts[0], {kind: {} for kind in DECODER_KINDS}, path[layer], found[layer], None)
        return _solve(texts[0], choices[index], path[index], {}, choice)

    for index in progress(range(len(choices)), "sizes of layers"):
        found.append(cached(str(index), partial(make, index)))
    return found


@torch.no_grad()
def _solve(
    text: RepairText,
    choices: dict[str, dict[int, Tensor]],
    path: dict[str, int],
    solutions: Solutions,
    choice: LocalChoice | None,
) -> Solutions:
    """Those of the layer that a text stands before, beside some that are known; the text goes through it."""
    model, index, solutions = text.model, text.layer, dict(solutions)
    for kind in DECODER_KINDS:
        changed = {
            count: stays for count, stays in choices[kind].items() if len(stays) and (text.owes or not stays.all())
        }
        moments = text.enter(kind, wanted=bool(changed))
        if moments is not None:
            outer = layers_of(model)[index].split(kind)[1]
            for count, stays in changed.items():
                if choice is not None:
                    stays = choice.stays(kind, index, outer.weight, moments.gram, stays)
                weight, bias = refitted(text, kind, moments, stays)
                columns = spread(stays, outer.in_features).to(weight.device)
                solutions |= {f"{kind}.{count}.stays": stays, f"{kind}.{count}.weight": weight[:, columns]}
                if bias is not None:
                    solutions[f"{kind}.{count}.bias"] = bias
        with placed(model, index, {kind: path[kind]}, solutions):
            text.leave(kind, changed=f"{kind}.{path[kind]}.stays" in solutions)
    return solutions


@contextmanager
def placed(model: PreTrainedModel, index: int, counts: dict[str, int], solutions: Solutions) -> Iterator[None]:
    """A layer computes as if it had these numbers of structures, for a while: the columns of the others are zero."""
    outers = [parts.split(kind)[1] for parts in [layers_of(model)[index]] for kind in counts if parts.count(kind)]
    before = [(outer.weight, outer.bias) for outer in outers]
    try:
        put(model, index, counts, solutions)
        yield
    finally:
        for outer, (weight, bias) in zip(outers, before, strict=True):
            outer.weight, outer.bias = weight, bias


def put(model: PreTrainedModel, index: int, counts: dict[str, int], solutions: Solutions) -> dict[str, Tensor]:
    """Give a layer's output projections the weights of these sizes, zero where a structure does not stay.

    Returns:
        Which structures stay, bool [structures], of the kinds whose projection is another one.
    """
    stays = {}
    for kind, count in counts.items():
        if (kept := solutions.get(f"{kind}.{count}.stays")) is not None:
            stays[kind], outer = kept, layers_of(model)[index].split(kind)[1]
            weight = torch.zeros_like(outer.weight)
            weight[:, spread(kept, outer.in_features)] = solutions[f"{kind}.{count}.weight"].to(weight.device)
            outer.weight = nn.Parameter(weight)
            if outer.bias is not None:
                outer.bias = nn.Parameter(solutions[f"{kind}.{count}.bias"].to(weight.device))
    return stays


def placing(
    model: PreTrainedModel, kept: dict[str, list[Tensor]], solutions: Sequence[Solutions]
) -> Callable[[int], None]:
    """As `repair.repairing`, with what is solved already.

    Args:
        kept: as many structures as the solutions are of; which, is put right layer by layer.
    """

    def step(index: int) -> None:
        counts = {kind: int(kept[kind][index].sum()) for kind in DECODER_KINDS}
        for kind, stays in put(model, index, counts, solutions[index]).items():
            kept[kind][index] = stays

    return step


@torch.no_grad()
def layer_of(model: PreTrainedModel, index: int, counts: dict[str, int], solutions: Solutions) -> nn.Module:
    """A copy of a layer that has these sizes; what it has in common with the model's own is not copied."""
    decoder = decoder_of(model)
    own, layers = decoder.layers[index], decoder.layers
    shared = {id(part): part for part in chain(own.parameters(), own.buffers(), [model.config])}
    try:
        layers[index] = copy.deepcopy(own, dict(shared))
        cut_layer(decoder, index, put(model, index, counts, solutions))
        return layers[index]
    finally:
        layers[index] = own


@contextmanager
def stitched(model: PreTrainedModel, counts: Counts, solutions: list[Solutions]) -> Iterator[None]:
    """A model is that of these sizes for a while."""
    layers = [layer_of(model, index, *made) for index, made in enumerate(zip(counts, solutions, strict=True))]
    with decoder_of(model).in_place_of_layers(layers):
        yield

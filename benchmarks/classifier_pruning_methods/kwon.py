"""Pruning without training: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers".

arXiv:2204.09656. Masks m are put on heads and neurons. The loss that is added by setting some to zero is taken to
second order with the empirical Fisher information of the masks, from gradients of single rows.

1. Search: with the diagonal of it alone, the heads and the neurons that stay within the MACs and lose least.
2. Rearrangement: with the blocks of each layer's heads and neurons, structures change places with pruned ones.
3. Tuning: the masks of what stays become the numbers that bring each attention and FFN nearest to the dense model's.

One thing is other than there: every layer keeps a head and a neuron, since a pruned model has some of each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from classifier_pruning_methods.ground import Ground, check_enough, structure_macs, top
from compression.hooks import hooked
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, family_of, layers_of
from compression.surgery import shrink

# Of the damped least squares; and masks outside of this range are not taken, with all that would come after them.
DAMPING, LARGEST = 1.0, 10.0


def kwon(ground: Ground, macs: int) -> PreTrainedModel:
    """Mask search, rearrangement and tuning; no training."""
    gradients = mask_gradients(ground)
    kept = {
        kind: [rearranged(mask, layer) for mask, layer in zip(masks, gradients[kind], strict=True)]
        for kind, masks in search(ground.teacher, gradients, macs).items()
    }
    small = shrink(ground.teacher, kept)
    tune(small, ground)
    return small


def mask_gradients(ground: Ground) -> dict[str, list[Tensor]]:
    """Derivative of each row's loss by a mask on each structure, by kind and layer [rows, structures].

    A mask scales what its structure hands to the output projection, so its derivative is the sum of input times
    gradient over tokens and the structure's columns; over all rows that is `importance.mask_gradient`.
    """
    model, found = ground.load(), {kind: [[] for _ in layers_of(ground.teacher)] for kind in ENCODER_KINDS}
    for inputs, labels in ground.batches(model):
        with inputs_of(model, grad=True) as seen:
            nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="sum").backward()
        for (kind, index), x in seen.items():
            count = layers_of(model)[index].count(kind)
            products = (x.detach() * x.grad).sum(1).view(len(labels), count, -1)
            found[kind][index].append(products.sum(-1).cpu())
        model.zero_grad(set_to_none=True)
    return {kind: [torch.cat(batches) for batches in layers] for kind, layers in found.items()}


@contextmanager
def inputs_of(model: PreTrainedModel, grad: bool = False) -> Iterator[dict[tuple[str, int], Tensor]]:
    """What goes into the output projections in a forward pass, by kind and layer [rows, tokens, columns]."""
    seen: dict[tuple[str, int], Tensor] = {}

    def note(place: tuple[str, int]):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[place] = inputs[0]
            if grad:
                inputs[0].retain_grad()

        return hook

    places = {
        (kind, index): parts.split(kind)[1] for index, parts in enumerate(layers_of(model)) for kind in ENCODER_KINDS
    }
    with hooked(outer.register_forward_pre_hook(note(place)) for place, outer in places.items()):
        yield seen


def search(model: PreTrainedModel, gradients: dict[str, list[Tensor]], macs: int) -> dict[str, list[Tensor]]:
    """Which structures stay (the paper's algorithm 1): for each number of heads the neurons fill up what is left.

    Returns:
        by kind and layer bool [structures].

    Raises:
        UserError: not even one of each in every layer.
    """
    fisher = {kind: torch.stack([layer.square().mean(0) for layer in layers]) for kind, layers in gradients.items()}
    first = layers_of(model)[0]
    head, neuron = (structure_macs(first, kind) for kind in (HEADS, NEURONS))
    check_enough(macs, len(fisher[HEADS]) * (head + neuron), len(fisher[HEADS]))
    # The best of each layer stay: they come before all others.
    ranked = {kind: scores + top_of_each(scores) * scores.sum() for kind, scores in fisher.items()}
    kept_loss = {kind: fisher[kind].flatten()[order(ranked[kind])].cumsum(0) for kind in ENCODER_KINDS}
    heads = torch.arange(len(fisher[HEADS]), fisher[HEADS].numel() + 1)
    neurons = ((macs - heads * head) // neuron).clamp(max=fisher[NEURONS].numel())
    possible = neurons >= len(fisher[NEURONS])
    heads, neurons = heads[possible], neurons[possible]
    best = (kept_loss[HEADS][heads - 1] + kept_loss[NEURONS][neurons - 1]).argmax()
    counts = {HEADS: int(heads[best]), NEURONS: int(neurons[best])}
    return {kind: [*top(ranked[kind], counts[kind])] for kind in ENCODER_KINDS}


def order(scores: Tensor) -> Tensor:
    return scores.flatten().argsort(descending=True)


def top_of_each(scores: Tensor) -> Tensor:
    """1 at the highest score of each row, else 0."""
    return torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0)


def rearranged(kept: Tensor, gradients: Tensor) -> Tensor:
    """Structures change places with pruned ones where the layer's block of the Fisher information says so.

    The pruned structures P cost sum over P x P of E[g g^T]. From the least important on, each one that stays joins
    them, and the one whose leaving lowers the cost most leaves.

    Args:
        kept: bool [structures]. gradients: [rows, structures].
    """
    if kept.all():
        return kept
    block = gradients.T.double() @ gradients.double()
    pruned = ~kept
    towards = block[pruned].sum(0)  # with all of P, [structures]
    importance = block.diagonal()
    for place in importance.argsort()[kept[importance.argsort()]].tolist():
        pruned[place] = True
        towards += block[place]
        lowered = torch.where(pruned, 2 * towards - importance, -torch.inf)
        leaves = int(lowered.argmax())
        pruned[leaves] = False
        towards -= block[leaves]
    return ~pruned


@torch.no_grad()
def tune(small: PreTrainedModel, ground: Ground) -> None:
    """Scale the columns of the output projections of a pruned model, in place, part by part from the first layer.

    Each part is brought nearest to what the dense model has behind it and its residual connection, given what the
    tuned parts before it hand over (least squares over all tokens).
    """
    real = [inputs["attention_mask"].bool() for inputs, _ in ground.batches(small)]
    states, dense_states = (first_states(model, ground) for model in (small, ground.teacher))
    for index, parts in enumerate(layers_of(small)):
        dense_outers = {kind: layers_of(ground.teacher)[index].split(kind)[1] for kind in ENCODER_KINDS}
        dense = [run_layer(ground.teacher, index, state) for state in dense_states]
        for kind in ENCODER_KINDS:
            outer, sums = parts.split(kind)[1], NormalEquations(parts.split(kind)[1], parts.count(kind))
            for state, (_, dense_seen), tokens in zip(states, dense, real, strict=True):
                _, seen = run_layer(small, index, state)
                x, residual = seen[kind]
                dense_x, dense_residual = dense_seen[kind]
                wanted = dense_outers[kind](dense_x) + dense_residual - residual - outer.bias
                sums.add(x[tokens], wanted[tokens])
            mask = sums.solve()
            if not mask.abs().max() <= LARGEST:
                return
            outer.weight.mul_(mask.to(outer.weight.dtype).repeat_interleave(outer.in_features // len(mask)))
        states = [state.moved(run_layer(small, index, state)[0]) for state in states]
        dense_states = [state.moved(hidden) for state, (hidden, _) in zip(dense_states, dense, strict=True)]


class NormalEquations:
    """A^T A and A^T b of one output projection: column s of A is what structure s adds to each output."""

    def __init__(self, outer: nn.Linear, count: int):
        self.weight = outer.weight.double().unflatten(1, (count, -1))  # [out, structures, columns of one]
        self.gram = self.weight.new_zeros(count, count)
        self.product = self.weight.new_zeros(count)

    def add(self, x: Tensor, wanted: Tensor) -> None:
        """Take in tokens: what goes into the projection [tokens, columns] and what should come out [tokens, out]."""
        added, wanted = x.double().unflatten(-1, (len(self.product), -1)), wanted.double()
        if added.shape[-1] == 1:  # each adds a number times its column: no need to write all outputs down
            columns, numbers = self.weight[..., 0], added[..., 0]
            self.gram += (columns.T @ columns) * (numbers.T @ numbers)
            self.product += ((wanted @ columns) * numbers).sum(0)
        else:
            outputs = torch.einsum("tsc,osc->sto", added, self.weight).flatten(1)
            self.gram += outputs @ outputs.T
            self.product += outputs @ wanted.flatten()

    def solve(self) -> Tensor:
        """The masks 1 + r [structures], damped towards r = 0."""
        damped = self.gram + DAMPING * torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        return 1 + torch.linalg.solve(damped, self.product - self.gram.sum(1))


@dataclass(frozen=True)
class State:
    """A batch on its way through the layers: what the next one is called with."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def moved(self, hidden: Tensor) -> "State":
        """The state in front of the next layer."""
        return State((hidden, *self.arguments[1:]), self.options)


def first_states(model: PreTrainedModel, ground: Ground) -> list[State]:
    """Each batch in front of the first layer."""
    states: list[State] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        states.append(State(arguments, options))

    with hooked([layers(model)[0].register_forward_pre_hook(note, with_kwargs=True)]):
        for inputs, _ in ground.batches(model):
            model(**inputs)
    return states


def run_layer(model: PreTrainedModel, index: int, state: State) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Hidden states behind a layer, and for each kind what goes into its output projection, and the residual."""
    layer, seen = layers(model)[index], {}
    with hooked(
        layer.get_submodule(family_of(model).path(kind).rpartition(".")[0]).register_forward_pre_hook(
            lambda _, inputs, kind=kind: seen.update({kind: inputs})
        )
        for kind in ENCODER_KINDS
    ):
        return layer(*state.arguments, **state.options), seen


def layers(model: PreTrainedModel) -> nn.ModuleList:
    return attrgetter(family_of(model).layers)(model)

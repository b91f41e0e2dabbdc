"""Second moments of what goes into and comes out of the output projections, while an encoder is trained.

They say what the removal of structures costs when those that stay are fitted anew (`importance.removal_costs`), and how
to fit them (`least_squares.refit`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression import importance
from compression.classifier.masks import Masks, gradient_of
from compression.hooks import hooked
from compression.least_squares import refit
from compression.runtime import own_share, sum_over_processes
from compression.structures import spread

CURVATURE_STEPS = 8
"""Steps up to a pruning event that are watched."""
FADE = 0.5
"""What a token that was watched for one event counts at the next: the weights have moved on a little, but a wide FFN
needs more tokens than a few steps have."""
TOGETHER = 8
"""Neurons that go together on the cheapest path."""

Place = tuple[str, int]
"""A layer's attention or FFN: the kind of its structures, and the layer."""


class Curvature:
    """Sums over tokens of x, x x^T and g g^T, for each masked output projection.

    x is what goes in, g the derivative of a row's own loss by what comes out; tokens that fill up a row do not count.
    x holds what all structures give, also those out of use, for the mask is on the projection's columns: those columns
    are left out where costs are computed, and known where they have just gone. The projection's bias makes up for the
    mean of what goes; what varies around it costs.

    Args:
        masked: the projections.
        gradients: whether g is wanted.
    """

    def __init__(self, masked: Masks, gradients: bool):
        self.masked = {(kind, index): layer for kind, layers in masked.items() for index, layer in layers.items()}
        weights = {place: layer.weight.detach() for place, layer in self.masked.items()}
        self.inputs = {place: _square(weight[0]) for place, weight in weights.items()}
        self.sums = {place: torch.zeros_like(weight[0]) for place, weight in weights.items()}
        self.gradients = {place: _square(weight[:, 0]) for place, weight in weights.items() if gradients}
        self.tokens = torch.zeros((), device=next(iter(self.sums.values())).device)
        self._scale = 1.0
        self._seen: dict[Place, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    # A training step.

    @contextmanager
    def watching(self, attention_mask: Tensor) -> Iterator[None]:
        """Note what goes through the projections in a forward pass and in its backward pass.

        Args:
            attention_mask: [rows, length], 1 for real tokens.
        """
        tokens = attention_mask.flatten().nonzero()[:, 0]
        with hooked(
            layer.register_forward_hook(partial(self._watch, place, tokens)) for place, layer in self.masked.items()
        ):
            yield

    def _watch(self, place: Place, tokens: Tensor, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(partial(self._note, place, tokens, inputs[0].detach()))

    def _note(self, place: Place, tokens: Tensor, inputs: Tensor, gradient: Tensor) -> None:
        if self._scale:
            x, g = (values.flatten(0, 1)[tokens].float() for values in (inputs, gradient))
            self._seen[place].append((x, g * self._scale))

    def weigh(self, loss: Tensor, rows: int) -> None:
        """Undo what a mean loss of so many rows is scaled with on its way back; a part that counts nothing is left out.

        To be called before the backward pass.
        """

        def note(gradient: Tensor) -> None:
            factor = gradient.item()
            self._scale = rows / factor if factor else 0.0

        loss.register_hook(note)

    @torch.no_grad()
    def take_in(self) -> None:
        """Add what was noted in the passes of one step, behind the last of them, over all processes.

        A step whose gradients overflow (fp16) is skipped by the optimizer and must not count here either.
        """
        seen, self._seen = self._seen, defaultdict(list)
        if not torch.stack([gradient_of(layer).sum() for layer in self.masked.values()]).isfinite().all():
            return
        for place, matrix in self.inputs.items():
            matrix += _over_tokens((x.T @ x for x, _ in seen[place]), matrix)
            self.sums[place] += _over_tokens((x.sum(0) for x, _ in seen[place]), self.sums[place])
        for place, matrix in self.gradients.items():
            matrix += _over_tokens((g.T @ g for _, g in seen[place]), matrix)
        self.tokens += _over_tokens((len(x) for x, _ in seen[next(iter(self.masked))]), self.tokens)

    # A pruning event.

    @torch.no_grad()
    def removal_costs(self, places: list[Place]) -> list[Tensor]:
        """For each place the `importance.removal_costs` of its structures, [structures], in loss per token.

        What is out of use costs nothing, and the path begins behind it: without it the others have learned to do.
        """
        costs = [torch.zeros(self.masked[place].count, device=self.tokens.device) for place in places]
        for number in own_share(range(len(places))):
            costs[number] = self._removal_costs(places[number])
        sum_over_processes(*costs)
        return costs

    def _removal_costs(self, place: Place) -> Tensor:
        layer, (mean, covariance) = self.masked[place], self._inputs(place)
        kept, columns, gradients = layer.kept, layer.mask > 0, self.gradients[place] / self.tokens.clamp_min(1)
        weight, costs = layer.weight[:, columns], torch.zeros(layer.count, device=layer.weight.device)
        costs[kept] = importance.removal_costs(
            weight, covariance[columns][:, columns], gradients, int(kept.sum()), together=TOGETHER
        )
        if layer.bias is not None:  # the part is taken out with its last structure, and so the bias
            constant = layer.bias + weight @ mean[columns]
            costs[costs.argmax()] += constant @ gradients @ constant / 2
        return costs

    def _inputs(self, place: Place) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what goes in; without a bias, which could make up for the mean, 0 and E[x x^T]."""
        tokens = self.tokens.clamp_min(1)
        mean, square = self.sums[place] / tokens, self.inputs[place] / tokens
        if self.masked[place].bias is None:
            return torch.zeros_like(mean), square
        return mean, square - mean.outer(mean)

    @torch.no_grad()
    def repair(self, stays: dict[Place, Tensor]) -> None:
        """The structures that stay, and the bias, take over by least squares what those give that are masked next.

        These are gone for good: the columns of all that is out of use become zero.

        Args:
            stays: for each place that is left which structures will be in use, bool [structures].
        """
        places = [place for place, stay in stays.items() if not torch.equal(stay, self.masked[place].kept)]
        fitted = [F.pad(torch.zeros_like(self.masked[place].weight), (0, 1)) for place in places]
        for number in own_share(range(len(places))):
            fitted[number] = self._fitted(places[number], stays[places[number]])
        sum_over_processes(*fitted)
        for place, matrix in zip(places, fitted, strict=True):
            layer = self.masked[place]
            layer.weight.copy_(matrix[:, :-1])
            if layer.bias is not None:
                layer.bias.add_(matrix[:, -1])

    def _fitted(self, place: Place, stay: Tensor) -> Tensor:
        """The weight of a projection with these structures only, and in a last column what its bias gains."""
        layer, (mean, covariance) = self.masked[place], self._inputs(place)
        before = layer.weight * layer.mask
        after = refit(before, covariance, spread(stay, layer.in_features))
        return torch.cat([after, ((before - after) @ mean)[:, None]], 1)

    def fade(self) -> None:
        """An event is over: what was watched for it counts less at the next."""
        for matrix in self.tensors().values():
            matrix.mul_(FADE)

    def forget(self, place: Place) -> None:
        """An attention or FFN was taken out of the model."""
        for known in (self.masked, self.inputs, self.sums, self.gradients):
            known.pop(place, None)

    def tensors(self) -> dict[str, Tensor]:
        """The sums, to resume from."""
        named = {"curvature.tokens": self.tokens}
        for name, matrices in (("inputs", self.inputs), ("sums", self.sums), ("gradients", self.gradients)):
            named |= {f"curvature.{name}.{kind}.{index}": matrix for (kind, index), matrix in matrices.items()}
        return named


def _square(like: Tensor) -> Tensor:
    return torch.zeros_like(like.outer(like))


def _over_tokens(sums: Iterable[Any], like: Tensor) -> Tensor:
    """The sum of some sums, of all processes: some may have none."""
    total = reduce(torch.add, sums, torch.zeros_like(like))
    sum_over_processes(total)
    return total

"""What a repair is fitted to: second moments of what goes into an output projection, and of what that owes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.hooks import hooked
from compression.llm.layerwise import LayerStream
from compression.offload import States
from compression.runtime import sum_over_processes
from compression.structures import CHANNELS, layers_of


@dataclass(frozen=True)
class Moments:
    """Second moments over a text, of what goes into an output projection (X) and of the share of errors that it is to
    make up for (R, see `repair`).

    Attributes:
        gram: [columns, columns] in fp32, X^T X.
        owed: [columns, outputs] in fp32, X^T R; None where no errors are made up for.
        means: where the projection has a bias, of X [columns] and of R [outputs]; X counts from its mean then.
    """

    gram: Tensor
    owed: Tensor | None
    means: tuple[Tensor, Tensor] | None


class RepairText:
    """A text on its way through a model that is repaired, one attention or MLP after the other; beside it, where errors
    are made up for, the same text on its way through the model as it was.

    Each attention and MLP is entered while it is as it was, and left when it is as it is to be; both while the layer's
    weights are on the device.

    Args:
        windows: token ids [count, length].
        error_share: the share of errors that is made up for, from 0 to 1.
        ridge: what keeps projections as they are, see `least_squares.refit`; None: what suits hidden size and tokens.

    Attributes:
        layer: the index of the layer that the text stands before, or in.
        tokens: how many the text has, those of all processes.
        owes: whether there are errors to make up for: something before was changed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        batch_size: int = 1,
        error_share: float = 0.0,
        ridge: float | None = None,
    ):
        stream = LayerStream(model, windows, batch_size)
        self.model, self.error_share, self.layer, self.owes = model, error_share, 0, False
        self.ridge, self.tokens = ridge, windows.numel()
        self.decoder, self.states, self.options = stream.decoder, stream.states, stream.options
        self.whole: States | None = None
        if error_share:
            self.whole = self.decoder.states()
            for number in range(len(self.options)):
                self.whole.put(number, self.states.get(number))

    def enter(self, kind: str, wanted: bool = True, targets: States | None = None) -> Moments | None:
        """Moments at the output projection of the attention or MLP that the text stands before, of all processes' text.

        Args:
            kind: of the structures there.
            wanted: where not, the text as it was goes on all the same.
            targets: where what the projection is to give is put, [windows, length, outputs] in fp32 for each batch.
        """
        if wanted:
            return self._moments(kind, targets)
        if self.whole is not None:
            self._advance(self.whole, kind)
        return None

    @torch.no_grad()
    def lacking(self, kind: str, targets: States) -> tuple[Moments, Tensor]:
        """As `enter`, once more after a change there; what is owed is all that targets from `enter` are away. And the
        squared error, that of all processes' text."""
        outer = layers_of(self.model)[self.layer].split(kind)[1]
        sums, squares = _Sums(outer, True, self.tokens), torch.zeros((), dtype=torch.double, device=outer.weight.device)
        for number in range(len(self.options)):
            inputs, missing = self.residual(kind, number, targets)
            sums.add(inputs, missing)
            squares += missing.square().sum(dtype=torch.double)
        sum_over_processes(squares)
        return sums.moments(1.0), squares

    def residual(self, kind: str, number: int, targets: States) -> tuple[Tensor, Tensor]:
        """Of a batch, what goes into the output projection there, and what that gives too little for the targets."""
        outer = layers_of(self.model)[self.layer].split(kind)[1]
        inputs, outputs, _ = watched(outer, partial(self.branch, kind, number))
        return inputs, targets.get(number) - outputs.float()

    def leave(self, kind: str, changed: bool) -> None:
        """Go through that attention or MLP, which may have changed meanwhile."""
        self._advance(self.states, kind)
        self.layer += kind == CHANNELS
        self.owes |= changed and self.whole is not None

    @torch.no_grad()
    def _advance(self, states: States, kind: str) -> None:
        for number in range(len(self.options)):
            state = states.get(number)
            states.put(number, state + self._branch(kind, number, state))

    def branch(self, kind: str, number: int) -> Tensor:
        """What the attention or MLP that the text stands before adds to the states of a batch."""
        return self._branch(kind, number, self.states.get(number))

    def _branch(self, kind: str, number: int, state: Tensor) -> Tensor:
        return self.decoder.branch(self.decoder.layers[self.layer], kind, state, self.options[number][self.layer])

    @torch.no_grad()
    def _moments(self, kind: str, targets: States | None) -> Moments:
        layer, outer = self.decoder.layers[self.layer], layers_of(self.model)[self.layer].split(kind)[1]
        sums = _Sums(outer, self.whole is not None, self.tokens)
        for number in range(len(self.options)):
            state, branch = self.states.get(number), partial(self._branch, kind, number)
            inputs, outputs, _ = watched(outer, partial(branch, state))
            error = None
            if self.whole is not None:
                whole = self.whole.get(number)
                _, expected, added = watched(outer, partial(branch, whole))
                error = expected.float() - outputs.float()
                error = error + self.decoder.before_added(layer, kind, whole.float() - state.float())
                self.whole.put(number, whole + added)
            sums.add(inputs, error)
            if targets is not None:
                wanted = outputs.float()
                targets.put(number, wanted if error is None else wanted + self.error_share * error)
        return sums.moments(self.error_share)


class _Sums:
    """Sums over a text's tokens, of what goes into a projection and of errors behind it.

    Args:
        outer: the projection.
        owes: whether there are errors.
        tokens: how many the text has, those of all processes.
    """

    def __init__(self, outer: nn.Linear, owes: bool, tokens: int):
        columns, outputs, device = outer.in_features, outer.out_features, outer.weight.device
        self.biased, self.tokens = outer.bias is not None, tokens
        self.gram = torch.zeros(columns, columns, device=device)
        self.owed = torch.zeros(columns, outputs if owes else 0, device=device)
        self.inputs = torch.zeros(columns, dtype=torch.double, device=device)
        self.errors = torch.zeros(outputs, dtype=torch.double, device=device)

    def add(self, inputs: Tensor, error: Tensor | None) -> None:
        """Add some windows' tokens.

        Args:
            inputs: [windows, length, columns]. error: [windows, length, outputs].
        """
        rows = inputs.flatten(0, -2)
        self.gram += rows.T @ rows
        self.inputs += rows.sum(0, dtype=torch.double)
        if error is not None:
            error = error.flatten(0, -2)
            self.owed += rows.T @ error.to(rows.dtype)
            self.errors += error.sum(0, dtype=torch.double)

    def moments(self, share: float) -> Moments:
        """The moments, of all processes' tokens.

        Args:
            share: of the errors.
        """
        sum_over_processes(self.gram, self.owed, self.inputs, self.errors)
        gram, owed, means = self.gram, self.owed, None
        if self.biased:
            means = (self.inputs / self.tokens).float(), (share * self.errors / self.tokens).float()
            gram = gram.addr(means[0], self.inputs.float(), alpha=-1)
            owed = owed.addr(means[0], self.errors.float(), alpha=-1) if share else owed
        return Moments(gram, share * owed if share else None, means)


def watched(outer: nn.Linear, compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into a projection and what it gives while something is computed, and that."""
    seen: list[Tensor] = []
    with hooked([outer.register_forward_hook(lambda _, given, output: seen.extend([*given, output]))]):
        result = compute()
    inputs, outputs = seen
    return inputs, outputs, result

"""How important a language model's structures are on calibration text.

Each score is a class here under `@register`, and that is all of it: the flag's allowed values, its help, the list for
the documentation, the benchmark's methods and the tests are made from `SCORES`. Gradients are folded into the scores as
they appear and freed, one matrix at a time, so a backward pass needs the memory of weights and activations but not of a
second model full of gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import PreTrainedModel

from compression import importance
from compression.config import choice_of
from compression.decoder import decoder_of
from compression.hooks import hooked
from compression.llm.layerwise import LayerStream, final_states
from compression.llm.perplexity import check_losses, suspect, token_losses
from compression.offload import States
from compression.runtime import UserError, sum_over_processes
from compression.structures import DECODER_KINDS, LayerParts, layers_of
from compression.tables import Column, markdown_table

Scores = dict[str, list[Tensor]]
# The first window, token ids [windows, length] and last hidden states [windows, length, hidden] of each batch, computed
# when it is asked for.
Passes = Iterator[tuple[int, Tensor, Tensor]]


class Matrix(NamedTuple):
    """A matrix of some layer, and the scores [structures] that it counts for."""

    scores: Tensor
    by_rows: bool
    """Whether structures are its rows or its columns."""
    linear: nn.Linear

    def add(self, values: Tensor) -> None:
        """Add a value for each weight to the scores of the structures that the weights belong to."""
        add_up = importance.sum_rows if self.by_rows else importance.sum_columns
        self.scores.add_(add_up(values, len(self.scores)).to(self.scores.device))


class Score(ABC):
    """One way of scoring, on its way over a text: `hooks` fold what they see into `scores`, `finish` ends it.

    Args:
        layers: those whose structures are scored, all of the model's or some.
    """

    name: ClassVar[str]
    """As the flag's value."""
    help: ClassVar[str]
    """What a structure's score is, in one line."""
    comparable: ClassVar[bool] = True
    """Whether scores compare across layers as they are."""
    needs_text: ClassVar[bool] = True
    loss: ClassVar[Literal["mean", "sum"] | None] = None
    """A batch's loss that the gradients are of: mean or sum over its tokens; None: no backward pass, so that the
    forward pass may end behind the layers that are scored."""
    through_activations: ClassVar[bool] = False
    """Whether the backward pass has to reach activations, which it does not where no weight takes a gradient."""

    def __init__(self, model: PreTrainedModel, layers: list[LayerParts]):
        self.scores: Scores = {
            kind: [torch.zeros(parts.count(kind), device=model.device) for parts in layers] for kind in DECODER_KINDS
        }
        self.matrices = list(_matrices(layers, self.scores))

    @property
    def output_projections(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if not matrix.by_rows]

    def trained(self) -> list[Tensor]:
        """The weights whose gradients are needed."""
        return []

    def hooks(self) -> Iterator[RemovableHandle]:
        """Register what looks at the passes."""
        return iter(())

    def sums(self) -> list[Tensor]:
        """What adds up over batches: several processes, each with a share of them, add theirs."""
        return [score for kind in DECODER_KINDS for score in self.scores[kind]]

    @abstractmethod
    def finish(self, batches: int, tokens: int) -> None:
        """Make the scores what they are once so many batches and tokens are through."""


SCORES: dict[str, type[Score]] = {}


def register(score: type[Score]) -> type[Score]:
    """Make a score known by its name."""
    SCORES[score.name] = score
    return score


@register
class Fisher(Score):
    """A gate scales the structure's output, so its derivative is the sum over that output of value * gradient."""

    name = "fisher"
    help = (
        "Fisher information per token: mean over tokens of (dL/dm)^2, m a gate on its output at that token, L the "
        "text's total loss (after Kwon et al. 2022, who take it per example)"
    )
    loss = "sum"
    through_activations = True

    def hooks(self) -> Iterator[RemovableHandle]:
        for matrix in self.output_projections:
            yield matrix.linear.register_forward_pre_hook(partial(self._watch, matrix.scores))

    def _watch(self, scores: Tensor, _: nn.Module, inputs: tuple[Tensor]) -> None:
        inputs[0].register_hook(partial(self._fold, scores, inputs[0].detach()))

    @staticmethod
    def _fold(scores: Tensor, values: Tensor, gradient: Tensor) -> None:
        products = (values.float() * gradient.float()).reshape(-1, len(scores), values.shape[-1] // len(scores))
        scores += products.sum(-1).square_().sum(0).to(scores.device)

    def finish(self, batches: int, tokens: int) -> None:
        for matrix in self.output_projections:
            matrix.scores.div_(tokens)


@register
class ObsCost(Score):
    """See `importance.removal_costs`. Holds two matrices per output projection: inputs squared, hidden size squared."""

    name = "obs"
    help = (
        "what its removal adds to the loss when the output projection is fitted anew and all cheaper structures of its "
        "layer and kind are gone (optimal brain surgeon); meant to go with least-squares repair"
    )
    loss = "sum"
    through_activations = True

    def __init__(self, model: PreTrainedModel, layers: list[LayerParts]):
        super().__init__(model, layers)
        # Sums over tokens of x x^T and g g^T, x what goes into a projection and g the loss's derivative by its output.
        self.curvature = {
            matrix.linear: tuple(
                torch.zeros(size, size, device=matrix.linear.weight.device)
                for size in (matrix.linear.in_features, matrix.linear.out_features)
            )
            for matrix in self.output_projections
        }

    def hooks(self) -> Iterator[RemovableHandle]:
        for linear in self.curvature:
            yield linear.register_forward_hook(self._watch)

    def _watch(self, linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(partial(self._fold, linear, inputs[0].detach()))

    def _fold(self, linear: nn.Linear, inputs: Tensor, gradient: Tensor) -> None:
        rows, slopes = inputs.flatten(0, -2), gradient.flatten(0, -2).float()
        inner, outer = self.curvature[linear]
        inner += rows.T @ rows
        outer.addmm_(slopes.T, slopes)

    def sums(self) -> list[Tensor]:
        return [total for totals in self.curvature.values() for total in totals]

    def finish(self, batches: int, tokens: int) -> None:
        for scores, _, linear in tqdm(self.output_projections, desc="removal costs", leave=False, disable=None):
            inputs, gradients = (total / tokens for total in self.curvature.pop(linear))
            try:
                costs = importance.removal_costs(linear.weight, inputs, gradients, len(scores))
            except torch.linalg.LinAlgError:  # what is not finite has no eigenvalues
                costs = torch.full_like(scores, torch.nan)
            scores += costs.to(scores.device)


@register
class Taylor(Score):
    name = "taylor"
    help = (
        "first-order Taylor: sum over its weights of |w * dL/dw|, L the mean loss of a batch, mean over batches "
        "(LLM-Pruner, Ma et al. 2023)"
    )
    loss = "mean"

    def trained(self) -> list[Tensor]:
        return [matrix.linear.weight for matrix in self.matrices]

    def hooks(self) -> Iterator[RemovableHandle]:
        for matrix in self.matrices:
            yield matrix.linear.weight.register_post_accumulate_grad_hook(partial(self._fold, matrix))

    def _fold(self, matrix: Matrix, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is not None:
            matrix.add(self.of_weights(importance.taylor_products(weight.detach(), gradient)))

    def of_weights(self, products: Tensor) -> Tensor:
        """Importance of weights, from their |w * dL/dw|."""
        return products

    def finish(self, batches: int, tokens: int) -> None:
        for scores in (score for kind in DECODER_KINDS for score in self.scores[kind]):
            scores /= batches


@register
class SecondOrderTaylor(Taylor):
    name = "taylor_2nd"
    help = "as taylor with the diagonal second-order term: |w * dL/dw| + 1/2 * (w * dL/dw)^2"

    def of_weights(self, products: Tensor) -> Tensor:
        return products + 0.5 * products.square()


@register
class Wanda(Score):
    name = "wanda"
    help = "sum over its weights of |w| * norm of their input over the text, no gradients (Sun et al. 2023)"
    comparable = False

    def __init__(self, model: PreTrainedModel, layers: list[LayerParts]):
        super().__init__(model, layers)
        # Sums over tokens of squared inputs.
        self.squares: dict[nn.Module, Tensor] = {
            linear: torch.zeros(linear.in_features, device=linear.weight.device) for _, _, linear in self.matrices
        }

    def hooks(self) -> Iterator[RemovableHandle]:
        for linear in self.squares:
            yield linear.register_forward_pre_hook(self._watch)

    def _watch(self, linear: nn.Module, inputs: tuple[Tensor]) -> None:
        self.squares[linear] += inputs[0].float().square().flatten(0, -2).sum(0)

    def sums(self) -> list[Tensor]:
        return list(self.squares.values())

    def finish(self, batches: int, tokens: int) -> None:
        for matrix in self.matrices:
            matrix.add(matrix.linear.weight.float().abs() * self.squares[matrix.linear].sqrt())


@register
class Magnitude(Score):
    name = "magnitude"
    help = "sum over its weights of |w|, no text"
    needs_text = False

    def finish(self, batches: int, tokens: int) -> None:
        for matrix in self.matrices:
            matrix.add(matrix.linear.weight.float().abs())


def scores_markdown() -> str:
    """The scores as a table for the documentation."""
    columns = [
        Column("score", lambda score: f"`{score.name}`"),
        Column("of a structure", lambda score: score.help),
        Column("needs", _needs),
        Column(
            "compares across layers", lambda score: "as it is" if score.comparable else "relative to its layer's mean"
        ),
    ]
    return markdown_table(columns, list(SCORES.values()), align="---")


def _needs(score: type["Score"]) -> str:
    needs = ["text"] * score.needs_text + ["gradients"] * (score.loss is not None)
    return ", ".join(needs) or "weights"


# Type of a field that chooses a score; carries the flag's allowed values and its help.
if TYPE_CHECKING:
    ScoreName: TypeAlias = str
else:
    ScoreName = choice_of(SCORES, "Score of a structure")


# Scoring.


def score_structures(
    model: PreTrainedModel,
    windows: Tensor,
    method: ScoreName,
    batch_size: int = 1,
    gradient_checkpointing: bool = False,
) -> Scores:
    """Importance of every structure of a language model.

    Args:
        windows: token ids [count, length].
        method: one of `SCORES`.
        batch_size: windows per forward pass.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.

    Returns:
        For groups and for channels a list over layers of fp32 scores [structures] on the model's device.

    Raises:
        UserError: a loss or score is not finite, and where that began.
    """
    numbered = dict(enumerate(layers_of(model)))
    if decoder_of(model).offload is not None:
        return _score_by_layers(model, numbered, LayerStream(model, windows, batch_size), method)
    passes = final_states(model, windows, batch_size, "calibration")
    return _score(model, numbered, passes, method, gradient_checkpointing)


def score_layer(
    model: PreTrainedModel, index: int, stream: LayerStream, method: ScoreName, gradient_checkpointing: bool = False
) -> dict[str, Tensor]:
    """As `score_structures`, of one layer alone, on text that stands before that layer.

    The layers before it are not run, and nothing but this layer's weights gets a gradient: the backward pass goes
    from the loss down to this layer and no further.

    Args:
        index: of the layer that the text stands before.

    Returns:
        For groups and for channels the fp32 scores [structures] on the model's device.

    Raises:
        UserError: a loss or score is not finite, and where that began.
    """
    score, numbered = SCORES[method], {index: layers_of(model)[index]}
    if stream.decoder.offload is not None:
        scores = _score_by_layers(model, numbered, stream, method)
    else:
        last = index + 1 if score.loss is None else None
        passes = _passes_from(model, slice(index, last), stream, needs_gradient=score.through_activations)
        scores = _score(model, numbered, passes, method, gradient_checkpointing)
    return {kind: layers[0] for kind, layers in scores.items()}


def _score(
    model: PreTrainedModel,
    numbered: dict[int, LayerParts],
    passes: Passes,
    method: ScoreName,
    gradient_checkpointing: bool,
) -> Scores:
    """Scores of these layers' structures; `passes` is not begun where no text is needed.

    Args:
        numbered: the layers by their index.
    """
    score = SCORES[method](model, list(numbered.values()))
    batches, tokens = _run(model, score, passes, gradient_checkpointing) if score.needs_text else (0, 0)
    return _finished(model, score, list(numbered), batches, tokens)


def _finished(model: PreTrainedModel, score: Score, indices: list[int], batches: int, tokens: int) -> Scores:
    """The scores of these layers, once this process's batches and tokens are through.

    Raises:
        UserError: one is not finite.
    """
    counts = torch.tensor([batches, tokens])
    if score.needs_text:
        sum_over_processes(counts, *score.sums())
    with torch.no_grad():
        score.finish(*counts.tolist())
    for kind in DECODER_KINDS:
        for index, values in zip(indices, score.scores[kind], strict=True):
            if not values.isfinite().all():
                where = f"scores of the {kind} of layer {index}"
                raise UserError(f"--importance_method {score.name}: {where} are not finite; {suspect(model)}")
    return score.scores


def _run(model: PreTrainedModel, score: Score, passes: Passes, gradient_checkpointing: bool) -> tuple[int, int]:
    """Let a score see the text; the number of batches and of tokens."""
    if score.loss is None:
        with torch.no_grad(), hooked(score.hooks()):
            sizes = [ids.numel() for _, ids, _ in passes]
        return len(sizes), sum(sizes)
    batches = tokens = 0
    with (
        _only_trainable(model, score.trained()),
        hooked(_with_start(model, score)),
        _checkpointing(model, gradient_checkpointing),
    ):
        for place, ids, hidden in passes:
            losses = token_losses(decoder_of(model).logits, hidden, ids)
            check_losses(model, losses, place, "calibration")
            _reduced(score, losses).backward()
            batches, tokens = batches + 1, tokens + ids.numel()
    return batches, tokens


def _reduced(score: Score | type[Score], losses: Tensor) -> Tensor:
    """A batch's loss that the gradients are of."""
    return losses.mean() if score.loss == "mean" else losses.sum()


def _passes_from(model: PreTrainedModel, layers: slice, stream: LayerStream, needs_gradient: bool) -> Passes:
    decoder = decoder_of(model)
    for place, (ids, state, options) in zip(stream.places, stream, strict=True):
        state = state.detach().requires_grad_(needs_gradient)
        for layer, option in zip(decoder.layers[layers], options[layers], strict=True):
            state = layer(state, **option)
        yield place, ids, decoder.norm(state)


# One layer at a time.


def _score_by_layers(
    model: PreTrainedModel, numbered: dict[int, LayerParts], stream: LayerStream, method: ScoreName
) -> Scores:
    """As `_score`, with each layer fetched once for the forward pass and once for the backward pass.

    The text goes forward, and what enters each layer is kept; then the gradient goes back, layer by layer, each
    computed anew from what entered it. The stream stays where it is.
    """
    score = SCORES[method]
    if score.loss is None:
        found = _scores_without_gradients(model, numbered, stream, score)
    else:
        with _only_trainable(model, []):
            entering, gradients = _forward(model, stream, score)
            found = _scores_on_the_way_back(model, numbered, stream, score, entering, gradients)
    return {kind: [found[index][kind][0] for index in numbered] for kind in DECODER_KINDS}


def _size_of(stream: LayerStream) -> tuple[int, int]:
    """Batches and tokens of a text."""
    return len(stream.ids), sum(ids.numel() for ids in stream.ids)


@torch.no_grad()
def _scores_without_gradients(
    model: PreTrainedModel, numbered: dict[int, LayerParts], stream: LayerStream, score: type[Score]
) -> dict[int, Scores]:
    decoder, states, found = stream.decoder, stream.decoder.states(), {}
    for number, (_, state, _) in enumerate(stream):
        states.put(number, state)
    for index in range(min(numbered), max(numbered) + 1):
        with decoder.present(index) as layer:
            one = score(model, [numbered[index]])
            with hooked(one.hooks()):
                for number, options in enumerate(stream.options if score.needs_text else ()):
                    states.put(number, layer(states.get(number), **options[index]))
            found[index] = _finished(model, one, [index], *_size_of(stream))
    return found


def _forward(model: PreTrainedModel, stream: LayerStream, score: type[Score]) -> tuple[States, States]:
    """The states that enter each layer, by layer and batch, and the loss's derivative by what leaves the last one, by
    batch."""
    decoder, entering, gradients = stream.decoder, stream.decoder.states(), stream.decoder.states()
    depth = len(decoder.layers)
    for number, (_, state, _) in enumerate(stream):
        entering.put((stream.layer, number), state)
    with torch.no_grad():
        for index in tqdm(range(stream.layer, depth), desc="calibration forward", leave=False, disable=None):
            with decoder.present(index) as layer:
                for number, options in enumerate(stream.options):
                    entering.put((index + 1, number), layer(entering.get((index, number)), **options[index]))
    for number, (place, ids) in enumerate(zip(stream.places, stream.ids, strict=True)):
        state = entering.take((depth, number)).detach().requires_grad_()
        losses = token_losses(decoder.logits, decoder.norm(state), ids)
        check_losses(model, losses, place, "calibration")
        _reduced(score, losses).backward()
        gradients.put(number, _gradient(state))
    return entering, gradients


def _scores_on_the_way_back(
    model: PreTrainedModel,
    numbered: dict[int, LayerParts],
    stream: LayerStream,
    score: type[Score],
    entering: States,
    gradients: States,
) -> dict[int, Scores]:
    decoder, found, first = stream.decoder, {}, min(numbered)
    layers = range(first, len(decoder.layers))
    for index in tqdm(reversed(layers), total=len(layers), desc="calibration backward", leave=False, disable=None):
        with decoder.present(index) as layer:
            one = score(model, [numbered[index]] if index in numbered else [])
            goes_on = index > first or score.through_activations
            with _only_trainable(layer, one.trained()), hooked(one.hooks()):
                for number, options in enumerate(stream.options):
                    state = entering.take((index, number)).detach().requires_grad_(goes_on)
                    layer(state, **options[index]).backward(gradients.get(number))
                    if goes_on:
                        gradients.put(number, _gradient(state))
            if index in numbered:
                found[index] = _finished(model, one, [index], *_size_of(stream))
    return found


def _gradient(state: Tensor) -> Tensor:
    assert state.grad is not None, "a layer's output depends on its input"
    return state.grad


def _with_start(model: PreTrainedModel, score: Score) -> Iterator[RemovableHandle]:
    """A score's hooks; where needed, also one at which the backward pass may end: the first layer's input."""
    if score.through_activations:
        yield decoder_of(model).embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    yield from score.hooks()


@contextmanager
def _only_trainable(model: nn.Module, trainable: list[Tensor]) -> Iterator[None]:
    """Gradients for these parameters and no others."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(trainable)
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, value in before.items():
            parameter.requires_grad_(value)
            parameter.grad = None


@contextmanager
def _checkpointing(model: PreTrainedModel, enable: bool) -> Iterator[None]:
    if not enable:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = decoder_of(model).layers
    for layer in layers:  # transformers recomputes layers in training mode only; what is in them draws no dropout
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()


def _matrices(layers: list[LayerParts], scores: Scores) -> Iterator[Matrix]:
    """All matrices of some layers, with the scores they count for."""
    for kind in DECODER_KINDS:
        for parts, score in zip(layers, scores[kind], strict=True):
            if len(score):
                inner, outer = parts.split(kind)
                yield from (Matrix(score, True, linear) for linear in inner)
                yield Matrix(score, False, outer)

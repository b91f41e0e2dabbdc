"""Passes of a text through a language model that its structures are scored on, see `scoring`.

In memory a batch goes through the whole model and back. Of an offloaded model the whole text goes through one layer
after the other, and its gradient the same way back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compression.decoder import decoder_of
from compression.hooks import hooked
from compression.llm.head import in_blocks
from compression.llm.layerwise import LayerStream, final_states
from compression.llm.perplexity import check_losses, suspect, token_losses
from compression.llm.scoring import SCORES, Score, ScoreName, Scores
from compression.llm.text import CalibrationText
from compression.offload import States
from compression.progress import progress
from compression.runtime import UserError, sum_over_processes
from compression.saved_parts import Cached
from compression.structures import DECODER_KINDS, LayerParts, layers_of

# The first window, token ids [windows, length] and last hidden states [windows, length, hidden] of each batch, computed
# when it is asked for.
Passes = Iterator[tuple[int, Tensor, Tensor]]


def score_structures(
    model: PreTrainedModel,
    windows: Tensor,
    method: ScoreName,
    batch_size: int = 1,
    gradient_checkpointing: bool = False,
    labels: Tensor | None = None,
) -> Scores:
    """Importance of every structure of a language model.

    Args:
        windows: token ids [count, length].
        method: one of `SCORES`.
        batch_size: windows per forward pass.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        labels: [count, length - 1], the tokens whose loss it is, see `draw_labels`; None: the text's own.

    Returns:
        For groups and for channels a list over layers of fp32 scores [structures] on the model's device.

    Raises:
        UserError: a loss or score is not finite, and where that began.
    """
    numbered = dict(enumerate(layers_of(model)))
    if decoder_of(model).offload is not None:
        return _score_by_layers(model, numbered, LayerStream(model, windows, batch_size), method, labels)
    passes = final_states(model, windows, batch_size, "calibration")
    return _score(model, numbered, passes, method, gradient_checkpointing, labels)


def labels_behind(
    loss: Literal["text", "kl"], model: PreTrainedModel, text: CalibrationText, cached: Cached
) -> Tensor | None:
    """The tokens whose loss is behind scores, see `scoring.LossName`; None where they are the text's own.

    Args:
        model: while it is dense.
        cached: keeps them by name, so that a run that was killed has the same ones.
    """
    if loss == "text":
        return None
    draw = partial(draw_labels, model, text.scores, text.seed, text.batch_size)
    return cached("labels", lambda: {"labels": draw()})["labels"]


@torch.no_grad()
def draw_labels(model: PreTrainedModel, windows: Tensor, seed: int, batch_size: int = 1) -> Tensor:
    """For each place of a text but its windows' last, a token drawn from the model's prediction of the next.

    What is drawn depends on the predictions and the seed, and neither on the batches nor on the processes.

    Args:
        windows: token ids [count, length].

    Returns:
        [count, length - 1], on the CPU.
    """
    decoder = decoder_of(model)
    chances = torch.rand(len(windows), windows.shape[1] - 1, generator=torch.Generator().manual_seed(seed))
    labels = torch.zeros(chances.shape, dtype=torch.long)

    for place, ids, states in final_states(model, windows, batch_size, "labels"):
        here = slice(place, place + len(ids))
        mine = chances[here].to(states.device).reshape(-1, 1)
        labels[here] = (
            in_blocks(partial(drawn_tokens, decoder.logits), states[:, :-1].flatten(0, 1), mine)
            .view(len(ids), -1)
            .cpu()
        )
    sum_over_processes(labels)
    return labels


@torch.no_grad()
def drawn_tokens(logits_of: Callable[[Tensor], Tensor], states: Tensor, chances: Tensor) -> Tensor:
    """Tokens drawn from a model's predictions, [tokens].

    Args:
        states: [tokens, hidden] behind the final norm. chances: [tokens, 1], evenly drawn from 0 to 1.
    """
    reached = logits_of(states).float().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(reached, chances * reached[:, -1:], right=True)[:, 0]
    return tokens.clamp_max_(reached.shape[-1] - 1)


def score_layer(
    model: PreTrainedModel,
    index: int,
    stream: LayerStream,
    method: ScoreName,
    gradient_checkpointing: bool = False,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """As `score_structures`, of one layer alone, on text that stands before that layer.

    The layers before it are not run, and nothing but this layer's weights gets a gradient: the backward pass goes
    from the loss down to this layer and no further.

    Args:
        index: of the layer that the text stands before.
        labels: see `score_structures`.

    Returns:
        For groups and for channels the fp32 scores [structures] on the model's device.

    Raises:
        UserError: a loss or score is not finite, and where that began.
    """
    score, numbered = SCORES[method], {index: layers_of(model)[index]}
    if stream.decoder.offload is not None:
        scores = _score_by_layers(model, numbered, stream, method, labels)
    else:
        last = index + 1 if score.loss is None else None
        passes = _passes_from(model, slice(index, last), stream, needs_gradient=score.through_activations)
        scores = _score(model, numbered, passes, method, gradient_checkpointing, labels)
    return {kind: layers[0] for kind, layers in scores.items()}


def _score(
    model: PreTrainedModel,
    numbered: dict[int, LayerParts],
    passes: Passes,
    method: ScoreName,
    gradient_checkpointing: bool,
    labels: Tensor | None,
) -> Scores:
    """Scores of these layers' structures; `passes` is not begun where no text is needed.

    Args:
        numbered: the layers by their index.
    """
    score = SCORES[method](model, list(numbered.values()))
    batches, tokens = _run(model, score, passes, gradient_checkpointing, labels) if score.needs_text else (0, 0)
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


def _run(
    model: PreTrainedModel, score: Score, passes: Passes, gradient_checkpointing: bool, labels: Tensor | None
) -> tuple[int, int]:
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
            _batch_loss(model, score, hidden, ids, place, labels).backward()
            batches, tokens = batches + 1, tokens + ids.numel()
    return batches, tokens


def _batch_loss(
    model: PreTrainedModel, score: Score | type[Score], hidden: Tensor, ids: Tensor, place: int, labels: Tensor | None
) -> Tensor:
    """A batch's loss that the gradients are of.

    Args:
        place: the batch's first window.
        labels: of all windows.
    """
    mine = None if labels is None else labels[place : place + len(ids)].to(ids.device)
    losses = token_losses(decoder_of(model).logits, hidden, ids, mine)
    check_losses(model, losses, place, "calibration")
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
    model: PreTrainedModel,
    numbered: dict[int, LayerParts],
    stream: LayerStream,
    method: ScoreName,
    labels: Tensor | None,
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
            entering, gradients = _forward(model, stream, score, labels)
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


def _forward(
    model: PreTrainedModel, stream: LayerStream, score: type[Score], labels: Tensor | None
) -> tuple[States, States]:
    """The states that enter each layer, by layer and batch, and the loss's derivative by what leaves the last one, by
    batch."""
    decoder, entering, gradients = stream.decoder, stream.decoder.states(), stream.decoder.states()
    depth = len(decoder.layers)
    for number, (_, state, _) in enumerate(stream):
        entering.put((stream.layer, number), state)
    with torch.no_grad():
        for index in progress(range(stream.layer, depth), "calibration forward"):
            with decoder.present(index) as layer:
                for number, options in enumerate(stream.options):
                    entering.put((index + 1, number), layer(entering.get((index, number)), **options[index]))
    for number, (place, ids) in enumerate(zip(stream.places, stream.ids, strict=True)):
        state = entering.take((depth, number)).detach().requires_grad_()
        _batch_loss(model, score, decoder.norm(state), ids, place, labels).backward()
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
    for index in progress(reversed(layers), "calibration backward", len(layers)):
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

"""What a language model does on calibration text: importance of its structures, and what removing a part would cost.

Gradients are folded into the scores as they appear and freed, one matrix at a time, so a backward pass needs the
memory of weights and activations but not of a second model full of gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from compression import importance
from compression.decoder import decoder_of
from compression.llm.layerwise import LayerStream
from compression.llm.perplexity import check_losses, suspect, token_losses
from compression.runtime import UserError
from compression.structures import DECODER_KINDS, LayerParts, layers_of

Method = Literal["fisher", "obs", "taylor", "taylor_2nd", "wanda", "magnitude"]
Scores = dict[str, list[Tensor]]
# Token ids [windows, length] and last hidden states [windows, length, hidden] of each batch, computed when it is asked
# for.
Passes = Iterator[tuple[Tensor, Tensor]]


def score_structures(
    model: PreTrainedModel, windows: Tensor, method: Method, batch_size: int = 1, gradient_checkpointing: bool = False
) -> Scores:
    """Importance of every structure of a language model.

    - obs: what a structure's removal adds to the loss when the output projection is fitted anew and all cheaper ones
      of its layer and kind are gone (`importance.removal_costs`). It compares across layers as it is, and is meant to
      go with least-squares repair. Holds two matrices per output projection: inputs squared, hidden size squared.
    - taylor: sum over the structure's weights of |w * dL/dw|, L the mean loss of a batch, averaged over batches
      (first order; LLM-Pruner, Ma et al. 2023).
    - taylor_2nd: with the diagonal second-order term, |w * dL/dw| + 1/2 * w^2 * (dL/dw)^2.
    - wanda: sum over the weights of |w| * norm of their input over the text (Sun et al. 2023). No gradients.
    - fisher: mean over tokens of (dL/dm)^2, m a gate on the structure's output, L the text's total loss
      (Kwon et al. 2022); no gradients of weights. It compares across layers as it is.
    - magnitude: sum of |w|. No text.

    Args:
        windows: token ids [count, length].
        batch_size: windows per forward pass.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.

    Returns:
        For groups and for channels a list over layers of fp32 scores [structures] on the model's device.

    Raises:
        UserError: a loss or score is not finite, and where that began.
    """
    decoder_of(model)
    passes = _whole_passes(model, windows, batch_size)
    return _score(model, dict(enumerate(layers_of(model))), passes, method, gradient_checkpointing)


def score_layer(
    model: PreTrainedModel, index: int, entering: LayerStream, method: Method, gradient_checkpointing: bool = False
) -> dict[str, Tensor]:
    """As `score_structures`, of one layer alone, on text that stands before that layer.

    The layers before it are not run, and nothing but this layer's weights gets a gradient: the backward pass goes
    from the loss down to this layer and no further.

    Args:
        index: of the layer that `entering` stands before.

    Returns:
        For groups and for channels the fp32 scores [structures] on the model's device.

    Raises:
        UserError: a loss or score is not finite, and where that began.
    """
    # Activations need no loss, so for them the pass ends behind the layer.
    last = index + 1 if method == "wanda" else None
    passes = _passes_from(model, slice(index, last), entering, needs_gradient=method in ("obs", "fisher"))
    scores = _score(model, {index: layers_of(model)[index]}, passes, method, gradient_checkpointing)
    return {kind: score for kind, (score,) in scores.items()}


def _score(
    model: PreTrainedModel,
    numbered: dict[int, LayerParts],
    passes: Passes,
    method: Method,
    gradient_checkpointing: bool,
) -> Scores:
    """Scores of these layers' structures; `passes` is not begun where no text is needed.

    Args:
        numbered: the layers by their index.
    """
    layers = list(numbered.values())
    scores = {kind: [torch.zeros(parts.count(kind), device=model.device) for parts in layers] for kind in DECODER_KINDS}
    if method == "magnitude":
        _add_weighted(scores, layers, None)
    elif method == "wanda":
        _score_by_activations(layers, passes, scores)
    elif method == "obs":
        _score_by_curvature(model, layers, passes, gradient_checkpointing, scores)
    else:
        observe = _observe_gates if method == "fisher" else partial(_observe_weights, second_order=method != "taylor")
        with observe(model, layers, scores), _checkpointing(model, gradient_checkpointing):
            batches, tokens = _backward(model, passes, mean=method != "fisher")
        for kind in DECODER_KINDS:
            for score in scores[kind]:
                score /= tokens if method == "fisher" else batches
    for kind in DECODER_KINDS:
        for index, score in zip(numbered, scores[kind], strict=True):
            if not score.isfinite().all():
                where = f"scores of the {kind} of layer {index}"
                raise UserError(f"--importance_method {method}: {where} are not finite; {suspect(model)}")
    return scores


def _whole_passes(model: PreTrainedModel, windows: Tensor, batch_size: int) -> Passes:
    for ids in tqdm(windows.split(batch_size), desc="calibration", leave=False, disable=None):
        ids = ids.to(model.device)
        yield ids, decoder_of(model).final_states(ids)


def _passes_from(model: PreTrainedModel, layers: slice, entering: LayerStream, needs_gradient: bool) -> Passes:
    decoder = decoder_of(model)
    for ids, state, options in entering:
        state = state.detach().requires_grad_(needs_gradient)
        for layer, option in zip(decoder.layers[layers], options[layers], strict=True):
            state = layer(state, **option)
        yield ids, decoder.norm(state)


def _backward(model: PreTrainedModel, passes: Passes, mean: bool) -> tuple[int, int]:
    """Backward passes of all batches; the number of batches and of tokens."""
    batches = tokens = windows = 0
    for ids, hidden in passes:
        losses = token_losses(decoder_of(model).logits, hidden, ids)
        check_losses(model, losses, windows, "calibration")
        windows += len(ids)
        (losses.mean() if mean else losses.sum()).backward()
        batches, tokens = batches + 1, tokens + ids.numel()
    return batches, tokens


@contextmanager
def _only_trainable(model: nn.Module, trainable: list[nn.Parameter]) -> Iterator[None]:
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
    model.train()  # transformers recomputes in training mode only
    try:
        yield
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


@contextmanager
def _observe_weights(
    model: PreTrainedModel, layers: list[LayerParts], scores: Scores, second_order: bool
) -> Iterator[None]:
    """Fold |weight * gradient| of every matrix into the scores as soon as its gradient is there."""

    def fold(score: Tensor, by_rows: bool, weight: nn.Parameter) -> None:
        product = (weight.detach().float() * weight.grad.float()).abs_()
        if second_order:
            product += 0.5 * product.square()
        weight.grad = None
        add = importance.sum_rows if by_rows else importance.sum_columns
        score += add(product, len(score)).to(score.device)

    hooks = []
    for score, by_rows, linear in _matrices(layers, scores):
        hooks.append((linear.weight, partial(fold, score, by_rows)))
    with _only_trainable(model, [weight for weight, _ in hooks]):
        handles = [weight.register_post_accumulate_grad_hook(hook) for weight, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _backward_through(model: PreTrainedModel) -> Iterator[None]:
    """A backward pass reaches every layer's activations though no weight takes a gradient."""

    def start(_, __, output: Tensor) -> Tensor:
        return output.requires_grad_()

    with _only_trainable(model, []):
        handle = decoder_of(model).embeddings.register_forward_hook(start)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _observe_gates(model: PreTrainedModel, layers: list[LayerParts], scores: Scores) -> Iterator[None]:
    """Fold the squared derivative of the loss by each structure's gate, token by token, into the scores.

    A gate scales the structure's output, so its derivative is the sum over that output of value * gradient.
    """

    def fold(score: Tensor, values: Tensor, gradient: Tensor) -> None:
        products = (values.float() * gradient.float()).reshape(-1, len(score), values.shape[-1] // len(score))
        score += products.sum(-1).square_().sum(0).to(score.device)

    def watch(score: Tensor, _, inputs: tuple[Tensor]) -> None:
        inputs[0].register_hook(partial(fold, score, inputs[0].detach()))

    with _backward_through(model):
        handles = []
        for score, by_rows, linear in _matrices(layers, scores):
            if not by_rows:
                handles.append(linear.register_forward_pre_hook(partial(watch, score)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _observe_curvature(model: PreTrainedModel, curvature: dict[nn.Linear, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Add up x x^T and g g^T over tokens, x what goes into a Linear layer and g the loss's derivative by its output."""

    def fold(linear: nn.Linear, inputs: Tensor, gradient: Tensor) -> None:
        rows, slopes = inputs.flatten(0, -2), gradient.flatten(0, -2).float()
        inner, outer = curvature[linear]
        inner += rows.T @ rows
        outer.addmm_(slopes.T, slopes)

    def watch(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(partial(fold, linear, inputs[0].detach()))

    with _backward_through(model):
        handles = [linear.register_forward_hook(watch) for linear in curvature]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _score_by_curvature(
    model: PreTrainedModel, layers: list[LayerParts], passes: Passes, gradient_checkpointing: bool, scores: Scores
) -> None:
    outer = [(score, linear) for score, by_rows, linear in _matrices(layers, scores) if not by_rows]
    curvature = {
        linear: tuple(
            torch.zeros(size, size, device=linear.weight.device) for size in (linear.in_features, linear.out_features)
        )
        for _, linear in outer
    }
    with _observe_curvature(model, curvature), _checkpointing(model, gradient_checkpointing):
        _, tokens = _backward(model, passes, mean=False)
    for score, linear in tqdm(outer, desc="removal costs", leave=False, disable=None):
        inputs, gradients = (total / tokens for total in curvature.pop(linear))
        try:
            costs = importance.removal_costs(linear.weight.detach(), inputs, gradients, len(score))
        except torch.linalg.LinAlgError:  # what is not finite has no eigenvalues
            costs = torch.full_like(score, torch.nan)
        score += costs.to(score.device)


@torch.no_grad()
def _score_by_activations(layers: list[LayerParts], passes: Passes, scores: Scores) -> None:
    """Wanda: input norms of every matrix over the text, then |weight| times them."""
    squares: dict[nn.Linear, Tensor] = {}

    def watch(linear: nn.Linear, inputs: tuple[Tensor]) -> None:
        total = inputs[0].float().square().flatten(0, -2).sum(0)
        squares[linear] = squares.get(linear, 0) + total

    handles = [linear.register_forward_pre_hook(watch) for parts in layers for linear in parts.linears()]
    try:
        for _ in passes:
            pass
    finally:
        for handle in handles:
            handle.remove()
    _add_weighted(scores, layers, {linear: total.sqrt() for linear, total in squares.items()})


@torch.no_grad()
def _add_weighted(scores: Scores, layers: list[LayerParts], norms: dict[nn.Linear, Tensor] | None) -> None:
    for score, by_rows, linear in _matrices(layers, scores):
        weighted = linear.weight.float().abs()
        if norms is not None:
            weighted = weighted * norms[linear]
        add = importance.sum_rows if by_rows else importance.sum_columns
        score += add(weighted, len(score)).to(score.device)


def _matrices(layers: list[LayerParts], scores: Scores) -> Iterator[tuple[Tensor, bool, nn.Linear]]:
    """(the scores it counts for, whether structures are its rows or its columns, the matrix), all that there are."""
    for kind in DECODER_KINDS:
        for parts, score in zip(layers, scores[kind], strict=True):
            if len(score):
                inner, outer = parts.split(kind)
                yield from ((score, True, linear) for linear in inner)
                yield score, False, outer


# What removing a whole part costs.

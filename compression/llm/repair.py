"""Least-squares repair: output projections that make up for the structures that go.

Going through the layers in order, with the inputs that the already pruned and repaired layers before it give, each
output projection is solved anew so that from the structures that stay it gives what it gave from all of them, and a
share of what the layers before it owe, also where all stay: minimise

    |X_kept W' - (X W + share * R)|^2 + ridge * |D (W' - W_kept)|^2, D^2 the diagonal of X_kept^T X_kept.

R is what the projection would have to give more for the state behind it to be that of the whole model, whose own text
goes through the layers beside the other. With a share of 0 a layer answers for itself alone, and errors pile up; with 1
it answers for all of them, and fits the text. Li et al. 2025 ("GPTAQ") quantize to such targets, with a share of 1.
The ridge is the larger the less text there is (`least_squares.ridge_of`).

All of it is known from X^T X and X^T R alone, so the text is gone through once, layer by layer, and no activations are
stored but the states between layers. With `mlp_rounds`, what an MLP's channels read is solved for too (`mlp_repair`),
on activations of one layer at a time.

Where the projection has a bias, that takes over the mean of what goes (An et al. 2024, "FLAP"), in the same solution:
with inputs counted from their mean, the bias gains (W - W') mean, and the ridge is on W' alone.

Which structures of a layer go is known before, or only how many: then those that what stays makes up for best do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.config import AtLeast, Between, Originally, Settings
from compression.importance import contributions, keep_in_rounds
from compression.least_squares import refit, ridge_of
from compression.llm.mlp_repair import solve_inputs
from compression.llm.perplexity import broken_weight, suspect
from compression.llm.repair_text import Moments, RepairText
from compression.offload import States
from compression.progress import progress
from compression.runtime import UserError
from compression.structures import CHANNELS, DECODER_KINDS, layers_of, spread

LocalRanking = Literal["obs", "product"]

# Of earlier layers' errors that is made up for: best at half the size of SmolLM2-135M (docs/results.md).
SHARE = 0.5
SHARE_WITH_ROUNDS = 0.25


@dataclass
class Repair(Settings):
    """What becomes of the structures that stay."""

    compensation: Literal["none", "lstsq"] = "lstsq"
    """Repair. lstsq: solve the output projections anew so that what stays makes up for what goes."""
    error_share: Annotated[float | None, Between(0, 1), Originally(0.0)] = None
    """Share of the errors that earlier layers leave in the states which a repair makes up for, also in layers that lose
    nothing; 0: each layer makes up for what it loses itself alone. None: 0.5, with `mlp_rounds` 0.25."""
    ridge: Annotated[float | None, Between(1e-4, 10), Originally(0.01)] = None
    """What keeps output projections as they are in a repair, as a share of each input's own square. None: the more the
    less text there is, 12 times the hidden size per token, from 0.01 to 0.5."""
    mlp_rounds: Annotated[int, AtLeast(0), Originally(0)] = 0
    """Rounds in which the repair solves for gates and ups of the MLPs too, and for their output projections again. For
    high ratios; each takes about as long as the repair without."""

    def check(self) -> None:
        if self.mlp_rounds and self.compensation == "none":
            raise UserError(f"--mlp_rounds {self.mlp_rounds}: allowed with --compensation none is 0")

    @property
    def share(self) -> float:
        """`error_share`; where it is None, what suits the rounds: more freedom meets its targets better."""
        if self.error_share is not None:
            return self.error_share
        return SHARE_WITH_ROUNDS if self.mlp_rounds else SHARE


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
            weight: of the layer's output projection. gram: of what goes into it, see `repair_text.Moments`.
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
    text: RepairText,
    choice: LocalChoice | None = None,
    mlp_rounds: int = 0,
) -> Callable[[int], None]:
    """Solve output projections anew, in place: those of pruned layers, where the columns of what goes become zero, and
    where errors are made up for all behind the first of them.

    The text should have many times as many tokens as a layer has channels: with few it is fitted, not the language.

    Args:
        kept: for groups and channels one bool tensor [structures] per layer, True where the structure stays.
        text: the model's, before the first layer.
        choice: chooses anew which structures of a layer stay, as many as `kept` says; it is put right layer by layer.
        mlp_rounds: in which what MLPs read is solved for too, see `mlp_repair`.

    Returns:
        A function of a layer's index, to be called for one layer after the other. It raises UserError where a
        projection has no finite solution.
    """
    bar = progress(None, "repair", len(layers_of(model)))

    def step(index: int) -> None:
        with text.decoder.present(index):
            stays = repair_layer(text, {kind: kept[kind][index] for kind in DECODER_KINDS}, choice, mlp_rounds)
        for kind in DECODER_KINDS:
            kept[kind][index] = stays[kind]
        bar.update()

    return step


@torch.no_grad()
def repair_layer(
    text: RepairText, kept: dict[str, Tensor], choice: LocalChoice | None = None, mlp_rounds: int = 0
) -> dict[str, Tensor]:
    """As `repairing`, of the layer that a text stands before; its weights are on the device.

    Args:
        kept: for groups and channels a bool tensor [structures], True where the structure stays.

    Returns:
        `kept`, or what was chosen in its place.

    Raises:
        UserError: a projection has no finite solution.
    """
    parts, kept = layers_of(text.model)[text.layer], dict(kept)
    for kind in DECODER_KINDS:
        wanted = bool(parts.count(kind)) and (text.owes or not kept[kind].all())
        targets = text.decoder.states() if mlp_rounds and kind == CHANNELS else None
        moments = text.enter(kind, wanted, targets)
        if moments is not None:
            if choice is not None:
                weight = parts.split(kind)[1].weight
                kept[kind] = choice.stays(kind, text.layer, weight, moments.gram, kept[kind])
            _refit(text, kind, moments, kept[kind])
            del moments  # with the rounds' own matrices it would be the most that there is at a time
            if targets is not None and kept[kind].any():
                _solve_in_rounds(text, targets, kept[kind], mlp_rounds)
        text.leave(kind, changed=wanted)
    return kept


def _solve_in_rounds(text: RepairText, targets: States, stays: Tensor, rounds: int) -> None:
    """Solve for what an MLP reads, and for its output projection again, as long as it helps."""
    for _ in range(rounds):
        lacking = solve_inputs(text, targets, stays)
        if lacking is None:
            return
        _refit(text, CHANNELS, lacking, stays)


def _refit(text: RepairText, kind: str, moments: Moments, stays: Tensor) -> None:
    """Give an output projection what `refitted` finds."""
    outer = layers_of(text.model)[text.layer].split(kind)[1]
    weight, bias = refitted(text, kind, moments, stays)
    outer.weight.copy_(weight)
    if bias is not None:
        outer.bias.copy_(bias)


def refitted(text: RepairText, kind: str, moments: Moments, stays: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight of the output projection that a text stands before, with the columns of some structures only, the
    others zero, see `least_squares.refit`; and its bias, if it has one.

    Args:
        stays: bool [structures].

    Raises:
        UserError: it is not finite.
    """
    model, index = text.model, text.layer
    outer: Any = layers_of(model)[index].split(kind)[1]
    columns, bias = spread(stays, outer.in_features).to(outer.weight.device), None
    ridge = ridge_of(outer.out_features, text.tokens) if text.ridge is None else text.ridge
    weight = refit(outer.weight, moments.gram, columns, moments.owed, ridge)
    if moments.means is not None:
        mean, owed = moments.means
        bias = outer.bias + ((outer.weight.float() - weight.float()) @ mean + owed).to(outer.bias.dtype)
    if not all(values.isfinite().all() for values in (weight, bias) if values is not None):
        singular = moments.gram.isfinite().all() and broken_weight(model) is None
        cure = "raise --repair_samples or take --compensation none" if singular else suspect(model)
        raise UserError(f"--compensation lstsq: what repairs the {kind} of layer {index} is not finite; {cure}")
    return weight, bias

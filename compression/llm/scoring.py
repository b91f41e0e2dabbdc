"""How important a language model's structures are on calibration text.

Each score is a class here under `@register`, and that is all of it: the flag's allowed values, its help, the list for
the documentation, the benchmark's methods and the tests are made from `SCORES`. Gradients are folded into the scores as
they appear and freed, one matrix at a time, so a backward pass needs the memory of weights and activations but not of a
second model full of gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compression import importance
from compression.config import choice_of
from compression.progress import progress
from compression.runtime import UserError
from compression.structures import DECODER_KINDS, LayerParts, Rows
from compression.tables import Column, markdown_table

Scores = dict[str, list[Tensor]]


class Matrix(NamedTuple):
    """A matrix of some layer, and the scores [structures] that it counts for."""

    scores: Tensor
    linear: nn.Linear
    rows: Rows | None = None
    """Given where structures are its rows, not its columns."""

    def add(self, values: Tensor) -> None:
        """Add a value for each weight to the scores of the structures that the weights belong to."""
        if self.rows is None:
            added = [importance.sum_columns(values, len(self.scores))]
        else:
            added = [importance.sum_rows(share, len(self.scores)) for share in self.rows.split(values)]
        for share in added:
            self.scores.add_(share.to(self.scores.device))


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
    default_loss: ClassVar[Literal["text", "kl"]] = "text"
    """Which loss it is at its best with, see `LossName`."""
    through_activations: ClassVar[bool] = False
    """Whether the backward pass has to reach activations, which it does not where no weight takes a gradient."""

    def __init__(self, model: PreTrainedModel, layers: list[LayerParts]):
        self.scores: Scores = {
            kind: [torch.zeros(parts.count(kind), device=model.device) for parts in layers] for kind in DECODER_KINDS
        }
        self.matrices = list(_matrices(layers, self.scores))

    @property
    def output_projections(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.rows is None]

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
    default_loss = "kl"
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
        for scores, linear, _ in progress(self.output_projections, "removal costs"):
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
            linear: torch.zeros(linear.in_features, device=linear.weight.device) for _, linear, _ in self.matrices
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


LossName = Literal["auto", "text", "kl"]
"""The loss behind scores.

text: that of the text's next tokens. Its squared derivatives are an empirical Fisher information.

kl: the divergence KL(dense || pruned) of next-token predictions, by one draw: the loss of tokens that are drawn from
the dense model's predictions, whose expectation is that divergence and a constant. At the dense model the divergence
and its gradient are zero, and its second derivative is the true Fisher information: the squared derivatives for drawn
tokens are an unbiased estimate of it, for tokens are drawn independently, so that cross terms vanish (on both Fishers:
Kunstner et al. 2019, arXiv:1905.12558). Of a model that is pruned already the derivatives' mean is the divergence's
gradient, and their mean square is that gradient's square and the scatter around it, which is the Fisher information as
far as the two models still agree.
"""


def loss_of(name: LossName, method: str) -> Literal["text", "kl"]:
    """The loss behind scores, auto resolved.

    Raises:
        UserError: a divergence behind scores that look at no loss.
    """
    score = SCORES[method]
    if name == "kl" and score.loss is None:
        raise UserError(f"--score_loss kl: {method} looks at no loss; allowed are auto and text")
    return score.default_loss if name == "auto" else name


# Type of a field that chooses a score; carries the flag's allowed values and its help.
if TYPE_CHECKING:
    ScoreName: TypeAlias = str
else:
    ScoreName = choice_of(SCORES, "Score of a structure")


def _matrices(layers: list[LayerParts], scores: Scores) -> Iterator[Matrix]:
    """All matrices of some layers, with the scores they count for."""
    for kind in DECODER_KINDS:
        for parts, score in zip(layers, scores[kind], strict=True):
            if len(score):
                inner, outer = parts.split(kind)
                yield from (Matrix(score, rows.module, rows) for rows in inner)
                yield Matrix(score, outer)

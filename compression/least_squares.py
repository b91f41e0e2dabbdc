"""Output projections that make up for the columns that go, by least squares. Tensors in, tensors out."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import solve_triangular as triangular

from compression.importance import RIDGE, damp

# Rows of a large matrix that are worked on at a time.
BLOCK = 1024
# What keeps a language model's projections as they are, times the width per token of text. With a tenth of it half of
# SmolLM2-135M is worse on every text, with three times as much on text like the one that it is fitted to
# (docs/results.md).
WIDTHS_PER_TOKEN = 12.0
# Four times as much was worse by far, with 64 windows.
LARGEST_RIDGE = 0.5


def ridge_of(width: int, tokens: int) -> float:
    """The ridge for a model of this hidden size and so many tokens of text: little text is fitted less closely.

    Noise asks for a share that falls with the number of tokens, as they are independent; those of a text are not, and
    other text is another matter yet, so that it is larger. From `RIDGE`, which rounding needs, to `LARGEST_RIDGE`.
    """
    return min(max(WIDTHS_PER_TOKEN * width / tokens, RIDGE), LARGEST_RIDGE)


def refit(weight: Tensor, gram: Tensor, columns: Tensor, owed: Tensor | None = None, ridge: float = RIDGE) -> Tensor:
    """The projection [out, in] with these columns only that comes nearest to the whole one, or to what that should be.

    Minimises |X_S W_S'^T - (X W^T + R)|^2 + ridge * |(W_S' - W_S) D|^2, S the columns that stay and G those that go,
    which W_S' = W_S + (W_G C_GS + R^T X_S) (C_SS + ridge D^2)^-1 does with C = X^T X and D^2 the diagonal of C_SS. The
    ridge is on the change: where the text says little, the columns keep their weights. Where there is no solution, it
    is not finite. Of the matrices in float64 there is one of the size of what stays, one of what stays by what goes,
    and blocks of outputs.

    Args:
        weight: [out, in]. gram: X^T X [in, in], or its mean over tokens. columns: [in], bool, True for those that stay.
        owed: X^T R [in, out], or its mean, R [tokens, out] what is to be given more; None: nothing.
        ridge: see above.
    """
    solved = torch.zeros_like(weight)
    if columns.any():
        stay, go = columns.nonzero(), (~columns).nonzero()[:, 0]
        solve, lost = _solver(gram, columns, ridge), gram[stay, go].double()  # in one step: no rows are copied whole
        for start, old in zip(range(0, len(weight), BLOCK), weight.split(BLOCK), strict=True):
            rows = slice(start, start + BLOCK)
            side = lost @ old[:, ~columns].double().T
            if owed is not None:
                side += owed[columns, rows]
            solved[rows, columns] = (old[:, columns].double() + solve(side).T).to(weight.dtype)
    return solved


def _solver(gram: Tensor, columns: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """Solves for right-hand sides [columns that stay, count] with the damped Gram matrix of these columns."""
    factor = cholesky(_damped(gram, columns, ridge))
    if factor is not None:
        return lambda sides: triangular(factor.mT, triangular(factor, sides, upper=False), upper=True)
    # In 16 bits the Gram matrix can be off by more than the ridge, and have a direction that counts below zero.
    factors, pivots, singular = _lu(_damped(gram, columns, ridge))
    return lambda sides: torch.linalg.lu_solve(factors, pivots, sides).masked_fill(singular != 0, torch.nan)


def _damped(gram: Tensor, columns: Tensor, ridge: float) -> Tensor:
    """The damped Gram matrix of these columns, in float64; made in blocks of rows, for it is the largest there is."""
    places = columns.nonzero()[:, 0]
    kept = torch.empty(len(places), len(places), dtype=torch.double, device=gram.device)
    for rows, part in zip(places.split(BLOCK), kept.split(BLOCK), strict=True):
        part.copy_(gram[rows][:, places])
    return damp(kept, ridge)


def cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor of a symmetric matrix, in its place; None where there is none."""
    factor, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if failed or not factor.diagonal().isfinite().all() else factor


def _lu(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of a symmetric matrix in its place, their pivots, and which pivot is zero, if any."""
    factors, device = matrix.mT, matrix.device
    pivots, singular = (torch.empty(size, dtype=torch.int32, device=device) for size in (len(matrix), ()))
    torch.linalg.lu_factor_ex(factors, out=(factors, pivots, singular))
    return factors, pivots, singular

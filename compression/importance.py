"""Importance of structures. Tensors in, tensors out; every function handles one layer's structures at once.

Scores of a layer's structures are additive over weights, so dividing them by the structure's number of parameters
makes kinds of different size comparable.
"""

import torch
from torch import Tensor


def sum_rows(values: Tensor, count: int) -> Tensor:
    """Sum a [count * rows of one structure, in] matrix over the rows of each structure -> [count]."""
    return values.sum(1).view(count, -1).sum(1)


def sum_columns(values: Tensor, count: int) -> Tensor:
    """Sum an [out, count * columns of one structure] matrix over the columns of each structure -> [count]."""
    return values.sum(0).view(count, -1).sum(1)


def l2(inner: list[Tensor], outer: Tensor, count: int) -> Tensor:
    """Squared L2 norm of each structure's weights.

    Args:
        inner: the matrices [rows, in] whose rows belong to the structures, an equal number to each.
        outer: the matrix [out, columns] whose columns do.
        count: number of structures.
    """
    return sum(sum_rows(weight.square(), count) for weight in inner) + sum_columns(outer.square(), count)


def taylor(weights: list[Tensor], gradients: list[Tensor], count: int) -> Tensor:
    """Sum of |weight * gradient| over the rows of each structure: first-order Taylor importance, weight by weight."""
    products = zip(weights, gradients, strict=True)
    return sum(sum_rows((weight * gradient).abs_(), count) for weight, gradient in products)


def taylor_columns(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Sum of |weight * gradient| over the columns of each structure."""
    return sum_columns((weight * gradient).abs_(), count)


def mask_gradient(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Derivative of the loss by a mask on each structure, from the output projection [out, columns].

    The mask scales the structure's columns, so by the chain rule its derivative is the signed sum of weight * gradient
    over them. Squared and averaged over batches this is the empirical Fisher information of the mask
    (Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers").
    """
    return sum_columns(weight * gradient, count)


def complete_pruned(inner: Tensor, outer: Tensor, kept: Tensor) -> Tensor:
    """Add up the two halves of a gradient score, also for structures that are pruned at the moment.

    A pruned structure feeds nothing forward, so only its output columns get a gradient and its inner half is zero.
    Its score is estimated as its outer half times the ratio of whole to outer half among the structures in use, so
    that it competes on equal terms for coming back.

    Args:
        inner, outer: [structures], the halves of the score. kept: [structures], bool.
    """
    ratio = inner[kept].sum() / outer[kept].sum().clamp_min(torch.finfo(outer.dtype).tiny)
    return outer + torch.where(kept, inner, outer * ratio)


def on_one_scale(scores: list[Tensor], parameters: list[int]) -> list[Tensor]:
    """Divide the score densities of all layers by their mean over parameters.

    Norms and gradients have different units and the gradients shrink as training goes on; relative to their own mean
    both are plain numbers around 1, so a weight of 0.5 on each means what it says. The mean, unlike min-max scaling,
    does not let one outlier squeeze all others together, and keeps ratios, unlike ranks.

    Args:
        scores: per layer (and kind) a tensor of score per parameter.
        parameters: parameters per structure, for each of those tensors.
    """
    weighted = sum(score.sum() * count for score, count in zip(scores, parameters, strict=True))
    total = sum(score.numel() * count for score, count in zip(scores, parameters, strict=True))
    mean = (weighted / total).clamp_min(torch.finfo(torch.float32).tiny)
    return [score / mean for score in scores]

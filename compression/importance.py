"""Importance of structures. Tensors in, tensors out; every function handles one layer's structures at once.

Scores of a layer's structures are additive over weights, so dividing them by the structure's number of parameters
makes kinds of different size comparable.
"""

from functools import reduce

import torch
from torch import Tensor

# Share of itself that is added to the diagonal of E[x x^T] where it is inverted: some windows of text do not fill all
# its directions. Not of the diagonal's mean: the few channels that make a language model's massive activations (Sun et
# al. 2024, arXiv:2402.17762) can have 100,000 times the squares of the others, which a share of that mean would drown.
RIDGE = 1e-2
# Columns that go before the large matrices change.
AT_ONCE = 64


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


def taylor_products(weight: Tensor, gradient: Tensor) -> Tensor:
    """|weight * gradient| of each weight, in fp32."""
    return (weight.float() * gradient.float()).abs_()


def taylor(weights: list[Tensor], gradients: list[Tensor], count: int) -> Tensor:
    """Sum of |weight * gradient| over the rows of each structure: first-order Taylor importance, weight by weight."""
    products = zip(weights, gradients, strict=True)
    return reduce(torch.add, (sum_rows(taylor_products(weight, gradient), count) for weight, gradient in products))


def taylor_columns(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Sum of |weight * gradient| over the columns of each structure."""
    return sum_columns(taylor_products(weight, gradient), count)


def mask_gradient(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Derivative of the loss by a mask on each structure, from the output projection [out, columns].

    The mask scales the structure's columns, so by the chain rule its derivative is the signed sum of weight * gradient
    over them. Squared and averaged over batches this is the empirical Fisher information of the mask
    (Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers").
    """
    return sum_columns(weight * gradient, count)


def removal_costs(
    weight: Tensor, inputs: Tensor, gradients: Tensor, count: int, ridge: float = RIDGE, together: int = 1
) -> Tensor:
    """Loss that the removal of each structure adds when those that stay are fitted anew, along the cheapest path.

    The loss is taken to second order with the Kronecker-factored curvature of the output projection, E[g g^T] for its
    rows and E[x x^T] for its columns. Removing the columns S and choosing the others best then costs
    1/2 * sum(E[g g^T] * W_S (E[x x^T]^-1)_SS^-1 W_S^T) (optimal brain surgeon, Hassibi and Stork 1993; for structures
    Kurtic et al. 2023, "ZipLM", and van der Ouderaa et al. 2024, "The LLM Surgeon"). The cheapest structure goes first,
    what stays is updated, and so on to the last: a structure's score says what it costs once all cheaper ones are gone,
    so two that can stand in for each other do not both look dispensable.

    Args:
        weight: the output projection [out, count * columns of one structure].
        inputs: E[x x^T] [columns, columns] of what goes into it; gradients: E[g g^T] [out, out] of the derivative of
            the loss by what comes out, both over tokens.
        count: number of structures.
        ridge: share of itself that is added to the diagonal of E[x x^T].
        together: of structures of one column so many go at a time, those that cost least on their own, and share what
            they cost together: exact for these, and several times faster.

    Returns:
        [count], in units of the loss per token, on the device of the inputs. Each is at least that of what went before.
    """
    values, vectors = torch.linalg.eigh(gradients.double())
    felt = (vectors * values.clamp_min(0).sqrt()).T.float() @ weight.float()  # its squares are felt by the loss
    inverse = _inverse(damp(inputs.double(), ridge)).float()
    size, left, costs, cost = weight.shape[1] // count, torch.arange(count), torch.zeros(count), 0.0
    while len(left):
        gone, steps = _cheapest(felt, inverse, len(left), together)
        for place, step in zip(gone, steps, strict=True):
            cost = max(cost, step)
            costs[left[place]] = cost / 2
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[gone] = False
        left, felt, inverse = left[stays], *_without(felt, inverse, stays.repeat_interleave(size).to(felt.device))
    return costs.to(inputs.device)


def keep_in_rounds(
    weight: Tensor,
    inputs: Tensor,
    count: int,
    removed: int,
    rounds: int,
    factors: Tensor | None = None,
    ridge: float = RIDGE,
) -> Tensor:
    """Which structures stay when so many go, in rounds: bool [count].

    A round takes those whose removal alone changes least of what comes out, the others fitted anew: for the columns S
    of a structure tr(W_S (E[x x^T]^-1)_SS^-1 W_S^T), the exact cost of a quadratic (optimal brain surgeon; for
    structures Kurtic et al. 2023, "ZipLM", and Meng et al. 2024, "OSSCAR"). Then what stays takes over, by elimination
    of these columns from weight and inverse. With one round, structures that stand in for each other may all go
    together; with as many rounds as structures go, each is the cheapest of its time.

    Args:
        weight: the output projection [out, count * columns of one structure].
        inputs: E[x x^T] or X^T X [columns, columns] of what goes into it.
        rounds: each takes as many as the others, to within one.
        factors: [count], what costs are multiplied with; None: 1.
        ridge: share of itself that is added to the diagonal of the inputs' matrix.
    """
    felt, inverse = weight.float(), _inverse(damp(inputs.to(torch.double, copy=True), ridge)).float()
    size, left = weight.shape[1] // count, torch.arange(count, device=inputs.device)
    for number in range(rounds):
        going = removed * (number + 1) // rounds - removed * number // rounds
        if not going:
            continue
        costs = _single_costs(felt, inverse, len(left))
        if factors is not None:
            costs = costs * factors[left]
        stays = torch.ones(len(left), dtype=torch.bool, device=inputs.device)
        stays[costs.argsort(stable=True)[:going]] = False
        left, felt, inverse = left[stays], *_without(felt, inverse, stays.repeat_interleave(size))
    kept = torch.zeros(count, dtype=torch.bool, device=inputs.device)
    kept[left] = True
    return kept


def contributions(weight: Tensor, inputs: Tensor, count: int) -> Tensor:
    """Mean square of what each structure gives through the output projection, [count].

    Args:
        weight: [out, count * columns of one structure].
        inputs: E[x x^T], or X^T X for the sum over tokens, [columns, columns].
    """
    columns, blocks = _by_structure(weight.float(), count), _diagonal_blocks(inputs.float(), count)
    return (columns * (blocks @ columns)).sum((1, 2))


def _inverse(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric matrix; of a positive definite one in half the time."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.inv(matrix) if failed else torch.cholesky_inverse(factor)


def _cheapest(felt: Tensor, inverse: Tensor, count: int, together: int) -> tuple[list[int], list[float]]:
    """The structures that go next, one after the other, and twice the loss that each of them adds then."""
    if felt.shape[1] == count:
        return _cheapest_columns(felt, inverse, together)
    costs = _single_costs(felt, inverse, count)
    place = int(costs.argmin())
    return [place], [costs[place].item()]


def _cheapest_columns(felt: Tensor, inverse: Tensor, together: int) -> tuple[list[int], list[float]]:
    """As `_cheapest`, of columns: `AT_ONCE` of them, or all.

    When columns go, `felt` loses felt_gone shares, and the inverse rows^T shares, where shares = (inverse of the rows
    by the columns that go) rows. Both are left as they are meanwhile: only the rows of those that go, and what all cost
    on their own, are kept up to date.
    """
    number = min(AT_ONCE, len(inverse))
    rows, shares = inverse.new_empty(2, number, len(inverse))
    lost = felt.new_empty(len(felt), number)
    squares, spreads = felt.square().sum(0), inverse.diagonal().clone()
    gone, costs = [], []
    for start in range(0, number, together):
        places = (squares / spreads).topk(min(together, number - start), largest=False).indices
        now = slice(start, start + len(places))
        before, given = shares[:start], lost[:, :start]
        rows[now] = inverse[places] - rows[:start, places].T @ before
        lost[:, now] = mine = felt[:, places] - given @ before[:, places]
        pivots = rows[now][:, places]
        shares[now] = torch.linalg.solve(pivots, rows[now])
        costs.append((mine * torch.linalg.solve(pivots, mine.T).T).sum().expand(len(places)) / len(places))
        along = mine.T @ felt - mine.T @ given @ before
        squares += (shares[now] * (mine.T @ mine @ shares[now] - 2 * along)).sum(0)
        spreads -= (rows[now] * shares[now]).sum(0)
        squares[places], spreads[places] = torch.inf, 1.0
        gone.append(places)
    return torch.cat(gone).tolist(), torch.cat(costs).tolist()


def _without(felt: Tensor, inverse: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """What is felt of the columns that stay, fitted anew without the others, and the inverse of their E[x x^T]."""
    gone, stay = (~stays).nonzero()[:, 0], stays.nonzero()[:, 0]
    rows = inverse[gone]
    share = torch.linalg.solve(rows[:, gone], rows[:, stay])
    left = inverse[stay][:, stay].addmm_(rows[:, stay].T, share, alpha=-1)
    return felt[:, stay].addmm_(felt[:, gone], share, alpha=-1), left


def damp(matrix: Tensor, ridge: float) -> Tensor:
    """Add a share of it to the diagonal of E[x x^T] or X^T X, in place; gives the matrix back.

    Columns count the same in whatever unit they are (Marquardt 1963). Where nothing comes in at all, the least bit
    makes the matrix invertible too.
    """
    matrix.diagonal().add_((ridge * matrix.diagonal()).clamp_min(1e-30))
    return matrix


def _single_costs(felt: Tensor, inverse: Tensor, count: int) -> Tensor:
    """Twice the loss that each structure's removal adds on its own, [count]."""
    size = felt.shape[1] // count
    if size == 1:
        return felt.square().sum(0) / inverse.diagonal()
    columns = _by_structure(felt, count)
    return (columns * torch.linalg.solve(_diagonal_blocks(inverse, count), columns)).sum((1, 2))


def _by_structure(matrix: Tensor, count: int) -> Tensor:
    """The columns of each structure: [out, count * size] -> [count, size, out]."""
    return matrix.view(len(matrix), count, -1).permute(1, 2, 0)


def _diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """Each structure's own block of a matrix [columns, columns]: [count, size, size]."""
    size = len(matrix) // count
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


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
    weighted = reduce(torch.add, (score.sum() * count for score, count in zip(scores, parameters, strict=True)))
    total = sum(score.numel() * count for score, count in zip(scores, parameters, strict=True))
    mean = (weighted / total).clamp_min(torch.finfo(torch.float32).tiny)
    return [score / mean for score in scores]

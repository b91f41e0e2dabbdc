"""Importance scores against their definitions, written as plain loops."""

import pytest
import torch

from compression import importance
from compression.least_squares import refit


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(12, 5, generator=generator) for _ in range(4)]
    columns = [torch.randn(5, 12, generator=generator) for _ in range(2)]
    return rows, columns


def test_l2_sums_rows_and_columns_of_a_structure(layer):
    (first, second, *_), (outer, _) = layer
    scores = importance.l2([first, second], outer, count=4)
    for index in range(4):
        part = slice(3 * index, 3 * index + 3)
        expected = first[part].norm() ** 2 + second[part].norm() ** 2 + outer[:, part].norm() ** 2
        torch.testing.assert_close(scores[index], expected)


def test_taylor_is_the_sum_of_weight_times_gradient(layer):
    (first, second, first_gradient, second_gradient), (outer, outer_gradient) = layer
    inner = importance.taylor([first, second], [first_gradient, second_gradient], count=4)
    columns = importance.taylor_columns(outer, outer_gradient, count=4)
    for index in range(4):
        part = slice(3 * index, 3 * index + 3)
        products = (first[part] * first_gradient[part]).abs().sum() + (second[part] * second_gradient[part]).abs().sum()
        torch.testing.assert_close(inner[index], products)
        torch.testing.assert_close(columns[index], (outer[:, part] * outer_gradient[:, part]).abs().sum())


def test_mask_gradient_is_the_derivative_of_a_mask(layer):
    _, (outer, _) = layer
    values = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, requires_grad=True)
    weight = outer.clone().requires_grad_()
    (values @ (weight * mask.repeat_interleave(3)).T).pow(3).sum().backward()
    torch.testing.assert_close(importance.mask_gradient(outer, weight.grad, count=4), mask.grad)


def test_pruned_structures_are_scored_as_if_they_were_whole():
    inner, outer = torch.tensor([2.0, 4.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])
    kept = torch.tensor([True, True, False])
    assert importance.complete_pruned(inner, outer, kept).tolist() == [3.0, 6.0, 9.0]


def test_one_scale_has_mean_one_and_keeps_ratios():
    scores = [torch.tensor([1.0, 3.0]), torch.tensor([10.0])]
    scaled = importance.on_one_scale(scores, [5, 20])
    mean = (5 * scaled[0].sum() + 20 * scaled[1].sum()) / 30
    torch.testing.assert_close(mean, torch.tensor(1.0))
    assert scaled[0][1] / scaled[0][0] == pytest.approx(3)
    tiny = importance.on_one_scale([score * 1e-6 for score in scores], [5, 20])
    torch.testing.assert_close(tiny[0], scaled[0])


@pytest.fixture
def tokens():
    """An output projection, what goes into it, and the loss's derivatives by what comes out, for 200 tokens."""
    torch.manual_seed(0)
    mixed = torch.randn(200, 12) @ torch.randn(12, 12)
    return torch.randn(5, 12), mixed, torch.randn(200, 5)


def second_order_loss(weight, changed, inputs, gradients):
    """1/2 * E[(g^T dW x)^2] with g and x taken as independent."""
    change = torch.linalg.cholesky(gradients.T @ gradients / len(gradients)).T @ (changed - weight)
    return 0.5 * (change @ (inputs.T @ inputs / len(inputs)) * change).sum().item()


def fitted_without(weight, inputs, gone):
    """The projection that gives most nearly the same from the other columns, by an ordinary least-squares solver."""
    changed = torch.zeros_like(weight)
    others = [column for column in range(weight.shape[1]) if column not in gone]
    changed[:, others] = torch.linalg.lstsq(inputs[:, others], inputs @ weight.T).solution.T
    return changed


@pytest.mark.parametrize("count", [12, 4])
def test_removal_costs_are_those_of_a_refitted_projection(tokens, count):
    weight, inputs, gradients = tokens
    curvature = inputs.T @ inputs / 200, gradients.T @ gradients / 200
    before = [matrix.clone() for matrix in (weight, *curvature)]
    costs = importance.removal_costs(weight, *curvature, count, ridge=1e-7)
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, *curvature), strict=True))
    size = 12 // count
    columns = [list(range(place * size, (place + 1) * size)) for place in range(count)]
    alone = [second_order_loss(weight, fitted_without(weight, inputs, gone), inputs, gradients) for gone in columns]
    order = costs.argsort().tolist()
    assert order[0] == torch.tensor(alone).argmin() and costs.min().item() == pytest.approx(min(alone), rel=1e-2)
    for number in (1, 2, 3):
        gone = [column for place in order[:number] for column in columns[place]]
        joint = second_order_loss(weight, fitted_without(weight, inputs, gone), inputs, gradients)
        assert costs[order[:number]].sum().item() == pytest.approx(joint, rel=1e-2), number


def test_of_two_alike_structures_one_is_free_and_the_other_is_not(tokens):
    weight, inputs, gradients = tokens
    inputs[:, 7] = inputs[:, 3]
    costs = importance.removal_costs(weight, inputs.T @ inputs / 200, gradients.T @ gradients / 200, 12, ridge=1e-6)
    free, other = sorted((costs[3].item(), costs[7].item()))
    assert free < 1e-3 * costs.median() and other > 10 * free


def greedy(weight, inputs, gradients):
    """Columns in the order in which they go, and the loss that each adds, every candidate solved for alone."""
    loss = torch.linalg.cholesky(gradients).T
    inverse, gone, order, costs = torch.linalg.inv(inputs), [], [], []

    def joint(columns):
        return (
            0.5
            * (torch.linalg.solve(inverse[columns][:, columns], (loss @ weight[:, columns]).T))
            .mul((loss @ weight[:, columns]).T)
            .sum()
            .item()
        )

    total = 0.0
    while len(gone) < weight.shape[1]:
        found = {column: joint([*gone, column]) for column in range(weight.shape[1]) if column not in gone}
        best = min(found, key=found.__getitem__)
        gone.append(best)
        order.append(best)
        costs.append(found[best] - total)
        total = found[best]
    return order, costs


@pytest.mark.parametrize("at_once", [1, 5, 7, 100])
def test_the_path_is_the_same_however_rarely_the_matrices_change(monkeypatch, at_once):
    monkeypatch.setattr(importance, "AT_ONCE", at_once)
    torch.manual_seed(1)
    x, g, weight = (torch.randn(*shape).double() for shape in ((100, 30), (50, 6), (6, 30)))
    x = x @ torch.randn(30, 30).double()
    inputs, gradients = x.T @ x / 100, g.T @ g / 50
    found = importance.removal_costs(weight, inputs, gradients, 30, ridge=1e-9)
    order, costs = greedy(weight, inputs, gradients)
    # A step that costs less than the one before it counts as much.
    expected = torch.tensor(costs).cummax(0).values
    torch.testing.assert_close(found[order], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("together", [4, 8])
def test_columns_that_go_together_share_what_they_cost(monkeypatch, tokens, together):
    monkeypatch.setattr(importance, "AT_ONCE", 8)
    weight, inputs, gradients = tokens
    curvature = inputs.T @ inputs / 200, gradients.T @ gradients / 200
    costs = importance.removal_costs(weight, *curvature, 12, ridge=1e-7, together=together)
    order = costs.argsort(stable=True)
    assert len(costs.unique()) == 12 // together + (12 % together > 0)
    gone = order[:together].tolist()
    joint = second_order_loss(weight, fitted_without(weight, inputs, gone), inputs, gradients)
    assert costs[gone].sum().item() == pytest.approx(joint, rel=1e-2)


def error_without(weight, inputs, gone):
    """What comes out otherwise when these columns are gone and the others are fitted anew."""
    return (inputs @ (fitted_without(weight, inputs, gone) - weight).T).square().sum().item()


def gone_of(kept, size=1):
    return [column for column, stays in enumerate(kept.repeat_interleave(size).tolist()) if not stays]


@pytest.mark.parametrize("count", [12, 4])
@pytest.mark.parametrize("removed", [1, 3])
def test_rounds_of_one_take_what_costs_least_by_brute_force(tokens, count, removed):
    weight, inputs, _ = tokens
    gram, size = inputs.T @ inputs, 12 // count
    before = gram.clone()
    kept = importance.keep_in_rounds(weight, gram, count, removed, removed, ridge=1e-7)
    expected = []
    for _ in range(removed):
        errors = {}
        for place in set(range(count)) - set(expected):
            columns = [place * size + column for place in (*expected, place) for column in range(size)]
            errors[place] = error_without(weight, inputs, columns)
        expected.append(min(errors, key=errors.__getitem__))
    assert sorted((~kept).nonzero()[:, 0].tolist()) == sorted(expected)
    assert torch.equal(gram, before)


@pytest.mark.parametrize("count", [40, 10])
def test_more_rounds_leave_less_error(count):
    """On inputs of low rank, as real ones are, what stands in for others must not go with them."""
    errors = {rounds: 0.0 for rounds in (1, 4, count // 2)}
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        inputs = torch.randn(300, 20, generator=draw) @ torch.randn(20, 40, generator=draw)
        inputs += 0.1 * torch.randn(300, 40, generator=draw)
        weight = torch.randn(8, 40, generator=draw)
        for rounds in errors:
            kept = importance.keep_in_rounds(weight, inputs.T @ inputs, count, count // 2, rounds)
            assert kept.sum() == count - count // 2
            errors[rounds] += error_without(weight, inputs, gone_of(kept, 40 // count))
    one, some, every = errors.values()
    assert every <= some <= one and every < 0.7 * one


def test_factors_decide_where_costs_do_not(tokens):
    weight, inputs, _ = tokens
    gram = inputs.T @ inputs
    factors = torch.ones(12)
    factors[[2, 7]] = 1e-6
    kept = importance.keep_in_rounds(weight, gram, 12, 2, 1, factors)
    assert gone_of(kept) == [2, 7]


@pytest.mark.parametrize("count", [12, 4])
def test_contributions_are_mean_squares_of_what_comes_out(tokens, count):
    weight, inputs, _ = tokens
    size = 12 // count
    alone = [
        (inputs[:, first : first + size] @ weight[:, first : first + size].T).square().sum(1).mean()
        for first in range(0, 12, size)
    ]
    torch.testing.assert_close(importance.contributions(weight, inputs.T @ inputs / 200, count), torch.stack(alone))


def test_a_channel_of_massive_activations_changes_nothing_for_the_others(tokens):
    """In whatever unit a column comes in, its weights in the inverse of it, choices, costs and fits are the same."""
    weight, inputs, gradients = tokens
    unit = torch.ones(12).index_fill(0, torch.tensor([3]), 1000.0)
    curvature = gradients.T @ gradients / 200
    found = []
    for each, rows in ((weight, inputs), (weight / unit, inputs * unit)):
        gram = rows.T @ rows / 200
        kept = importance.keep_in_rounds(each, gram, 12, 6, 3, factors=torch.arange(1.0, 13.0))
        costs = importance.removal_costs(each, gram, curvature, 12)
        fitted = refit(each, gram, torch.arange(12) % 2 > 0)
        found.append((kept.float(), costs, fitted * (unit if each is not weight else 1)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

"""Rounds in which a repair also solves for what the channels of an MLP read (gates and ups), by Gauss and Newton.

With the output projection D as it is solved already, the rows W of gates and ups that stay are to minimise

    |D f(W x) - T|^2

over a text, T being what the projection itself was fitted to (see `repair`). Each channel has its own rows, so f has a
derivative c per row and token, which makes it linear: D (c * (dW x)). A few steps of conjugate gradients on that, from
zero, change the rows; few steps change little where the text says little. They are preconditioned with the Kronecker
product of the second moments of what goes in and of what a row does to the output (Martens & Grosse 2015, "K-FAC"),
for each share (gates, ups) alone. The projection is solved anew after each round.
"""

from functools import partial

import torch
from torch import Tensor, nn

from compression.hooks import hooked
from compression.importance import damp
from compression.least_squares import cholesky
from compression.llm.repair_text import Moments, RepairText, watched
from compression.offload import States
from compression.runtime import sum_over_processes
from compression.structures import CHANNELS, layers_of, spread

# Of conjugate gradients, in each round.
STEPS = 4
# What is added to the diagonals of the preconditioner's factors, as a share of them and of their median: an input that
# is next to nothing in every token would get weights without bound, which no training survives.
DAMPING = 0.01
# The linear model of f holds near by: a change after which the error is no smaller is halved, so often.
HALVINGS = 3


@torch.no_grad()
def solve_inputs(text: RepairText, targets: States, stays: Tensor) -> Moments | None:
    """One round for the MLP that the text stands before, in place; its weights are on the device.

    Args:
        targets: of each batch, what the output projection is to give, [windows, length, outputs].
        stays: bool [channels]; only the rows of these change.

    Returns:
        What is lacking then for the targets, see `RepairText.lacking`; None where no change was found that brings the
        output nearer to them, and nothing has changed.
    """
    problem = _Linear(text, targets, stays)
    change = _conjugate_gradients(problem, STEPS)
    for _ in range(HALVINGS + 1):
        problem.put(problem.weight + change)
        moments, error = text.lacking(CHANNELS, targets)
        if error < problem.start:
            return moments
        change = change / 2
    problem.put(problem.weight)
    return None


def _conjugate_gradients(problem: "_Linear", steps: int) -> Tensor:
    """The change of the rows [rows, inputs] after some steps from zero; changes the problem's residuals."""
    gradient = problem.gradient()
    direction = pulled = problem.preconditioned(gradient)
    change, slope = torch.zeros_like(gradient), (gradient * pulled).sum()
    for step in range(steps):
        if not slope > 0:  # solved, or not finite
            break
        change += problem.advance(direction, slope) * direction
        if step + 1 < steps:
            gradient = problem.gradient()
            pulled, before = problem.preconditioned(gradient), slope
            slope = (gradient * pulled).sum()
            direction = pulled + slope / before * direction
    return change


class _Linear:
    """What the output of an MLP becomes with other rows, to first order around the present ones.

    Args: see `solve_inputs`.

    Attributes:
        weight: the rows of the channels that stay, of all modules and shares behind one another, [rows, inputs] in
            fp32.
        start: the squared error with them.
    """

    def __init__(self, text: RepairText, targets: States, stays: Tensor):
        self.text = text
        self.inner, self.outer = layers_of(text.model)[text.layer].split(CHANNELS)
        device = self.outer.weight.device
        self.columns = spread(stays, self.outer.in_features).to(device)
        self.rows = [rows.spread(stays).to(device) for rows in self.inner]
        self.weight = torch.cat(
            [each.module.weight[rows] for each, rows in zip(self.inner, self.rows, strict=True)]
        ).float()
        self.shares = len(self.weight) // int(self.columns.sum())
        self.projection = self.outer.weight[:, self.columns]
        self.inputs, self.slopes, self.residuals = (text.decoder.states() for _ in range(3))
        self.start, self.factors = self._linearise(targets)

    def _linearise(self, targets: States) -> tuple[Tensor, tuple[list[Tensor], Tensor]]:
        """Note inputs, derivatives and residuals of the whole text; gives the squared error, and the factors of the
        preconditioner: of each share's rows, and of the inputs."""
        error = torch.zeros((), dtype=torch.double, device=self.weight.device)
        given = torch.zeros(self.weight.shape[1], self.weight.shape[1], device=self.weight.device)
        channels = self.projection.shape[1]
        felt = [torch.zeros(channels, channels, device=self.weight.device) for _ in range(self.shares)]
        for number in range(len(self.text.options)):
            inputs, slopes, outputs = self._watched(number)
            residual = targets.get(number).flatten(0, -2) - outputs
            error += residual.square().sum(dtype=torch.double)
            given += inputs.T @ inputs
            for sums, share in zip(felt, slopes.chunk(self.shares, dim=1), strict=True):
                sums += share.T @ share
            for states, values in ((self.inputs, inputs), (self.slopes, slopes), (self.residuals, residual)):
                states.put(number, values)
        sum_over_processes(error, given, *felt)
        products = self.projection.float().T @ self.projection.float()
        # One after the other: these are the largest matrices that there are.
        return error, ([_factor(felt.pop(0).mul_(products)) for _ in range(self.shares)], _factor(given))

    def _watched(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch's tokens: what goes into the rows, each row's derivative of what goes into the projection, and
        what that gives."""
        inputs: list[Tensor] = []
        sums: list[Tensor] = []

        def cut(_: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
            inputs.append(given[0])
            sums.append(output.detach().requires_grad_())
            return sums[-1]

        with torch.enable_grad(), hooked(rows.module.register_forward_hook(cut) for rows in self.inner):
            read, outputs, _ = watched(self.outer, partial(self.text.branch, CHANNELS, number))
            slopes = torch.autograd.grad(read.sum(), sums)
        chosen = [each.flatten(0, -2)[:, rows] for each, rows in zip(slopes, self.rows, strict=True)]
        return inputs[0].flatten(0, -2), torch.cat(chosen, 1), outputs.detach().float().flatten(0, -2)

    def gradient(self) -> Tensor:
        """Half of the negative gradient of the squared error, [rows, inputs]."""
        total = torch.zeros_like(self.weight)
        for number in range(len(self.text.options)):
            inputs, slopes = self.inputs.get(number), self.slopes.get(number)
            felt = self.residuals.get(number).to(inputs.dtype) @ self.projection
            total += (felt.repeat(1, self.shares) * slopes).T @ inputs
        sum_over_processes(total)
        return total

    def advance(self, direction: Tensor, slope: Tensor) -> Tensor:
        """How far to go in a direction in which the squared error falls by twice `slope` at first; the residuals are
        those there then."""
        outputs = self.text.decoder.states()
        curvature = torch.zeros((), dtype=torch.double, device=direction.device)
        for number in range(len(self.text.options)):
            inputs, slopes = self.inputs.get(number), self.slopes.get(number)
            felt = (inputs @ direction.T.to(inputs.dtype)) * slopes
            output = felt.unflatten(1, (self.shares, -1)).sum(1) @ self.projection.T
            curvature += output.float().square().sum(dtype=torch.double)
            outputs.put(number, output)
        sum_over_processes(curvature)
        length = (slope / curvature).float()
        for number in range(len(self.text.options)):
            self.residuals.put(number, self.residuals.get(number) - length * outputs.take(number).float())
        return length

    def preconditioned(self, gradient: Tensor) -> Tensor:
        """An approximation of the solution."""
        of_rows, of_inputs = self.factors
        parts = gradient.double().chunk(self.shares)
        solved = [torch.cholesky_solve(part, factor) for part, factor in zip(parts, of_rows, strict=True)]
        return torch.cholesky_solve(torch.cat(solved).T, of_inputs).T.float()

    def put(self, weight: Tensor) -> None:
        """Give the modules these rows."""
        counts = [int(rows.sum()) for rows in self.rows]
        for each, rows, part in zip(self.inner, self.rows, weight.split(counts), strict=True):
            each.module.weight[rows] = part.to(each.module.weight.dtype)


def _factor(moments: Tensor) -> Tensor:
    """The lower factor of second moments in float64, damped so far that there is one: in 16 bits moments can be off by
    more than the least damping. Where there is none at all it is not finite."""
    damping, median = DAMPING, moments.diagonal().median().double()
    while damping <= 1:
        damped = damp(moments.double(), damping)
        damped.diagonal().add_(damping * median)
        factor = cholesky(damped)
        if factor is not None:
            return factor
        damping *= 10
    return torch.full_like(moments, torch.nan, dtype=torch.double)

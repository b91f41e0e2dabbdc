"""What changes while training goes on: sparsity, temperature, mixing weight, learning rate, phase, early stopping.

Pure functions of the step, so that a resumed run needs nothing but its step number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Literal


def cubic_sparsity(progress: float, final: float) -> float:
    """Sparsity after a share `progress` of the pruning steps: final * (1 - (1 - progress)^3).

    Zhu and Gupta 2017, "To prune, or not to prune": fast while there is much redundancy, slow towards the end.
    """
    progress = min(max(progress, 0.0), 1.0)
    return final * (1 - (1 - progress) ** 3)


def linear(progress: float, start: float, end: float) -> float:
    """From `start` to `end` as progress goes from 0 to 1; constant outside."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


Factor = Callable[[int, int, int], float]
"""On the learning rate, of the step, the number of steps and that of the warm-up."""


def after_warmup(decay: Factor) -> Factor:
    """A factor that goes from 0 to 1 in the warm-up, and is that of a decay behind it."""

    def factor(step: int, total: int, warmup: int) -> float:
        return (step + 1) / warmup if step < warmup else decay(step, total, warmup)

    return update_wrapper(factor, decay)


@after_warmup
def warmup_then_linear_decay(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: 0 to 1 over `warmup` steps, then down to 0 at `total`."""
    return max(total - step, 0) / max(total - warmup, 1)


@after_warmup
def warmup_then_cosine_decay(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: 0 to 1 over `warmup` steps, then half a cosine down to 0 at `total`.

    Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", without the restarts.
    """
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return (1 + math.cos(math.pi * progress)) / 2


DECAY_SHARE = 0.2
"""Share of all steps in which `warmup_stable_decay` goes down to 0."""


@after_warmup
def warmup_stable_decay(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate (WSD): 0 to 1 over `warmup` steps, 1 up to the last fifth of all steps, then down.

    It falls as 1 - sqrt(progress) to 0 at `total` (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations"; WSD itself: Hu et al. 2024, "MiniCPM").
    """
    begin = max(total - round(DECAY_SHARE * total), warmup)
    progress = min(max(step - begin, 0) / max(total - begin, 1), 1.0)
    return 1 - math.sqrt(progress)


ScheduleName = Literal["linear", "cosine", "wsd"]
SCHEDULES: dict[ScheduleName, Factor] = {
    "linear": warmup_then_linear_decay,
    "cosine": warmup_then_cosine_decay,
    "wsd": warmup_stable_decay,
}


@dataclass
class EarlyStopping:
    """Stop when the metric has not risen by more than `min_delta` for `patience` epochs."""

    patience: int
    min_delta: float
    best: float = float("-inf")
    waited: int = 0

    def update(self, metric: float) -> bool:
        """Take in one epoch's metric; True if it is a new best one."""
        improved = metric > self.best + self.min_delta
        self.best, self.waited = (metric, 0) if improved else (self.best, self.waited + 1)
        return improved

    @property
    def stop(self) -> bool:
        return self.waited >= self.patience

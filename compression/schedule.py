"""What changes while training goes on: sparsity, temperature, mixing weight, learning rate, phase, early stopping.

Pure functions of the step, so that a resumed run needs nothing but its step number.
"""

from dataclasses import dataclass


def cubic_sparsity(progress: float, final: float) -> float:
    """Sparsity after a share `progress` of the pruning steps: final * (1 - (1 - progress)^3).

    Zhu and Gupta 2017, "To prune, or not to prune": fast while there is much redundancy, slow towards the end.
    """
    progress = min(max(progress, 0.0), 1.0)
    return final * (1 - (1 - progress) ** 3)


def linear(progress: float, start: float, end: float) -> float:
    """From `start` to `end` as progress goes from 0 to 1; constant outside."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def warmup_then_linear_decay(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: 0 to 1 over `warmup` steps, then down to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return max(total - step, 0) / max(total - warmup, 1)


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

"""Whether what training computes is finite."""

import torch
from torch import Tensor

from compression.runtime import UserError


class Health:
    """Whether what training computes is finite; on a GPU it is looked at now and then, for a look waits for the GPU.

    Raises:
        UserError: from `watch` or `check`, once something was not finite: what, and at which step it began.
    """

    STEPS_UNSEEN = 50

    def __init__(self, device: torch.device):
        self.device = device
        self.first: dict[str, Tensor] = {}

    def watch(self, what: str, value: Tensor, step: int) -> None:
        """Take note of a value of a step."""
        never, now = (torch.tensor(at, dtype=torch.double, device=self.device) for at in (float("inf"), step))
        here = torch.where(value.isfinite(), never, now)
        self.first[what] = torch.minimum(self.first.get(what, never), here)
        if self.device.type == "cpu" or step % self.STEPS_UNSEEN == 0:
            self.check()

    def check(self) -> None:
        """Raise where anything was not finite so far."""
        steps = {what: step.item() for what, step in self.first.items()}
        step = min(steps.values(), default=float("inf"))
        if step < float("inf"):
            what = next(name for name, first in steps.items() if first == step)
            raise UserError(
                f"training broke down at step {int(step) + 1}: {what} is not finite; nothing was saved; use a lower "
                "--learning_rate, other weights of the losses, or --amp no"
            )

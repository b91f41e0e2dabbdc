"""The states that a killed training goes on from: trained weights, the optimizer's moments, a record of the rest."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.checkpoint import load_tensors, save_tensors
from compression.files import new_folder, remove_folder
from compression.integrity import STATE_FILE, seal
from compression.runtime import processes
from compression.saved_parts import read_state
from compression.sharding import load_parts, save_parts

PARTS = "parts"
"""The folder in a state where each process has written its part."""


class SavedStates:
    """The states of one training run, of which the newest is kept.

    Args:
        folder: where they are kept; its name must tell runs with other settings or inputs apart.
        model: weights that are frozen are not saved.
        in_parts: whether all processes write what they have, to be read by any number of them.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, in_parts: bool):
        self.folder, self.model, self.optimizer, self.in_parts = Path(folder), model, optimizer, in_parts

    def save(self, step: int, epoch: int, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Save a state; those before it are removed once it is complete. All processes call it together.

        Args:
            record, tensors: what else there is to go on from, the record as JSON values.
        """
        if not processes().is_main_process:
            self._write_trained(None)
        else:
            target, older = self.folder / f"step_{step:08d}_epoch_{epoch:04d}", self._saved()
            with new_folder(target) as folder:
                self._write_trained(folder)
                save_tensors(folder / "recipe.safetensors", tensors)
                seal(folder, record, STATE_FILE)
            for folder in older:
                if folder != target:
                    remove_folder(folder)
        processes().wait_for_everyone()

    def restore(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Give model and optimizer what the newest state has; its record and tensors, None without a state.

        Raises:
            UserError: it is damaged.
        """
        saved = self._saved()
        if not saved:
            return None
        record = read_state(saved[-1], self.folder)
        self._read_trained(saved[-1])
        return record, load_tensors(saved[-1] / "recipe.safetensors")

    def _saved(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    def _write_trained(self, folder: Path | None) -> None:
        """Write weights and optimizer; the processes without a folder have their part in it, if there are parts."""
        if self.in_parts:
            save_parts(folder and folder / PARTS, self.model, self.optimizer)
        elif folder is not None:
            save_tensors(folder / "model.safetensors", _trained(self.model))
            save_tensors(folder / "optimizer.safetensors", _flat(self.optimizer.state_dict()["state"]))

    def _read_trained(self, folder: Path) -> None:
        if self.in_parts:
            load_parts(folder / PARTS, self.model, self.optimizer)
            return
        self.model.load_state_dict(load_tensors(folder / "model.safetensors"), strict=False)
        moments = _nested(load_tensors(folder / "optimizer.safetensors"))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without what is frozen, and without what belongs to it (the scales of 4-bit weights)."""
    parameters = model.named_parameters(remove_duplicate=False)
    frozen = tuple(name for name, parameter in parameters if not parameter.requires_grad)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(frozen)}


def _flat(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state

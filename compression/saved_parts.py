"""What a long run keeps on its way: finished parts, and how a saved state is read."""

from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any

import torch

from compression.checkpoint import load_tensors, save_tensors
from compression.files import new_folder, remove_folder
from compression.integrity import STATE_FILE, read_record, seal, verify
from compression.runtime import UserError, processes

TENSORS_FILE = "tensors.safetensors"
# Gives named tensors that an earlier run made by this name, or makes them, as `SavedParts.tensors` does.
Cached = Callable[[str, Callable[[], dict[str, torch.Tensor]]], dict[str, torch.Tensor]]


class SavedParts:
    """Finished parts of a long run, so that a run that was killed goes on behind them.

    Several processes make a part together, the first one keeps it, and all read it.

    Args:
        folder: where they are kept; its name must tell runs with other settings or inputs apart.
        resume: take what is there; otherwise the folder is emptied first.
    """

    def __init__(self, folder: Path, resume: bool):
        self.folder = Path(folder)
        if not resume:
            self.remove()
        processes().wait_for_everyone()

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON values by name; made and kept where they are not there yet."""
        part = self.folder / name
        if self._is_missing(part):
            record = {"value": make()}
            self._keep(part, lambda _: record)
        return read_state(part, self.folder)["value"]

    def tensors(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Named tensors, on the CPU; made and kept where they are not there yet."""
        part = self.folder / name
        if self._is_missing(part):
            made = make()

            def write(folder: Path) -> dict[str, Any]:
                save_tensors(folder / TENSORS_FILE, made)
                return {}

            self._keep(part, write)
        read_state(part, self.folder)
        return load_tensors(part / TENSORS_FILE)

    def files(self, name: str, write: Callable[[Path | None], None]) -> Path:
        """A folder of files, which `write` puts into the folder it gets, where they are not there yet.

        Several processes call it together; only the first one gets a folder.
        """
        part = self.folder / name

        def write_files(folder: Path) -> dict[str, Any]:
            write(folder)
            return {}

        if self._is_missing(part):
            self._keep(part, write_files, lambda: write(None))
        read_state(part, self.folder)
        return part

    def forget(self, prefix: str) -> None:
        """Keep the parts whose names begin so no longer."""
        processes().wait_for_everyone()
        if processes().is_main_process:
            for part in self.folder.glob(f"{escape(prefix)}*"):
                remove_folder(part)

    def _is_missing(self, part: Path) -> bool:
        missing = not part.is_dir()
        processes().wait_for_everyone()  # all of them look before one writes
        return missing

    def _keep(
        self, part: Path, write: Callable[[Path], dict[str, Any]], others: Callable[[], None] = lambda: None
    ) -> None:
        """Write a part: `write` makes its files in the folder it gets, and gives its record; the other processes do
        `others` meanwhile."""
        if processes().is_main_process:
            with new_folder(part) as temporary:
                seal(temporary, write(temporary), STATE_FILE)
        else:
            others()
        processes().wait_for_everyone()

    def remove(self) -> None:
        """Once the run's result is saved."""
        if processes().is_main_process:
            remove_folder(self.folder)


def read_state(folder: Path, states: Path) -> dict[str, Any]:
    """The record of a saved state whose files are as they were written.

    Args:
        states: the folder of all states of the run.

    Raises:
        UserError: it is damaged; says which folder to delete.
    """
    try:
        verify(folder)
        record = read_record(folder, STATE_FILE)
    except UserError as problem:
        found, _, _ = str(problem).partition(";")
        raise UserError(f"{found}; start the run anew without it: rm -r {states}") from None
    if record is None:
        raise UserError(f"{folder}: has no {STATE_FILE}; start the run anew without it: rm -r {states}")
    return record

"""Uploading a checkpoint to the Hugging Face hub, with the library's own functions."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from compression.config import NO_EFFECT, Settings
from compression.runtime import UserError, first_line, log, processes, shown


@dataclass
class Publishing(Settings):
    """Where the result goes besides its folder."""

    push_to_hub: Annotated[str | None, NO_EFFECT] = None
    """Upload the result to this model of the hub (USER/NAME) once it is saved, also one that --skip_existing finds."""

    def check(self) -> None:
        name = self.push_to_hub
        if name is None:
            return
        if not _is_name(name):
            raise UserError(f"--push_to_hub {name!r}: allowed is USER/NAME, of letters, digits, '-', '_' and '.'")
        if get_token() is None:
            raise UserError(f"--push_to_hub {name}: no token of the hub was found; log in first: hf auth login")

    def publish(self, folder: Path) -> None:
        """Upload a checkpoint that is saved, where that is asked for; of several processes the first one does.

        Raises:
            UserError: it could not be uploaded; says where it lies and how to do it later.
        """
        name = self.push_to_hub
        if name is None or not processes().is_main_process:
            return
        log.info("Uploading %s", shown(folder))
        try:
            address = HfApi().create_repo(name, exist_ok=True)
            HfApi().upload_folder(repo_id=name, folder_path=folder)
        except Exception as error:  # of several libraries; whichever it is, the checkpoint was not uploaded
            place = shown(folder)
            raise UserError(
                f"--push_to_hub {name}: not uploaded ({first_line(error)}); the checkpoint is saved in {place}; "
                f"upload it later: hf upload {name} {shlex.quote(place)}"
            ) from None
        log.info("-> %s", address)


def _is_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name

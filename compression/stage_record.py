"""What a result was made from: the record in its `stage.json`, and whether a result is there already."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compression.files import read_unchanged, restore_replaced
from compression.integrity import STAGE_FILE, read_record, sha256_of, verify, weights_digest
from compression.outputs import Output
from compression.runtime import UserError, fingerprint, log, relative_path, shown


def describe_stage(
    stage: str, config: dict[str, Any], inputs: dict[str, Any], metrics: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """What `stage.json` holds.

    Args:
        inputs: by role (parent, teacher, data) what identifies the input, see `identify`; `parent` is the checkpoint
            that this one was made from.
    """
    return {
        "stage": stage,
        "parent": inputs.get("parent", {}).get("path"),
        "inputs": inputs,
        "config": config,
        "seed": config.get("seed"),
        "metrics": metrics,
        "data": data,
        "environment": fingerprint(),
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def identify(folder: Path) -> dict[str, str]:
    """A checkpoint's path and a hash of its weights: what later stages note about their inputs.

    Raises:
        UserError: the folder holds no weights, or a file of it is damaged.
    """
    restore_replaced(Path(folder))
    digests = read_unchanged(folder, lambda: _digests(Path(folder)))
    return {"path": relative_path(Path(folder).resolve()), "sha256": weights_digest(digests)}


def _digests(folder: Path) -> list[str]:
    """The sha256 of all weight files, in the order of their names."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder}: no checkpoint there (no model.safetensors)")
    verify(folder)
    return [sha256_of(path) for path in weights]


def contents(inputs: Any) -> dict[str, Any]:
    """The hashes of a stage's inputs by role: where they lie does not matter."""
    entries = inputs.items() if isinstance(inputs, dict) else ()
    return {role: entry.get("sha256") if isinstance(entry, dict) else None for role, entry in entries}


def is_made_from(
    folder: Path,
    config: dict[str, Any],
    inputs: dict[str, Any],
    record: str = STAGE_FILE,
    modernized: Callable[[dict[str, Any]], dict[str, Any]] = lambda noted: noted,
) -> bool:
    """Whether a result exists that was made with these settings from these inputs.

    Args:
        record: the name of the file that says so.
        modernized: gives the settings of an older record their names of today.

    Raises:
        UserError: it exists and is damaged.
    """
    restore_replaced(Path(folder))
    stage = read_record(folder, record)
    if stage is None or contents(stage.get("inputs")) != contents(inputs):
        return False
    noted = stage.get("config")
    if not isinstance(noted, dict):
        return False
    noted = modernized(noted)
    if any(noted.get(name) != value for name, value in config.items()):
        return False
    verify(folder)
    return True


def is_done(output: Output, config: Any, inputs: dict[str, Any], reads: Sequence[Path], shared: Sequence[Path]) -> bool:
    """Whether `--skip_existing` is given and the result is there, made with these settings from these inputs.

    Args:
        config: has `skip_existing` and `overwrite`.
        reads, shared: see `Output.check`.

    Raises:
        UserError: it is to be made, and what lies in its place must stay.
    """
    same = is_made_from(output.path, config.result_fields(), inputs)
    if config.skip_existing and same:
        log.info("%s exists and matches configuration and inputs: skipped", shown(output.path))
        return True
    output.check(reads, shared)
    output.check_same(same, config.overwrite)
    return False


def read_stage(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's `stage.json`, or None where the folder or the file is missing.

    Raises:
        UserError: it is damaged, or no JSON object.
    """
    restore_replaced(Path(folder))
    return read_record(folder)

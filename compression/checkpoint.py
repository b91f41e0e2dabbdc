"""The only code that writes or reads a checkpoint.

A checkpoint is an ordinary Hugging Face folder plus `stage.json`, which says where it came from. Weights are
safetensors, everything else is JSON: no pickles. A folder is written beside its target and renamed onto it, so a
killed run leaves the old state or the new one, never a half-written one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compression.modeling import add_modeling_code
from compression.runtime import ROOT, UserError, fingerprint, processes

STAGE_FILE = "stage.json"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target`; on success rename it onto `target`, else remove it."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        previous = _previous(target)
        if target.exists():
            os.rename(target, previous)
        os.rename(temporary, target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle(target: Path) -> None:
    """Finish a replacement of `target` that was killed between its two renames: put the old folder back."""
    previous = _previous(target)
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous)
        else:
            os.rename(previous, target)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def save_classifier(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: dict[str, Any],
    files: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder.

    Args:
        folder: target; an existing one is replaced once the new one is complete.
        model: its weights are stored as safetensors; a pruned class brings its modeling file along.
        stage: contents of `stage.json`, see `describe_stage`.
        files: further JSON files, by name.

    Of several processes the first one writes.
    """
    state = processes()
    if not state.is_main_process:
        state.wait_for_everyone()
        return Path(folder)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        add_modeling_code(model, temporary)
        tokenizer.save_pretrained(temporary)
        for name, value in (files or {}).items():
            write_json(temporary / name, value)
        write_json(temporary / STAGE_FILE, stage)
    state.wait_for_everyone()
    return Path(folder)


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
        UserError: the folder holds no weights.
    """
    weights = Path(folder) / "model.safetensors"
    settle(Path(folder))
    if not weights.exists():
        raise UserError(f"{folder}: no checkpoint there (no model.safetensors)")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = Path(folder).resolve()
    return {"path": str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path), "sha256": digest[:16]}


def is_made_from(folder: Path, config: dict[str, Any], inputs: dict[str, Any]) -> bool:
    """Whether a checkpoint exists that was made with these settings from these inputs."""
    stage = read_stage(folder)
    if stage is None:
        return False
    same_config = all(stage["config"].get(name) == value for name, value in config.items())
    return same_config and stage.get("inputs") == inputs


def read_stage(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's `stage.json`, or None where the folder or the file is missing."""
    folder = Path(folder)
    settle(folder)
    path = folder / STAGE_FILE
    return read_json(path) if path.exists() else None


def require(folder: Path, flag: str, command: str) -> None:
    """Raise UserError unless a checkpoint is there; the text names the flag and the command that makes one."""
    settle(Path(folder))
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{flag} {folder}: no checkpoint there; make it with: {command}")


def find_newest(models_dir: Path, stage: str) -> Path | None:
    """The newest checkpoint of a stage under `models_dir`, by the creation time in its `stage.json`."""
    found = []
    for path in Path(models_dir).glob(f"[!.]*/{STAGE_FILE}"):
        description = read_json(path)
        if description.get("stage") == stage:
            found.append((description.get("created", ""), path.parent))
    return max(found)[1] if found else None


def load_classifier(
    folder: Path, device: torch.device | str = "cpu", num_labels: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier and its tokenizer, in evaluation mode.

    Args:
        folder: a checkpoint, stock or pruned by this project. Code that lies in the folder is not run: pruned classes
            are the project's own, registered ones.
        num_labels: given where the checkpoint is a bare encoder that gets a new classification head.

    Raises:
        UserError: the folder is missing, is not a checkpoint, or cannot be loaded.
    """
    folder = Path(folder)
    settle(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no checkpoint there (no config.json); name a folder that a stage has written")
    options = {} if num_labels is None else {"num_labels": num_labels}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be loaded as a classifier: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), tokenizer


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Store named tensors as safetensors (copied to the CPU, each with storage of its own)."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

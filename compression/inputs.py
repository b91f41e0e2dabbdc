"""Which checkpoints are there, and whether one is what a stage needs."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from compression.files import read_object, restore_replaced
from compression.integrity import STAGE_FILE, read_record
from compression.outputs import exports_of, is_export
from compression.runtime import UserError
from compression.stage_record import contents, identify, read_stage
from compression.structures import DECODERS, unsupported


def require(folder: Path, flag: str, command: str) -> None:
    """Raise UserError unless a checkpoint is there; the text names the flag and the command that makes one."""
    restore_replaced(Path(folder))
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{flag} {folder}: no checkpoint there; make it with: {command}")


def require_language_model(
    folder: Path, flag: str, command: str = "python run_global_pruning.py", quantized: bool = False
) -> None:
    """Raise UserError unless a language model is there.

    Args:
        flag, command: for the error text, see `require_type`.
        quantized: whether it may be a quantized one.
    """
    require_type(folder, flag, command, DECODERS)
    if not quantized:
        require_unquantized(folder, flag)


def require_unquantized(folder: Path, flag: str) -> None:
    """Raise UserError where a checkpoint is quantized; `flag` is for its text."""
    if "quantization_config" in read_object(Path(folder) / "config.json"):
        raise UserError(f"{flag} {folder}: is quantized already; name the model it was made from")


def is_language_model(folder: Path) -> bool:
    """Whether a checkpoint is of a decoder's model type."""
    return read_object(Path(folder) / "config.json").get("model_type") in DECODERS


def require_type(folder: Path, flag: str, command: str, families: Collection[str]) -> dict[str, Any]:
    """The config of a checkpoint that is there and of one of these model types.

    Args:
        flag, command: what names the folder, and what makes it, for the error text.

    Raises:
        UserError: there is none, or of another type.
    """
    require(folder, flag, command)
    config = read_object(Path(folder) / "config.json")
    model_type = config.get("model_type")
    if model_type not in families:
        raise UserError(f"{flag} {folder}: {unsupported(model_type, families)}; name another folder")
    return config


def find_all(models_dir: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage under `models_dir`, newest first, by the creation time in their `stage.json`."""
    found = []
    for path in _folders_in(models_dir):
        record = read_record(path) or {}
        if record.get("stage") == stage:
            found.append((str(record.get("created", "")), path))
    return [path for _, path in sorted(found, reverse=True)]


def _folders_in(models_dir: Path) -> list[Path]:
    """The folders of checkpoints and exports right under `models_dir`."""
    return [path.parent for path in Path(models_dir).glob(f"[!.]*/{STAGE_FILE}")]


def find_newest(models_dir: Path, stage: str) -> Path | None:
    """The newest checkpoint of a stage under `models_dir`, None where there is none."""
    return next(iter(find_all(models_dir, stage)), None)


def find_exports(folder: Path, models_dir: Path, format: str) -> list[Path]:
    """The exports of a checkpoint, by the hash of its weights: in its folder and among the checkpoints."""
    digest = identify(folder)["sha256"]
    stages = ((path, read_stage(path) or {}) for path in [*exports_of(folder), *_folders_in(models_dir)])
    return sorted(
        path
        for path, stage in stages
        if is_export(stage.get("stage"), format) and contents(stage.get("inputs")).get("parent") == digest
    )


def find_unquantized(pruned_model_path: Path | None, models_dir: Path) -> Path:
    """The model that stages 9 and 10 start from: the one named, else the newest pruned one.

    Raises:
        UserError: there is none, or it is quantized already.
    """
    command = "python 8_pruning_with_finetuning.py"
    folder = pruned_model_path or find_newest(models_dir, "pruned")
    if folder is None:
        raise UserError(f"--models_dir {models_dir}: no pruned model there; make one with: {command}")
    require(folder, "--pruned_model_path", command)
    require_unquantized(folder, "--pruned_model_path")
    return folder

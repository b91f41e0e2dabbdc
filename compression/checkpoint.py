"""The only code that writes or reads a checkpoint.

A checkpoint is an ordinary Hugging Face folder plus `stage.json`, which says where it came from. Weights are
safetensors, everything else is JSON: no pickles. A folder is written beside its target and renamed onto it, so a
killed run leaves the old state or the new one, never a half-written one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compression.modeling import add_modeling_code
from compression.modeling.pruned_distilbert import fix_4bit_layers
from compression.runtime import ROOT, UserError, fingerprint, processes
from compression.structures import DECODERS

STAGE_FILE = "stage.json"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on success it is renamed onto `path`, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); make or fetch its folder again") from None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target`; on success rename it onto `target`, else remove it."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        if not _is_running(leftover.suffixes[-2][1:]):
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


def _is_running(process_id: str) -> bool:
    try:
        os.kill(int(process_id), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def save_checkpoint(
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

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        add_modeling_code(model, temporary)
        tokenizer.save_pretrained(temporary)

    return save_folder(folder, write, stage, files)


def save_folder(
    folder: Path, write: Callable[[Path], None], stage: dict[str, Any], files: dict[str, Any] | None = None
) -> Path:
    """Write a folder with its `stage.json`: see `save_checkpoint`; `write` puts the weights into the path it gets."""
    state = processes()
    if state.is_main_process:
        with new_folder(folder) as temporary:
            write(temporary)
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
    settle(Path(folder))
    weights = sorted(Path(folder).glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder}: no checkpoint there (no model.safetensors)")
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    path = Path(folder).resolve()
    shown = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return {"path": shown, "sha256": digest.hexdigest()[:16]}


def contents(inputs: dict[str, dict[str, str]]) -> dict[str, str]:
    """The hashes of a stage's inputs by role: where they lie does not matter."""
    return {role: entry["sha256"] for role, entry in inputs.items()}


def short_hash(*identity: Any) -> str:
    """A hash of JSON values: what tells a run's states to resume from apart from those of others."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def is_made_from(folder: Path, config: dict[str, Any], inputs: dict[str, Any]) -> bool:
    """Whether a checkpoint exists that was made with these settings from these inputs."""
    stage = read_stage(folder)
    if stage is None:
        return False
    same_config = all(stage["config"].get(name) == value for name, value in config.items())
    return same_config and contents(stage.get("inputs", {})) == contents(inputs)


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


def require_language_model(folder: Path, flag: str, command: str = "python run_global_pruning.py") -> None:
    """Raise UserError unless an unquantized language model is there; `flag` and `command` are for its text."""
    require(folder, flag, command)
    config = read_json(Path(folder) / "config.json")
    if config.get("model_type") not in DECODERS:
        raise UserError(
            f"{flag} {folder}: model type {config.get('model_type')!r} is no supported language model; allowed "
            f"are {', '.join(sorted(DECODERS))}; name another folder"
        )
    if "quantization_config" in config:
        raise UserError(f"{flag} {folder}: is quantized already; name the model it was made from")


def find_all(models_dir: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage under `models_dir`, newest first, by the creation time in their `stage.json`."""
    found = []
    for path in Path(models_dir).glob(f"[!.]*/{STAGE_FILE}"):
        description = read_json(path)
        if description.get("stage") == stage:
            found.append((description.get("created", ""), path.parent))
    return [path for _, path in sorted(found, reverse=True)]


def find_newest(models_dir: Path, stage: str) -> Path | None:
    """The newest checkpoint of a stage under `models_dir`, None where there is none."""
    return next(iter(find_all(models_dir, stage)), None)


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
    if "quantization_config" in read_json(folder / "config.json"):
        raise UserError(f"--pruned_model_path {folder}: is quantized already; name the model it was made from")
    return folder


def make_folder(folder: Path, flag: str) -> None:
    """Create a folder to write to, or raise UserError with the flag that named it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror}); name another folder") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot be written; name another folder")


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
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{folder}: has no tokenizer (tokenizer.json or vocab.txt); save it beside the model")
    options = {} if num_labels is None else {"num_labels": num_labels}
    quantized = "quantization_config" in read_json(folder / "config.json")
    if quantized:  # 8-bit models cannot be moved once they are loaded
        options["device_map"] = {"": torch.device(device)}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded as a classifier: {str(error).splitlines()[0]}") from None
    if num_labels is None and report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{folder}: not a fine-tuned classifier, it lacks {missing}; fine-tune it first (stage 1 or 2)")
    return (model if quantized else model.to(device)).eval(), tokenizer


def load_language_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: BitsAndBytesConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model and its tokenizer, in evaluation mode: see `load_classifier`.

    Args:
        quantization: how to quantize the layers' weights while they are loaded, if at all.

    Raises:
        UserError: the folder is missing, is not a checkpoint, or cannot be loaded.
    """
    folder = Path(folder)
    settle(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no checkpoint there (no config.json)")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": torch.device(device)}, quantization_config=quantization
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded as a language model: {str(error).splitlines()[0]}") from None
    fix_4bit_layers(model)
    return model.eval(), tokenizer


class SavedParts:
    """Finished parts of a long run, so that a run that was killed goes on behind them.

    Of several processes the first one makes them, the others wait and read.

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
        path = self.folder / f"{name}.json"
        with processes().main_process_first():
            if not path.is_file():
                write_json(path, make())
        return read_json(path)

    def tensors(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Named tensors, on the CPU; made and kept where they are not there yet."""
        path = self.folder / f"{name}.safetensors"
        with processes().main_process_first():
            if not path.is_file():
                with new_file(path) as temporary:
                    save_tensors(temporary, make())
        return load_tensors(path)

    def remove(self) -> None:
        """Once the run's result is saved."""
        if processes().is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Store named tensors as safetensors (copied to the CPU, each with storage of its own)."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

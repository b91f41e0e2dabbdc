"""The only code that writes or reads a checkpoint.

A checkpoint is an ordinary Hugging Face folder plus `stage.json`, which says where it came from and what its files'
checksums are. Weights are safetensors, everything else is JSON: no pickles. Nothing that is missing, damaged,
mis-shaped or not finite passes.
"""

from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compression.files import new_folder, read_object, read_unchanged, remove_folder, restore_replaced, write_json
from compression.flops import part_of
from compression.integrity import STAGE_FILE, STATE_FILE, digest_of, read_record, seal, sha256_of, verify
from compression.modeling import add_modeling_code, fix_4bit_layers
from compression.outputs import Output, some
from compression.runtime import UserError, fingerprint, processes, relative_path
from compression.structures import DECODERS

# A model, its tokenizer, and which weights did not fit.
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: dict[str, Any],
    files: dict[str, Any] | None = None,
    new: bool = False,
) -> Path:
    """Write a checkpoint folder.

    Args:
        folder: target; an earlier checkpoint of the same stage is replaced once the new one is complete.
        model: its weights are stored as safetensors; a pruned class brings its modeling file along.
        stage: contents of `stage.json`, see `describe_stage`.
        files: further JSON files, by name.
        new: nothing is replaced.

    Of several processes the first one writes.

    Raises:
        UserError: a weight is not finite, or what lies in the folder must stay: see `outputs.Output`.
    """
    check_finite(model.state_dict(), f"the model for {folder}", "nothing was saved")

    def write(temporary: Path) -> None:
        add_modeling_code(model, temporary)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    return save_folder(folder, write, stage, files, new)


def save_folder(
    folder: Path,
    write: Callable[[Path], None],
    stage: dict[str, Any],
    files: dict[str, Any] | None = None,
    new: bool = False,
) -> Path:
    """Write a folder with its `stage.json`: see `save_checkpoint`; `write` puts the weights into the path it gets."""
    state = processes()
    if state.is_main_process:
        with Output(folder, "", None if new else stage.get("stage")).written() as temporary:
            write(temporary)
            for name, value in (files or {}).items():
                write_json(temporary / name, value)
            seal(temporary, stage)
    state.wait_for_everyone()
    return Path(folder)


def check_finite(tensors: dict[str, torch.Tensor], what: str, then: str) -> None:
    """Raise UserError where a tensor holds NaN or infinity.

    Args:
        what: whose tensors they are. then: what follows from it, for the error text.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and tensor.numel():
            if not all(value.isfinite() for value in tensor.aminmax()):  # both are NaN where one value is
                count = int((~tensor.isfinite()).sum())
                raise UserError(f"{what}: {count} of {tensor.numel()} values of {name} are not finite; {then}")


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
    return {"path": relative_path(Path(folder).resolve()), "sha256": digest_of(digests, 16)}


def _digests(folder: Path) -> bytes:
    """The sha256 of all weight files, one after the other."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder}: no checkpoint there (no model.safetensors)")
    verify(folder)
    return b"".join(bytes.fromhex(sha256_of(path)) for path in weights)


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


def read_stage(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's `stage.json`, or None where the folder or the file is missing.

    Raises:
        UserError: it is damaged, or no JSON object.
    """
    restore_replaced(Path(folder))
    return read_record(folder)


def require(folder: Path, flag: str, command: str) -> None:
    """Raise UserError unless a checkpoint is there; the text names the flag and the command that makes one."""
    restore_replaced(Path(folder))
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{flag} {folder}: no checkpoint there; make it with: {command}")


def require_language_model(folder: Path, flag: str, command: str = "python run_global_pruning.py") -> None:
    """Raise UserError unless an unquantized language model is there; `flag` and `command` are for its text."""
    config = require_type(folder, flag, command, DECODERS, "is no supported language model; allowed are")
    if "quantization_config" in config:
        raise UserError(f"{flag} {folder}: is quantized already; name the model it was made from")


def require_type(folder: Path, flag: str, command: str, families: Collection[str], refusal: str) -> dict[str, Any]:
    """The config of a checkpoint that is there and of one of these model types.

    Args:
        flag, command: what names the folder, and what makes it, for the error text.
        refusal: of a model of another type, before the list of those allowed.

    Raises:
        UserError: there is none, or of another type.
    """
    require(folder, flag, command)
    config = read_object(Path(folder) / "config.json")
    model_type = config.get("model_type")
    if model_type not in families:
        raise UserError(
            f"{flag} {folder}: model type {model_type!r} {refusal} {', '.join(sorted(families))}; name another folder"
        )
    return config


def find_all(models_dir: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage under `models_dir`, newest first, by the creation time in their `stage.json`."""
    found = []
    for path in Path(models_dir).glob(f"[!.]*/{STAGE_FILE}"):
        record = read_record(path.parent) or {}
        if record.get("stage") == stage:
            found.append((str(record.get("created", "")), path.parent))
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
    if "quantization_config" in read_object(folder / "config.json"):
        raise UserError(f"--pruned_model_path {folder}: is quantized already; name the model it was made from")
    return folder


def load_classifier(
    folder: Path, device: torch.device | str = "cpu", num_labels: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier and its tokenizer, in evaluation mode.

    Args:
        folder: a checkpoint, stock or pruned by this project. Code that lies in the folder is not run: pruned classes
            are the project's own, registered ones.
        num_labels: given where the checkpoint is a bare encoder that gets a new classification head.

    Raises:
        UserError: the folder is missing, is not a checkpoint, is damaged, or cannot be loaded; weights are missing, too
            many, of another shape or not finite.
    """
    options = {} if num_labels is None else {"num_labels": num_labels}

    def load() -> Loaded:
        placed = {}
        if "quantization_config" in _check_folder(folder):  # 8-bit models cannot be moved once they are loaded
            placed["device_map"] = {"": torch.device(device)}
        return _load(AutoModelForSequenceClassification, folder, dtype=torch.float32, **options, **placed)

    model, tokenizer, report = read_unchanged(folder, load)
    if num_labels is None:
        _check_weights(folder, report, "fine-tune it first (stage 1 or 2) if it is a bare encoder")
    else:
        _check_weights(folder, report, _ANOTHER, about=lambda name: part_of(name) != "head")
    quantized = hasattr(model.config, "quantization_config")
    if not quantized:
        model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


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
        UserError: see `load_classifier`.
    """

    def load() -> Loaded:
        _check_folder(folder)
        return _load(
            AutoModelForCausalLM,
            folder,
            dtype=dtype,
            device_map={"": torch.device(device)},
            quantization_config=quantization,
        )

    model, tokenizer, report = read_unchanged(folder, load)
    _check_weights(folder, report, _ANOTHER)
    fix_4bit_layers(model)
    return model.eval(), tokenizer


def check_positions(model: PreTrainedModel, flag: str, length: int) -> None:
    """Raise UserError where texts are longer than the model's positions.

    Args:
        flag: what asks for them, without its dashes. length: tokens of a text.
    """
    positions = model.config.max_position_embeddings
    if length > positions:
        raise UserError(f"--{flag} {length}: allowed is at most {positions}, the model's positions")


_ANOTHER = "make or fetch that folder again"


def _check_folder(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint whose files are all there and as they were written."""
    folder = Path(folder)
    restore_replaced(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no checkpoint there (no config.json); name a folder that a stage has written")
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{folder}: has no tokenizer (tokenizer.json or vocab.txt); save it beside the model")
    verify(folder)
    return read_object(folder / "config.json")


def _load(auto_class: Any, folder: Path, **options: Any) -> Loaded:
    try:
        model, report = auto_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        highest = max(tokenizer.get_vocab().values(), default=0)
    except Exception as error:  # of several libraries, for whatever a file of it holds
        reason = (str(error).splitlines() or ["no reason given"])[0]
        kind = "a classifier" if auto_class is AutoModelForSequenceClassification else "a language model"
        raise UserError(
            f"{folder}: cannot be loaded as {kind}: {type(error).__name__}: {reason}; {_ANOTHER}, or name another"
        ) from None
    rows = model.get_input_embeddings().num_embeddings
    if highest >= rows:
        raise UserError(
            f"{folder}: its tokenizer gives token ids up to {highest}, its model has embeddings for {rows}; save the "
            "tokenizer that belongs to the model beside it"
        )
    check_finite(model.state_dict(), str(folder), _ANOTHER)
    return model, tokenizer, report


def _check_weights(
    folder: Path, report: dict[str, Any], then: str, about: Callable[[str], bool] = lambda _: True
) -> None:
    """Raise UserError where weights are missing, too many or of another shape.

    Args:
        then: what to do. about: which weights count, by name.
    """
    shapes = {name: f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in report["mismatched_keys"]}
    problems = [
        _listed("lacks", filter(about, report["missing_keys"])),
        _listed("has weights that its config.json has no place for,", filter(about, report["unexpected_keys"])),
        _listed("has weights of another shape,", (text for name, text in shapes.items() if about(name))),
    ]
    if found := " and ".join(filter(None, problems)):
        raise UserError(f"{folder}: {found}; {then}")


def _listed(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{what} {some(names)}" if names else ""


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
        return self._part(name, lambda _: {"value": make()})["value"]

    def tensors(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Named tensors, on the CPU; made and kept where they are not there yet."""

        def write(folder: Path) -> dict[str, Any]:
            save_tensors(folder / "tensors.safetensors", make())
            return {}

        self._part(name, write)
        return load_tensors(self.folder / name / "tensors.safetensors")

    def _part(self, name: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """A part's record; `write` makes the part's files in the folder it gets, and gives the record."""
        part = self.folder / name
        with processes().main_process_first():
            if not part.is_dir():
                with new_folder(part) as temporary:
                    seal(temporary, write(temporary), STATE_FILE)
        return read_state(part, self.folder)

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


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Store named tensors as safetensors (copied to the CPU, each with storage of its own)."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

"""Writes and loads checkpoints; no other code does.

A checkpoint is an ordinary Hugging Face folder plus `stage.json`, which says where it came from (see `stage_record`)
and what its files' checksums are. Weights are safetensors, everything else is JSON: no pickles. Nothing that is
missing, damaged, mis-shaped or not finite passes.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from compression.files import (
    link_or_copy,
    new_folder,
    read_object,
    read_unchanged,
    real_path,
    restore_replaced,
    write_json,
)
from compression.flops import part_of
from compression.integrity import CARD, STAGE_FILE, seal, verify
from compression.model_card import model_card
from compression.modeling import add_modeling_code, fix_4bit_layers
from compression.offload import Placement, offload_of, put_offloaded
from compression.outputs import Output, some
from compression.runtime import UserError, processes
from compression.sources import missing_tokenizer
from compression.structures import positions_of
from compression.weights import MAX_SHARD_SIZE, Shards, check_finite

# A model, its tokenizer, and which weights did not fit.
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: dict[str, Any],
    files: dict[str, Any] | None = None,
    new: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Write a checkpoint folder.

    Args:
        folder: target; an earlier checkpoint of the same stage is replaced once the new one is complete.
        model: its weights are stored as safetensors; a pruned class brings its modeling file along.
        stage: contents of `stage.json`, see `describe_stage`.
        files: further JSON files, by name.
        new: nothing is replaced.
        max_shard_size: bytes of weights per file; an offloaded model's files stay as they are.

    Of several processes the first one writes.

    Raises:
        UserError: a weight is not finite, or what lies in the folder must stay: see `outputs.Output`.
    """
    check_weights_finite(model, folder)
    return save_folder(folder, partial(write_model, model, tokenizer, max_shard_size), stage, files, new)


@contextmanager
def folder_of_all(target: Path, record: dict[str, Any], name: str = STAGE_FILE) -> Iterator[Path]:
    """Yield an empty folder that several processes write to; once all are done it is sealed and takes its place.

    Args:
        record, name: see `integrity.seal`.
    """
    state = processes()
    if state.is_main_process:
        with new_folder(target) as temporary:
            broadcast_object_list([str(temporary)])
            yield temporary
            state.wait_for_everyone()
            seal(temporary, record, name)
    else:
        (path,) = broadcast_object_list([None])
        yield Path(path)
        state.wait_for_everyone()
    state.wait_for_everyone()


def check_weights_finite(model: PreTrainedModel, folder: Path) -> None:
    """Raise UserError where a weight that is to be saved is not finite; an offloaded model's were, when written."""
    if offload_of(model) is None:
        check_finite(model.state_dict(), f"the model for {folder}", "nothing was saved")


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_shard_size: int, folder: Path) -> None:
    """Write all of a checkpoint but its `stage.json` into a folder that is there."""
    offloaded = offload_of(model)
    if offloaded is None:
        add_modeling_code(model, folder)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        write_description(model, folder)
        for file in offloaded.shards.files:
            link_or_copy(str(offloaded.shards.folder / file), str(folder / file))
    tokenizer.save_pretrained(folder)


def write_description(model: PreTrainedModel, folder: Path) -> None:
    """Write everything of a model but its weights and tokenizer: configurations, a pruned class's code."""
    add_modeling_code(model, folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def save_folder(
    folder: Path,
    write: Callable[[Path], dict[str, Any] | None],
    stage: dict[str, Any],
    files: dict[str, Any] | None = None,
    new: bool = False,
    others: Callable[[], None] = lambda: None,
) -> Path:
    """Write a folder with its `stage.json`: see `save_checkpoint`.

    Args:
        write: puts the weights into the path it gets; what it returns are further metrics.
        others: what the other processes do meanwhile.
    """
    state = processes()
    if not state.is_main_process:
        others()
    else:
        with Output(folder, "", None if new else stage.get("stage")).written() as temporary:
            if measured := write(temporary):
                stage = stage | {"metrics": stage.get("metrics", {}) | measured}
            for name, value in (files or {}).items():
                write_json(temporary / name, value)
            finish_folder(temporary, stage, folder)
    state.wait_for_everyone()
    return Path(folder)


def finish_folder(folder: Path, stage: dict[str, Any], target: Path) -> None:
    """Write what a checkpoint's folder has besides the model: its card, then the `stage.json` that lists all files.

    Args:
        target: where the folder will be.
    """
    (folder / CARD).write_text(model_card(folder, stage, real_path(target)), encoding="utf-8")
    seal(folder, stage)


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
    dtype: torch.dtype | None = torch.float32,
    quantization: BitsAndBytesConfig | None = None,
    offload: Literal["none", "cpu", "disk"] = "none",
    scratch: Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model and its tokenizer, in evaluation mode: see `load_classifier`.

    Args:
        dtype: of the weights that are not quantized; None: as the checkpoint has them (offloaded: float32).
        quantization: how to quantize the layers' weights while they are loaded, if at all.
        offload: where the layers stay while they do not compute, see `compression.offload`; none: on the device.
        scratch: folder for states between layers with disk; None: the system's for temporary files.

    Raises:
        UserError: see `load_classifier`.
    """

    def load() -> Loaded:
        _check_folder(folder)
        options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
        if quantization is not None:  # None would take the place of what the checkpoint says
            options["quantization_config"] = quantization
        return _load(AutoModelForCausalLM, folder, device_map={"": torch.device(device)}, **options)

    if offload != "none":
        _check_folder(folder)
        placement = Placement(offload, torch.device(device), dtype or torch.float32, scratch or Path(gettempdir()))
        skeleton = open_offloaded(folder, placement)
        return skeleton, load_tokenizer(folder, skeleton)
    model, tokenizer, report = read_unchanged(folder, load)
    _check_weights(folder, report, _ANOTHER)
    if dtype is not None:  # what a quantized checkpoint has unquantized comes in the type that it is stored in
        for parameter in filter(torch.is_floating_point, model.parameters()):
            parameter.data = parameter.to(dtype)
    fix_4bit_layers(model)
    return model.eval(), tokenizer


def open_offloaded(folder: Path, placement: Placement) -> PreTrainedModel:
    """A language model in evaluation mode that computes with the weights in a folder, one layer at a time.

    Raises:
        UserError: see `load_classifier`.
    """
    model, shards = load_skeleton(folder, placement.dtype)
    put_offloaded(model, shards, placement)
    return model


def load_skeleton(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Shards]:
    """A language model in evaluation mode without weights (they are on the meta device, buffers are not), and those
    that it is to have.

    Raises:
        UserError: the folder is missing, is not a checkpoint or is damaged; weights are missing, too many or of another
            shape.
    """
    _check_folder(folder, tokenizer=False)
    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if model.can_generate() and (Path(folder) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # of several libraries, for whatever a file of it holds
        raise _not_loaded(folder, "a language model", error) from None
    shards = Shards(folder)
    _check_weights(folder, _report(model, shards), _ANOTHER)
    return model.eval(), shards


def _report(model: PreTrainedModel, shards: Shards) -> dict[str, Any]:
    """Which weights do not fit a skeleton, as transformers reports it."""
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    found, tied = shards.shapes, model.all_tied_weights_keys.keys()
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq"]
    unexpected = (name for name in found.keys() - wanted.keys() if not any(re.search(key, name) for key in ignored))
    misfits = (name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return {
        "missing_keys": wanted.keys() - found.keys() - tied,
        "unexpected_keys": set(unexpected),
        "mismatched_keys": {(name, tuple(found[name]), tuple(wanted[name])) for name in misfits},
    }


def check_positions(model: PreTrainedModel, flag: str, length: int) -> None:
    """Raise UserError where texts are longer than the model's positions.

    Args:
        flag: what asks for them, without its dashes. length: tokens of a text.
    """
    positions = positions_of(model.config)
    if length > positions:
        raise UserError(f"--{flag} {length}: allowed is at most {positions}, the model's positions")


_ANOTHER = "make or fetch that folder again"


def _check_folder(folder: Path, tokenizer: bool = True) -> dict[str, Any]:
    """The config of a checkpoint whose files are all there and as they were written.

    Args:
        tokenizer: whether its files have to be there too.
    """
    folder = Path(folder)
    restore_replaced(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no checkpoint there (no config.json); name a folder that a stage has written")
    if tokenizer and (missing := missing_tokenizer(folder)):
        raise UserError(f"{folder}: has no {missing}; save the tokenizer beside the model")
    verify(folder)
    return read_object(folder / "config.json")


def _load(auto_class: Any, folder: Path, **options: Any) -> Loaded:
    try:
        model, report = auto_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # of several libraries, for whatever a file of it holds
        kind = "a classifier" if auto_class is AutoModelForSequenceClassification else "a language model"
        raise _not_loaded(folder, kind, error) from None
    tokenizer = load_tokenizer(folder, model)
    check_finite(model.state_dict(), str(folder), _ANOTHER)
    return model, tokenizer, report


def load_config(folder: Path) -> PretrainedConfig:
    """The config of a checkpoint, with the sizes that its file leaves at their defaults.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # of several libraries, for whatever the file holds
        raise _not_loaded(folder, "a model", error) from None


def load_tokenizer(folder: Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's model.

    Raises:
        UserError: it cannot be loaded, or gives token ids that the model has no embeddings for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        highest = max(tokenizer.get_vocab().values(), default=0)
    except Exception as error:  # of several libraries, for whatever a file of it holds
        raise _not_loaded(folder, "a tokenizer", error) from None
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    if highest >= rows:
        raise UserError(
            f"{folder}: its tokenizer gives token ids up to {highest}, its model has embeddings for {rows}; save the "
            "tokenizer that belongs to the model beside it"
        )
    return tokenizer


def _not_loaded(folder: Path, kind: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return UserError(
        f"{folder}: cannot be loaded as {kind}: {type(error).__name__}: {reason}; {_ANOTHER}, or name another"
    )


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


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Store named tensors as safetensors (copied to the CPU, each with storage of its own)."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

"""Export a model to an engine that people deploy: ONNX Runtime (classifiers) or llama.cpp (language models).

    python export_model.py [--model DIR] [--precision int8]
    python export_model.py --model results/NAME/models [--precision q8_0]

Reads a checkpoint of this project, or a dense one; writes DIR/onnx or DIR/gguf (or --output_dir), with tokenizer and
config beside the model. It is kept only after it ran in its engine and computed what the PyTorch model does.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compression.batching import batches
from compression.checkpoint import load_classifier, save_folder, write_description
from compression.classifier.data import DatasetSettings, encode, load_data
from compression.classifier.parts import TaskData
from compression.config import NO_EFFECT, AtLeast, Between, Config, Flat, choice_of, group, run_script
from compression.export import gguf, onnx
from compression.files import read_object
from compression.hub import Publishing
from compression.inputs import find_newest, require
from compression.outputs import Output, export_stage, owned
from compression.runtime import MODELS, UserError, log, shown
from compression.stage_record import describe_stage, identify, is_done, read_stage
from compression.structures import DECODERS, ENCODERS

PRECISIONS = {"onnx": onnx.PRECISIONS, "gguf": gguf.PRECISIONS}
GGUF_FILE = "model.gguf"


@dataclass
class ExportConfig(Config):
    model: Annotated[Path | None, NO_EFFECT] = None
    """The checkpoint; by default the newest pruned classifier in models_dir, for nf4 the newest 4-bit one."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that the default model is looked for in."""
    format: Literal["auto", "onnx", "gguf"] = "auto"
    """What to write; auto: ONNX of classifiers, GGUF of language models."""
    precision: choice_of(onnx.PRECISIONS | gguf.PRECISIONS, "Weights; none: fp32, f16") | None = None
    output_dir: Annotated[Path | None, NO_EFFECT] = None
    """Where to write; by default a folder with the format's name in the model's."""
    dataset: Flat[DatasetSettings] = group(DatasetSettings)
    calibration_samples: Annotated[int, AtLeast(1)] = 256
    """Training sentences of that data to calibrate int8_static on."""
    max_length: Annotated[int, Between(4, 512)] = 128
    """Tokens at which they are cut."""
    seed: int = 42
    """Fixes which sentences these are."""
    tokenizer_pre: str | None = None
    """What llama.cpp calls the way in which the tokenizer splits text, where that is not found out."""
    overwrite: Annotated[bool, NO_EFFECT] = False
    """Replace an earlier export that was made with other settings or from another model."""
    skip_existing: Annotated[bool, NO_EFFECT] = False
    """Do nothing if the output exists and was made with this configuration from this model."""
    publishing: Flat[Publishing] = group(Publishing)

    # An export takes seconds to minutes: the quick settings are the usual ones.
    presets: ClassVar = {"fast": {}}


def pick_model(config: ExportConfig) -> Path:
    """The model that is named, else the newest one that the precision is for."""
    if config.model is not None:
        return config.model
    stages = ["pruned_qkd4bit", "pruned_quantized"] if config.precision == "nf4" else ["pruned"]
    found = filter(None, (find_newest(config.models_dir, stage) for stage in stages))
    folder = next(found, None)
    if folder is None:
        command = "10_qat_kd_4bit.py" if config.precision == "nf4" else "8_pruning_with_finetuning.py"
        raise UserError(f"--models_dir {config.models_dir}: no model to export; make one with: python {command}")
    return folder


def resolved(config: ExportConfig, folder: Path) -> ExportConfig:
    """The configuration with format and precision as the model in the folder has them where they are not given.

    Raises:
        UserError: they are not for this model.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"--model {folder}: is a LoRA adapter; merge it first: python merge_and_save_lora.py")
    require(folder, "--model", "python download_model.py")
    about = read_object(folder / "config.json")
    model_type, quantized = about.get("model_type"), "quantization_config" in about
    formats = {"onnx": ENCODERS, "gguf": DECODERS}
    found = next((name for name, types in formats.items() if model_type in types), None)
    if found is None:
        supported = ", ".join(sorted(ENCODERS | DECODERS))
        raise UserError(f"--model {folder}: model type {model_type!r} cannot be exported; allowed are {supported}")
    if config.format not in ("auto", found):
        raise UserError(f"--format {config.format}: {folder} is a {model_type} model; allowed is {found}")
    precision = config.precision or {"onnx": "nf4" if quantized else "fp32", "gguf": "f16"}[found]
    if precision not in PRECISIONS[found]:
        raise UserError(
            f"--precision {precision}: {folder} goes to {found}; allowed is one of {', '.join(PRECISIONS[found])}"
        )
    return config.updated(format=found, precision=precision)


def write_onnx(config: ExportConfig, data: TaskData | None, folder: Path, target: Path) -> dict[str, Any]:
    """Write a classifier's export and all that lies beside it; returns what was measured of it."""
    model, tokenizer = load_classifier(folder)
    metrics = onnx.write_onnx(model, target, config.precision, calibration(config, data, tokenizer))
    write_description(model, target)
    tokenizer.save_pretrained(target)
    return metrics | onnx.check_onnx(model, tokenizer, target, config.precision)


def calibration(
    config: ExportConfig, data: TaskData | None, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Tensor]]:
    """Batches of training sentences, where the precision needs them."""
    if data is None:
        return []
    sample = data.train.sample(min(1, config.calibration_samples / len(data.train)), config.seed)
    return list(batches(encode(tokenizer, sample, config.max_length), 32, tokenizer.pad_token_id))


def write_gguf(config: ExportConfig, data: TaskData | None, folder: Path, target: Path) -> dict[str, Any]:
    """As `write_onnx`, of a language model."""
    plan, file = gguf.check_exportable(folder, config.tokenizer_pre), target / GGUF_FILE
    metrics = gguf.write_gguf(plan, file, config.precision)
    write_description(plan.model, target)
    plan.tokenizer.save_pretrained(target)
    return metrics | gguf.check_gguf(plan, file, config.precision)


def main(config: ExportConfig) -> None:
    folder = pick_model(config)
    config = resolved(config, folder)
    parent = read_stage(folder) or {}
    path = config.output_dir or folder / config.format
    output = Output(path, "--output_dir", export_stage(parent.get("stage"), config.format))
    inputs = {"parent": identify(folder)}
    data = load_data(config.dataset) if config.precision == "int8_static" else None
    if data is not None:
        inputs["data"] = {"name": data.name, "sha256": data.digest()}
    if is_done(output, config, inputs, reads=[], shared=[folder, config.models_dir]):
        config.publishing.publish(path)
        return
    write = {"onnx": write_onnx, "gguf": write_gguf}[config.format]
    with owned(path):
        stage = describe_stage(output.kind, config.as_dict(), inputs, {}, parent.get("data"))
        save_folder(path, partial(write, config, data, folder), stage)
    metrics = (read_stage(path) or {})["metrics"]
    differences = {name: f"{value:.2g}" for name, value in metrics.items() if name.startswith("logit_difference")}
    log.info("%.1f MB; %s", metrics["bytes"] / 1e6, ", ".join(f"{name} {value}" for name, value in differences.items()))
    log.info("%s -> %s", shown(folder), shown(path))
    config.publishing.publish(path)


if __name__ == "__main__":
    run_script(ExportConfig, main)

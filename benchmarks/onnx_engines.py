"""Exported classifiers in ONNX Runtime against PyTorch: the same answers, how fast, how large.

    python benchmarks/onnx_engines.py --models models/student_model models/pruning_with_finetuning_* \\
        --quantized models/pruned_quantized_final [--dataset NAME]

Each model is exported in fp32 and in both kinds of int8, each 4-bit model with its own weights; 4-bit layers compute in
fp32 in PyTorch too. Logits and accuracy: the whole validation set. Times: one process, as many threads for both
engines, all models in turns, at batch 1 and at a larger batch; ratios are to the first model in PyTorch and to the same
model in ONNX Runtime's fp32. Writes results/onnx_engines.json.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import onnxruntime
import torch
from torch import Tensor

from compression.batching import batches
from compression.checkpoint import load_classifier
from compression.classifier.data import DatasetSettings, Encoded, encode, load_data
from compression.classifier.metrics import paired_difference, predict
from compression.classifier.parts import TaskData
from compression.config import AtLeast, Between, Config, Flat, group, run_script
from compression.export.onnx import OnnxClassifier, write_onnx
from compression.files import write_json
from compression.quantization import compute_in_fp32
from compression.runtime import RESULTS, UserError, fingerprint, log
from compression.tables import Column, at, markdown_table
from compression.timing import measure_latency, size_on_disk

PYTORCH = "PyTorch"


@dataclass
class EnginesConfig(Config):
    models: tuple[Path, ...] = ()
    """Checkpoints in full precision; the first one in PyTorch is what speeds are compared with."""
    quantized: tuple[Path, ...] = ()
    """4-bit checkpoints."""
    precisions: tuple[Literal["fp32", "int8", "int8_static"], ...] = ("fp32", "int8", "int8_static")
    """What the models in full precision are exported in."""
    dataset: Flat[DatasetSettings] = group(DatasetSettings)
    max_length: Annotated[int, Between(4, 512)] = 128
    """Sentences are cut at this number of tokens, and this is what is timed."""
    calibration: Annotated[int, AtLeast(1)] = 256
    """Training sentences for fixed ranges."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """Sequences per batch for throughput; latency is of one sequence."""
    latency_repeats: Annotated[int, AtLeast(1)] = 100
    """Timed passes of each for latency."""
    throughput_repeats: Annotated[int, AtLeast(1)] = 20
    """Timed passes of each for throughput."""
    seed: int = 0
    """Fixes the calibration sentences and the token ids that are timed."""

    presets: ClassVar = {"fast": dict(latency_repeats=20, throughput_repeats=5)}


@dataclass
class Measured:
    """The models that are timed, and a row of the table for each."""

    models: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, key: str, model: Any, row: dict[str, Any]) -> None:
        self.models[key], self.rows[key] = model, row


def check_folders(config: EnginesConfig) -> None:
    """Raise UserError where there is nothing to compare with, or two models have one name."""
    names = [folder.resolve().name for folder in (*config.models, *config.quantized)]
    if not config.models:
        raise UserError("--models: none given; name at least one checkpoint, such as models/student_model")
    if len(set(names)) < len(names):
        raise UserError(f"--models, --quantized: found {', '.join(names)}; each folder needs a name of its own")


def compare(
    folder: Path, precisions: tuple[str, ...], data: TaskData, measured: Measured, config: EnginesConfig, scratch: Path
) -> None:
    """Add a checkpoint in PyTorch and its exports: what each computes on the validation set, and its size."""
    model, tokenizer = load_classifier(folder)
    name = folder.resolve().name
    compute_in_fp32(model)
    validation = encode(tokenizer, data.validation, config.max_length)
    share = min(1.0, config.calibration / len(data.train))
    training = encode(tokenizer, data.train.sample(share, config.seed), config.max_length)
    calibration = list(batches(training, config.batch_size, tokenizer.pad_token_id))
    expected = predict(model, validation, tokenizer.pad_token_id, data.task)
    row = {"model": name, "engine": PYTORCH, "bytes": size_on_disk(folder)["weights_bytes"]}
    measured.add(f"{name}, {PYTORCH}", model, row | quality(expected, expected, validation))
    for precision in precisions:
        log.info("Exporting %s, %s", name, precision)
        target = scratch / f"{name}_{precision}"
        target.mkdir()
        about = write_onnx(model, target, precision, calibration)
        model.config.save_pretrained(target)
        exported = OnnxClassifier(target, torch.get_num_threads())
        logits = predict(exported, validation, tokenizer.pad_token_id, data.task)
        row = {"model": name, "engine": f"ORT {precision}"} | about
        measured.add(f"{name}, {precision}", exported, row | quality(logits, expected, validation))


def quality(logits: Tensor, expected: Tensor, validation: Encoded) -> dict[str, Any]:
    """Accuracy against that of PyTorch on the same rows, and the largest difference of a logit."""
    right, before = (found.argmax(-1) == validation.labels for found in (logits, expected))
    accuracy = {"accuracy": float(right.double().mean())} | paired_difference(right, before)
    return accuracy | {"largest_logit_difference": float((logits - expected).abs().max())}


def add_times(measured: Measured, config: EnginesConfig) -> None:
    """Time all in turns; ratios of the medians."""
    log.info("Timing, the models taking turns")
    times = measure_latency(
        measured.models,
        torch.device("cpu"),
        config.max_length,
        config.latency_repeats,
        config.throughput_repeats,
        config.batch_size,
        config.seed,
    )
    speeds = {
        key: (1 / entry["latency"]["median_ms"], entry["throughput"]["median_samples_per_second"])
        for key, entry in times.items()
    }
    baseline = next(iter(speeds.values()))
    for key, row in measured.rows.items():
        own = speeds.get(f"{row['model']}, fp32")
        row |= times[key]
        for place, kind in enumerate(("latency", "throughput")):
            row[f"{kind}_speed_up"] = speeds[key][place] / baseline[place]
            row[f"{kind}_speed_up_on_fp32"] = speeds[key][place] / own[place] if own else None


COLUMNS = [
    Column("model", at("model")),
    Column("engine", at("engine")),
    Column("MB", at("bytes", per=1e6), "{:.2f}"),
    Column("largest logit difference", at("largest_logit_difference"), "{:.1e}"),
    Column("accuracy", at("accuracy"), "{:.4f}"),
    Column(
        "points against PyTorch",
        lambda row: (row["accuracy_points"], row["accuracy_points_standard_error"]),
        "{:+.2f} ± {:.2f}",
    ),
    Column("latency, ms", at("latency", "median_ms"), "{:.2f}"),
    Column("× as fast", at("latency_speed_up"), "{:.2f}"),
    Column("× ORT fp32", at("latency_speed_up_on_fp32"), "{:.2f}", missing=""),
    Column("sequences/s", at("throughput", "median_samples_per_second"), "{:.1f}"),
    Column("× as many", at("throughput_speed_up"), "{:.2f}"),
    Column("× ORT fp32", at("throughput_speed_up_on_fp32"), "{:.2f}", missing=""),
]


def main(config: EnginesConfig) -> None:
    check_folders(config)
    data, measured = load_data(config.dataset), Measured()
    with TemporaryDirectory() as scratch:
        for folders, precisions in ((config.models, config.precisions), (config.quantized, ("nf4",))):
            for folder in folders:
                compare(folder, precisions, data, measured, config, Path(scratch))
        add_times(measured, config)
    rows = list(measured.rows.values())
    log.info("\n%s\n", markdown_table(COLUMNS, rows))
    environment = fingerprint() | {"onnxruntime": onnxruntime.__version__}
    path = RESULTS / "onnx_engines.json"
    write_json(path, {"data": data.describe(), "rows": rows, "config": config.as_dict(), "environment": environment})
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(EnginesConfig, main)

"""Compare models: accuracy (or the task's own metric), inference time, load time and size.

    python evaluate_plot.py [--fast] [--dataset NAME] [--data_dir DIR]

Reads what exists of `models` under models/ and the validation sentences; writes results/model_comparison.csv, .png and
.pdf. Times are of several runs in which the models take turns: the median, and the 10th and 90th percentile.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from compression.checkpoint import check_positions, load_classifier
from compression.classifier.data import DatasetSettings, encode, load_data_for
from compression.classifier.metrics import classification_metrics, describe_task, predict
from compression.classifier.models import EVALUATED
from compression.classifier.parts import TaskData
from compression.classifier.plots import plot_model_comparison
from compression.config import AtLeast, Between, Config, Flat, group, run_script
from compression.flops import count_parameters
from compression.inputs import find_newest
from compression.outputs import check_files, new_files
from compression.plots import save_figure
from compression.runtime import MODELS, RESULTS, UserError, log, pick_device, shown
from compression.tables import Column, at, text_table, write_csv
from compression.timing import interleaved_times, measure_latency, size_on_disk

FILES = ("model_comparison.csv", "model_comparison.png", "model_comparison.pdf")
# What is compared, in this order. To leave a model out or to add one, make this a list of your own.
models = EVALUATED
# The table, which ends with the task's metric where that is not accuracy, and which of its columns are logged too.
COLUMNS = [
    Column("model", at("name")),
    Column("folder", at("folder")),
    Column("data", at("data")),
    Column("sentences", at("quality", "n")),
    Column("accuracy", at("quality", "accuracy"), "{:.4f}"),
    Column("accuracy_standard_error", at("quality", "accuracy_standard_error")),
    Column("inference_median_ms", at("inference", "median_ms"), "{:.2f}"),
    Column("inference_p10_ms", at("inference", "p10_ms")),
    Column("inference_p90_ms", at("inference", "p90_ms")),
    Column("load_median_s", at("load", "median_s"), "{:.3f}"),
    Column("load_p10_s", at("load", "p10_s")),
    Column("load_p90_s", at("load", "p90_s")),
    Column("weights_bytes", at("size", "weights_bytes"), "{:,}"),
    Column("folder_bytes", at("size", "folder_bytes")),
    Column("parameters", at("parameters", "total")),
]
LOGGED = ("model", "accuracy", "inference_median_ms", "load_median_s", "weights_bytes")


@dataclass
class ComparisonConfig(Config):
    dataset: Flat[DatasetSettings] = group(DatasetSettings)
    models_dir: Path = MODELS
    """Where the checkpoints are."""
    output_dir: Path = RESULTS
    """Where table and figure go."""
    max_length: Annotated[int, Between(4, 512)] = 128
    """Sentences are cut at this number of tokens for accuracy."""
    sequence_length: Annotated[int, Between(4, 512)] = 128
    """Tokens of the one sequence that inference is timed on."""
    inference_runs: Annotated[int, AtLeast(1)] = 100
    """Timed forward passes per model."""
    load_runs: Annotated[int, AtLeast(1)] = 10
    """Timed loads per model, from a warm file cache."""
    seed: int = 42
    """Fixes the token ids that are timed."""

    presets: ClassVar = {"fast": dict(max_length=64, inference_runs=30, load_runs=5)}


def compare(found: dict[str, Path], data: TaskData, config: ComparisonConfig) -> list[dict[str, Any]]:
    """What `COLUMNS` are columns of, for each model."""
    device, task = pick_device(), data.task
    log.info("Loading times, the models taking turns")
    loads = {name: lambda folder=folder: load_classifier(folder, device) for name, folder in found.items()}
    seconds = interleaved_times(loads, config.load_runs, device)
    loaded = {name: load() for name, load in loads.items()}
    for model, _ in loaded.values():
        check_positions(model, "sequence_length", config.sequence_length)
    log.info("Inference times, the models taking turns")
    classifiers = {name: model for name, (model, _) in loaded.items()}
    timings = measure_latency(classifiers, device, config.sequence_length, config.inference_runs, 1, 1, config.seed)
    entries = []
    for name, (model, tokenizer) in loaded.items():
        log.info("%s of %s on %d sentences of %s", task.title, name, len(data.validation), data.name)
        encoded = encode(tokenizer, data.validation, config.max_length)
        logits = predict(model, encoded, tokenizer.pad_token_id, task)
        low, median, high = np.percentile(seconds[name], (10, 50, 90))
        entries.append(
            {
                "name": name,
                "folder": str(found[name]),
                "data": data.name,
                "quality": classification_metrics(logits, encoded.labels, task),
                "inference": timings[name]["latency"],
                "load": {"median_s": median, "p10_s": low, "p90_s": high},
                "size": size_on_disk(found[name]),
                "parameters": count_parameters(model),
            }
        )
    return entries


def main(config: ComparisonConfig) -> None:
    newest = {model.short_name: find_newest(config.models_dir, model.stage) for model in models}
    found = {name: folder for name, folder in newest.items() if folder}
    if not found:
        raise UserError(
            f"--models_dir {config.models_dir}: no model to compare; make the first with: "
            f"{models[0].command_on(config.dataset)}"
        )
    if absent := [name for name, folder in newest.items() if not folder]:
        log.info("Not there, so not compared: %s", "; ".join(absent))
    data = load_data_for(found.values(), config.dataset)
    check_files(config.output_dir, FILES, "--output_dir")
    primary = data.task.primary
    own = [] if primary == "accuracy" else [Column(primary, at("quality", primary), "{:.4f}")]
    entries, columns = compare(found, data, config), COLUMNS + own
    rows = [{column.title: column.value(entry) for column in columns} for entry in entries]
    figure = plot_model_comparison(rows, describe_task(data.task), models)
    with new_files(config.output_dir, FILES, "--output_dir") as temporary:
        write_csv(temporary / FILES[0], columns, entries)
        for name in FILES[1:]:
            save_figure(figure, temporary / name)
    log.info("%s", text_table([column for column in columns if column.title in (*LOGGED, primary)], entries))
    log.info("Written: %s", ", ".join(shown(config.output_dir / name) for name in FILES))


if __name__ == "__main__":
    run_script(ComparisonConfig, main)

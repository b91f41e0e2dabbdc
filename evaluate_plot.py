"""Compare models: accuracy, inference time, load time and size.

    python evaluate_plot.py [--fast] [--data_dir DIR]

Reads what exists of `models` under models/ and the validation sentences; writes results/model_comparison.csv, .png and
.pdf. Times are of several runs in which the models take turns: the median, and the 10th and 90th percentile.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from compression.checkpoint import check_positions, find_newest, load_classifier
from compression.classifier.metrics import classification_metrics, predict
from compression.classifier.tasks import encode, load_sentiment
from compression.config import AtLeast, Between, Config, run_script
from compression.flops import count_parameters
from compression.outputs import check_files, new_files
from compression.plots import plot_model_comparison, save_figure
from compression.runtime import MODELS, RESULTS, UserError, log, pick_device, shown
from compression.timing import interleaved_times, measure_latency, size_on_disk

FILES = ("model_comparison.csv", "model_comparison.png", "model_comparison.pdf")
# What stage.json calls the stage (the newest checkpoint of it is taken), and the name in the figure.
models = [
    ("teacher", "Teacher"),
    ("student", "Student"),
    ("student_softlabel", "Student, soft labels"),
    ("student_quantized", "Student, 4 bits"),
    ("pruned", "Pruned"),
    ("pruned_quantized", "Pruned, 4 bits (PTQ)"),
    ("pruned_qkd4bit", "Pruned, 4 bits (QAT)"),
]


@dataclass
class ComparisonConfig(Config):
    data_dir: str | None = None
    """Folder with SST-2; without it ./sst2_data, then the hub, then the embedded review sentences."""
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


def compare(found: dict[str, Path], config: ComparisonConfig) -> list[dict[str, Any]]:
    """One row per model."""
    device, data = pick_device(), load_sentiment(config.data_dir)
    log.info("Loading times, the models taking turns")
    loads = {name: lambda folder=folder: load_classifier(folder, device) for name, folder in found.items()}
    seconds = interleaved_times(loads, config.load_runs, device)
    loaded = {name: load() for name, load in loads.items()}
    for model, _ in loaded.values():
        check_positions(model, "sequence_length", config.sequence_length)
    log.info("Inference times, the models taking turns")
    classifiers = {name: model for name, (model, _) in loaded.items()}
    timings = measure_latency(classifiers, device, config.sequence_length, config.inference_runs, 1, 1, config.seed)
    rows = []
    for name, (model, tokenizer) in loaded.items():
        log.info("Accuracy of %s on %d sentences of %s", name, len(data.validation), data.name)
        encoded = encode(tokenizer, data.validation, config.max_length)
        quality = classification_metrics(predict(model, encoded, tokenizer.pad_token_id), encoded.labels)
        low, median, high = np.percentile(seconds[name], (10, 50, 90))
        latency = {f"inference_{key}": value for key, value in timings[name]["latency"].items() if key.endswith("_ms")}
        rows.append(
            {"model": name, "folder": str(found[name]), "data": data.name, "sentences": quality["n"]}
            | {key: quality[key] for key in ("accuracy", "accuracy_standard_error")}
            | latency
            | {"load_median_s": median, "load_p10_s": low, "load_p90_s": high}
            | size_on_disk(found[name])
            | {"parameters": count_parameters(model)["total"]}
        )
    return rows


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(config: ComparisonConfig) -> None:
    newest = {name: find_newest(config.models_dir, stage) for stage, name in models}
    found = {name: folder for name, folder in newest.items() if folder}
    if not found:
        raise UserError(
            f"--models_dir {config.models_dir}: no model to compare; make the first with: python 1_finetune_teacher.py"
        )
    if absent := [name for name, folder in newest.items() if not folder]:
        log.info("Not there, so not compared: %s", "; ".join(absent))
    check_files(config.output_dir, FILES, "--output_dir")
    rows = compare(found, config)
    figure = plot_model_comparison(rows)
    with new_files(config.output_dir, FILES, "--output_dir") as temporary:
        write_table(rows, temporary / FILES[0])
        for name in FILES[1:]:
            save_figure(figure, temporary / name)
    for row in rows:
        log.info(
            "%-24s accuracy %.4f   inference %7.2f ms   load %6.3f s   %6.1f MB", row["model"], row["accuracy"],
            row["inference_median_ms"], row["load_median_s"], row["weights_bytes"] / 1e6,
        )  # fmt: skip
    log.info("Written: %s", ", ".join(shown(config.output_dir / name) for name in FILES))


if __name__ == "__main__":
    run_script(ComparisonConfig, main)

"""Stage 7: measure every model and write the report.

    python 7_evaluate_and_generate_report.py [--fast]

Reads what exists of MODELS_TO_EVALUATE under models/, their ONNX exports, and the validation sentences; writes
results/final_report.json, .md and .png, of more than two classes confusion_matrix.png too, and report.html, the page of
all results. A model that is missing is listed with the command that makes it.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import check_positions, load_classifier, load_tokenizer
from compression.classifier.data import DatasetSettings, encode, load_data_for
from compression.classifier.metrics import (
    classification_metrics,
    describe_task,
    disagreements,
    paired_difference,
    predict,
)
from compression.classifier.models import EVALUATED, baseline_of
from compression.classifier.parts import TaskData
from compression.classifier.report import (
    Entry,
    data_warnings,
    describe_lineage,
    missing_section,
    relative_figures,
    report_files,
    results_table,
    write_report,
)
from compression.classifier.tasks import Task
from compression.config import AtLeast, Between, Config, Flat, group, run_script
from compression.export.onnx import PRECISIONS, OnnxClassifier
from compression.flops import count_macs, count_parameters, count_thop
from compression.inputs import find_all, find_exports
from compression.outputs import check_files
from compression.page import PAGE, write_page
from compression.quantization import bytes_by_part, compute_type
from compression.runtime import MODELS, RESULTS, UserError, fingerprint, log, pick_device, shown
from compression.stage_record import read_stage
from compression.timing import measure_latency, size_on_disk

# What is evaluated, in this order. To leave a model out or to add one, make this a list of your own.
MODELS_TO_EVALUATE = EVALUATED


@dataclass
class EvaluationConfig(Config):
    dataset: Flat[DatasetSettings] = group(DatasetSettings)
    models_dir: Path = MODELS
    """Where the checkpoints are."""
    output_dir: Path = RESULTS
    """Where the report goes."""
    max_length: Annotated[int, Between(4, 512)] = 128
    """Sentences are cut at this number of tokens for accuracy."""
    flops_sequence_length: Annotated[int, Between(4, 512)] = 128
    """Tokens per sequence that GFLOPs are counted at."""
    latency_sequence_length: Annotated[int, Between(4, 512)] = 128
    """Tokens per sequence that latency and throughput are measured at."""
    throughput_batch_size: Annotated[int, AtLeast(1)] = 32
    """Sequences per batch for throughput; latency is measured on one sequence."""
    latency_repeats: Annotated[int, AtLeast(1)] = 100
    """Timed passes per model for latency."""
    throughput_repeats: Annotated[int, AtLeast(1)] = 20
    """Timed passes per model for throughput."""
    every_pruned: bool = False
    """Evaluate every pruned model, not only the newest one."""
    seed: int = 42
    """Fixes the token ids that are timed."""

    presets: ClassVar = {"fast": dict(max_length=64, latency_repeats=30, throughput_repeats=8)}


@dataclass
class Candidate:
    """A model as one engine runs it.

    Attributes:
        folder: the checkpoint or export.
        model: what is called; an `OnnxClassifier` where ONNX Runtime runs it.
        engine: what computes, and in which data type.
        size: its bytes, see `size_on_disk`.
        same_as: another candidate that does the same arithmetic in another form.
    """

    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerBase
    engine: dict[str, str]
    size: dict[str, int | None]
    same_as: str | None = None


def load_candidates(
    found: dict[str, Path], baseline: str, models_dir: Path, device: torch.device
) -> dict[str, Candidate]:
    """Every model in PyTorch, behind it its exports; the baseline in bfloat16, too."""
    candidates = {}
    for name, folder in found.items():
        model, tokenizer = load_classifier(folder, device)
        candidates[name] = Candidate(folder, model, tokenizer, pytorch(model), size_on_disk(folder))
        if name == baseline:
            halved = copy.deepcopy(model).to(torch.bfloat16)
            size = {"weights_bytes": bytes_by_part(halved)["total"], "folder_bytes": None}
            candidates[f"{name}, bfloat16"] = Candidate(folder, halved, tokenizer, pytorch(halved), size, name)
        for export in find_exports(folder, models_dir, "onnx"):
            session = OnnxClassifier(export, torch.get_num_threads())
            precision = (read_stage(export) or {})["config"]["precision"]
            engine = {"name": "ONNX Runtime", "type": PRECISIONS[precision].computes_in}
            title = f"{name}, ONNX {precision}"
            title = f"{title}, {export.name}" if title in candidates else title
            tokenizer = load_tokenizer(export, model)
            candidates[title] = Candidate(export, session, tokenizer, engine, size_on_disk(export), name)
    return candidates


def pytorch(model: PreTrainedModel) -> dict[str, str]:
    """PyTorch as the engine, and what a model computes in there."""
    return {"name": "PyTorch", "type": compute_type(model)}


def measure(name: str, candidate: Candidate, validation, task: Task, max_length: int) -> tuple[Entry, Tensor]:
    """Quality and size of one model; and its logits."""
    encoded = encode(candidate.tokenizer, validation, max_length)
    logits = predict(candidate.model, encoded, candidate.tokenizer.pad_token_id, task)
    entry = {
        "name": name,
        "folder": str(candidate.folder),
        "engine": candidate.engine,
        "quality": classification_metrics(logits, encoded.labels, task),
        "size": candidate.size,
    }
    return entry, logits


def count_work(candidates: dict[str, Candidate], sequence_length: int) -> dict[str, Entry]:
    """Parameters and MACs of each model, also by thop: other forms of one have the same."""
    counted = {
        name: {
            "parameters": count_parameters(one.model),
            "macs": count_macs(one.model, sequence_length).as_dict(),
            "thop": count_thop(one.model, sequence_length),
        }
        for name, one in candidates.items()
        if one.same_as is None
    }
    return {name: counted[one.same_as or name] for name, one in candidates.items()}


def build_report(found: dict[str, Path], missing: list[Entry], data: TaskData, config: EvaluationConfig) -> Entry:
    """Measure every model that was found."""
    device, task, baseline = pick_device(), data.task, baseline_of(found)
    candidates = load_candidates(found, baseline, config.models_dir, device)
    lineages = {name: {"lineage": describe_lineage(one.folder)} for name, one in candidates.items()}
    for one in candidates.values():
        for length in ("flops_sequence_length", "latency_sequence_length"):
            check_positions(one.model, length, getattr(config, length))
    work = count_work(candidates, config.flops_sequence_length)
    measured: dict[str, tuple[Entry, Tensor]] = {}
    for name, one in candidates.items():
        log.info("Evaluating %s on %d sentences of %s", name, len(data.validation), data.name)
        measured[name] = measure(name, one, data.validation, task, config.max_length)
    log.info("Timing, the models taking turns")
    timings = measure_latency(
        {name: one.model for name, one in candidates.items()},
        device,
        config.latency_sequence_length,
        config.latency_repeats,
        config.throughput_repeats,
        config.throughput_batch_size,
        config.seed,
    )
    entries = {name: entry | work[name] | lineages[name] | timings[name] for name, (entry, _) in measured.items()}
    if baseline in entries:
        labels, expected = torch.tensor(data.validation.labels), measured[baseline][1]
        for name, entry in entries.items():
            logits = measured[name][1]
            paired = paired_difference(logits.argmax(-1) == labels, expected.argmax(-1) == labels)
            entry["relative"] = paired | relative_figures(entry, entries[baseline])
            entry["disagreements"] = disagreements(data.validation, logits, expected)
    return {
        "task": describe_task(task),
        "data": {"name": data.name, "source": data.source, "n": len(data.validation), "duplicates": data.duplicates},
        "baseline": baseline,
        "models": list(entries.values()),
        "missing": missing,
        "warnings": data_warnings([entries[name] for name in found], data.name),
        "config": config.as_dict(),
        "environment": fingerprint(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(config: EvaluationConfig) -> None:
    found, missing = {}, []
    for model in MODELS_TO_EVALUATE:
        folders = find_all(config.models_dir, model.stage)
        if not folders:
            missing.append({"name": model.name, "command": model.command_on(config.dataset)})
        for older, folder in enumerate(folders if config.every_pruned else folders[:1]):
            found[f"{model.name}, {folder.name}" if older else model.name] = folder
    if not found:
        command = missing[0]["command"]
        raise UserError(f"--models_dir {config.models_dir}: no model to evaluate; make the first with: {command}")
    data = load_data_for(found.values(), config.dataset)
    check_files(config.output_dir, (*report_files(data.task.labels), PAGE), "--output_dir")
    report = build_report(found, missing, data, config)
    paths = write_report(report, config.output_dir, MODELS_TO_EVALUATE)
    paths.append(write_page(config.models_dir, config.output_dir, "--output_dir"))
    for section in (results_table(report), missing_section(report), "Written: " + ", ".join(map(shown, paths))):
        if section:
            log.info("\n%s", section)


if __name__ == "__main__":
    run_script(EvaluationConfig, main)

"""The final report: numbers that others measured, put side by side.

Nothing is measured here. The report is one JSON document; the markdown and the plot are made from it alone.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compression.checkpoint import read_stage
from compression.classifier.models import EVALUATED, EvaluatedModel
from compression.classifier.plots import plot_accuracy_against_cost
from compression.classifier.tasks import SST2, Task
from compression.files import write_json, write_text
from compression.integrity import digest_of
from compression.outputs import new_files
from compression.plots import save_figure
from compression.runtime import ROOT, UserError, relative_path
from compression.tables import Column, at, markdown_table

REPORT_FILES = ("final_report.json", "final_report.md", "final_report.png")
Report = dict[str, Any]
Entry = dict[str, Any]
Getter = Callable[[Entry], tuple[float, ...]]

# The fields of stage.json that are read, with their types; any may be missing or null.
FIELDS: dict[str, tuple[type, str]] = {
    "stage": (str, "text"),
    "parent": (str, "text"),
    "created": (str, "text"),
    "seed": (int, "a whole number"),
    "data": (dict, "an object"),
    "config": (dict, "an object"),
}


def describe_lineage(folder: Path) -> dict[str, Any]:
    """Where a checkpoint comes from, by its `stage.json`; every value is None where that file is missing.

    Returns:
        stage, created, seed, config and a digest of it, data; `ancestors` lists the parent, its parent, and so on.

    Raises:
        UserError: a field is of another type than the project writes.
    """
    lineage = _fields(folder)
    config = lineage["config"]
    ancestors = _ancestors(lineage["parent"])
    return lineage | {"ancestors": ancestors, "config_digest": None if config is None else digest_of(config, 12)}


def _fields(folder: Path) -> dict[str, Any]:
    stage = read_stage(folder) or {}
    for name, (kind, what) in FIELDS.items():
        if stage.get(name) is not None and not isinstance(stage[name], kind):
            raise UserError(
                f"{folder}/stage.json: {name} is {str(stage[name])[:40]!r}; allowed is {what}; make the model again"
            )
    return {name: stage.get(name) for name in FIELDS}


def _ancestors(parent: str | None) -> list[str]:
    ancestors: list[str] = []
    while parent and parent not in ancestors:
        ancestors.append(parent)
        parent = _fields(ROOT / parent)["parent"]
    return [relative_path(ancestor) for ancestor in ancestors]


# What costs are compared by: the name in the JSON, the title in the table, where an entry has the figure.
RATIOS = (
    ("parameters", "Parameters", ("parameters", "total")),
    ("encoder_parameters", "Encoder parameters", ("parameters", "encoder")),
    ("macs", "MACs", ("macs", "total")),
    ("encoder_macs", "Encoder MACs", ("macs", "encoder")),
    ("weights_bytes", "Weights", ("size", "weights_bytes")),
    ("latency", "Latency", ("latency", "median_ms")),
    ("throughput", "Throughput", ("throughput", "median_samples_per_second")),
)


def _percent(*names: str) -> Getter:
    return lambda entry: tuple(100 * entry["quality"][name] for name in names)


def _spread(group: str, unit: str) -> Getter:
    return lambda entry: tuple(entry[group][f"{name}_{unit}"] for name in ("median", "p10", "p90"))


def _points(entry: Entry) -> tuple[float, float]:
    return entry["relative"]["accuracy_points"], entry["relative"]["accuracy_points_standard_error"]


def _trained_on(entry: Entry) -> str | None:
    return (entry["lineage"]["data"] or {}).get("name")


# What the tables show of an entry: a new column is a line here.
MODEL = Column("Model", at("name"))
ENGINE = [Column("Engine", at("engine", "name")), Column("Computes in", at("engine", "type"))]


def results_columns(flops_sequence_length: int, task: Task) -> list[Column]:
    """Quality and cost."""
    metrics = ((name, metric) for name, metric in task.metrics.items() if name != "accuracy")
    return [
        MODEL,
        *ENGINE,
        Column("Accuracy (%)", _percent("accuracy", "accuracy_standard_error"), "{:.2f} ± {:.2f}"),
        *(Column(metric.title, at("quality", name), "{:.4f}") for name, metric in metrics),
        Column("ROC-AUC", at("quality", "roc_auc"), "{:.4f}", missing="undefined"),
        Column("Parameters (M)", at("parameters", "total", per=1e6), "{:.2f}"),
        Column("Embeddings (M)", at("parameters", "embeddings", per=1e6), "{:.2f}"),
        Column("Encoder (M)", at("parameters", "encoder", per=1e6), "{:.2f}"),
        Column(f"GFLOPs @{flops_sequence_length}", at("macs", "gflops"), "{:.3f}"),
        Column("Encoder GMACs", at("macs", "encoder", per=1e9), "{:.3f}"),
        Column("Weights (MB)", at("size", "weights_bytes", per=1e6), "{:.1f}"),
        Column("Latency (ms)", _spread("latency", "ms"), "{:.2f} ({:.2f}–{:.2f})"),
        Column("Samples/s", _spread("throughput", "samples_per_second"), "{:.1f} ({:.1f}–{:.1f})"),
    ]


RELATIVE_COLUMNS = [
    MODEL,
    *ENGINE,
    Column("Accuracy (points)", _points, "{:+.2f} ± {:.2f}"),
    *(Column(title, at("relative", name), "×{:.2f}") for name, title, _ in RATIOS),
    Column("Throughput ÷ MAC reduction", at("relative", "throughput_per_mac_reduction"), "{:.2f}"),
]


def confusion_columns(labels: Sequence[str]) -> list[Column]:
    """How often each label is taken for each: of two labels true and false negatives and positives."""
    return [
        MODEL,
        *(
            Column(f"{'True' if truth == place else 'False'} {label}", at("quality", "confusion_matrix", truth, place))
            for truth in range(len(labels))
            for place, label in enumerate(labels)
        ),
    ]


LINEAGE_COLUMNS = [
    MODEL,
    Column("Folder", at("folder")),
    *(
        Column(title, value, missing="not recorded")
        for title, value in (
            ("Stage", at("lineage", "stage")),
            ("Made from", lambda entry: " ← ".join(entry["lineage"]["ancestors"]) or None),
            ("Trained on", _trained_on),
            ("Seed", at("lineage", "seed")),
            ("Created", at("lineage", "created")),
            ("Config", at("lineage", "config_digest")),
        )
    ),
]


def relative_figures(entry: Entry, baseline: Entry) -> dict[str, float]:
    """The cost of an entry against the baseline's, as ratios to it.

    `throughput_per_mac_reduction` is the throughput ratio over the MAC reduction: 1 says that all of the saved
    arithmetic shows as speed, 0.5 that half of it does.
    """
    ratios = {name: at(*path)(entry) / at(*path)(baseline) for name, _, path in RATIOS}
    return ratios | {"throughput_per_mac_reduction": ratios["throughput"] * ratios["macs"]}


def data_warnings(entries: Sequence[Entry], data_name: str) -> list[str]:
    """One line per checkpoint that was trained on another data set than it is evaluated on, or does not say."""
    lines = []
    for entry in entries:
        trained_on = _trained_on(entry)
        if trained_on is None:
            lines.append(f"{entry['name']} ({entry['folder']}) does not record what data it was trained on.")
        elif trained_on != data_name:
            lines.append(
                f"{entry['name']} ({entry['folder']}) was trained on {trained_on} but is evaluated on {data_name}."
            )
    return lines


def write_report(
    report: Report, folder: Path, models: Sequence[EvaluatedModel] = EVALUATED, task: Task = SST2
) -> list[Path]:
    """Write the files of `REPORT_FILES`; each is replaced whole, and none before all three are made.

    Args:
        models: what the entries are checkpoints of, for the looks of the figure.
        task: what they are evaluated on, for the metrics and labels that the tables show.

    Returns:
        The paths written.
    """
    report = json.loads(json.dumps(report))  # what the markdown and plot show is what the JSON holds
    markdown, figure = build_markdown(report, task), plot_accuracy_against_cost(report, models)
    with new_files(folder, REPORT_FILES, "--output_dir") as temporary:
        write_json(temporary / REPORT_FILES[0], report)
        write_text(temporary / REPORT_FILES[1], markdown)
        save_figure(figure, temporary / REPORT_FILES[2])
    return [Path(folder) / name for name in REPORT_FILES]


def build_markdown(report: Report, task: Task = SST2) -> str:
    """The whole report as markdown."""
    sections = [
        "# Final report",
        *(f"> **Warning:** {warning}" for warning in report["warnings"]),
        _setting(report),
        "![Accuracy against GFLOPs and against size](final_report.png)",
        results_table(report, task),
        _definitions(report),
        _relative_section(report),
        _confusion_section(report, task),
        _lineage_section(report),
        missing_section(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _setting(report: Report) -> str:
    data, config = report["data"], report["config"]
    machine = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    return "\n".join(
        [
            f"- Data: {data['name']}, validation set, n = {data['n']} ({data['source']})",
            f"- Machine: {machine}, timed on {report['device']}",
            f"- Sequence lengths: {config['max_length']} at most for accuracy, {config['flops_sequence_length']} for"
            f" GFLOPs, {config['latency_sequence_length']} for latency and throughput (tokens)",
            f"- Made: {report['created']}",
        ]
    )


def results_table(report: Report, task: Task = SST2) -> str:
    """Quality and cost of every model, one row each."""
    return markdown_table(results_columns(report["config"]["flops_sequence_length"], task), report["models"])


def _definitions(report: Report) -> str:
    config = report["config"]
    return (
        "Accuracy ± one binomial standard error. GFLOPs are counted on the model for one sequence, attention included;"
        " 1 MAC = 2 FLOPs. Weight-only quantization does not change them: 4-bit weights become numbers again before"
        " they are multiplied; what it changes is the size. A speed is that of its engine in the type it computes in:"
        " compare 4-bit weights that are multiplied in bfloat16 with the baseline in bfloat16, not with float32."
        " 1 MB = 10^6 bytes of weights in safetensors or ONNX. Latency at batch 1,"
        " samples per second at batch"
        f" {config['throughput_batch_size']}: median (10th–90th percentile) of {config['latency_repeats']} and"
        f" {config['throughput_repeats']} passes over full-length sequences, the models taking turns."
    )


def _relative_section(report: Report) -> str:
    name = report["baseline"]
    if not any(entry["name"] == name for entry in report["models"]):
        return f"No comparison with {name}: it is missing."
    table = markdown_table(RELATIVE_COLUMNS, report["models"])
    reading = (
        "Accuracy difference ± one standard error over the paired sentences; all else are ratios to the baseline."
        " Throughput ÷ MAC reduction compares the gain in throughput with the reduction in MACs: in one engine and"
        " type, 1 says that all of the saved arithmetic shows as speed."
    )
    return f"## Against {name}\n\n{table}\n\n{reading}"


def _confusion_section(report: Report, task: Task) -> str:
    return f"## Confusion matrices\n\n{markdown_table(confusion_columns(task.labels), report['models'])}"


def _lineage_section(report: Report) -> str:
    table = markdown_table(LINEAGE_COLUMNS, report["models"], align="---")
    settings = [
        f"- {entry['name']}: {_settings(entry['lineage']['config'])}"
        for entry in report["models"]
        if entry["lineage"]["config"]
    ]
    return "\n\n".join(["## Checkpoints", table, "\n".join(settings)])


def _settings(config: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in config.items() if value is not None)


def missing_section(report: Report) -> str:
    """The models that were not found, each with the command that makes it; empty when none is missing."""
    lines = [f"- {missing['name']}: `{missing['command']}`" for missing in report["missing"]]
    return "\n".join(["## Missing models, and the command that makes each", "", *lines]) if lines else ""

"""The final report: numbers that others measured, put side by side.

Nothing is measured here. The report is one JSON document; the markdown and the plot are made from it alone.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compression.classifier.models import EVALUATED, EvaluatedModel
from compression.classifier.plots import checkpoints_in_pytorch, plot_confusion_matrices, plot_quality_against_cost
from compression.classifier.tasks import listed
from compression.files import write_json, write_text
from compression.integrity import digest_of
from compression.outputs import new_files
from compression.plots import save_figure
from compression.runtime import ROOT, UserError, relative_path
from compression.stage_record import read_stage
from compression.tables import Column, at, markdown_table

REPORT_FILE = "final_report.json"
REPORT_FILES = (REPORT_FILE, "final_report.md", "final_report.png")
CONFUSION_FILE = "confusion_matrix.png"
"""Of more than two labels."""
MATRIX_LABELS = 3
"""Of so many labels at most, a table shows the whole confusion matrices."""
LISTED_CONFUSIONS, LISTED_CLASSES = 5, 20
"""What else the tables show at most: confusions per model, and classes."""
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


def results_columns(flops_sequence_length: int, task: Entry) -> list[Column]:
    """Quality and cost; task: what `describe_task` says of it."""
    metrics = ((name, title) for name, title in task["metrics"].items() if name != "accuracy")
    roc_auc = Column("ROC-AUC", at("quality", "roc_auc"), "{:.4f}", missing="undefined")
    return [
        MODEL,
        *ENGINE,
        Column("Accuracy (%)", _percent("accuracy", "accuracy_standard_error"), "{:.2f} ± {:.2f}"),
        *(Column(title, at("quality", name), "{:.4f}") for name, title in metrics),
        *([roc_auc] if len(task["labels"]) == 2 else []),
        Column("Parameters (M)", at("parameters", "total", per=1e6), "{:.2f}"),
        Column("Embeddings (M)", at("parameters", "embeddings", per=1e6), "{:.2f}"),
        Column("Encoder (M)", at("parameters", "encoder", per=1e6), "{:.2f}"),
        Column(f"GFLOPs @{flops_sequence_length}", at("macs", "gflops"), "{:.3f}"),
        Column("Encoder GMACs", at("macs", "encoder", per=1e9), "{:.3f}"),
        Column(f"thop GMACs @{flops_sequence_length}", at("thop", "macs", per=1e9), "{:.3f}"),
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

    def title(truth: int, place: int) -> str:
        if len(labels) == 2:
            return f"{'True' if truth == place else 'False'} {labels[place]}"
        return f"{labels[truth]} → {labels[place]}"

    places = range(len(labels))
    cells = ((truth, place) for truth in places for place in places)
    return [MODEL, *(Column(title(*cell), at("quality", "confusion_matrix", *cell)) for cell in cells)]


def frequent_confusions(entry: Entry, labels: Sequence[str]) -> str:
    """The pairs of labels that a model confuses most often: truth, prediction, how often."""
    counts = np.array(entry["quality"]["confusion_matrix"])
    np.fill_diagonal(counts, 0)
    places = np.argsort(-counts, axis=None, kind="stable")[:LISTED_CONFUSIONS]
    pairs = [(truth, place) for truth, place in zip(*np.unravel_index(places, counts.shape), strict=True)]
    return "; ".join(
        f"{labels[truth]} → {labels[place]} {counts[truth, place]}" for truth, place in pairs if counts[truth, place]
    )


def class_scores(entry: Entry) -> np.ndarray:
    """Precision, recall and F1 of every class [classes, 3], 0 where a class does not occur."""
    counts = np.array(entry["quality"]["confusion_matrix"], dtype=float)
    right, predicted, true = counts.diagonal(), counts.sum(0), counts.sum(1)
    parts = (right, predicted), (right, true), (2 * right, predicted + true)
    return np.stack([some / np.maximum(all, 1) for some, all in parts], 1)


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


def report_files(labels: Sequence[str]) -> tuple[str, ...]:
    """The files of a report on these labels."""
    return (*REPORT_FILES, CONFUSION_FILE) if len(labels) > 2 else REPORT_FILES


def write_report(report: Report, folder: Path, models: Sequence[EvaluatedModel] = EVALUATED) -> list[Path]:
    """Write the files of `report_files`; each is replaced whole, and none before all are made.

    An earlier report's picture of the confusion matrices does not stay beside a report that has none.

    Args:
        models: what the entries are checkpoints of, for the looks of the figure.

    Returns:
        The paths written.
    """
    report = json.loads(json.dumps(report))  # what the markdown and plots show is what the JSON holds
    files = report_files(report["task"]["labels"])
    figures = [plot_quality_against_cost(report, models)]
    if CONFUSION_FILE in files:
        figures.append(plot_confusion_matrices(report))
    markdown, outdated = build_markdown(report), {CONFUSION_FILE}.difference(files)
    with new_files(folder, files, "--output_dir", outdated) as temporary:
        write_json(temporary / REPORT_FILES[0], report)
        write_text(temporary / REPORT_FILES[1], markdown)
        for figure, name in zip(figures, files[2:], strict=True):
            save_figure(figure, temporary / name)
    return [Path(folder) / name for name in files]


def build_markdown(report: Report) -> str:
    """The whole report as markdown."""
    title = report["task"]["metrics"][report["task"]["primary"]]
    sections = [
        "# Final report",
        *(f"> **Warning:** {warning}" for warning in report["warnings"]),
        _setting(report),
        f"![{title} against GFLOPs and against size](final_report.png)",
        results_table(report),
        _definitions(report),
        _relative_section(report),
        _confusion_section(report),
        _lineage_section(report),
        missing_section(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _setting(report: Report) -> str:
    data, config, task = report["data"], report["config"], report["task"]
    labels = listed(task["labels"])
    machine = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    return "\n".join(
        [
            f"- Data: {data['name']}, validation set, n = {data['n']} ({data['source']}); {data['duplicates']} of its"
            " texts are in the training data, too",
            f"- Task: {task['name']}, {labels}; epochs are chosen by {task['metrics'][task['primary']]}",
            f"- Machine: {machine}, timed on {report['device']}",
            f"- Sequence lengths: {config['max_length']} at most for accuracy, {config['flops_sequence_length']} for"
            f" GFLOPs, {config['latency_sequence_length']} for latency and throughput (tokens)",
            f"- Made: {report['created']}",
        ]
    )


def results_table(report: Report) -> str:
    """Quality and cost of every model, one row each."""
    columns = results_columns(report["config"]["flops_sequence_length"], report["task"])
    return markdown_table(columns, report["models"])


def _definitions(report: Report) -> str:
    config, labels = report["config"], report["task"]["labels"]
    of_one = f" F1 is that of {labels[1]}, macro F1 the mean over both labels." if len(labels) == 2 else ""
    return (
        f"Accuracy ± one binomial standard error.{of_one} GFLOPs are counted on the model for one sequence, attention"
        " included; 1 MAC = 2 FLOPs. thop GMACs are what the tool of that name counts, the Linear layers without"
        " attention's products: they are there to compare with figures made with it. Weight-only quantization changes"
        " neither: 4-bit weights become numbers again before they are multiplied; what it changes is the size. A speed"
        " is that of its engine in the type it computes in: compare 4-bit weights that are multiplied in bfloat16 with"
        " the baseline in bfloat16, not with float32. 1 MB = 10^6 bytes of weights in safetensors or ONNX. Latency at"
        " batch 1, samples per second at batch"
        f" {config['throughput_batch_size']}: median (10th–90th percentile) of {config['latency_repeats']} and"
        f" {config['throughput_repeats']} passes over full-length sequences, the models taking turns."
    )


def _relative_section(report: Report) -> str:
    name = report["baseline"]
    if not any(entry["name"] == name for entry in report["models"]):
        return f"No comparison with {name}: it is missing."
    table = markdown_table(RELATIVE_COLUMNS, report["models"])
    reading = (
        "Accuracy difference ± one standard error over the paired rows; all else are ratios to the baseline."
        " Throughput ÷ MAC reduction compares the gain in throughput with the reduction in MACs: in one engine and"
        " type, 1 says that all of the saved arithmetic shows as speed."
    )
    return f"## Against {name}\n\n{table}\n\n{reading}"


def _confusion_section(report: Report) -> str:
    labels, entries = report["task"]["labels"], report["models"]
    parts = ["## Confusion matrices"]
    if len(labels) <= MATRIX_LABELS:
        parts.append(markdown_table(confusion_columns(labels), entries))
    else:
        often = Column("Most frequent confusions (truth → prediction)", lambda one: frequent_confusions(one, labels))
        parts.append(markdown_table([MODEL, often], entries, align="---"))
    if len(labels) > 2:
        parts += [f"![Confusion matrices]({CONFUSION_FILE})", *_classes(report)]
    return "\n\n".join(parts)


def _classes(report: Report) -> list[str]:
    """A table of the classes' scores, a row per class and a column per checkpoint, and what it shows."""
    labels, entries = report["task"]["labels"], checkpoints_in_pytorch(report)
    scores = 100 * np.stack([class_scores(entry) for entry in entries], 1)  # [classes, models, 3]
    sizes = np.sum(entries[0]["quality"]["confusion_matrix"], 1)
    shown, reading = np.arange(len(labels)), "Precision / recall / F1 of each class in percent."
    if len(labels) > LISTED_CLASSES:
        shown = np.sort(np.argsort(scores[..., 2].mean(1), kind="stable")[:LISTED_CLASSES])
        reading += f" Of {len(labels)} classes these have the lowest F1, averaged over the models."
    rows = [
        {"label": labels[place], "n": sizes[place], "scores": list(map(tuple, scores[place]))}
        for place in shown.tolist()
    ]
    columns = [
        Column("Class", at("label")),
        Column("n", at("n")),
        *(
            Column(entry["name"], at("scores", place), "{:.1f} / {:.1f} / {:.1f}")
            for place, entry in enumerate(entries)
        ),
    ]
    return [markdown_table(columns, rows), reading]


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

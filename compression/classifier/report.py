"""The final report: numbers that others measured, put side by side.

Nothing is measured here. The report is one JSON document; the markdown and the plot are made from it alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compression.checkpoint import read_stage
from compression.files import write_json, write_text
from compression.integrity import digest_of
from compression.outputs import new_files
from compression.plots import plot_accuracy_against_cost, save_figure
from compression.runtime import ROOT, UserError, relative_path

REPORT_FILES = ("final_report.json", "final_report.md", "final_report.png")
Report = dict[str, Any]
Entry = dict[str, Any]


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


def relative_figures(entry: Entry, baseline: Entry) -> dict[str, float]:
    """The cost of an entry against the baseline's, as ratios to it.

    `throughput_per_mac_reduction` is the throughput ratio over the MAC reduction: 1 says that all of the saved
    arithmetic shows as speed, 0.5 that half of it does.
    """

    def ratio(group: str, name: str) -> float:
        return entry[group][name] / baseline[group][name]

    throughput, macs = ratio("throughput", "median_samples_per_second"), ratio("macs", "total")
    return {
        "parameters": ratio("parameters", "total"),
        "encoder_parameters": ratio("parameters", "encoder"),
        "macs": macs,
        "encoder_macs": ratio("macs", "encoder"),
        "weights_bytes": ratio("size", "weights_bytes"),
        "latency": ratio("latency", "median_ms"),
        "throughput": throughput,
        "throughput_per_mac_reduction": throughput * macs,
    }


def data_warnings(entries: Sequence[Entry], data_name: str) -> list[str]:
    """One line per checkpoint that was trained on another data set than it is evaluated on, or does not say."""
    lines = []
    for entry in entries:
        trained_on = (entry["lineage"]["data"] or {}).get("name")
        if trained_on is None:
            lines.append(f"{entry['name']} ({entry['folder']}) does not record what data it was trained on.")
        elif trained_on != data_name:
            lines.append(
                f"{entry['name']} ({entry['folder']}) was trained on {trained_on} but is evaluated on {data_name}."
            )
    return lines


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the files of `REPORT_FILES`; each is replaced whole, and none before all three are made.

    Returns:
        The paths written.
    """
    report = json.loads(json.dumps(report))  # what the markdown and plot show is what the JSON holds
    markdown, figure = build_markdown(report), plot_accuracy_against_cost(report)
    with new_files(folder, REPORT_FILES, "--output_dir") as temporary:
        write_json(temporary / REPORT_FILES[0], report)
        write_text(temporary / REPORT_FILES[1], markdown)
        save_figure(figure, temporary / REPORT_FILES[2])
    return [Path(folder) / name for name in REPORT_FILES]


def build_markdown(report: Report) -> str:
    """The whole report as markdown."""
    sections = [
        "# Final report",
        *(f"> **Warning:** {warning}" for warning in report["warnings"]),
        _setting(report),
        "![Accuracy against GFLOPs and against size](final_report.png)",
        results_table(report),
        _definitions(report),
        _relative_section(report),
        _confusion_section(report),
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


def results_table(report: Report) -> str:
    """Quality and cost of every model, one row each."""
    config = report["config"]
    header = [
        "Model",
        "Accuracy (%)",
        "F1",
        "ROC-AUC",
        "Parameters (M)",
        "Embeddings (M)",
        "Encoder (M)",
        f"GFLOPs @{config['flops_sequence_length']}",
        "Encoder GMACs",
        "Weights (MB)",
        "Latency (ms)",
        "Samples/s",
    ]
    return _table(header, [_result_row(entry) for entry in report["models"]])


def _result_row(entry: Entry) -> list[str]:
    quality, parameters, macs = entry["quality"], entry["parameters"], entry["macs"]
    return [
        entry["name"],
        f"{100 * quality['accuracy']:.2f} ± {100 * quality['accuracy_standard_error']:.2f}",
        f"{quality['f1']:.4f}",
        "undefined" if quality["roc_auc"] is None else f"{quality['roc_auc']:.4f}",
        *(f"{parameters[part] / 1e6:.2f}" for part in ("total", "embeddings", "encoder")),
        f"{macs['gflops']:.3f}",
        f"{macs['encoder'] / 1e9:.3f}",
        f"{entry['size']['weights_bytes'] / 1e6:.1f}",
        _with_spread(entry["latency"], "ms", 2),
        _with_spread(entry["throughput"], "samples_per_second", 1),
    ]


def _with_spread(measured: dict[str, float], unit: str, digits: int) -> str:
    median, low, high = (f"{measured[f'{name}_{unit}']:.{digits}f}" for name in ("median", "p10", "p90"))
    return f"{median} ({low}–{high})"


def _definitions(report: Report) -> str:
    config = report["config"]
    return (
        "Accuracy ± one binomial standard error. GFLOPs are counted on the model for one sequence, attention included;"
        " 1 MAC = 2 FLOPs. Weight-only quantization does not change them: 4-bit weights become numbers again before"
        " they are multiplied; what it changes is the size. 1 MB = 10^6 bytes of safetensors. Latency at batch 1,"
        " samples per second at batch"
        f" {config['throughput_batch_size']}: median (10th–90th percentile) of {config['latency_repeats']} and"
        f" {config['throughput_repeats']} passes over full-length sequences, the models taking turns."
    )


def _relative_section(report: Report) -> str:
    name = report["baseline"]
    if not any(entry["name"] == name for entry in report["models"]):
        return f"No comparison with {name}: it is missing."
    header = [
        "Model",
        "Accuracy (points)",
        "Parameters",
        "Encoder parameters",
        "MACs",
        "Encoder MACs",
        "Weights",
        "Latency",
        "Throughput",
        "Throughput ÷ MAC reduction",
    ]
    table = _table(header, [_relative_row(entry) for entry in report["models"]])
    reading = (
        "Accuracy difference ± one standard error over the paired sentences; all else are ratios to the baseline. The"
        " last column compares the gain in throughput with the reduction in MACs: 1 says that all of the saved"
        " arithmetic shows as speed."
    )
    return f"## Against {name}\n\n{table}\n\n{reading}"


def _relative_row(entry: Entry) -> list[str]:
    relative = entry["relative"]
    points = ("accuracy_points", "accuracy_points_standard_error")
    ratios = (name for name in relative if name not in (*points, "throughput_per_mac_reduction"))
    return [
        entry["name"],
        "{:+.2f} ± {:.2f}".format(*(relative[name] for name in points)),
        *(f"×{relative[name]:.2f}" for name in ratios),
        f"{relative['throughput_per_mac_reduction']:.2f}",
    ]


def _confusion_section(report: Report) -> str:
    header = ["Model", "True negative", "False positive", "False negative", "True positive"]
    rows = [
        [entry["name"], *(str(count) for row in entry["quality"]["confusion_matrix"] for count in row)]
        for entry in report["models"]
    ]
    return f"## Confusion matrices\n\n{_table(header, rows)}"


def _lineage_section(report: Report) -> str:
    header = ["Model", "Folder", "Stage", "Made from", "Trained on", "Seed", "Created", "Config"]
    table = _table(header, [_lineage_row(entry) for entry in report["models"]], align="---")
    settings = [
        f"- {entry['name']}: {_settings(entry['lineage']['config'])}"
        for entry in report["models"]
        if entry["lineage"]["config"]
    ]
    return "\n\n".join(["## Checkpoints", table, "\n".join(settings)])


def _lineage_row(entry: Entry) -> list[str]:
    lineage = entry["lineage"]
    trained_on = (lineage["data"] or {}).get("name")
    made_from = " ← ".join(lineage["ancestors"]) or None
    cells = (lineage["stage"], made_from, trained_on, lineage["seed"], lineage["created"], lineage["config_digest"])
    return [entry["name"], entry["folder"], *("not recorded" if cell is None else str(cell) for cell in cells)]


def _settings(config: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in config.items() if value is not None)


def missing_section(report: Report) -> str:
    """The models that were not found, each with the command that makes it; empty when none is missing."""
    lines = [f"- {missing['name']}: `{missing['command']}`" for missing in report["missing"]]
    return "\n".join(["## Missing models, and the command that makes each", "", *lines]) if lines else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    """A markdown table; its columns after the first one are aligned to the right, as numbers are, by default."""
    rule = ["---", *[align] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))

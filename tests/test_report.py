"""The report: what it says, what it is drawn from, which files it leaves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import KEPT, WORDS, load_script, tiny_bert, tiny_distilbert
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.image import imread

from compression.checkpoint import save_checkpoint
from compression.classifier import report as report_module
from compression.classifier.data import DatasetSettings
from compression.classifier.metrics import describe_task
from compression.classifier.models import BASELINE, EVALUATED, looks
from compression.classifier.plots import (
    LARGEST_MARKER,
    pareto_front,
    plot_confusion_matrices,
    plot_quality_against_cost,
)
from compression.classifier.report import (
    build_markdown,
    data_warnings,
    describe_lineage,
    relative_figures,
    results_table,
    write_report,
)
from compression.classifier.tasks import METRICS, SST2
from compression.files import write_json
from compression.flops import count_macs
from compression.llm.plots import plot_removal
from compression.plots import COLOURS, MARKERS, save_figure, unit_area
from compression.runtime import ROOT, UserError
from compression.stage_record import describe_stage, identify, read_stage
from compression.surgery import shrink

FILES = {"final_report.json", "final_report.md", "final_report.png", ".written.json"}


def entry(name, accuracy, gflops, megabytes, throughput, data="SST-2 (GLUE)"):
    macs = int(gflops * 1e9 / 2)
    return {
        "name": name,
        "folder": f"models/{name.split()[0].lower()}",
        "engine": {"name": "PyTorch", "type": "float32"},
        "quality": {
            "n": 800,
            "accuracy": accuracy,
            "accuracy_standard_error": (accuracy * (1 - accuracy) / 800) ** 0.5,
            "f1": 0.8765,
            "f1_macro": 0.8754,
            "roc_auc": 0.9432,
            "confusion_matrix": [[351, 49], [38, 362]],
        },
        "parameters": {"total": int(megabytes * 250_000), "embeddings": 11_920_000, "encoder": int(macs / 100)},
        "macs": {"total": macs, "encoder": macs - 1000, "gflops": gflops},
        "thop": {"macs": macs - 250_000_000, "params": 1},
        "size": {"weights_bytes": int(megabytes * 1e6), "folder_bytes": int(megabytes * 1e6) + 999},
        "latency": {"median_ms": 12.34, "p10_ms": 11.11, "p90_ms": 15.67},
        "throughput": {
            "median_samples_per_second": throughput,
            "p10_samples_per_second": 0.9 * throughput,
            "p90_samples_per_second": 1.1 * throughput,
        },
        "lineage": {
            "stage": "a stage",
            "created": "2026-01-02T03:04:05+00:00",
            "seed": 42,
            "parent": None,
            "ancestors": ["models/parent", "models/grandparent"],
            "config_digest": "0123456789ab",
            "config": {"num_epochs": 15, "unset": None},
            "data": {"name": data},
        },
    }


@pytest.fixture
def report():
    baseline = entry("Distilled Student (Baseline)", 0.9000, 10.0, 200.0, 100.0)
    entries = [
        entry("Teacher", 0.9250, 20.0, 400.0, 55.0),
        baseline,
        entry("Pruned Student", 0.8950, 5.0, 150.0, 160.0),
    ]
    for each in entries:
        points = 100 * (each["quality"]["accuracy"] - baseline["quality"]["accuracy"])
        paired = {"accuracy_points": points, "accuracy_points_standard_error": 0.31}
        each["relative"] = paired | relative_figures(each, baseline)
    return {
        "task": describe_task(SST2),
        "data": {"name": "SST-2 (GLUE)", "source": "a local folder", "n": 800, "duplicates": 3},
        "baseline": baseline["name"],
        "models": entries,
        "missing": [{"name": "Soft Label Student", "command": "python 2_distill_student.py --variant soft_labels"}],
        "warnings": ["the warning that was given"],
        "config": {
            "max_length": 96,
            "flops_sequence_length": 128,
            "latency_sequence_length": 64,
            "throughput_batch_size": 32,
            "latency_repeats": 100,
            "throughput_repeats": 20,
        },
        "environment": {"torch": "2.13.0", "processor": "a processor"},
        "device": "the CPU",
        "created": "2026-01-02T03:04:05+00:00",
    }


def of_classes(report, count, **fields):
    """The report, of so many classes: each model takes class 1 for class 0 most often."""
    counts = 90 * np.eye(count, dtype=int) + (count <= 10)
    counts[1, 0], counts[0, 1] = 9, 1
    own = {name: METRICS[name] for name in ("accuracy", "f1_macro")}
    task = replace(SST2, name="topics", labels=tuple(f"topic_{i}" for i in range(count)), metrics=own, **fields)
    models = [
        one | {"quality": {**one["quality"], "roc_auc": None, "confusion_matrix": counts.tolist()}}
        for one in report["models"]
    ]
    return report | {"task": describe_task(task), "models": models}


def row(markdown, name):
    """The cells of a model's row in the first table that has one."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_relative_figures_worked_out_by_hand(report):
    relative = report["models"][2]["relative"]
    assert relative["macs"] == pytest.approx(0.5)
    assert relative["weights_bytes"] == relative["parameters"] == pytest.approx(0.75)
    assert relative["throughput"] == pytest.approx(1.6)
    assert relative["throughput_per_mac_reduction"] == pytest.approx(0.8), "1.6 times as fast at half of the MACs"


def test_markdown_shows_the_numbers_of_the_json(report):
    table = results_table(report)
    shown = dict(zip(row(table, "Model"), row(table, "Pruned Student"), strict=True))
    assert shown["Accuracy (%)"] == "89.50 ± 1.08" and (shown["F1"], shown["ROC-AUC"]) == ("0.8765", "0.9432")
    parts = ("Parameters (M)", "Embeddings (M)", "Encoder (M)", "GFLOPs @128", "Encoder GMACs", "thop GMACs @128")
    assert [shown[title] for title in parts] == ["37.50", "11.92", "25.00", "5.000", "2.500", "2.250"]
    assert (shown["Macro F1"], shown["Weights (MB)"]) == ("0.8754", "150.0")
    assert shown["Latency (ms)"] == "12.34 (11.11–15.67)" and shown["Samples/s"] == "160.0 (144.0–176.0)"
    markdown = build_markdown(report)
    against = markdown[markdown.index("## Against Distilled Student (Baseline)") :]
    assert row(against, "Pruned Student")[1:3] == row(table, "Pruned Student")[1:3] == ["PyTorch", "float32"]
    assert row(against, "Pruned Student")[3:7] == ["-0.50 ± 0.31", "×0.75", "×0.50", "×0.50"]
    assert row(against, "Pruned Student")[-2:] == ["×1.60", "0.80"]
    confusion = markdown[markdown.index("## Confusion matrices") :]
    assert row(confusion, "Teacher") == ["Teacher", "351", "49", "38", "362"]


def test_markdown_says_what_the_numbers_hold_for(report):
    markdown = build_markdown(report)
    for said in (
        "> **Warning:** the warning that was given",
        "SST-2 (GLUE), validation set, n = 800 (a local folder); 3 of its texts are in the training data",
        "torch 2.13.0, processor a processor, timed on the CPU",
        "96 at most for accuracy, 128 for GFLOPs, 64 for latency and throughput",
        "GFLOPs @128",
        "1 MAC = 2 FLOPs",
        "models/parent ← models/grandparent",
        "0123456789ab",
        "`num_epochs=15`",
        "- Soft Label Student: `python 2_distill_student.py --variant soft_labels`",
    ):
        assert said in markdown
    assert "unset" not in markdown


def test_markdown_without_the_baseline(report):
    report["models"] = [each | {"relative": None} for each in report["models"] if each["name"] == "Teacher"]
    report["models"][0]["quality"]["roc_auc"] = None
    markdown = build_markdown(report)
    assert "No comparison with Distilled Student (Baseline): it is missing." in markdown
    assert dict(zip(row(markdown, "Model"), row(markdown, "Teacher"), strict=True))["ROC-AUC"] == "undefined"


def test_other_training_data_is_warned_of():
    entries = [
        entry("Same", 0.9, 1, 1, 1),
        entry("Other", 0.9, 1, 1, 1, data="review sentences"),
        entry("Silent", 0.9, 1, 1, 1, data=None),
    ]
    assert data_warnings(entries, "SST-2 (GLUE)") == [
        "Other (models/other) was trained on review sentences but is evaluated on SST-2 (GLUE).",
        "Silent (models/silent) does not record what data it was trained on.",
    ]


def test_lineage_follows_the_parents(tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    write_json(
        teacher / "stage.json", {"stage": "teacher", "parent": str(ROOT / "models" / "base"), "config": {"a": 1}}
    )
    write_json(student / "stage.json", {"stage": "student", "parent": str(teacher), "config": {"a": 2}, "seed": 7})
    lineage = describe_lineage(student)
    assert (lineage["stage"], lineage["seed"], lineage["data"]) == ("student", 7, None)
    assert lineage["ancestors"] == [str(teacher), "models/base"]
    assert lineage["config_digest"] != describe_lineage(teacher)["config_digest"]
    unknown = describe_lineage(tmp_path)
    assert unknown.pop("ancestors") == [] and set(unknown.values()) == {None}


def test_three_classes_are_a_whole_matrix_and_scores(report):
    markdown = build_markdown(of_classes(report, 3))
    assert "ROC-AUC" not in markdown and "Macro F1" in markdown and "topic_0, topic_1, topic_2" in markdown
    confusion = markdown[markdown.index("## Confusion matrices") :]
    table = dict(zip(row(confusion, "Model"), row(confusion, "Teacher"), strict=True))
    assert (table["topic_1 → topic_0"], table["topic_0 → topic_1"], table["topic_2 → topic_2"]) == ("9", "1", "91")
    assert "![Confusion matrices](confusion_matrix.png)" in confusion
    # Of class 0: 91 right, 9 + 1 others taken for it, 2 of it taken for others.
    scores = dict(zip(row(confusion, "Class"), row(confusion, "topic_0"), strict=True))
    assert scores["n"] == "93" and scores["Teacher"] == f"{9100 / 101:.1f} / {9100 / 93:.1f} / {18200 / 194:.1f}"


def test_many_classes_are_their_confusions_and_the_weakest_of_them(report):
    markdown = build_markdown(of_classes(report, 77))
    confusion = markdown[markdown.index("## Confusion matrices") :]
    assert row(confusion, "Teacher")[1] == "topic_1 → topic_0 9; topic_0 → topic_1 1"
    lines = [line for line in confusion.splitlines() if line.startswith("| topic_")]
    assert len(lines) == 20 and lines[0].startswith("| topic_0 |") and lines[1].startswith("| topic_1 |")
    assert "Of 77 classes these have the lowest F1" in confusion
    assert max(line.count("|") for line in confusion.splitlines()) < 20


def test_a_class_that_does_not_occur_scores_nothing(report):
    three = of_classes(report, 3)
    for one in three["models"]:
        one["quality"]["confusion_matrix"] = [[5, 0, 0], [2, 3, 0], [0, 0, 0]]
    assert row(build_markdown(three), "topic_2")[1:3] == ["0", "0.0 / 0.0 / 0.0"]


@pytest.mark.parametrize(("count", "printed"), [(3, 9), (10, 100), (200, 0)])
def test_confusion_matrices_are_a_panel_per_checkpoint(report, count, printed):
    report = of_classes(report, count)
    halved = report["models"][1] | {"name": "Distilled Student (Baseline), bfloat16"}
    export = report["models"][1] | {"engine": {"name": "ONNX Runtime", "type": "int8"}, "folder": "models/export"}
    report["models"][2:2] = [halved, export]
    report["task"]["labels"][1] = "$5 or $6"
    figure = plot_confusion_matrices(report)
    figure.canvas.draw()  # a price is no formula
    panels = [axes for axes in figure.axes if axes.get_title()]
    titles = [axes.get_title().replace("\n", " ") for axes in panels]
    assert titles == ["Teacher", "Distilled Student (Baseline)", "Pruned Student"]
    shares = panels[0].images[0].get_array()
    assert np.allclose(shares.sum(1), 1) and shares[1, 0] == pytest.approx(9 / (98 + count if count <= 10 else 99))
    assert len(panels[0].texts) == printed
    labels = [tick.get_text() for tick in panels[0].get_yticklabels()]
    assert set(labels) <= set(report["task"]["labels"]) and (count == 200 or len(labels) == count)


@pytest.mark.parametrize("count", [3, 10, 77])
def test_labels_of_confusion_matrices_are_inside_the_figure_and_apart(report, count):
    report = of_classes(report, count)
    report["task"]["labels"][0] = "a_name_that_is_much_longer_than_those_of_the_others"
    figure = plot_confusion_matrices(report)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        for ticks, side in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1)):
            boxes = [tick.get_window_extent() for tick in ticks if tick.get_text() and tick.get_visible()]
            assert all(0 <= b.x0 and b.x1 <= width and 0 <= b.y0 and b.y1 <= height for b in boxes)
            spans = sorted((box.intervalx, box.intervaly)[side].tolist() for box in boxes)
            assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))


def test_a_report_on_two_classes_takes_the_picture_of_three_away(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "save_figure", lambda figure, path: path.write_bytes(b"figure"))
    paths = write_report(of_classes(report, 3), tmp_path)
    assert {path.name for path in paths} == FILES - {".written.json"} | {"confusion_matrix.png"}
    write_report(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    (tmp_path / "confusion_matrix.png").write_text("mine")
    write_report(report, tmp_path)
    assert (tmp_path / "confusion_matrix.png").read_text() == "mine"
    with pytest.raises(UserError, match="holds a confusion_matrix.png that is not an earlier result"):
        write_report(of_classes(report, 3), tmp_path)


def test_exactly_three_files_are_written(report, tmp_path):
    paths = write_report(report, tmp_path / "results")
    assert {path.name for path in (tmp_path / "results").iterdir()} == FILES
    assert {path.name for path in paths} == FILES - {".written.json"}
    assert json.loads(paths[0].read_text()) == report
    assert paths[1].read_text() == build_markdown(report)
    pixels = imread(paths[2])
    assert pixels.shape[:2] == (1120, 2800)
    assert len(set(map(tuple, pixels[::4, ::4, :3].reshape(-1, 3)))) > 50, "the figure is blank"


def test_a_failed_figure_leaves_the_old_report(report, tmp_path, monkeypatch):
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(report_module, "plot_quality_against_cost", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(report | {"created": "later"}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def drawn_models(axes):
    """The markers of a panel; empty scatters are there for the legends only."""
    return [marks for marks in axes.collections if isinstance(marks, PathCollection) and len(marks.get_offsets())]


def test_marker_area_is_proportional_to_size_whatever_the_shape(report):
    shapes = [shape for _, shape in looks([entry["name"] for entry in report["models"]])]
    assert len(set(shapes)) == 3
    for axes in plot_quality_against_cost(report).axes:
        areas = [
            marks.get_sizes()[0] * unit_area(shape) for marks, shape in zip(drawn_models(axes), shapes, strict=True)
        ]
        assert areas == pytest.approx([LARGEST_MARKER, LARGEST_MARKER / 2, LARGEST_MARKER * 150 / 400])
    assert (unit_area("s"), unit_area("o")) == (pytest.approx(1), pytest.approx(torch.pi / 4, rel=1e-3))


def test_a_model_keeps_its_looks_whatever_else_there_is():
    assert list(looks([model.name for model in EVALUATED])) == list(zip(COLOURS, MARKERS, strict=True))
    assert list(looks([model.short_name for model in EVALUATED[3:]])) == list(zip(COLOURS, MARKERS, strict=True))[3:]
    newest, older, oldest, quantized = looks(
        [
            "Pruned Student (KGSP + MSP)",
            "Pruned Student (KGSP + MSP), pruned_2",
            "Pruned Student (KGSP + MSP), pruned_1",
            "Pruned + Quantized Student (PTQ)",
        ]
    )
    assert newest == (EVALUATED[4].colour, EVALUATED[4].marker) and quantized[1] == EVALUATED[5].marker
    assert older[0] == oldest[0] == newest[0]
    markers = {newest[1], older[1], oldest[1], quantized[1]}
    assert len(markers) == 4 and not {older[1], oldest[1]} & set(MARKERS)
    assert next(looks(["none of them"])) not in list(zip(COLOURS, MARKERS, strict=True))


def many_models(report, count):
    """The report, of so many models: checkpoints of one kind, with long names."""
    names = [EVALUATED[4].name] + [f"{EVALUATED[4].name}, pruning_with_finetuning_{i}" for i in range(count - 1)]
    more = (entry(name, 0.9 - 0.001 * i, 5 + 0.01 * i, 100, 100) for i, name in enumerate(names))
    return report | {"models": [*report["models"], *more]}


def test_no_two_of_thirty_checkpoints_look_alike(report):
    found = list(looks([one["name"] for one in many_models(report, 30)["models"]]))
    assert len(set(found)) == 33
    assert len({marker for _, marker in found[3:]}) == 30, "in grey print, too"


@pytest.mark.parametrize("count", [1, 30])
def test_labels_of_the_picture_are_inside_it_and_apart(report, count):
    report = many_models(report, count)
    figure = plot_quality_against_cost(report)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    texts = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        texts += [axis.label, *(tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 10 + len(report["models"])
    assert all(0 <= b.x0 and b.x1 <= width and 0 <= b.y0 and b.y1 <= height for b in boxes)
    for place, box in enumerate(boxes):
        assert box.count_overlaps(boxes[place + 1 :]) == 0


def test_commands_name_the_data_where_their_script_reads_any():
    assert EVALUATED[0].command_on(DatasetSettings()) == "python 1_finetune_teacher.py"
    own = DatasetSettings(dataset="my data/x.csv", label_column="topic")
    flags = " --dataset 'my data/x.csv' --label_column topic"
    assert EVALUATED[0].command_on(own) == f"python 1_finetune_teacher.py{flags}"
    for model in EVALUATED:
        script = next(ROOT.glob(model.command.split()[1])).read_text()
        assert model.reads_data == ("dataset" in script or "DataSettings" in script), model.name


def test_the_models_are_told_apart():
    for what in ("stage", "name", "short_name", "command", "colour", "marker"):
        assert len({getattr(model, what) for model in EVALUATED}) == len(EVALUATED), what
    assert BASELINE == "Distilled Student (Baseline)"


def test_models_are_drawn_against_gflops_and_against_size(report):
    against_gflops, against_size = plot_quality_against_cost(report).axes
    for axes, costs in ((against_gflops, (20, 10, 5)), (against_size, (400, 200, 150))):
        places = [tuple(marks.get_offsets()[0]) for marks in drawn_models(axes)]
        assert places == [pytest.approx(place) for place in zip(costs, (92.5, 90, 89.5), strict=True)]


def test_figures_show_the_tasks_metric_without_an_error_that_it_has_not(report):
    own = {name: METRICS[name] for name in ("accuracy", "f1", "matthews_correlation")}
    cola = describe_task(replace(SST2, metrics=own, primary="matthews_correlation"))
    for one, value in zip(report["models"], (0.6, 0.5, 0.4), strict=True):
        one["quality"]["matthews_correlation"] = value
    figure = plot_quality_against_cost(report | {"task": cola})
    axes = figure.axes[0]
    assert axes.get_ylabel() == "Matthews correlation"
    assert [tuple(marks.get_offsets()[0])[1] for marks in drawn_models(axes)] == [0.6, 0.5, 0.4]
    assert not [marks for marks in axes.collections if isinstance(marks, LineCollection)], "error bars"
    assert any("Matthews correlation 0.6000" in text.get_text() for text in figure.legends[0].get_texts())
    assert [
        marks for marks in plot_quality_against_cost(report).axes[0].collections if isinstance(marks, LineCollection)
    ]


def test_pareto_front_leaves_out_what_is_no_better_than_a_cheaper_model():
    assert pareto_front([5, 2, 2, 4, 9], [90, 80, 85, 85, 89]) == [(2, 85), (5, 90)]


# The script, on tiny checkpoints.


@pytest.fixture(scope="module")
def script():
    return load_script("7_evaluate_and_generate_report")


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "sst2"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{letter} a b{' c' * index}\t{index % 2}" for index, letter in enumerate("abcdefghijklmnopqrst")]
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return DatasetSettings(data_dir=str(folder))


@pytest.fixture
def models_dir(tmp_path, tokenizer):
    """A teacher of other data, the student, and a pruned student made from it."""
    student = tiny_distilbert()
    folder = tmp_path / "models"
    for stage, model, parent, data in (
        ("teacher", tiny_bert(), None, "review sentences"),
        ("student", student, None, "SST-2 (GLUE)"),
        ("pruned", shrink(student, KEPT), folder / "student_model", "SST-2 (GLUE)"),
    ):
        inputs = {"parent": identify(parent)} if parent else {}
        about = describe_stage(stage, {"seed": 1, "num_epochs": 3}, inputs, {}, {"name": data})
        save_checkpoint(folder / f"{stage}_model", model, tokenizer, about)
    return folder


def config_of(script, models_dir, dataset, output_dir):
    return script.EvaluationConfig(
        dataset=dataset,
        models_dir=models_dir,
        output_dir=output_dir,
        max_length=32,
        flops_sequence_length=16,
        latency_sequence_length=8,
        throughput_batch_size=2,
        latency_repeats=3,
        throughput_repeats=2,
    )


def test_script_measures_every_model_there_is(script, models_dir, dataset, tmp_path):
    config = config_of(script, models_dir, dataset, tmp_path / "results")
    script.main(config)
    assert {path.name for path in (tmp_path / "results").iterdir()} == FILES | {"report.html"}
    report = json.loads((tmp_path / "results" / "final_report.json").read_text())
    assert report["config"] == config.as_dict()
    assert report["data"] == {"name": "SST-2 (GLUE)", "source": "a local folder", "n": 20, "duplicates": 20}
    assert report["task"]["labels"] == ["negative", "positive"] and report["task"]["primary"] == "accuracy"

    teacher, student, halved, pruned = report["models"]
    assert [model["lineage"]["stage"] for model in report["models"]] == ["teacher", "student", "student", "pruned"]
    assert student["engine"] == {"name": "PyTorch", "type": "float32"}
    assert halved["name"] == f"{BASELINE}, bfloat16" and halved["engine"] == {"name": "PyTorch", "type": "bfloat16"}
    assert halved["macs"] == student["macs"]
    assert halved["size"]["weights_bytes"] == 2 * student["parameters"]["total"]
    assert student["macs"] == count_macs(tiny_distilbert(), 16).as_dict()
    assert student["thop"]["macs"] == student["macs"]["total"] - student["macs"]["attention"]
    assert pruned["macs"]["total"] < student["macs"]["total"]
    assert pruned["size"]["weights_bytes"] == (models_dir / "pruned_model" / "model.safetensors").stat().st_size
    assert pruned["relative"]["macs"] == pytest.approx(pruned["macs"]["total"] / student["macs"]["total"])
    assert pruned["lineage"]["parent"] == read_stage(models_dir / "pruned_model")["parent"]
    assert all(sum(map(sum, model["quality"]["confusion_matrix"])) == 20 for model in report["models"])

    assert student["disagreements"] == {"n": 0, "examples": []}
    page = (tmp_path / "results" / "report.html").read_text()
    assert "Where it and Distilled Student (Baseline) disagree" in page or not pruned["disagreements"]["n"]

    (warning,) = report["warnings"]
    assert warning.startswith("Teacher ") and "review sentences" in warning
    missing, *others = report["missing"]
    assert [model["name"] for model in others] == [
        "Quantized Distilled Student",
        "Pruned + Quantized Student (PTQ)",
        "Pruned + QKD-4bit (QAT)",
    ]
    markdown = (tmp_path / "results" / "final_report.md").read_text()
    assert missing["command"] == f"python 2_distill_student.py --variant soft_labels --data_dir {tmp_path}/sst2"
    assert f"- {missing['name']}: `{missing['command']}`" in markdown
    assert all(f"| {model['name']} |" in markdown for model in report["models"])


def test_without_a_student_models_are_compared_with_the_teacher(script, models_dir, dataset, tmp_path):
    student = next(path for path in models_dir.iterdir() if read_stage(path)["stage"] == "student")
    student.rename(tmp_path / "elsewhere")
    script.main(config_of(script, models_dir, dataset, tmp_path / "results"))
    report = json.loads((tmp_path / "results" / "final_report.json").read_text())
    teacher, halved, pruned = report["models"]
    assert report["baseline"] == teacher["name"] == "Teacher" and halved["name"] == "Teacher, bfloat16"
    assert teacher["relative"]["macs"] == 1
    assert pruned["relative"]["macs"] == pytest.approx(pruned["macs"]["total"] / teacher["macs"]["total"])
    assert "## Against Teacher" in (tmp_path / "results" / "final_report.md").read_text()


def test_script_without_any_model_names_the_first_command(script, dataset, tmp_path):
    with pytest.raises(UserError, match="no model.*python 1_finetune_teacher.py") as error:
        script.main(config_of(script, tmp_path / "empty", dataset, tmp_path / "results"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_script_refuses_models_of_other_labels(script, models_dir, dataset, tokenizer, tmp_path):
    model = tiny_bert(id2label={0: "contradiction", 1: "entailment"})
    save_checkpoint(models_dir / "mine", model, tokenizer, describe_stage("teacher", {}, {}, {}, {}))
    pattern = "models_dir.*models/mine.*contradiction, entailment.*negative, positive.*--dataset"
    with pytest.raises(UserError, match=pattern) as error:
        script.main(config_of(script, models_dir, dataset, tmp_path / "results"))
    assert "\n" not in str(error.value) and not (tmp_path / "results").exists()


def test_script_on_three_classes_of_a_users_own(script, tokenizer, tmp_path):
    topics = dict(zip(WORDS, ["sport", "politics", "other"] * 8, strict=False))
    rows = [f"{one} {two},{topic}" for one, topic in topics.items() for two in "abc"]
    (tmp_path / "topics.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    names = {0: "other", 1: "politics", 2: "sport"}
    about = describe_stage("student", {}, {}, {}, {"name": "topics.csv"})
    model = tiny_distilbert(num_labels=3, id2label=names, label2id={name: place for place, name in names.items()})
    save_checkpoint(tmp_path / "models" / "student", model, tokenizer, about)
    dataset = DatasetSettings(dataset=str(tmp_path / "topics.csv"), validation_fraction=0.3)
    script.main(config_of(script, tmp_path / "models", dataset, tmp_path / "results"))
    assert {path.name for path in (tmp_path / "results").iterdir()} == FILES | {"confusion_matrix.png", "report.html"}
    report = json.loads((tmp_path / "results" / "final_report.json").read_text())
    assert report["task"]["labels"] == list(names.values()) and report["task"]["primary"] == "accuracy"
    quality = report["models"][0]["quality"]
    assert quality["roc_auc"] is None and 0 <= quality["f1_macro"] <= 1
    assert [sum(counts) for counts in quality["confusion_matrix"]] == [7, 7, 7]
    teacher = report["missing"][0]["command"]
    assert teacher == f"python 1_finetune_teacher.py --dataset {tmp_path}/topics.csv --validation_fraction 0.3"
    assert "| sport |" in (tmp_path / "results" / "final_report.md").read_text()


def test_fast_preset_only_times_less(script):
    fast, full = script.EvaluationConfig.fast().as_dict(), script.EvaluationConfig().as_dict()
    assert fast["latency_repeats"] < full["latency_repeats"]
    assert fast["throughput_repeats"] < full["throughput_repeats"]
    assert fast["flops_sequence_length"] == full["flops_sequence_length"], "GFLOPs must stay comparable"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parent", ["models/a"]),
        ("parent", {}),
        ("parent", 3),
        ("config", []),
        ("data", "SST-2"),
        ("seed", "1"),
        ("stage", 5),
    ],
)
def test_fields_of_a_wrong_type_in_a_stage_are_named(tmp_path, field, value):
    write_json(tmp_path / "parent" / "stage.json", {field: value})
    with pytest.raises(UserError, match=rf"parent/stage.json: {field} is .*; allowed is .*; make the model again"):
        describe_lineage(tmp_path / "parent")
    write_json(tmp_path / "child" / "stage.json", {"parent": str(tmp_path / "parent")})
    with pytest.raises(UserError, match=rf"parent/stage.json: {field} is "):
        describe_lineage(tmp_path / "child")


def test_a_stage_that_says_nothing_is_not_recorded(tmp_path):
    write_json(tmp_path / "stage.json", {})
    lineage = describe_lineage(tmp_path)
    assert lineage.pop("ancestors") == [] and set(lineage.values()) == {None}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("group", "name"), [("quality", "accuracy"), ("macs", "gflops"), ("size", "weights_bytes")])
def test_numbers_that_are_not_finite_are_not_drawn(report, group, name, bad):
    report["models"][2][group][name] = bad
    with pytest.raises(ValueError, match="^Pruned Student: a number to draw is not finite, among .*(nan|inf)"):
        plot_quality_against_cost(report)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_removal_perplexities_beyond_all_numbers_are_left_out(tmp_path, bad):
    for values in ([9.0, bad], [bad, bad]):
        path = tmp_path / "removal.png"
        save_figure(plot_removal({"layer": values, "attention": values, "mlp": values, "dense": values[0]}), path)
        assert imread(path).std() > 0

"""The comparison script through its command line, on tiny checkpoints."""

import csv
from dataclasses import replace

import pytest
import torch
from conftest import tiny_bert, tiny_distilbert
from matplotlib.image import imread
from scripts import run_script

from compression.checkpoint import load_classifier, save_checkpoint
from compression.classifier.metrics import describe_task
from compression.classifier.plots import plot_model_comparison
from compression.classifier.tasks import METRICS, SST2
from compression.quantization import Format, pack
from compression.stage_record import describe_stage


def run(*flags, expect=0):
    return run_script("evaluate_plot.py", *flags, expect=expect)


@pytest.fixture
def models_dir(tmp_path, tokenizer):
    student = tiny_distilbert()
    quantized = pack(student, Format(), torch.float32)
    for stage, model in (("teacher", tiny_bert()), ("student", student), ("student_quantized", quantized)):
        save_checkpoint(tmp_path / "models" / stage, model, tokenizer, describe_stage(stage, {}, {}, {}, {}))
    return tmp_path / "models"


def test_table_and_figures_hold_every_model_there_is(models_dir, tmp_path):
    rows = [f"{letter} a b{' c' * index}\t{index % 2}" for index, letter in enumerate("abcdefghijklmnopqrst")]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    output = tmp_path / "results"
    repeats = "--inference_runs 3 --load_runs 2 --sequence_length 8".split()
    result = run("--models_dir", models_dir, "--data_dir", tmp_path, "--output_dir", output, *repeats)
    assert {path.name for path in output.iterdir()} == {
        ".written.json",
        *(f"model_comparison.{end}" for end in ("csv", "png", "pdf")),
    }
    assert (output / "model_comparison.csv").read_text().splitlines()[0] == (
        "model,folder,data,sentences,accuracy,accuracy_standard_error,inference_median_ms,inference_p10_ms,"
        "inference_p90_ms,load_median_s,load_p10_s,load_p90_s,weights_bytes,folder_bytes,parameters"
    )
    with (output / "model_comparison.csv").open(newline="") as file:
        teacher, student, quantized = csv.DictReader(file)
    assert [row["model"] for row in (teacher, student, quantized)] == ["Teacher", "Student", "Student, 4 bits"]
    assert int(quantized["weights_bytes"]) < int(student["weights_bytes"])
    assert int(quantized["parameters"]) == int(student["parameters"])
    for row in (teacher, student, quantized):
        assert row["sentences"] == "20" and float(row["load_median_s"]) > 0 < float(row["inference_median_ms"])
    for row, stage in ((teacher, "teacher"), (student, "student"), (quantized, "student_quantized")):
        model, tokenizer = load_classifier(models_dir / stage)
        inputs = tokenizer([line.split("\t")[0] for line in rows], padding=True, return_tensors="pt")
        if stage != "teacher":
            del inputs["token_type_ids"]
        with torch.no_grad():
            right = sum(int(label) == index % 2 for index, label in enumerate(model(**inputs).logits.argmax(-1)))
        assert float(row["accuracy"]) == pytest.approx(right / 20)
    pixels = imread(output / "model_comparison.png")
    assert len(set(map(tuple, pixels[::4, ::4, :3].reshape(-1, 3)))) > 50, "the figure is blank"
    assert (output / "model_comparison.pdf").read_bytes().startswith(b"%PDF")
    assert "Not there, so not compared: Student, soft labels; Pruned" in result.stdout


def test_panels_show_the_numbers_of_the_table():
    row = {"model": "A", "data": "SST-2 (GLUE)", "sentences": 800, "accuracy": 0.9, "accuracy_standard_error": 0.01}
    row |= {"inference_median_ms": 5.0, "inference_p10_ms": 4.0, "inference_p90_ms": 7.0, "weights_bytes": 70_000_000}
    row |= {"load_median_s": 0.5, "load_p10_s": 0.4, "load_p90_s": 0.9}
    figure = plot_model_comparison([row, row | {"model": "B", "accuracy": 0.8}], describe_task(SST2))
    widths = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert widths == [[], [5, 5], [0.5, 0.5], [70, 70]]
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts == [["90.00", "80.00"], ["5", "5"], ["0.5", "0.5"], ["70.0", "70.0"]]
    metrics = {name: METRICS[name] for name in ("accuracy", "matthews_correlation")}
    cola = describe_task(replace(SST2, metrics=metrics, primary="matthews_correlation"))
    axes = plot_model_comparison([row | {"matthews_correlation": 0.5}], cola).axes[0]
    assert axes.get_xlabel() == "Matthews correlation" and [text.get_text() for text in axes.texts] == ["0.5000"]
    assert not axes.collections, "an error bar"


def test_without_any_model_the_first_command_is_named():
    result = run("--models_dir", "nowhere", expect=2)
    assert "no model to compare; make the first with: python 1_finetune_teacher.py" in result.stderr


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_drawn(bad):
    with pytest.raises(ValueError, match="^B: a number to draw is not finite, among 0.9, "):
        plot_model_comparison(
            [{"model": "A", "accuracy": 0.9}, {"model": "B", "accuracy": 0.9, "load_p90_s": bad}], describe_task(SST2)
        )


def test_models_of_other_labels_are_named_before_any_work(tmp_path, tokenizer):
    model = tiny_bert(num_labels=3, id2label={0: "fresh", 1: "rotten", 2: "plot"})
    save_checkpoint(tmp_path / "models" / "teacher", model, tokenizer, describe_stage("teacher", {}, {}, {}, {}))
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{letter} a b\t{index % 2}" for index, letter in enumerate("abcdefghijklmnopqrst")]
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    result = run("--models_dir", tmp_path / "models", "--data_dir", tmp_path, "--output_dir", tmp_path / "x", expect=2)
    said = result.stderr.strip().splitlines()[-1]
    for part in ("--models_dir", "models/teacher", "fresh, rotten, plot", "negative, positive", "--dataset"):
        assert part in said
    assert not (tmp_path / "x").exists()

"""The classifier track on a tiny slice of real text and tiny random models; its chain of stages as users run it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, run_distributed, run_killed, run_script
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from compression.checkpoint import load_classifier
from compression.classifier.data import DatasetSettings, load_data
from compression.inputs import find_newest
from compression.stage_record import read_stage
from compression.structures import layers_of

SST2 = Path(os.environ.get("COMPRESSION_DATA", ROOT.parent / "shared" / "data")) / "sst2"
FLAGS = ["--fast", "--batch_size", "16"]
FINETUNE, DISTIL = "1_finetune_teacher.py", "2_distill_student.py"
PRUNE, REPORT = "8_pruning_with_finetuning.py", "7_evaluate_and_generate_report.py"
STEP = "compression.training.seed_step"  # what begins each step


def run_command_line(script, *flags, expect=0):
    """Run a script as users do, in a process that starts from nothing."""
    command = [sys.executable, script, *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == expect, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def sentences():
    """A few hundred labelled sentences: SST-2 where it is at hand, else the embedded reviews."""
    data = load_data(DatasetSettings(data_dir=str(SST2) if SST2.exists() else None))
    return data.train.take(list(range(240))), data.validation.take(list(range(60)))


@pytest.fixture(scope="module")
def data_dir(sentences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, split in zip(("train.tsv", "dev.tsv"), sentences, strict=True):
        rows = [f"{text}\t{label}" for text, label in zip(split.sentences, split.labels, strict=True)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def starts(sentences, tmp_path_factory):
    """Tiny random encoders with a tokenizer of the text's own words."""
    folder = tmp_path_factory.mktemp("starts")
    words = sorted(
        {word for split in sentences for text in split.sentences for word in re.findall(r"\w+", text.lower())}
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=len(vocabulary), hidden_size=48, num_attention_heads=6, intermediate_size=64, num_hidden_layers=2
    )
    # Without dropout, whose draws differ between processes, one process and several must agree.
    without = dict(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    sizes = dict(vocab_size=len(vocabulary), dim=48, n_heads=6, hidden_dim=64, n_layers=2)
    distilbert = DistilBertConfig(**sizes, **without)
    for name, model in (("bert", BertModel(bert)), ("distilbert", DistilBertModel(distilbert))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def models(starts, data_dir, tmp_path_factory):
    """Stages 1, 2, 8 and 9 have run."""
    models_dir = tmp_path_factory.mktemp("models")
    common = [*FLAGS, "--data_dir", data_dir, "--models_dir", models_dir]
    run_command_line(FINETUNE, *common, "--teacher", starts / "bert")
    run_command_line(DISTIL, *common, "--student", starts / "distilbert")
    run_command_line(PRUNE, *common, "--train_fraction", 1)
    run_command_line("9_quantize_pruned_model.py", "--models_dir", models_dir, "--compute_dtype", "float32")
    return models_dir


@pytest.fixture(scope="module")
def common(models, data_dir):
    return [*FLAGS, "--data_dir", data_dir, "--models_dir", models]


def test_pruned_checkpoint_is_smaller_and_says_where_it_came_from(models):
    pruned = find_newest(models, "pruned")
    assert re.fullmatch(r"pruning_with_finetuning_\d{8}_\d{6}", pruned.name)
    stage, history = read_stage(pruned), json.loads((pruned / "training_history.json").read_text())
    assert stage["parent"] == str(models / "student_model")
    assert stage["inputs"]["teacher"]["path"] == str(models / "teacher_model")
    assert stage["config"]["head_final_sparsity"] == 0.30 and stage["data"]["name"] == "SST-2 (GLUE)"
    assert stage["metrics"]["logit_difference"] < 1e-5
    assert [record["phase"] for record in history] == ["Pruning", "Pruning", "Finetuning", "Finetuning"]
    names = "epoch phase loss soft_label_loss cross_entropy accuracy selection_accuracy learning_rate temperature alpha"
    assert set(history[0]) == {*names.split(), "head_sparsity", "neuron_sparsity", "total_sparsity"}
    layers = layers_of(load_classifier(pruned)[0])
    assert sum(layer.heads for layer in layers) == 8  # 30 % of 12 heads is 3.6, so 4 went
    assert sum(layer.neurons for layer in layers) == 96  # 20 % of 128 neurons, in blocks of 8, is 32
    dense = load_classifier(models / "student_model")[0]
    assert sum(p.numel() for p in layers_of(dense)[0].attention[0].module.parameters()) == 48 * 49


def test_report_lists_what_is_there_and_what_is_missing(models, common, tmp_path):
    repeats = "--latency_repeats 2 --throughput_repeats 2 --throughput_batch_size 2 --latency_sequence_length 8"
    result = run_command_line(REPORT, "--fast", *common[3:], "--output_dir", tmp_path, *repeats.split())
    report = json.loads((tmp_path / "final_report.json").read_text())
    names = [entry["name"] for entry in report["models"]]
    student = "Distilled Student (Baseline)"
    assert names[:4] == ["Teacher", student, f"{student}, bfloat16", "Pruned Student (KGSP + MSP)"] and len(names) == 5
    assert report["data"]["name"] == "SST-2 (GLUE)" and report["data"]["n"] == 60
    assert report["models"][3]["relative"]["encoder_macs"] < 0.8
    assert (
        report["models"][3]["quality"]["accuracy"] == read_stage(find_newest(models, "pruned"))["metrics"]["accuracy"]
    )
    assert "python 2_distill_student.py --variant soft_labels" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        ".written.json",
        "report.html",
        *(f"final_report.{end}" for end in ("json", "md", "png")),
    }
    assert (tmp_path / "final_report.png").stat().st_size > 20_000


def test_finished_stage_is_skipped_only_while_nothing_changed(common, models, starts):
    student = ["--student", starts / "distilbert", "--skip_existing"]
    before = read_stage(models / "student_model")["created"]
    assert "skipped" in run_script(DISTIL, *common, *student).stdout
    assert read_stage(models / "student_model")["created"] == before
    assert "skipped" in run_script(PRUNE, *common, "--train_fraction", 1, "--skip_existing").stdout
    assert "skipped" not in run_script(DISTIL, *common, *student, "--alpha", 0.4, "--variant", "soft_labels").stdout


def test_sigkill_and_resume_give_the_undisturbed_result(common, models, tmp_path):
    inputs = ["--student_path", models / "student_model", "--teacher_path", models / "teacher_model"]
    flags = [*common[:5], *inputs, "--train_fraction", 1, "--num_epochs", 3, "--save_steps", 2]
    run_script(PRUNE, *flags, "--models_dir", tmp_path / "whole")
    states, killed = tmp_path / "killed", [PRUNE, *flags, "--models_dir", tmp_path / "killed", "--resume"]
    run_killed(*killed, at=STEP, call=20)
    assert find_newest(states, "pruned") is None
    assert [path.name for path in states.glob(".pruned_*.resume/step_*")] == ["step_00000018_epoch_0002"]
    assert "Resumed at epoch 2, step 18\n" in run_script(*killed).stdout
    whole, killed = (find_newest(tmp_path / name, "pruned") for name in ("whole", "killed"))
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert (whole / "training_history.json").read_text() == (killed / "training_history.json").read_text()
    assert read_stage(whole)["metrics"] == read_stage(killed)["metrics"]
    left = {path.name for path in states.iterdir() if not path.name.startswith(".teacher_logits_")}
    assert left == {killed.name}, "states to resume from were left"


@pytest.mark.parametrize("scores", [[], ["--importance_mode", "obs", "--repair", "events"]], ids=["default", "obs"])
def test_two_processes_agree_with_one(common, models, tmp_path, scores):
    inputs = ["--student_path", models / "student_model", "--teacher_path", models / "teacher_model"]
    flags = [PRUNE, *common[:5], *inputs, "--train_fraction", 1, "--num_epochs", 3, *scores]
    run_script(*flags, "--models_dir", tmp_path / "one")
    result = run_distributed(*flags, "--models_dir", tmp_path / "two")
    assert "on 2 process(es)" in result.stdout and result.stdout.count("epoch 3") == 1
    one, two = (find_newest(tmp_path / name, "pruned") for name in ("one", "two"))
    for first, second in zip(*(json.loads((p / "training_history.json").read_text()) for p in (one, two)), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=2e-4)
        assert second["head_sparsity"] == first["head_sparsity"]
    layers = [[(layer.heads, layer.neurons) for layer in layers_of(load_classifier(p)[0])] for p in (one, two)]
    assert layers[0] == layers[1]


@pytest.fixture(scope="module")
def weather(tmp_path_factory):
    """Data of one's own: pairs in three classes named by words; and the same with another class."""
    folder = tmp_path_factory.mktemp("own")
    places, kinds = ["the sea", "the hills", "a town", "the north"], ["sun", "rain", "hail"]
    rows = [f'"{place}, {number}",{kind} again,{kind}' for number in range(8) for place in places for kind in kinds]
    (folder / "weather.csv").write_text("\n".join(["question,passage,label", *rows]) + "\n")
    (folder / "other.csv").write_text((folder / "weather.csv").read_text().replace(",hail\n", ",zero\n"))
    return folder


def test_pairs_of_ones_own_in_three_classes_go_through_all_stages(weather, starts, tmp_path):
    models, names = tmp_path / "models", {0: "hail", 1: "rain", 2: "sun"}
    common = [*FLAGS, "--dataset", weather / "weather.csv", "--models_dir", models]
    common += ["--num_epochs", 1, "--train_fraction", 1]
    run_script(FINETUNE, *common, "--teacher", starts / "bert")
    run_script(DISTIL, *common, "--student", starts / "distilbert")
    pruning = [*common, "--num_epochs", 2, "--pruning_end_epoch", 1]
    said = run_script(PRUNE, *pruning).stdout
    assert "Accuracy 0." in said and "on weather.csv (9 sentences)" in said
    run_script("9_quantize_pruned_model.py", "--models_dir", models, "--compute_dtype", "float32")
    run_script("10_qat_kd_4bit.py", *common, "--compute_dtype", "float32")
    made = ["teacher", "student", "pruned", "pruned_quantized", "pruned_qkd4bit"]
    for stage in made:
        folder = find_newest(models, stage)
        written = json.loads((folder / "config.json").read_text())
        assert written["id2label"] == {str(place): name for place, name in names.items()}
        assert written["label2id"] == {name: place for place, name in names.items()}
        model = load_classifier(folder)[0]
        assert model.config.id2label == names and list(model.parameters())[-1].shape == (3,)
    data = read_stage(find_newest(models, "pruned_qkd4bit"))["data"]
    sizes = {"train": 78, "selection": 9, "validation": 9}
    more = {"name": "weather.csv", "source": "a local file", "labels": [*names.values()], "duplicates": 0}
    assert data == more | sizes

    # What is made is known by what is in the data, and by what its labels are called.
    (tmp_path / "elsewhere.csv").write_bytes((weather / "weather.csv").read_bytes())
    moved = [*common, "--dataset", tmp_path / "elsewhere.csv", "--student", starts / "distilbert", "--skip_existing"]
    assert "skipped" in run_script(DISTIL, *moved).stdout
    other = ["--dataset", weather / "other.csv"]
    message = "{} {}: has 3 labels (hail, rain, sun); allowed are those of other.csv, 3 labels (rain, sun, zero);"
    for script, flags, flag in ((DISTIL, common, "--teacher_path"), (PRUNE, pruning, "--teacher_path")):
        result = run_script(script, *flags, *other, expect=2)
        assert message.format(flag, models / "teacher_model") in result.stderr

    # A fine-tuned model of other labels is a start like another: its head is made anew.
    again = [*common, *other, "--models_dir", tmp_path / "again"]
    run_script(FINETUNE, *again, "--teacher", models / "teacher_model")
    assert load_classifier(tmp_path / "again" / "teacher_model")[0].config.id2label[2] == "zero"
    mixed = ["--teacher_path", tmp_path / "again" / "teacher_model", "--models_dir", tmp_path / "again"]
    result = run_script(PRUNE, *pruning, *other, *mixed, "--student_path", models / "student_model", expect=2)
    assert message.format("", models / "student_model").strip() in result.stderr
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["teacher_model"]


def test_stages_measure_a_tasks_own_metric(starts, tmp_path):
    lines = [f"gj04\t{row % 2}\t*\t{'one' if row % 2 else 'the'} thing is {row}" for row in range(60)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    flags = [*FLAGS, "--dataset", "cola", "--data_dir", tmp_path, "--models_dir", tmp_path / "models"]
    said = run_script(
        FINETUNE, *flags, "--num_epochs", 8, "--learning_rate", 0.003, "--teacher", starts / "bert"
    ).stdout
    folder = tmp_path / "models" / "teacher_model"
    metrics = read_stage(folder)["metrics"]
    history = json.loads((folder / "training_history.json").read_text())
    assert (
        metrics["matthews_correlation"] == pytest.approx(history[-1]["matthews_correlation"])
        and "accuracy" not in metrics
    )
    assert f"Matthews correlation {metrics['matthews_correlation']:.4f} on CoLA (GLUE) (60 sentences)" in said
    assert "60 of 60 validation texts are in the training data, too" in said
    assert read_stage(folder)["data"]["duplicates"] == 60
    pruning = ["--student_path", folder, "--num_epochs", 2, "--pruning_end_epoch", 1, "--train_fraction", 1]
    assert "Matthews correlation before pruning" in run_script(PRUNE, *flags, *pruning).stdout
    assert "matthews_correlation_before" in read_stage(find_newest(tmp_path / "models", "pruned"))["metrics"]


def test_a_budget_of_time_is_kept_and_its_table_lies_beside_the_model(models, data_dir, tmp_path):
    flags = ["--fast", "--data_dir", data_dir, "--models_dir", tmp_path, "--teacher_path", models / "teacher_model"]
    flags += ["--preset", "twentieth", "--target", "latency", "0.99", "--beta_hidden", "1", "--min_part_share", "0.5"]
    said = run_script(PRUNE, *flags, "--train_fraction", 1, "--num_epochs", 3, "--pruning_end_epoch", 2).stdout
    pruned = find_newest(tmp_path, "pruned")
    table = json.loads((pruned / "latency_table.json").read_text())
    assert table["unit"] == "ms" and sorted(table["parts"]["heads"], key=int) == ["1", "2", "3", "4", "5", "6"]
    stage = read_stage(pruned)
    assert stage["parent"] == stage["inputs"]["teacher"]["path"] == str(models / "teacher_model")
    history = json.loads((pruned / "training_history.json").read_text())
    assert history[-1]["latency_share"] == stage["metrics"]["latency_share"] <= 0.99
    assert all(record["hidden_state_loss"] > 0 for record in history)
    assert said.count("Masked and smaller model agree") == 2, "after each epoch of Pruning"
    model, _ = load_classifier(pruned, torch.device("cpu"))
    assert any(parts.heads for parts in layers_of(model))
    left = {path.name.split("_")[0] for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {".teacher", ".latency", "pruning"}, "no states to resume from"


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (PRUNE, "--head_final_sparsity 1.5", "--head_final_sparsity 1.5: allowed is 0 to 0.99"),
        (PRUNE, "--head_final_sparsity 0.9", "--head_final_sparsity 0.9: with --min_heads 1"),
        (PRUNE, "--num_epochs 1", "--num_epochs 1: allowed is at least --pruning_end_epoch 8; set both"),
        (PRUNE, "--target mac 1.5", "--target mac 1.5: allowed is a share of the teacher's, above 0 and at most 1"),
        (PRUNE, "--start teacher --student_path s", "--student_path s: --start teacher prunes the teacher"),
        (PRUNE, "--preset bold", "--preset bold: unknown; allowed: aggressive, conservative, fast"),
        (PRUNE, "--student_path nowhere", "nowhere: no checkpoint there; make it with: python 2_distill_student.py"),
        (DISTIL, "--teacher_path nowhere", "nowhere: no checkpoint there; make it with: python 1_finetune_teacher.py"),
        (FINETUNE, "--data_dir nowhere", "nowhere"),
        (REPORT, "--models_dir nowhere", "--models_dir nowhere: no model to evaluate"),
    ],
)
def test_mistakes_end_in_one_line(script, flags, message, models, starts, data_dir):
    known = ["--data_dir", data_dir, "--models_dir", models]
    if script.startswith("1"):
        known += ["--teacher", starts / "bert"]
    result = run_script(script, *known, *flags.split(), expect=2)
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")
    assert message in result.stderr


def test_unsupported_architecture_writes_nothing(models, common, tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=600, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(models / "student_model").save_pretrained(tmp_path / "gpt2")
    before = sorted(models.iterdir())
    result = run_command_line(PRUNE, *common, "--student_path", tmp_path / "gpt2", expect=2)
    assert len(result.stderr.strip().splitlines()) == 1
    assert "model type 'gpt2' is not supported here; supported: bert, camembert, deberta-v2" in result.stderr
    assert sorted(models.iterdir()) == before

"""export_model.py as a user runs it: which model, where to, what lies there after, and every mistake in one line."""

import json
import shutil

import pytest
import torch
from conftest import KEPT, bytes_tokenizer, load_script, save_decoder, tiny_bert, tiny_decoder, tiny_distilbert
from scripts import run_script
from transformers import AutoConfig

from compression.checkpoint import load_classifier, save_checkpoint
from compression.export.onnx import OnnxClassifier
from compression.inputs import find_exports
from compression.integrity import files_in, verify
from compression.outputs import Output
from compression.runtime import UserError
from compression.stage_record import describe_stage, identify, read_stage
from compression.surgery import shrink


def export(*flags, expect=0):
    return run_script("export_model.py", *flags, expect=expect)


def snapshot(folder):
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A teacher, a pruned student and the same in 4 bits; a language model."""
    folder = tmp_path_factory.mktemp("models")
    pruned = shrink(tiny_distilbert(), KEPT)
    for stage, model in (("teacher", tiny_bert()), ("pruned", pruned)):
        save_checkpoint(folder / stage, model, tokenizer, describe_stage(stage, {}, {}, {}, {"name": "letters"}))
    flags = ("--models_dir", folder, "--output_dir", folder / "pruned_quantized", "--compute_dtype", "float32")
    run_script("9_quantize_pruned_model.py", *flags)
    save_decoder(folder / "decoder", tiny_decoder())
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def exported(models):
    export("--models_dir", models, "--precision", "fp32")
    export("--models_dir", models, "--precision", "nf4")
    return models


@pytest.mark.parametrize("name", ["pruned", "pruned_quantized"])
def test_the_newest_model_of_the_precision_is_exported_into_its_own_folder(exported, name):
    folder = exported / name / "onnx"
    record = read_stage(folder)
    assert record["stage"] == f"{name}_onnx" and record["inputs"]["parent"] == identify(exported / name)
    assert record["metrics"]["logit_difference"] < 1e-4
    assert record["config"]["precision"] == {"pruned": "fp32", "pruned_quantized": "nf4"}[name]
    assert record["data"] == {"name": "letters"}
    assert {"model.onnx", "config.json", "tokenizer.json", "stage.json"} <= set(files_in(folder))
    assert not any(path.endswith((".safetensors", ".data")) for path in files_in(folder))
    assert find_exports(exported / name, exported, "onnx") == [folder]


def test_a_language_model_goes_to_llama_cpp(tmp_path):
    model = tiny_decoder(vocab_size=340, hidden_size=64, intermediate_size=64)
    folder = save_decoder(tmp_path / "model", model, tokenizer=bytes_tokenizer())
    said = export("--model", folder).stdout
    record = read_stage(folder / "gguf")
    assert record["stage"] == "dense_gguf" and record["config"]["precision"] == "f16"
    metrics = record["metrics"]
    assert metrics["engine"] == "llama.cpp" and metrics["bytes"] == (folder / "gguf" / "model.gguf").stat().st_size
    assert metrics["logit_difference"] < 0.05 and "logit_difference" in said
    assert {"model.gguf", "config.json", "tokenizer.json"} <= set(files_in(folder / "gguf"))


@pytest.mark.parametrize("make", [tiny_bert, tiny_distilbert])
def test_label_names_go_through_pruning_quantization_and_export(make, tokenizer, tmp_path):
    names = ["fresh", "rotten", "plot of a film"]
    model = make(num_labels=3, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    save_checkpoint(tmp_path / "pruned", shrink(model, KEPT), tokenizer, describe_stage("pruned", {}, {}, {}, {}))
    flags = ("--models_dir", tmp_path, "--output_dir", tmp_path / "packed", "--compute_dtype", "float32")
    run_script("9_quantize_pruned_model.py", *flags)
    export("--models_dir", tmp_path, "--precision", "nf4")
    for folder in (tmp_path / "pruned", tmp_path / "packed", tmp_path / "packed" / "onnx"):
        config = AutoConfig.from_pretrained(folder)
        assert list(config.id2label.items()) == list(enumerate(names)) and config.label2id == model.config.label2id
        assert "- Labels, from 0: `fresh`, `rotten`, `plot of a film`" in (folder / "README.md").read_text()


def test_an_export_alone_gives_the_checkpoints_logits(exported, tokenizer, tmp_path):
    alone = shutil.copytree(exported / "pruned" / "onnx", tmp_path / "alone")
    model, _ = load_classifier(exported / "pruned")
    batch = tokenizer(["a b c d e", "f"], padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = model(**inputs).logits
    assert torch.allclose(OnnxClassifier(alone, threads=1)(**inputs).logits, wanted, atol=1e-4)


def test_an_export_is_skipped_kept_or_replaced(exported):
    before = snapshot(exported / "pruned" / "onnx")
    said = export("--models_dir", exported, "--precision", "fp32", "--skip_existing").stdout
    assert "skipped" in said
    refused = export("--models_dir", exported, "--precision", "int8", expect=2).stderr
    assert refused.count("\n") == 1 and "--overwrite" in refused
    assert snapshot(exported / "pruned" / "onnx") == before


def test_the_checkpoint_stays_sound_and_is_replaced_with_its_exports(exported, tokenizer, tmp_path):
    folder = shutil.copytree(exported / "pruned", tmp_path / "pruned")
    verify(folder)
    save_checkpoint(folder, tiny_distilbert(), tokenizer, describe_stage("pruned", {}, {}, {}, {}))
    assert not (folder / "onnx").exists()


def test_a_users_file_in_an_export_keeps_all_of_it(exported, tmp_path):
    folder = shutil.copytree(exported / "pruned", tmp_path / "pruned")
    (folder / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"onnx: holds files that were put there by hand \(notes.txt\)"):
        Output(folder, "--output_dir", "pruned").check()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "decoder", "--format", "onnx"], "--format onnx: {0}/decoder is a llama model; allowed is gguf"),
        (["--model", "pruned", "--format", "gguf"], "is a pruned_distilbert model; allowed is onnx"),
        (["--model", "decoder", "--precision", "int8"], "--precision int8"),
        (["--model", "pruned", "--precision", "nf4", "--output_dir", "new"], "9_quantize_pruned_model.py"),
        (["--model", "pruned_quantized", "--precision", "int8", "--output_dir", "new"], "is quantized already"),
        (["--model", "nowhere"], "--model {0}/nowhere: no checkpoint there"),
        (["--model", "pruned", "--output_dir", "pruned"], "name a folder of its own"),
        (["--model", "pruned", "--output_dir", "."], "name a folder of its own"),
        (["--model", "adapter"], "is a LoRA adapter; merge it first: python merge_and_save_lora.py"),
        (["--model", "decoder"], "its tokenizer (WordLevel) cannot be written to GGUF; allowed is byte-pair encoding"),
        (["--push_to_hub", "nobody"], "--push_to_hub 'nobody': allowed is USER/NAME"),
    ],
)
def test_mistakes_end_in_one_line_and_nothing_is_written(models, flags, message):
    before = files_in(models)
    places = {"adapter", "decoder", "pruned", "pruned_quantized", "nowhere", "new", "."}
    flags = [models / flag if flag in places else flag for flag in flags]
    said = export(*flags, "--models_dir", models, expect=2).stderr
    assert said.startswith("error: ") and said.count("\n") == 1 and message.format(models) in said
    assert files_in(models) == before


def test_no_model_names_the_command(tmp_path):
    said = export("--models_dir", tmp_path, expect=2).stderr
    assert "python 8_pruning_with_finetuning.py" in said and said.count("\n") == 1


def test_the_report_has_a_row_for_each_engine_and_type(exported, tmp_path):
    script = load_script("7_evaluate_and_generate_report")
    rows = "\n".join(f"{letter} a b\t{place % 2}" for place, letter in enumerate("abcdefghij"))
    (tmp_path / "data").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "data" / name).write_text(f"sentence\tlabel\n{rows}\n")
    lengths = dict.fromkeys(("max_length", "flops_sequence_length", "latency_sequence_length"), 16)
    repeats = dict(latency_repeats=2, throughput_repeats=2, throughput_batch_size=2)
    places = dict(data_dir=str(tmp_path / "data"), models_dir=exported, output_dir=tmp_path / "results")
    script.main(script.EvaluationConfig.make(**places, **lengths, **repeats))
    report = json.loads((tmp_path / "results" / "final_report.json").read_text())
    engines = {entry["name"]: (entry["engine"]["name"], entry["engine"]["type"]) for entry in report["models"]}
    assert engines == {
        "Teacher": ("PyTorch", "float32"),
        "Teacher, bfloat16": ("PyTorch", "bfloat16"),
        "Pruned Student (KGSP + MSP)": ("PyTorch", "float32"),
        "Pruned Student (KGSP + MSP), ONNX fp32": ("ONNX Runtime", "float32"),
        "Pruned + Quantized Student (PTQ)": ("PyTorch", "float32"),
        "Pruned + Quantized Student (PTQ), ONNX nf4": ("ONNX Runtime", "float32"),
    }
    _, _, pruned, onnx, *_ = report["models"]
    assert onnx["macs"] == pruned["macs"] and onnx["quality"] == pruned["quality"]
    assert onnx["size"]["weights_bytes"] == (exported / "pruned" / "onnx" / "model.onnx").stat().st_size
    assert "ONNX Runtime" in (tmp_path / "results" / "final_report.md").read_text()

"""Stage 9 through its command line, on tiny pruned and dense classifiers."""

import json

import pytest
import torch
from conftest import KEPT, tiny_bert, tiny_distilbert
from scripts import run_script

from compression.checkpoint import describe_stage, find_newest, load_classifier, read_stage, save_checkpoint
from compression.formats import FourBit, dequantized_weight
from compression.quantization import encoder_linears
from compression.surgery import shrink

DATA = {"name": "SST-2 (GLUE)"}


def run(*flags, expect=0):
    return run_script("9_quantize_pruned_model.py", *flags, expect=expect)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A dense student, and the pruned model made from it."""
    folder = tmp_path_factory.mktemp("models")
    for stage, model in (("student", tiny_distilbert()), ("pruned", shrink(tiny_distilbert(), KEPT))):
        save_checkpoint(folder / stage, model, tokenizer, describe_stage(stage, {}, {}, {}, DATA))
    save_checkpoint(folder / "no_stage", tiny_bert(), tokenizer, {})
    (folder / "no_stage" / "stage.json").unlink()
    return folder


def test_newest_pruned_model_is_quantized(models):
    result = run("--models_dir", models, "--double_quant", "--compute_dtype", "float32")
    folder = models / "pruned_quantized_final"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "stage.json",
        "pruned_encoder.py",
    }
    stage = read_stage(folder)
    assert (stage["stage"], stage["parent"]) == ("pruned_quantized", str(models / "pruned"))
    assert stage["data"] == DATA and stage["config"]["double_quant"]
    assert find_newest(models, "pruned_quantized") == folder

    before, after = stage["metrics"]["bytes_before"], stage["metrics"]["bytes_after"]
    assert after["head"] == before["head"] and after["encoder"] < 0.7 * before["encoder"]
    line = next(line for line in result.stdout.splitlines() if line.startswith("embeddings"))
    shown = [float(word) for word in line.split()[1:3]]
    assert shown == pytest.approx([before["embeddings"] / 1e6, after["embeddings"] / 1e6], abs=0.006)

    storage = FourBit(double_quant=True)
    quantized, latent = load_classifier(folder)[0], encoder_linears(load_classifier(models / "pruned")[0])
    for name, linear in latent.items():
        values = dequantized_weight(quantized.get_submodule(name))
        assert torch.equal(values, storage.values(linear.weight.detach())), name


def test_dense_models_are_quantized_too(models):
    output = models / "student_quantized_model"
    run("--pruned_model_path", models / "student", "--output_dir", output, "--models_dir", models)
    assert read_stage(output)["stage"] == "student_quantized"
    output = models / "bert_quantized"
    flags = ["--embedding_bits", 8, "--load_in_8bit", "--fast"]
    run("--pruned_model_path", models / "no_stage", "--output_dir", output, *flags)
    assert read_stage(output)["stage"] == "quantized"
    settings = json.loads((output / "config.json").read_text())
    assert settings["quantization_config"]["load_in_8bit"] and settings["embedding_bits"] == 8
    load_classifier(output)


def test_existing_output_is_skipped_while_nothing_changed(models):
    flags = ["--pruned_model_path", models / "student", "--output_dir", models / "skip", "--skip_existing"]
    assert "skipped" not in run(*flags).stdout
    assert "skipped" in run(*flags).stdout
    assert "--overwrite" in run(*flags, "--embedding_bits", 8, expect=2).stderr
    assert "skipped" not in run(*flags, "--embedding_bits", 8, "--overwrite").stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--models_dir nowhere", "--models_dir nowhere: no pruned model there; make one with: python 8_"),
        ("--pruned_model_path nowhere", "--pruned_model_path nowhere: no checkpoint there; make it with: python 8_"),
        ("--load_in_8bit --double_quant", "--double_quant True: is for 4-bit weights; not allowed with --load_in_8bit"),
    ],
)
def test_mistakes_end_in_one_line(flags, message):
    result = run(*flags.split(), expect=2)
    assert len(result.stderr.strip().splitlines()) == 1 and message in result.stderr


def test_quantizing_twice_is_refused(models):
    flags = ["--pruned_model_path", models / "student", "--output_dir", models / "once"]
    run(*flags)
    result = run("--pruned_model_path", models / "once", "--output_dir", models / "twice", expect=2)
    assert "is quantized already; name the model it was made from" in result.stderr
    assert not (models / "twice").exists()

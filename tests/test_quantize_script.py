"""Stage 9 through its command line, on tiny classifiers and language models, pruned and dense."""

import json

import pytest
import torch
from conftest import DECODER_FILES, KEPT, letters, pruning_flags, save_decoder, tiny_bert, tiny_decoder, tiny_distilbert
from scripts import run_script

from compression.checkpoint import load_classifier, load_language_model, save_checkpoint
from compression.formats import FourBit, dequantized_weight
from compression.inputs import find_newest
from compression.quantization import encoder_linears
from compression.stage_record import describe_stage, read_stage
from compression.structures import CHANNELS, GROUPS
from compression.surgery import shrink, shrink_decoder

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
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "stage.json",
        "pruned_encoder.py",
    }
    stage = read_stage(folder)
    assert (stage["stage"], stage["parent"]) == ("pruned_quantized", str(models / "pruned"))
    assert stage["data"] == DATA and stage["config"]["double_quant"] and stage["config"]["embedding_bits"] == 4
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


# Language models.


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """A dense one, and in `pruned/models` a pruned one in bfloat16; beside them a text and the pruned one in 4 bits."""
    folder = tmp_path_factory.mktemp("language_models")
    kept = {GROUPS: [torch.arange(4) < count for count in (4, 0, 1, 3)], CHANNELS: [torch.arange(48) < 9] * 4}
    pruned = shrink_decoder(tiny_decoder(), kept).to(torch.bfloat16)
    save_decoder(folder / "dense", tiny_decoder())
    stage = describe_stage("global_pruning", {}, {}, {}, {"calibration": ["a text"]})
    save_decoder(folder / "pruned" / "models", pruned, stage)
    (folder / "text.txt").write_text(letters(3000))
    run("--pruned_model_path", folder / "pruned" / "models", "--output_dir", folder / "nf4")
    return folder


def test_a_pruned_language_model_is_quantized(language_models):
    stage, folder = read_stage(language_models / "nf4"), language_models / "nf4"
    assert {path.name for path in folder.iterdir()} == set(DECODER_FILES)
    assert (stage["stage"], stage["parent"]) == ("global_pruning_quantized", str(language_models / "pruned" / "models"))
    assert stage["data"] == {"calibration": ["a text"]} and stage["config"]["embedding_bits"] is None
    before, after = stage["metrics"]["bytes_before"], stage["metrics"]["bytes_after"]
    assert (after["embeddings"], after["head"]) == (before["embeddings"], before["head"])
    assert after["encoder"] < 0.6 * before["encoder"]
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    quantized, _ = load_language_model(folder)
    plain = encoder_linears(load_language_model(language_models / "pruned" / "models")[0])
    for name, linear in plain.items():
        values = dequantized_weight(quantized.get_submodule(name))
        assert torch.equal(values, FourBit().values(linear.weight.detach())), name


def test_a_dense_language_model_is_quantized_to_8_bits(language_models, tmp_path):
    output = tmp_path / "int8"
    run("--pruned_model_path", language_models / "dense", "--output_dir", output, "--load_in_8bit")
    model, _ = load_language_model(output)
    assert model.config.model_type == "pruned_llama" and model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def evaluate(folder, *flags, expect=0):
    text = ["--eval_ppl_datasets", folder / "text.txt", "--eval_length", 32, "--eval_samples", 4]
    more = ["--dtype", "float32", "--efficiency_repeats", 1, "--output_file", folder / "found" / "found.json"]
    return run_script("evaluate_lora_model.py", *text, *more, *flags, expect=expect)


def test_it_is_evaluated_beside_the_model_that_it_was_made_from(language_models):
    models = ["--pruned_model", language_models / "pruned" / "models", "--quantized_model", language_models / "nf4"]
    evaluate(language_models, *models, "--lora_dir", "None", "--run_evaluation", "ppl,efficiency")
    result = json.loads((language_models / "found" / "found.json").read_text())
    found = result["models"]
    assert list(found) == ["base", "quantized"] == list(result["inputs"])
    assert found["base"]["parameters"] == found["quantized"]["parameters"]
    assert found["base"]["layers"] == found["quantized"]["layers"]
    assert found["base"]["efficiency"]["macs"] == found["quantized"]["efficiency"]["macs"]
    perplexities = {role: figures["perplexity"]["text.txt"] for role, figures in found.items()}
    assert 0 < abs(perplexities["quantized"] / perplexities["base"] - 1) < 0.5

    alone = ["--pruned_model", language_models / "nf4", "--lora_dir", "None", "--run_evaluation", "ppl"]
    evaluate(language_models, *alone)
    again = json.loads((language_models / "found" / "found.json").read_text())["models"]
    assert again["base"]["perplexity"]["text.txt"] == perplexities["quantized"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pruned_model_path {}/dense", "--output_dir: has no default for a language model ({}/dense); name a folder"),
        ("--pruned_model_path {}/dense --output_dir {}/x --embedding_bits 4", "--embedding_bits 4: is for classifiers"),
        ("--pruned_model_path {}/nf4 --output_dir {}/x", "{}/nf4: is quantized already; name the model it was made"),
        ("--pruned_model_path {}/dense --output_dir {}/dense", "--output_dir {}/dense: is an input of this run"),
        ("--pruned_model_path {}/dense --output_dir {}/pruned", "holds files that are not an earlier result"),
        ("--pruned_model_path {}/dense --output_dir {}/nf4", "holds a result of another kind ('global_pruning_quant"),
    ],
)
def test_mistakes_with_language_models_end_in_one_line(language_models, flags, message):
    before = sorted(language_models.rglob("*"))
    result = run(*flags.replace("{}", str(language_models)).split(), expect=2)
    assert len(result.stderr.strip().splitlines()) == 1
    assert message.replace("{}", str(language_models)) in result.stderr
    assert sorted(language_models.rglob("*")) == before


def test_4_bit_models_are_neither_pruned_nor_trained_nor_adapted(language_models, tmp_path):
    nf4 = language_models / "nf4"
    refused = [
        run_script("run_global_pruning.py", *pruning_flags(nf4, tmp_path), expect=2),
        run_script("post_training.py", "--pruned_model", nf4, "--results_dir", tmp_path, expect=2),
        evaluate(language_models, "--pruned_model", nf4, "--lora_dir", nf4, expect=2),
        evaluate(language_models, "--pruned_model", nf4, "--lora_dir", "None", "--load_in_4bit", expect=2),
    ]
    for flag, result in zip(["--base_model", *["--pruned_model"] * 3], refused, strict=True):
        assert f"{flag} {nf4}: is quantized already; name the model it was made from" in result.stderr
    assert not list(tmp_path.iterdir())

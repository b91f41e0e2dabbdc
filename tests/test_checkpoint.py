"""What is missing, damaged, mis-shaped or not finite does not pass, and is named in one line."""

import json
import shutil

import pytest
import torch
from conftest import save_decoder, tiny_bert, tiny_decoder, tiny_distilbert
from safetensors.torch import load_file, save_file

from compression.checkpoint import load_classifier, load_language_model, save_checkpoint
from compression.classifier.data import Split, encode
from compression.classifier.tasks import SST2, check_labels
from compression.classifier.teacher import teacher_logits
from compression.inputs import find_newest
from compression.runtime import UserError
from compression.saved_parts import SavedParts
from compression.stage_record import identify, is_made_from, read_stage

WEIGHT = {
    "language model": "model.layers.1.mlp.up_proj.weight",
    "classifier": "bert.encoder.layer.1.output.dense.weight",
}
LOAD = {"language model": load_language_model, "classifier": load_classifier}


@pytest.fixture(params=sorted(WEIGHT))
def made(request, tmp_path, tokenizer):
    """What kind of model it is, and its folder, which says nothing of checksums: as one made elsewhere."""
    folder = tmp_path / "model"
    if request.param == "classifier":
        save_checkpoint(folder, tiny_bert(), tokenizer, {"stage": "teacher"})
    else:
        save_decoder(folder, tiny_decoder())
    (folder / "stage.json").unlink()
    return request.param, folder


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_model_made_elsewhere_loads(made):
    kind, folder = made
    LOAD[kind](folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, weights: weights.pop(name), "lacks {}"),
        (
            lambda name, weights: weights.update({name.replace(".1.", ".9."): weights[name].clone()}),
            "has weights that its config.json has no place for, {}",
        ),
        (lambda name, weights: weights.update({name: torch.zeros(3, 5)}), r"another shape, {} \[3, 5\] for"),
        (
            lambda name, weights: weights[name].view(-1)[7:9].fill_(float("nan")),
            "2 of 1536 values of {} are not finite",
        ),
        (
            lambda name, weights: weights[name].view(-1)[3:4].fill_(float("inf")),
            "1 of 1536 values of {} are not finite",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(made, change, message):
    kind, folder = made
    change_weights(folder, lambda weights: change(WEIGHT[kind], weights))
    name = WEIGHT[kind].replace(".1.", ".9.") if "no place" in message else WEIGHT[kind]
    with pytest.raises(UserError, match=f"{folder}: .*{message.format(name)}") as error:
        LOAD[kind](folder)
    assert "\n" not in str(error.value)


def test_a_bare_encoder_may_lack_its_head_and_nothing_else(tmp_path, tokenizer):
    folder = tmp_path / "bert"
    tiny_bert().bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    load_classifier(folder, num_labels=2)
    with pytest.raises(UserError, match="lacks classifier.bias, classifier.weight; fine-tune it first"):
        load_classifier(folder)
    change_weights(folder, lambda weights: weights.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(UserError, match="lacks bert.encoder.layer.1.output.dense.weight"):
        load_classifier(folder, num_labels=2)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00", b"null"])
def test_files_that_hold_something_else(made, file, content):
    kind, folder = made
    (folder / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        LOAD[kind](folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[], "x", 3, {"0": 5}, {"0": {"intermediate_size": "wide"}}, {"99": {}}])
def test_sizes_of_layers_of_a_wrong_type(tmp_path, value):
    folder = save_decoder(tmp_path / "model", tiny_decoder())
    (folder / "stage.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "pruned_llama", "per_layer_config": value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_language_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_that_is_larger_than_the_vocabulary(tmp_path):
    folder = save_decoder(tmp_path / "model", tiny_decoder(vocab_size=20))
    with pytest.raises(UserError, match="its tokenizer gives token ids up to 29, its model has embeddings for 20"):
        load_language_model(folder)


@pytest.mark.parametrize(
    ("fields", "agree"),
    [
        ({}, True),
        ({"id2label": {0: "negative", 1: "positive"}}, True),
        ({"id2label": {0: "positive", 1: "negative"}}, False),
        ({"num_labels": 3}, False),
    ],
)
@pytest.mark.parametrize("model", [tiny_bert, tiny_distilbert])
def test_labels_are_the_tasks_or_without_names(tmp_path, model, fields, agree):
    model(**fields).save_pretrained(tmp_path / "model")
    if agree:
        check_labels(tmp_path / "model", "--teacher_path", SST2)
        return
    found = ", ".join(model(**fields).config.id2label.values())
    message = rf"^--teacher_path .*model: has \d labels \({found}\); .* SST-2, 2 labels \(negative, positive\); name a"
    with pytest.raises(UserError, match=message):
        check_labels(tmp_path / "model", "--teacher_path", SST2)


def test_a_flipped_byte_stops_whoever_reads_the_checkpoint(tmp_path, tokenizer):
    folder = save_checkpoint(
        tmp_path / "model", tiny_bert(), tokenizer, {"stage": "teacher", "config": {}, "inputs": {}}
    )
    assert is_made_from(folder, {}, {})
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    for read in (load_classifier, identify, lambda folder: is_made_from(folder, {}, {})):
        with pytest.raises(UserError, match=f"{path}: is damaged"):
            read(folder)


def test_a_damaged_record_is_no_missing_one(tmp_path, tokenizer):
    save_checkpoint(tmp_path / "model", tiny_bert(), tokenizer, {"stage": "teacher", "created": "2026"})
    assert find_newest(tmp_path, "teacher") == tmp_path / "model"
    record = tmp_path / "model" / "stage.json"
    record.write_text(record.read_text().replace("2026", "2027"))
    for read in (lambda: find_newest(tmp_path, "teacher"), lambda: read_stage(tmp_path / "model")):
        with pytest.raises(UserError, match="stage.json: is damaged"):
            read()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, tokenizer):
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.weight[1, 3] = float("nan")
    with pytest.raises(UserError, match="1 of 64 values of classifier.weight are not finite; nothing was saved"):
        save_checkpoint(tmp_path / "model", model, tokenizer, {"stage": "teacher"})
    assert list(tmp_path.iterdir()) == []


# Finished parts of long runs, and logits that are kept.


def test_a_damaged_part_says_which_folder_to_delete(tmp_path):
    states = tmp_path / ".one.resume"
    parts = SavedParts(states, resume=True)
    parts.tensors("scores", lambda: {"a": torch.arange(9.0)})
    assert parts.json("dense", lambda: {"x": 1.5}) == {"x": 1.5}
    again = SavedParts(states, resume=True)
    assert torch.equal(again.tensors("scores", lambda: {})["a"], torch.arange(9.0))
    for file in ("scores/tensors.safetensors", "scores/state.json", "dense/state.json"):
        whole = (states / file).read_bytes()
        for bad in (whole[:-4], whole[:40] + b"#" + whole[41:], b"", b"[]"):
            (states / file).write_bytes(bad)
            with pytest.raises(UserError, match=f"{states}/.*: rm -r {states}$") as error:
                again.tensors("scores", lambda: {}), again.json("dense", dict)
            assert "\n" not in str(error.value)
        (states / file).write_bytes(whole)
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_damaged_logits_of_a_teacher_are_computed_again_and_a_read_only_teacher_serves(tmp_path, tokenizer):
    teacher = save_checkpoint(tmp_path / "disk" / "teacher", tiny_bert(), tokenizer, {"stage": "teacher"})
    encoded = encode(tokenizer, Split(["a b", "c d e"], [0, 1]), 16)
    before = sorted(path.name for path in teacher.parent.iterdir())
    logits = teacher_logits(
        tiny_bert(), teacher, encoded, 0, tmp_path / "models", SST2
    ).clone()  # what is read is mapped
    (stored,) = (tmp_path / "models").iterdir()
    path = stored / "logits.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert torch.equal(teacher_logits(tiny_bert(), teacher, encoded, 0, tmp_path / "models", SST2), logits)
    assert path.read_bytes() != content
    assert sorted(found.name for found in teacher.parent.iterdir()) == before, "nothing is written beside the teacher"
    shutil.rmtree(stored)

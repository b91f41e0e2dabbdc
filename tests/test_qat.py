"""Quantization-aware training with distillation: losses, resume, and stage 10 through its command line."""

import json
import re

import pytest
import torch
from conftest import KEPT, VOCABULARY, load_script, tiny_bert, tiny_distilbert
from safetensors.torch import load_file
from scripts import run_distributed, run_killed, run_script
from transformers import BertConfig, BertForSequenceClassification

from compression.checkpoint import load_classifier, save_checkpoint
from compression.classifier.data import Encoded
from compression.classifier.hidden_states import HiddenStates, LiveTeacher
from compression.classifier.qat import LossWeights, QuantizationAwareDistillation
from compression.config import pick
from compression.distillation import hidden_state_loss, layer_map
from compression.formats import FourBit, dequantized_weight
from compression.inputs import find_newest
from compression.quantization import Storage, check_exact, encoder_linears, pack
from compression.runtime import UserError
from compression.stage_record import describe_stage, read_stage
from compression.surgery import shrink
from compression.training import fit

ROWS = 26
QATKDConfig = load_script("10_qat_kd_4bit").QATKDConfig


def wide_teacher():
    """A teacher with more and wider layers than the student has."""
    torch.manual_seed(5)
    config = BertConfig(
        hidden_size=48,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=6,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_labels=2,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [(12, 6, [2, 4, 6, 8, 10, 12]), (6, 3, [2, 4, 6]), (6, 6, [1, 2, 3, 4, 5, 6]), (3, 2, [2, 3]), (1, 3, [1, 1, 1])],
)
def test_layers_are_mapped_evenly_and_end_with_the_last(teacher, student, expected):
    assert layer_map(teacher, student) == expected


def test_hidden_state_loss_leaves_padding_out():
    student, teacher = (torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = ((student[0] - teacher[0]).square().mean() + (student[1, :2] - teacher[1, :2]).square().mean()) / 2
    loss = hidden_state_loss([student], [teacher], mask)
    torch.testing.assert_close(loss, expected)
    teacher[1, 2:] = 100.0
    torch.testing.assert_close(hidden_state_loss([student], [teacher], mask), expected)
    halves = hidden_state_loss([teacher / 2], [teacher], mask, projection=lambda states: 2 * states)
    assert halves == 0


@pytest.fixture
def train():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (ROWS,), generator=generator).tolist()
    ids = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Encoded({"input_ids": ids}, torch.randint(0, 2, (ROWS,), generator=generator))


def recipe_of(teacher, train, **changes):
    config = QATKDConfig.make(**(dict(batch_size=8, num_epochs=2, learning_rate=1e-3, save_steps=2) | changes))
    torch.manual_seed(0)
    model = shrink(tiny_distilbert(), KEPT)
    live = LiveTeacher(teacher, train, 0) if config.beta_hidden else None
    logits = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0))
    inputs = model, config.training, pick(LossWeights, config), config.storage.format(), logits
    return QuantizationAwareDistillation(*inputs, HiddenStates(model, live, config.beta_hidden))


def run_fit(recipe, train, work_dir):
    return fit(recipe.model, recipe, train, lambda _: {}, work_dir, 0)


@pytest.mark.parametrize("teacher", [tiny_bert, wide_teacher])
def test_all_losses_count_and_the_projection_is_trained(train, tmp_path, teacher):
    recipe = recipe_of(teacher(), train)
    wide = teacher is wide_teacher
    assert hasattr(recipe.model, "hidden_projection") == wide
    before = recipe.model.hidden_projection.weight.detach().clone() if wide else None
    teachers = recipe.hidden_states.teacher.model.state_dict()
    frozen = {name: value.clone() for name, value in teachers.items()}
    history = run_fit(recipe, train, tmp_path)
    terms = {"loss", "cross_entropy", "soft_label_loss", "hidden_state_loss"}
    assert all(terms <= set(record) for record in history)
    last, weights = history[-1], recipe.weights
    assert last["loss"] == pytest.approx(
        weights.beta_ce * last["cross_entropy"]
        + weights.beta_logits * last["soft_label_loss"]
        + recipe.hidden_states.weight * last["hidden_state_loss"],
        rel=1e-5,
    )
    assert last["hidden_state_loss"] < history[0]["hidden_state_loss"]
    if wide:
        assert not torch.equal(recipe.model.hidden_projection.weight, before)
    assert all(torch.equal(value, frozen[name]) for name, value in teachers.items())


def test_on_pairs_the_teacher_gets_the_token_types_and_the_student_what_it_takes(train):
    types = [[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in train.inputs["input_ids"]]
    pairs = Encoded(train.inputs | {"token_type_ids": types}, train.labels)
    losses = []
    for rows in (train, pairs):
        recipe = recipe_of(tiny_bert(), rows)
        losses.append(recipe.loss(recipe.model, rows.collate([0, 1], 0) | {"rows": torch.tensor([0, 1])}, 0))
    without, with_types = losses
    assert with_types["cross_entropy"] == without["cross_entropy"], "a DistilBERT has no token types"
    assert with_types["hidden_state_loss"] != without["hidden_state_loss"]


def test_trained_values_are_the_packed_ones(train, tmp_path):
    recipe = recipe_of(wide_teacher(), train, double_quant=True)
    run_fit(recipe, train, tmp_path)
    values = recipe.finish()
    packed = pack(recipe.model, Storage(double_quant=True).format(), torch.float32)
    check_exact(packed, values)
    assert not any("projection" in name for name in packed.state_dict())


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


@pytest.mark.parametrize("kill_at", [2, 4])
def test_killed_and_resumed_equals_undisturbed(train, tmp_path, kill_at):
    def run(work_dir, kill_at=None, **changes):
        recipe = recipe_of(wide_teacher(), train, **changes)
        after_step = recipe.after_step

        def killing(step):
            after_step(step)
            if step == kill_at:
                raise Killed

        recipe.after_step = killing
        return recipe, run_fit(recipe, train, work_dir)

    expected, history = run(tmp_path / "undisturbed")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=kill_at)
    resumed, resumed_history = run(tmp_path / "killed", resume=True)
    assert resumed_history == history
    for (name, value), other in zip(
        resumed.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    for name, values in resumed.finish().items():
        assert torch.equal(values, expected.layers[name].values)


def test_settings_that_make_no_sense_are_refused():
    config, fast = QATKDConfig().as_dict(), QATKDConfig.fast().as_dict()
    changed = dict(num_epochs=1, batch_size=32, train_fraction=0.3, max_length=64, beta_hidden=0.0, amp="auto")
    assert fast == config | changed
    with pytest.raises(UserError, match="--temperature 0: allowed is 0.1 to 100"):
        QATKDConfig(temperature=0)
    with pytest.raises(UserError, match="--beta_ce 0 .* one of them must be above 0"):
        QATKDConfig(beta_ce=0, beta_logits=0, beta_hidden=0)


# The script.


SCRIPT = "10_qat_kd_4bit.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A teacher and a pruned student."""
    folder = tmp_path_factory.mktemp("models")
    data = {"name": "SST-2 (GLUE)"}
    pruned = shrink(tiny_distilbert(), KEPT)
    # Without dropout, whose draws differ between processes, one process and several must agree.
    pruned.config.update(dict(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0))
    for name, stage, model in (("teacher_model", "teacher", wide_teacher()), ("pruned_model", "pruned", pruned)):
        save_checkpoint(folder / name, model, tokenizer, describe_stage(stage, {}, {}, {}, data))
    return folder


@pytest.fixture(scope="module")
def common(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    letters = "abcdefghijklmnopqrstuvwxyz"
    for name, count in (("train.tsv", 100), ("dev.tsv", 20)):
        rows = [f"{letters[i % 26]} {letters[i % 7]} b{' c' * (i % 5)}\t{i % 2}" for i in range(count)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return ["--data_dir", folder, "--models_dir", models, "--compute_dtype", "float32"]


def test_script_writes_the_model_that_was_trained(models, common):
    result = run_script(SCRIPT, *common, "--learning_rate", 1e-3)
    folder = find_newest(models, "pruned_qkd4bit")
    assert re.fullmatch(r"pruned_qkd4bit_\d{8}_\d{6}", folder.name)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "stage.json",
        "training_history.json",
        "pruned_encoder.py",
    }
    stage, history = read_stage(folder), json.loads((folder / "training_history.json").read_text())
    assert stage["parent"] == str(models / "pruned_model") and len(history) == 2
    assert stage["inputs"]["teacher"]["path"] == str(models / "teacher_model")
    assert "hidden_state_loss" in history[0] and stage["config"]["beta_hidden"] == 0.2
    assert stage["metrics"]["logit_difference"] < 1e-4
    assert stage["metrics"]["bytes_after"]["total"] < stage["metrics"]["bytes_before"]["total"]
    assert stage["metrics"]["accuracy"] == history[-1]["accuracy"]
    assert "all weights as trained" in result.stdout
    assert not any("projection" in name for name in load_file(folder / "model.safetensors"))

    before, after = load_classifier(models / "pruned_model")[0], load_classifier(folder)[0]
    for name, linear in encoder_linears(before).items():
        values = dequantized_weight(after.get_submodule(name))
        assert not torch.equal(values, FourBit().values(linear.weight.detach())), "nothing was trained"
    assert "skipped" in run_script(SCRIPT, *common, "--learning_rate", 1e-3, "--skip_existing").stdout


def test_fast_run_needs_no_teacher_in_the_loop(models, common):
    run_script(SCRIPT, *common, "--fast", "--pruned_model_path", models / "pruned_model", "--embedding_bits", 8)
    folder = find_newest(models, "pruned_qkd4bit")
    (record,) = json.loads((folder / "training_history.json").read_text())
    assert "hidden_state_loss" not in record
    assert read_stage(folder)["config"]["embedding_bits"] == 8


def test_sigkill_and_resume_give_the_undisturbed_result(models, common, tmp_path):
    inputs = ["--pruned_model_path", models / "pruned_model", "--teacher_path", models / "teacher_model"]
    flags = [*common[:2], *common[4:], *inputs, "--num_epochs", 3, "--save_steps", 2, "--learning_rate", 1e-3]
    run_script(SCRIPT, *flags, "--models_dir", tmp_path / "whole")
    killed = [*flags, "--models_dir", tmp_path / "killed", "--resume"]
    run_killed(SCRIPT, *killed, at="compression.training.seed_step", call=12)
    assert "Resumed at epoch 2, step 10\n" in run_script(SCRIPT, *killed).stdout
    one, other = (find_newest(tmp_path / name, "pruned_qkd4bit") for name in ("whole", "killed"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (one / "training_history.json").read_text() == (other / "training_history.json").read_text()


def test_two_processes_agree_with_one(models, common, tmp_path):
    inputs = ["--pruned_model_path", models / "pruned_model", "--teacher_path", models / "teacher_model"]
    flags = [*common[:2], *common[4:], *inputs, "--learning_rate", 1e-3]
    run_script(SCRIPT, *flags, "--models_dir", tmp_path / "one")
    result = run_distributed(SCRIPT, *flags, "--models_dir", tmp_path / "two")
    assert "on 2 process(es)" in result.stdout
    folders = [find_newest(tmp_path / name, "pruned_qkd4bit") for name in ("one", "two")]
    histories = [json.loads((folder / "training_history.json").read_text()) for folder in folders]
    for one, two in zip(*histories, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
        assert two["hidden_state_loss"] == pytest.approx(one["hidden_state_loss"], abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--teacher_path nowhere", "--teacher_path nowhere: no checkpoint there; make it with: python 1_finetune"),
        ("--pruned_model_path nowhere", "--pruned_model_path nowhere: no checkpoint there; make it with: python 8_"),
        ("--beta_ce -1", "--beta_ce -1.0: allowed is at least 0"),
    ],
)
def test_mistakes_end_in_one_line(common, flags, message):
    result = run_script(SCRIPT, *common, *flags.split(), expect=2)
    assert len(result.stderr.strip().splitlines()) == 1 and message in result.stderr

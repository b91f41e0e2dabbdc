"""Stage 1: R-Drop by hand, each layer's rate, early stopping, the best epoch, a killed run that goes on."""

import pytest
import torch
import torch.nn.functional as F
from conftest import KEPT, MODELS, WORDS, load_script, tiny_bert
from test_training import Killed

from compression.batching import model_inputs
from compression.checkpoint import load_tensors, save_checkpoint
from compression.classifier.finetuning import FineTuning, Smoothing
from compression.classifier.stage import TokenizedTask
from compression.files import read_json
from compression.schedule import EarlyStopping
from compression.stage_record import read_stage
from compression.surgery import shrink
from compression.training import Training, fit

stage_1 = load_script("1_finetune_teacher")
ROWS = 5


def recipe_of(model, rows=ROWS, r_drop=0.0, layer_decay=1.0, **training):
    smoothing = Smoothing(layer_decay=layer_decay, r_drop=r_drop)
    return FineTuning(model, Training(**training), smoothing, rows, EarlyStopping(2, 0.0))


# The loss.


@pytest.fixture(params=[2, 3])
def labelled(batch, request):
    """A batch with labels of two or three classes."""
    return batch | {"labels": torch.arange(ROWS) % request.param}, request.param


def loss_and_logits(model, batch, r_drop):
    """The terms of the loss, and the logits of each forward pass."""
    passes = []
    with model.register_forward_hook(lambda _model, _args, output: passes.append(output.logits)):
        torch.manual_seed(0)
        terms = recipe_of(model, r_drop=r_drop).loss(model, batch, 0)
    return terms, passes


@pytest.mark.parametrize("family", sorted(MODELS))
@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_r_drop_is_what_two_passes_lose_and_how_they_differ(labelled, family, weight):
    batch, classes = labelled
    terms, (logits,) = loss_and_logits(MODELS[family](num_labels=classes).train(), batch, weight)
    (one, other), labels = logits.softmax(-1).view(2, ROWS, classes), batch["labels"]
    assert (one - other).abs().max() > 1e-3, "both passes had the same dropout"
    right = torch.stack([each[torch.arange(ROWS), labels] for each in (one, other)])
    cross_entropy = -right.log().mean()
    symmetric = ((one - other) * (one.log() - other.log())).sum(-1).mean() / 2
    expected = cross_entropy + weight / 2 * symmetric
    for name, value in (("loss", expected), ("cross_entropy", cross_entropy), ("r_drop", symmetric)):
        torch.testing.assert_close(terms[name], value)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (terms["loss"], expected)]
    torch.testing.assert_close(*gradients, msg="both passes learn from one another")


def test_without_dropout_r_drop_adds_nothing(labelled):
    batch, classes = labelled
    model = tiny_bert(num_labels=classes)
    terms, _ = loss_and_logits(model, batch, 1.0)
    torch.testing.assert_close(terms["loss"], loss_and_logits(model, batch, 0.0)[0]["loss"])
    assert terms["r_drop"].abs() < 1e-6


def test_without_r_drop_each_row_passes_once(labelled):
    batch, classes = labelled
    terms, (logits,) = loss_and_logits(tiny_bert(num_labels=classes).train(), batch, 0.0)
    assert terms.keys() == {"loss"} and logits.shape == (ROWS, classes)
    assert torch.equal(terms["loss"], F.cross_entropy(logits, batch["labels"]))


def test_both_passes_see_the_token_types_of_pairs(batch):
    types = (torch.arange(9) > 4).long().expand(ROWS, 9)
    model, labelled = tiny_bert(), batch | {"labels": torch.arange(ROWS) % 2, "token_type_ids": types}
    assert "token_type_ids" in model_inputs(model, labelled)
    _, (logits,) = loss_and_logits(model, labelled, 1.0)
    expected = model(**batch, token_type_ids=types).logits
    torch.testing.assert_close(logits, torch.cat([expected, expected]))


def test_fast_is_plain_cross_entropy_at_one_rate():
    config, fast = stage_1.TeacherConfig(), stage_1.TeacherConfig.fast()
    assert (config.r_drop, config.layer_decay) == (1.0, 0.9)
    assert (fast.r_drop, fast.layer_decay) == (0.0, 1.0)


# Rates.


class Rows:
    """Training data: rows of one batch."""

    def __init__(self, batch):
        self.batch, self.lengths = batch, batch["attention_mask"].sum(1)
        self.weights = torch.ones(len(self))

    def __len__(self):
        return len(self.batch["labels"])

    def collate(self, rows, pad_token_id):
        return {name: tensor[rows] for name, tensor in self.batch.items()}


PARTS = {"embeddings.": 0.0625, "layer.0.": 0.125, "layer.1.": 0.25, "layer.2.": 0.5}


def expected_share(name):
    """What is in no part belongs to the head: classifier, pooler, DistilBERT's pre_classifier."""
    return next((share for part, share in PARTS.items() if part in name), 1.0)


@pytest.mark.parametrize("family", ["bert", "distilbert", "pruned_bert"])
def test_a_step_is_smaller_from_layer_to_layer(batch, tmp_path, family):
    """AdamW's first step moves each weight by the learning rate, whatever its gradient."""
    model = shrink(tiny_bert(), KEPT) if family == "pruned_bert" else MODELS[family]()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    once = dict(num_epochs=1, batch_size=ROWS, warmup_ratio=0.0, weight_decay=0.0, learning_rate=1e-3)
    recipe = recipe_of(model, layer_decay=0.5, **once)
    train = Rows(batch | {"labels": torch.arange(ROWS) % 2})
    fit(model, recipe, train, lambda _: {"selection_accuracy": 0.5}, tmp_path, 0)
    for name, parameter in model.named_parameters():
        if not name.endswith(("key.bias", "k_lin.bias")):  # no attention depends on them, so they have no gradient
            moved = (parameter - before[name]).abs().max().item()
            assert moved == pytest.approx(1e-3 * expected_share(name), rel=1e-2), name


# Early stopping, the best epoch, and a run that is killed.


@pytest.fixture(scope="module")
def places(tokenizer, tmp_path_factory):
    """An encoder, and texts of letters in two classes."""
    folder = tmp_path_factory.mktemp("places")
    save_checkpoint(folder / "encoder", tiny_bert(), tokenizer, {"stage": "dense"})
    rows = [f"{letter} a b{' c' * (index % 9)}\t{index % 2}" for index, letter in enumerate(WORDS * 2)]
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


@pytest.fixture
def finetune(places, monkeypatch):
    """`finetune(folder, metrics, ...)` runs stage 1, whose epochs have these metrics on the held-out sentences.

    It gives the weights that the model had when each was asked for, and ends with `Killed` where they run out.
    """

    def run(folder, metrics, **changes):
        left, weights = iter(metrics), []

        def evaluate(_, model):
            metric = next(left, None)
            if metric is None:
                raise Killed
            weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {"accuracy": 0.5, "selection_accuracy": metric}

        monkeypatch.setattr(TokenizedTask, "evaluate", evaluate)
        fields = dict(num_epochs=6, batch_size=16, max_length=16, learning_rate=1e-3)
        inputs = dict(teacher=str(places / "encoder"), data_dir=str(places), models_dir=folder)
        stage_1.main(stage_1.TeacherConfig.make(**fields | inputs | changes))
        return weights

    return run


def saved(folder):
    return load_tensors(folder / "teacher_model" / "model.safetensors")


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


SAVED = 0.0  # the metric that is asked for when the model is saved


@pytest.mark.parametrize(
    ("patience", "metrics", "best"),
    [
        (1, [0.6, 0.9, 0.8], 2),
        (2, [0.6, 0.9, 0.8, 0.7], 2),
        (2, [0.6, 0.6, 0.6], 1),  # of equals the first
        (3, [0.6, 0.9, 0.8, 0.7, 0.9], 2),
        (2, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 6),
        (2, [0.9, 0.5, 1.0, 0.7, 0.8], 3),  # one epoch without a better one is not two
    ],
)
def test_the_best_epoch_is_saved_and_patience_ends_training(finetune, tmp_path, patience, metrics, best):
    weights = finetune(tmp_path, [*metrics, SAVED], patience=patience)
    assert len(weights) == len(metrics) + 1
    history = read_json(tmp_path / "teacher_model" / "training_history.json")
    assert [record["selection_accuracy"] for record in history] == metrics
    check_equal(saved(tmp_path), weights[best - 1])
    check_equal(weights[-1], weights[best - 1])  # what is in stage.json was measured on what is saved
    assert read_stage(tmp_path / "teacher_model")["metrics"]["selection_accuracy"] == SAVED


# Three steps an epoch, a state saved after every second one; the second epoch is the best. Killed where the first epoch
# is measured, where the last one is, two behind the best, and where the result is saved.
@pytest.mark.parametrize("kill_after", [0, 3, 4])
def test_killed_and_resumed_is_as_undisturbed(finetune, tmp_path, kill_after):
    metrics = [0.6, 0.9, 0.8, 0.7, SAVED]
    expected = finetune(tmp_path / "whole", metrics, save_steps=2)
    with pytest.raises(Killed):
        finetune(tmp_path / "killed", metrics[:kill_after], save_steps=2)
    assert not (tmp_path / "killed" / "teacher_model").exists()
    found = finetune(tmp_path / "killed", metrics[kill_after:], save_steps=2, resume=True)
    assert len(found) == len(expected) - kill_after, "epochs that were done are not done again"
    check_equal(saved(tmp_path / "killed"), expected[1])
    histories = [read_json(tmp_path / name / "teacher_model/training_history.json") for name in ("whole", "killed")]
    assert histories[0] == histories[1]
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["teacher_model"]

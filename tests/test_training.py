"""The training loop: resume gives what an undisturbed run gives, bad resumes are refused, several processes agree."""

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, load_script, tiny_bert, tiny_distilbert

from compression.checkpoint import load_tensors
from compression.classifier.budget import macs_budget
from compression.classifier.data import Encoded
from compression.classifier.gradual_pruning import PruningSchedule, extent, sections
from compression.classifier.hidden_states import HiddenStates, LiveTeacher
from compression.config import pick
from compression.flops import encoder_macs_formula
from compression.runtime import UserError
from compression.structures import layers_of
from compression.training import Recipe, Training, clean_up, fit, pick_precision


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


@pytest.fixture
def train():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (42,), generator=generator).tolist()
    ids = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Encoded({"input_ids": ids}, torch.randint(0, 2, (42,), generator=generator))


class CrossEntropy(Recipe):
    def loss(self, model, batch, step):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return {"loss": F.cross_entropy(logits, batch["labels"])}


def run(train, work_dir, kill_at=None, **changes):
    """Both phases of stage 8; returns the smaller model, the recipe of each phase, and the history."""
    fields = dict(
        num_epochs=7,
        pruning_start_epoch=1,
        pruning_end_epoch=5,
        batch_size=8,
        save_steps=2,
        pruning_frequency=3,
        learning_rate=1e-3,
        finetuning_learning_rate=1e-3,
        patience=1,
    )
    stage, model = load_script("8_pruning_with_finetuning"), tiny_distilbert()
    config = stage.GradualPruningWithFinetuningConfig.make(**(fields | changes))
    logits = torch.randn(42, 2, generator=torch.Generator().manual_seed(0))

    def fitted(model, recipe, folder):
        after_step = recipe.after_step

        def killing(step):
            after_step(step)
            if step == kill_at:
                raise Killed

        def evaluate(_):
            return {"accuracy": 0.5, "selection_accuracy": 0.5 + sum(p.sum().item() for p in model.parameters()) % 0.1}

        recipe.after_step = killing
        return fit(model, recipe, train, evaluate, folder, 0)

    budget = None if config.target is None else macs_budget(config.target[1], model, tiny_bert(), 8)
    states = HiddenStates(model, LiveTeacher(tiny_bert(), train, 0) if config.beta_hidden else None, config.beta_hidden)
    target, whole = stage.make_target(model, config, budget), extent(layers_of(model))
    history, recipes = [], []
    for first, last in sections(pick(PruningSchedule, config), target.cuts):
        pruning = stage.make_recipe(model, logits, config, target, states, whole, (first, last))
        history += fitted(model, pruning, work_dir / ("" if first == 1 else str(first)))
        sparsity = pruning.sparsity()
        recipes.append(pruning)
        model, states = pruning.finish()
    finetuning = stage.make_finetuning(model, logits, config, sparsity, states)
    return model, (*recipes, finetuning), history + fitted(model, finetuning, work_dir / "finetuning")


# Six steps an epoch, an event every third step, a state saved every second one: the kills fall before the first state,
# within a window of gradients, right after an event, at the end of the Pruning phase and in Finetuning.
@pytest.mark.parametrize("kill_at", [0, 3, 10, 13, 29, 37])
def test_killed_and_resumed_equals_undisturbed(train, tmp_path, kill_at):
    check_resumed(train, tmp_path, kill_at)


@pytest.mark.parametrize("kill_at", [13, 29, 37])
def test_killed_and_resumed_with_parts_taken_out_equals_undisturbed(train, tmp_path, kill_at):
    settings = dict(target=("mac", 0.1), beta_hidden=0.5, min_part_share=0.1)
    model, recipes = check_resumed(train, tmp_path, kill_at, **settings)
    assert len(recipes) == 6, "five epochs of Pruning, each with what the one before has left, and Finetuning"
    assert any(recipe.removed for recipe in recipes[:-1])
    assert encoder_macs_formula(layers_of(model), 8) <= 0.1 * encoder_macs_formula(layers_of(tiny_bert()), 8)


@pytest.mark.parametrize("kill_at", [3, 13, 29])
def test_killed_and_resumed_with_second_order_scores_and_repair_equals_undisturbed(train, tmp_path, kill_at):
    settings = dict(importance_mode="obs", repair="events", target=("mac", 0.1), min_part_share=0.1)
    model, recipes = check_resumed(train, tmp_path, kill_at, **settings)
    assert len(recipes) == 6, "five epochs of Pruning, each with what the one before has left, and Finetuning"
    assert any(recipe.removed for recipe in recipes[:-1])
    assert encoder_macs_formula(layers_of(model), 8) <= 0.1 * encoder_macs_formula(layers_of(tiny_bert()), 8)


def check_resumed(train, tmp_path, kill_at, **settings):
    expected_model, expected_recipes, expected_history = run(train, tmp_path / "undisturbed", **settings)
    with pytest.raises(Killed):
        run(train, tmp_path / "killed", kill_at=kill_at, **settings)
    model, recipes, history = run(train, tmp_path / "killed", resume=True, **settings)
    assert history == expected_history
    for (name, value), expected in zip(model.state_dict().items(), expected_model.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    best, expected = recipes[-1].best.weights, expected_recipes[-1].best.weights
    assert best and best.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in best.items())
    return model, recipes


def test_same_seed_same_result_other_seed_other_result(train, tmp_path):
    first, again, other = (run(train, tmp_path / str(i), seed=seed)[0] for i, seed in enumerate((1, 1, 2)))
    weight = "distilbert.transformer.layer.0.ffn.lin1.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_a_new_run_does_not_pick_up_an_old_state(train, tmp_path):
    with pytest.raises(Killed):
        run(train, tmp_path, kill_at=8)
    _, _, history = run(train, tmp_path)
    assert [record["epoch"] for record in history][0] == 1
    assert len(list(tmp_path.glob("step_*"))) == 1
    clean_up(tmp_path)
    assert not tmp_path.exists()


def test_training_learns(train, tmp_path):
    model = tiny_distilbert()
    config = Training(num_epochs=12, batch_size=8, learning_rate=5e-3)
    history = fit(model, CrossEntropy(config, len(train)), train, lambda _: {}, tmp_path, 0)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_batch_in_parts_is_the_same_batch(train, tmp_path, parts):
    """Batches of 8 rows, and at the end of an epoch one of 2, in parts of 4, 3 or 1."""
    histories, gradients = [], []
    for steps in (1, parts):
        model = tiny_distilbert()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        config = Training(num_epochs=2, batch_size=8, gradient_accumulation_steps=steps, learning_rate=1e-3)
        recipe = CrossEntropy(config, len(train))
        seen = []

        def note(step, model=model, seen=seen):
            seen.append({name: p.grad.clone() for name, p in model.named_parameters()})

        recipe.after_backward = note
        histories.append(fit(model, recipe, train, lambda _: {}, tmp_path / str(steps), 0))
        gradients.append(seen)
    assert len(gradients[1]) == 12, "one step of the optimizer for each batch"
    assert histories[1][1]["loss"] == pytest.approx(histories[0][1]["loss"], rel=1e-4)
    for name, expected in gradients[0][0].items():
        torch.testing.assert_close(gradients[1][0][name], expected, atol=1e-6, rtol=1e-4)


def test_recomputed_activations_give_the_same_weights(train, tmp_path):
    weights, forwards = [], []
    for recompute in (False, True):
        model = tiny_distilbert()
        calls = []
        model.distilbert.transformer.layer[0].ffn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        config = Training(num_epochs=1, batch_size=8, gradient_checkpointing=recompute)
        fit(model, CrossEntropy(config, len(train)), train, lambda _: {}, tmp_path / str(recompute), 0)
        weights.append(model.state_dict())
        forwards.append(len(calls))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert forwards == [6, 12]
    assert all(torch.equal(value, weights[0][name]) for name, value in weights[1].items())


def test_frozen_weights_are_not_saved_to_resume_from(train, tmp_path):
    model = tiny_distilbert()
    model.distilbert.requires_grad_(False)
    config = Training(num_epochs=1, batch_size=8)
    fit(model, CrossEntropy(config, len(train)), train, lambda _: {}, tmp_path, 0)
    (state,) = tmp_path.glob("step_*/model.safetensors")
    names = {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"}
    assert load_tensors(state).keys() == names


def test_mixed_precision_ends_with_training(train, tmp_path, batch):
    """And begins with it, whatever was trained before in the same process."""
    fit(tiny_distilbert(), CrossEntropy(Training(num_epochs=1), len(train)), train, lambda _: {}, tmp_path / "no", 0)
    model = tiny_distilbert()
    config = Training(num_epochs=1, batch_size=8, amp="bf16")
    evaluated = []
    fit(
        model, CrossEntropy(config, len(train)), train, lambda m: evaluated.append(m(**batch).logits) or {}, tmp_path, 0
    )
    fresh = tiny_distilbert(seed=1)
    fresh.load_state_dict(model.state_dict())
    expected = fresh.eval()(**batch).logits
    torch.testing.assert_close(model.eval()(**batch).logits, expected, atol=0, rtol=0)
    assert evaluated[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("amp", "cuda", "multiplies", "expected"),
    [
        ("auto", True, True, "bf16"),
        ("auto", True, False, "fp16"),
        ("auto", False, True, "bf16"),
        ("auto", False, False, "no"),
        ("no", True, True, "no"),
    ],
)
def test_precision_is_what_the_hardware_multiplies(monkeypatch, amp, cuda, multiplies, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("compression.training.multiplies_bf16", lambda: multiplies)
    assert pick_precision(amp) == expected


class BreaksDown(CrossEntropy):
    """A term of the loss, or the gradients alone, are not finite from a step on."""

    def __init__(self, config, rows, what, at):
        super().__init__(config, rows)
        self.what, self.at = what, at

    def loss(self, model, batch, step):
        terms = super().loss(model, batch, step)
        if step >= self.at and self.what == "gradient":
            terms["loss"] = terms["loss"] + (0 * next(model.parameters()).sum()).sqrt()  # 0 with a slope of infinity
        elif step >= self.at:
            terms[self.what] = terms["loss"] * float("nan")
        return terms


@pytest.mark.parametrize("what", ["loss", "soft_label_loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_ends_training(train, tmp_path, what):
    config = Training(num_epochs=2, batch_size=8, save_steps=1)
    found = {"loss": "the loss", "gradient": "the gradient's norm"}.get(what, f"the term {what}")
    with pytest.raises(UserError, match=f"broke down at step 4: {found} is not finite; nothing .*--learning_rate"):
        fit(tiny_distilbert(), BreaksDown(config, len(train), what, 3), train, lambda _: {}, tmp_path / "work", 0)
    (state,) = (tmp_path / "work").glob("step_*")
    assert state.name.startswith("step_00000003"), "the last state is from before"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "recipe.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_state_is_not_resumed(train, tmp_path, file, damage):
    with pytest.raises(Killed):
        run(train, tmp_path, kill_at=8)
    (path,) = tmp_path.glob(f"step_*/{file}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-3])
    if damage == "delete":
        path.unlink()
    with pytest.raises(UserError, match=f"{path.parent.name}.*: rm -r {tmp_path}$") as error:
        run(train, tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_fp16_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--amp fp16: needs a CUDA GPU"):
        Training(amp="fp16")


def test_tensorboard_gets_the_metrics_of_each_epoch(train, tmp_path):
    pytest.importorskip("tensorboard")
    model = tiny_distilbert()
    config = Training(num_epochs=1, batch_size=8, track="tensorboard")
    fit(model, CrossEntropy(config, len(train)), train, lambda _: {}, tmp_path / "work", 0)
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


def test_missing_tracker_names_the_command_that_installs_it(train, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--track wandb: not installed; install it with: pip install wandb"):
        run(train, tmp_path, track="wandb")

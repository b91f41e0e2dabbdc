"""Pruning in steps with training in between: what is trained, what is recorded, and what a kill leaves."""

import json

import pytest
import torch
from conftest import leftovers, letters, pruning_flags, tiny_decoder
from scripts import run_script
from test_training import Killed
from transformers import AutoModelForCausalLM

from compression.checkpoint import load_tensors
from compression.llm import iterate
from compression.llm.recovery import LanguageModelling

PRUNE = "run_global_pruning.py"
STEPS = ("--iterative_steps", "2", "--pruning_ratio", "0.4", "--round_to", "8", "--recover_learning_rate", "1e-2")
TOKENS = ("--recover_tokens", "2000")


def words_of(base, output, *flags):
    return [PRUNE, *pruning_flags(base, output), *STEPS, "--output_name", "one", *flags]


@pytest.fixture(scope="module", autouse=True)
def states_after_few_steps():
    """A state to resume from after every fourth of the nine steps of a training."""
    with pytest.MonkeyPatch.context() as patch:
        usual = iterate.recovery_between
        patch.setattr(iterate, "recovery_between", lambda *given: usual(*given).updated(save_steps=4))
        yield


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Flags for a text that nothing is calibrated or trained on."""
    path = tmp_path_factory.mktemp("unseen") / "unseen.txt"
    path.write_text(letters(4000, seed=7))
    return "--agreement_text", path, "--agreement_length", "16", "--agreement_samples", "4"


@pytest.fixture(scope="module")
def whole(base, unseen, tmp_path_factory):
    """A run of two steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("iterate")
    result = run_script(*words_of(base, folder, *TOKENS, *unseen))
    return folder / "one", result.stdout


def test_the_model_is_trained_after_each_step_for_the_tokens(whole, base, unseen, tmp_path):
    folder, said = whole
    assert said.count(" 2000 tokens to predict") == 2 and said.count(" tokens/s in training)") == 2
    found = json.loads((folder / "evaluation" / "evaluation_results.json").read_text())
    first, second = found["recovery"]
    assert len(first) == len(second) == 1 and second[0]["validation_perplexity"] < first[0]["validation_perplexity"]
    stage = json.loads((folder / "models" / "stage.json").read_text())
    assert stage["config"]["recover_tokens"] == 2000 and stage["metrics"]["recovery"] == found["recovery"]
    run_script(*words_of(base, tmp_path, *unseen))
    plain = json.loads((tmp_path / "one" / "evaluation" / "evaluation_results.json").read_text())
    assert "recovery" not in plain and plain["reduction"]["structures"] == pytest.approx(0.4, abs=0.05)
    assert found["reduction"]["structures"] == pytest.approx(0.4, abs=0.05)
    assert found["pruned"]["perplexity"]["text.txt"] < 0.9 * plain["pruned"]["perplexity"]["text.txt"]
    # Training changes the head, and the dense model's predictions are those of its own.
    dense = [run["agreement"]["perplexity"]["dense"] for run in (found, plain)]
    assert dense[0] == pytest.approx(dense[1], rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained(folder / "models")
    assert model.num_parameters() == found["pruned"]["parameters"]["total"]


@pytest.mark.parametrize(("kill_at", "trained"), [(6, 2), (11, 1)], ids=["first training", "second training"])
def test_killed_while_it_trains_and_resumed_equals_undisturbed(whole, base, tmp_path, monkeypatch, kill_at, trained):
    words, calls = words_of(base, tmp_path, *TOKENS, "--resume"), []

    def kill(self, step):
        calls.append(step)
        if len(calls) == kill_at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LanguageModelling, "after_step", kill)
        run_script(*words)
    assert not (tmp_path / "one").exists()
    said = run_script(*words).stdout
    assert ("Resumed at epoch 1, step 4" in said) == (trained == 2)
    assert said.count(" tokens/s in training)") == trained, "what was finished is not trained again"
    for name in ("models/model.safetensors", "models/config.json", "analysis/global_group_table.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (whole[0] / name).read_bytes(), name
    found, expected = (folder / "evaluation" / "evaluation_results.json" for folder in (tmp_path / "one", whole[0]))
    assert json.loads(found.read_text())["recovery"] == json.loads(expected.read_text())["recovery"]
    assert not leftovers(tmp_path), "what was kept to resume from is gone"


def test_the_dense_model_teaches_between_the_steps(whole, base, unseen, tmp_path):
    said = run_script(*words_of(base, tmp_path, *TOKENS, *unseen, "--recover_kd_weight", "1")).stdout
    assert said.count("soft_label_loss") >= 2
    taught, told = (
        json.loads((folder / "evaluation" / "evaluation_results.json").read_text())["agreement"]
        for folder in (tmp_path / "one", whole[0])
    )
    assert taught["kl"] < told["kl"], "it agrees more with its teacher than one that saw the text alone"


def test_weights_change_their_type_and_rotary_tables_do_not():
    model = tiny_decoder()
    table = model.model.rotary_emb.inv_freq
    iterate.cast_weights(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq is table and table.dtype == torch.float32


def test_trained_weights_keep_the_models_type(base, tmp_path):
    words = words_of(base, tmp_path, "--recover_tokens", "100", "--run_evaluation", "none")
    run_script(*["bfloat16" if word == "float32" else word for word in words])
    weights = load_tensors(tmp_path / "one" / "models" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recover_tokens", "-1"], "--recover_tokens -1: allowed is at least 0"),
        (["--dataset", "ptb,plots", "--recover_tokens", "9"], "--recover_tokens 9: allowed is at least 32, for a "),
        (["--recover_tokens", "9", "--recover_learning_rate", "2"], "--recover_learning_rate 2.0: allowed is 0 to 1"),
        (["--recover_kd_weight", "0.5"], "--recover_kd_weight 0.5: is used with --recover_tokens above 0 alone"),
        (["--recover_tokens", "9", "--offload", "disk"], "--recover_tokens 9: trains the model in memory, and it "),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(base, tmp_path, flags, message):
    words = [PRUNE, *pruning_flags(base, tmp_path / "results"), *flags]
    stderr = run_script(*words, expect=2).stderr
    assert message in stderr and len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()

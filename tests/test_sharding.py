"""Recovery training of a model that is spread over processes: as on one process, resumed on any number of them."""

import shutil

import pytest
import torch
from conftest import VOCABULARY, leftovers, letters, save_decoder, tiny_decoder
from scripts import run_distributed, run_script
from test_lora import pruned
from test_post_training import settings
from test_training import Killed

from compression.checkpoint import load_tensors
from compression.files import read_json
from compression.llm.recovery import LanguageModelling, recover
from compression.outputs import KEPT_LOGITS
from compression.runtime import UserError
from compression.stage_record import read_stage

TRAIN, STEP = "post_training.py", "compression.training.Recipe.after_step"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model, a pruned one that was made from it, and a text."""
    folder = tmp_path_factory.mktemp("sharding")
    save_decoder(folder / "dense", tiny_decoder(max_position_embeddings=128))
    save_decoder(folder / "pruned", pruned(), {"stage": "global_pruning", "parent": str(folder / "dense")})
    (folder / "text.txt").write_text(letters(6_000))
    (folder / "unseen.txt").write_text(letters(6_000, seed=3))
    return folder


def flags(folder, *more):
    """Six steps an epoch, a state after every second one; each batch in two parts; odd numbers of windows."""
    text = folder / "text.txt"
    words = ["--pruned_model", folder / "pruned", "--dataset", text, "--eval_ppl_datasets", text, "--results_dir"]
    words += [folder, "--max_length", 16, "--eval_length", 16, "--eval_samples", 7, "--finetune_samples", 24]
    words += ["--agreement_text", folder / "unseen.txt", "--agreement_length", 16, "--agreement_samples", 5]
    words += ["--validation_samples", 3, "--batch_size", 4, "--gradient_accumulation_steps", 2, "--save_steps", 2]
    return [TRAIN, *words, "--learning_rate", "1e-3", "--amp", "no", "--kd_weight", 0.5, *more]


METHODS = {
    "full": ["--finetune_method", "full"],
    # Frozen weights in 16 bits, those that are trained in 32.
    "lora": ["--lora_r", 3, "--dtype", "bfloat16", "--gradient_checkpointing"],
}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def undisturbed(folder):
    """On one process without --shard, and on two with it, by method; adapters learn from all predictions, kept."""
    kept = {"full": [], "lora": ["--teacher_cache", VOCABULARY]}
    for method, more in METHODS.items():
        run_script(*flags(folder, *more, "--output_name", f"{method}_one"))
        run_distributed(*flags(folder, *more, *kept[method], "--output_name", f"{method}_two", "--shard"))
    return folder


def check_same(one, two, method, tolerance):
    """The same files, curves, figures and weights."""
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for first, second in zip(*(read_json(folder / "training_history.json") for folder in (one, two)), strict=True):
        assert second == pytest.approx(first, rel=tolerance)
    first, second = (read_stage(folder)["metrics"] for folder in (one, two))
    for when in ("before", "after"):
        assert (
            second[when]["parameters"] == first[when]["parameters"] and second[when]["layers"] == first[when]["layers"]
        )
        assert second[when]["perplexity"] == pytest.approx(first[when]["perplexity"], rel=tolerance)
        one_kl, two_kl = (metrics[when]["agreement"]["kl"] for metrics in (first, second))
        assert two_kl == pytest.approx(one_kl, rel=10 * tolerance)
    first, second = (load_tensors(folder / WEIGHTS[method]) for folder in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_with_parts_of_the_model_agree_with_one(undisturbed, method):
    one, two = undisturbed / f"{method}_one", undisturbed / f"{method}_two"
    check_same(one, two, method, 1e-3)
    assert all(path.name.startswith(KEPT_LOGITS) for path in leftovers(undisturbed)), "nothing to resume from is left"
    for name in ("config.json", "generation_config.json"):
        assert not (one / name).exists() or read_json(two / name) == read_json(one / name)


def test_processes_share_the_rows_of_a_teacher(undisturbed):
    (kept,) = undisturbed.glob(f"{KEPT_LOGITS}*")
    rows = [set(load_tensors(part)) for part in kept.glob("part_*/words/model.safetensors")]
    assert len(rows) == 2 and not rows[0] & rows[1] and rows[0] | rows[1] == {str(row) for row in range(24)}


def test_killed_on_two_processes_and_resumed_on_two_or_on_one(undisturbed, tmp_path):
    place = ["--results_dir", tmp_path, "--output_name", "killed"]
    words = flags(undisturbed, *METHODS["full"], "--shard", "--resume", *place)
    run_distributed(*words, kill_at=(STEP, 9))
    (state,) = tmp_path.glob(".killed_*.resume/step_*")
    assert {path.suffix for path in state.rglob("*.*")} == {".safetensors", ".json"}
    parts = [load_tensors(path) for path in (state / "parts").iterdir()]
    sizes = [sum(values.numel() for values in part.values()) for part in parts]
    assert len(parts) == 2 and max(sizes) < 0.6 * sum(sizes), "each process writes what it has"

    shutil.copytree(tmp_path, tmp_path / "copy")
    run_distributed(*words)
    two = undisturbed / "full_two"
    check_same(two, tmp_path / "killed", "full", 0)
    said = run_script(*words, "--results_dir", tmp_path / "copy").stdout
    assert "Resumed at epoch 2, step 8" in said and "on 1 process(es)" in said
    check_same(two, tmp_path / "copy" / "killed", "full", 1e-3)


def test_a_single_process_has_all_of_the_model_and_resumes_too(folder, tmp_path, monkeypatch):
    fields = dict(finetune_method="full", shard=True, resume=True)
    recover(settings(folder, **fields), folder / "pruned", tmp_path / "whole")

    def kill(self, step):
        if step == 9:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LanguageModelling, "after_step", kill)
        recover(settings(folder, **fields), folder / "pruned", tmp_path / "killed")
    (part,) = tmp_path.glob(".killed_*.resume/step_*/parts/*")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="parts/.* is damaged .*; start the run anew without it: rm -r"):
        recover(settings(folder, **fields), folder / "pruned", tmp_path / "killed")
    part.write_bytes(content)
    recover(settings(folder, **fields), folder / "pruned", tmp_path / "killed")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}
    for name in ("model.safetensors", "training_history.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

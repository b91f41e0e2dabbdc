"""What is learned from a teacher is the same wherever its layers or its predictions are."""

import pytest
import torch
from conftest import VOCABULARY, letters, save_decoder, tiny_decoder
from test_lora import pruned
from test_post_training import ALPACA, settings
from test_training import Killed

from compression.checkpoint import load_tensors
from compression.files import read_json, write_json
from compression.llm import teacher
from compression.llm.recovery import LanguageModelling, recover
from compression.outputs import remove_states


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model, a pruned one that was made from it, a text, and instructions of different lengths."""
    folder = tmp_path_factory.mktemp("teacher")
    save_decoder(folder / "dense", tiny_decoder(max_position_embeddings=128))
    save_decoder(folder / "pruned", pruned(), {"stage": "global_pruning", "parent": str(folder / "dense")})
    (folder / "text.txt").write_text(letters(6_000))
    write_json(folder / "alpaca.json", ALPACA)
    return folder


def run(folder, output, **changes):
    """The history and the adapter."""
    fields = dict(kd_weight=0.5, dataset=str(folder / "alpaca.json"), max_length=100, run_evaluation="none")
    recover(settings(folder, **fields | changes), folder / "pruned", output)
    return read_json(output / "training_history.json"), load_tensors(output / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def live(folder):
    return run(folder, folder / "live")


def check_same(found, expected):
    for first, second in zip(expected[0], found[0], strict=True):
        assert second == pytest.approx(first, rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("cache", [0, VOCABULARY])
@pytest.mark.parametrize("place", ["none", "cpu", "disk"])
def test_the_same_is_learned_wherever_the_teacher_is(folder, live, tmp_path, cache, place):
    check_same(run(folder, tmp_path / "out", teacher_cache=cache, teacher_offload=place), live)
    kept = list(tmp_path.glob(".*"))
    assert len(kept) == bool(cache)
    assert remove_states(tmp_path) == kept


def test_the_divergence_of_the_largest_is_a_lower_bound(folder, live, tmp_path):
    first = run(folder, tmp_path / "out", teacher_cache=3)[0][0]
    assert 0 < first["soft_label_loss"] < live[0][0]["soft_label_loss"]


def test_predictions_are_computed_once_for_killed_and_later_runs(folder, tmp_path, monkeypatch):
    computed, write = [], teacher._write_largest
    monkeypatch.setattr(teacher, "_write_largest", lambda *given: computed.append(write(*given)))
    expected = run(folder, tmp_path / "whole", teacher_cache=8)
    (kept,) = tmp_path.glob(".teacher_logits_*")

    def kill(self, step):
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LanguageModelling, "after_step", kill)
        run(folder, tmp_path / "killed", teacher_cache=8)
    check_same(run(folder, tmp_path / "killed", teacher_cache=8, resume=True), expected)
    assert len(computed) == 1
    run(folder, tmp_path / "other", teacher_cache=9)
    assert len(computed) == 2 and len(list(tmp_path.glob(".teacher_logits_*"))) == 2
    (part,) = kept.glob("part_*/logs/model.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    run(folder, tmp_path / "damaged", teacher_cache=8)
    assert len(computed) == 3

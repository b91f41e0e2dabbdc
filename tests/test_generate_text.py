"""Text that a model writes by itself: what it is drawn from, and that it can be calibrated on."""

import pytest
import torch
from conftest import letters_tokenizer, save_decoder, tiny_decoder
from scripts import run_distributed, run_killed, run_script

from compression.files import read_json
from compression.integrity import verify
from compression.page import write_page

SCRIPT = "generate_text.py"
PRUNE = "--sequence_length 16 --num_samples 2 --repair_samples 4 --held_out_samples 1 --analysis_samples 0"


def with_letters():
    """A model that knows no other token than its tokenizer."""
    return tiny_decoder(max_position_embeddings=64, vocab_size=len(letters_tokenizer()))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("base") / "model", with_letters())


def flags_of(base, results, *more):
    return ["--base_model", base, "--results_dir", results, "--dtype", "float32", *" ".join(more).split()]


def documents_of(folder):
    return (folder / "own_text" / "text.txt").read_text().strip().split("\n\n")


def test_as_many_documents_are_written_as_have_the_tokens_and_can_be_calibrated_on(base, tmp_path):
    flags = flags_of(base, tmp_path, "--tokens 2000 --length 30 --batch_size 8")
    assert "67 documents of 30 tokens" in run_script(SCRIPT, *flags).stdout
    documents = documents_of(tmp_path)
    assert [len(text.split()) for text in documents] == 67 * [30]
    assert len(set(documents)) == 67
    verify(tmp_path / "own_text")
    record = read_json(tmp_path / "own_text" / "run.json")
    assert record["documents"] == 67 and record["config"]["temperature"] == 1.0
    text = tmp_path / "own_text" / "text.txt"
    pruning = flags_of(base, tmp_path, PRUNE, "--run_evaluation none --analysis_length 16 --pruning_ratio 0.3")
    run_script("run_global_pruning.py", "--dataset", text, *pruning, "--output_name", "smaller")
    data = read_json(tmp_path / "smaller" / "models" / "stage.json")["data"]["calibration"]
    assert [(part["name"], part["windows"].get("repair")) for part in data] == [("text.txt", 4), ("text.txt", None)]


def test_tokens_are_drawn_from_the_models_own_predictions(tmp_path):
    """Of 4,000 first tokens each comes as often as the model expects it, within five standard errors."""
    model = with_letters()
    tokenizer, count = letters_tokenizer(), 4000
    begin = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        model.lm_head.weight *= 1.5 / model(begin).logits.std()  # so that its predictions are far from alike
        expected = model(begin).logits[0, 0].softmax(-1)
    base = save_decoder(tmp_path / "model", model)
    run_script(SCRIPT, *flags_of(base, tmp_path, f"--tokens {count} --length 1 --batch_size 500"))
    written = [tokenizer.convert_tokens_to_ids(text) for text in documents_of(tmp_path)]
    drawn = torch.bincount(torch.tensor(written), minlength=len(tokenizer)) / count
    errors = (expected * (1 - expected) / count).sqrt()
    assert expected.max() > 2 / len(tokenizer)
    assert (drawn - expected).abs().le(5 * errors).all()


def test_text_goes_on_behind_an_end_of_text(tmp_path):
    model = with_letters()
    end = letters_tokenizer().eos_token_id
    model.generation_config.eos_token_id = end
    model.lm_head.weight.data.zero_()  # so that all tokens are as likely
    base = save_decoder(tmp_path / "model", model)
    run_script(SCRIPT, *flags_of(base, tmp_path, "--tokens 2000 --length 40"))
    assert any("</s> " in text for text in documents_of(tmp_path))


def test_a_seed_fixes_the_text_and_a_killed_run_goes_on_to_the_same_on_several_processes(base, tmp_path):
    sizes = "--tokens 300 --length 10 --batch_size 8"
    for name, seed in (("once", 1), ("again", 1), ("other", 2)):
        run_script(SCRIPT, *flags_of(base, tmp_path / name, sizes, f"--seed {seed}"))
    once = documents_of(tmp_path / "once")
    assert documents_of(tmp_path / "again") == once != documents_of(tmp_path / "other")
    resumed = flags_of(base, tmp_path / "killed", sizes, "--seed 1 --resume")
    run_killed(SCRIPT, *resumed, at="compression.runtime.seed_step", call=3)
    (state,) = (tmp_path / "killed").glob(".own_text_*")
    assert sorted(part.name for part in state.iterdir()) == ["batch_0", "batch_1"]
    run_distributed(SCRIPT, *resumed)
    assert documents_of(tmp_path / "killed") == once and not state.exists()


def test_a_text_with_other_settings_is_not_replaced_unasked(base, tmp_path):
    flags = flags_of(base, tmp_path, "--tokens 20 --length 10 --batch_size 2")
    run_script(SCRIPT, *flags)
    before = documents_of(tmp_path)
    assert "holds a result with other settings" in run_script(SCRIPT, *flags, "--seed", 3, expect=2).stderr
    assert documents_of(tmp_path) == before
    run_script(SCRIPT, *flags, "--seed", 3, "--overwrite")
    assert documents_of(tmp_path) != before
    assert "own_text" not in write_page(tmp_path / "none", tmp_path).read_text()  # which is no pruning run


def test_what_cannot_be_written_is_refused(tmp_path):
    nameless = letters_tokenizer()
    nameless.bos_token = nameless.eos_token = None
    base = save_decoder(tmp_path / "model", with_letters(), tokenizer=nameless)
    problem = run_script(SCRIPT, *flags_of(base, tmp_path), "--length", 64, expect=2).stderr
    assert "--length 65: allowed is at most 64" in problem
    problem = run_script(SCRIPT, *flags_of(base, tmp_path), "--length", 32, expect=2).stderr
    assert "names no token that begins or ends a text" in problem and "bos_token" in problem
    assert not (tmp_path / "own_text").exists()

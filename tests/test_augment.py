"""Changed copies of the training text: what is changed, what is not, and whose labels the copies have."""

import csv
import re

import pytest
import torch
from conftest import letters, load_script, tiny_bert, tiny_distilbert
from scripts import run_distributed, run_killed, run_script
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from compression.checkpoint import load_classifier, save_checkpoint
from compression.classifier.augment import Augmentation, changed_copies, nearest_words
from compression.classifier.data import encode
from compression.classifier.metrics import predict
from compression.classifier.stage import Stage
from compression.inputs import find_newest
from compression.runtime import UserError
from compression.stage_record import describe_stage, read_stage

DISTIL, PRUNE = "2_distill_student.py", "8_pruning_with_finetuning.py"
NOTHING = dict(augment=3, augment_replace=0.0, augment_drop=0.0, augment_span=0.0, augment_join=0.0)
TEXTS = [letters(12, seed).upper() if seed % 2 else letters(12, seed) for seed in range(30)]


def draw(tokenizer, rows=TEXTS, known=(), seed=0, **changes):
    embed = torch.nn.Embedding.from_pretrained(torch.randn(len(tokenizer), 8, generator=torch.Generator()))
    return changed_copies(rows, known, Augmentation(**NOTHING | changes), tokenizer, embed, seed)


def words_of(texts):
    return {word for text in texts for word in re.findall(r"\w+", text)}


def test_the_seed_decides_and_every_copy_is_another(tokenizer):
    shares = dict(augment_replace=0.3, augment_drop=0.1, augment_span=0.2, augment_join=0.1)
    copies, sources = draw(tokenizer, **shares)
    assert (copies, sources) == draw(tokenizer, **shares) and sources == 3 * list(range(30))
    assert copies != draw(tokenizer, **shares, seed=1)[0]
    assert len({*copies}) == 90 and not {*copies} & {*TEXTS}


PROSE = ["It's old, the sea in the town: the river rises.", "They'd said in the hills", "flows to the town. The sea"]


def byte_pairs():
    """A tokenizer as RoBERTa's: a word has another token where a space is before it."""
    words = Tokenizer(BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(PROSE * 9, BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def unigrams():
    """A tokenizer as XLM-R's: a word's token begins with a mark."""
    pieces = [
        "<unk>",
        *"\u2581abcdefghijklmnopqrstuvwxyz',.:IT",
        *(f"\u2581{word}" for word in ("the", "sea", "town", "in")),
    ]
    words = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.mark.parametrize("kind", [byte_pairs, unigrams])
def test_words_are_those_of_the_training_text_for_any_tokenizer(kind):
    copies, sources = draw(kind(), PROSE, augment_replace=0.5, augment=5)
    assert len(copies) >= 6 and words_of(copies) <= words_of(PROSE)
    for copy, source in zip(copies, sources, strict=True):
        old, new = (re.sub(r"\w+", "_", text) for text in (PROSE[source], copy))
        assert old == new, "marks and spaces stay"


def test_near_words_are_those_of_near_embeddings(tokenizer):
    vectors = torch.zeros(len(tokenizer), 2)
    vectors[5:9] = torch.tensor([[1, 0], [0, 1], [1, 0.1], [0.1, 1]])
    words = ["d", "a", "A", "b", "c", "ab", "7", "?"]
    found = nearest_words(words, tokenizer, torch.nn.Embedding.from_pretrained(vectors), 1)[:, 0].tolist()
    assert [words[place] for place in found] == ["b", "c", "c", "d", "a", "ab", "7", "?"]


def changed_by(tokenizer, name, rows=TEXTS):
    copies, sources = draw(tokenizer, rows, **{name: 0.5})
    assert len(copies) > len(rows)
    return [(rows[source], copy) for copy, source in zip(copies, sources, strict=True)]


def test_replaced_words_are_in_the_place_of_others(tokenizer):
    for text, copy in changed_by(tokenizer, "augment_replace"):
        pairs = list(zip(text.split(), copy.split(), strict=True))
        assert 0 < sum(old.lower() != new.lower() for old, new in pairs) < 12


def test_dropped_words_leave_the_others_in_their_order(tokenizer):
    for text, copy in changed_by(tokenizer, "augment_drop"):
        rest = iter(text.split())
        assert copy and all(word in rest for word in copy.split()) and len(copy) < len(text)


def test_spans_are_parts(tokenizer):
    pairs = changed_by(tokenizer, "augment_span")
    assert all(copy in text for text, copy in pairs) and len({len(copy) for _, copy in pairs}) > 5


def test_joined_texts_are_two(tokenizer):
    for text, copy in changed_by(tokenizer, "augment_join"):
        assert copy.startswith(f"{text} ") and copy[len(text) + 1 :] in TEXTS


def test_no_copy_is_a_known_text_whatever_its_case_and_spaces(tokenizer):
    assert {*draw(tokenizer, ["a b c"], augment_span=1.0, augment=20)[0]} == {"a", "b", "c", "a b", "b c"}
    assert draw(tokenizer, ["a b c"], ["A  B", "b c", "C"], augment_span=1.0, augment=20)[0] in (["a", "b"], ["b", "a"])


def test_the_texts_of_a_pair_are_changed_each_on_its_own(tokenizer):
    rows = list(zip(TEXTS[::2], TEXTS[1::2], strict=True))
    pairs = changed_by(tokenizer, "augment_drop", rows)
    for old, new in pairs:
        assert len(new) == 2 and all({*copy.split()} <= {*text.split()} for text, copy in zip(old, new, strict=True))
    assert draw(tokenizer, rows, augment_join=1.0)[0] == [], "joining is for single texts"


# Stages.


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """A teacher that tells letters apart, a student, data of one text and of pairs, and of numbers alone."""
    folder = tmp_path_factory.mktemp("models")
    texts = [letters(4 + row % 5, row) for row in range(60)]
    labels = [("no", "yes")[row % 2] for row in range(60)]
    texts[:10] = [text[:3] for text in texts[50:]]  # some, in whichever part, are spans of others
    write(folder / "one.csv", [("text", "label"), *zip(texts, labels, strict=True)])
    write(folder / "two.csv", [("text", "text_pair", "label"), *zip(texts, texts[::-1], labels, strict=True)])
    write(folder / "numbers.csv", [("text", "label"), *((str(row), labels[row]) for row in range(60))])
    for name, model in (
        ("teacher", tiny_bert(seed=6)),
        ("student", tiny_distilbert(dropout=0.0, attention_dropout=0.0)),
    ):
        model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
        record = describe_stage(name, {}, {}, {}, {"name": "x"})
        save_checkpoint(folder / f"{name}_model", model, tokenizer, record)
    return folder


def stage_of(models, data="one.csv", **changes):
    settings = dict(dataset=str(models / data), models_dir=models, max_length=32, augment=2)
    config = load_script("2_distill_student").DistillationConfig.make(**settings | changes)
    teacher = models / "teacher_model"
    return Stage("student", config, teacher, "student_new", teacher, augmentation=config.augmentation)


@pytest.mark.parametrize("data", ["one.csv", "two.csv"])
def test_copies_come_after_the_rows_with_the_teachers_labels_and_logits(models, data):
    plain, stage = stage_of(models, data, augment=0), stage_of(models, data)
    own, rows, logits = plain.training_rows, stage.training_rows, stage.teacher_logits()
    assert rows.sentences[: len(own)] == own.sentences and rows.labels[: len(own)] == own.labels
    assert len(rows) == len(logits) == 3 * len(own) and len({*rows.sentences}) == len(rows)
    teacher, tokenizer = load_classifier(models / "teacher_model")
    expected = predict(teacher, encode(tokenizer, rows, 32), 0, stage.task)
    torch.testing.assert_close(logits, expected)
    assert rows.labels[len(own) :] == expected.argmax(-1)[len(own) :].tolist()
    assert set(rows.labels[len(own) :]) == {0, 1}
    torch.testing.assert_close(plain.teacher_logits(), logits[: len(own)])


def test_what_is_held_out_stays_as_it_is_and_out_of_the_copies(models):
    shares = dict(augment=20, augment_span=1.0, augment_drop=0.0, augment_replace=0.0, augment_join=0.0)
    plain, stage = stage_of(models, augment=0), stage_of(models, train_fraction=0.5, **shares)
    assert (stage.data.selection, stage.data.validation) == (plain.data.selection, plain.data.validation)
    own = stage.own_rows
    assert len(own) == round(len(plain.training_rows) / 2)
    added = stage.training_rows.sentences[len(own) :]
    assert all(any(copy in text for text in own.sentences) for copy in added), "copies are of the share that is used"
    parts = stage.data.train, stage.data.selection, stage.data.validation
    inside = {text for part in parts for text in part.sentences}
    assert added and not inside & {*added}


def flags(models, output, *more):
    where = ["--dataset", models / "one.csv", "--teacher_path", models / "teacher_model", "--models_dir", output]
    return [*where, "--max_length", 32, "--batch_size", 8, "--num_epochs", 2, "--augment", 2, *more]


def test_a_killed_run_goes_on_to_the_same_result(models, tmp_path):
    more = ["--student_path", models / "student_model", "--pruning_end_epoch", 2, "--save_steps", 5]
    said = run_script(PRUNE, *flags(models, tmp_path / "whole", *more)).stdout
    words = flags(models, tmp_path / "killed", *more, "--resume")
    run_killed(PRUNE, *words, at="compression.training.seed_step", call=17)
    assert "Resumed at epoch 1, step 15" in run_script(PRUNE, *words).stdout
    whole, killed = (find_newest(tmp_path / folder, "pruned") for folder in ("whole", "killed"))
    for name in ("model.safetensors", "training_history.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert "Augmentation: 96 changed copies of 48 training rows are added" in said
    assert "Training: 144 rows, 2 epochs of 18 steps" in said


def test_two_processes_are_taught_the_same_rows(models, tmp_path):
    kept, records = [], []
    for run, folder in ((run_script, tmp_path / "one"), (run_distributed, tmp_path / "two")):
        run(DISTIL, *flags(models, folder, "--student_layers", 2))
        kept.append({path.name for path in folder.glob(".teacher_logits_*")})
        records.append(read_stage(folder / "student_model"))
    assert len(kept[0]) == 2 and kept[0] == kept[1], "named by a hash of the rows"
    for record in records:
        assert (record["data"]["train"], record["data"]["added"], record["config"]["augment"]) == (48, 96, 2)


def test_text_that_cannot_be_changed_is_refused(models):
    with pytest.raises(UserError, match="--augment 2: no training text can be changed so; use --augment 0"):
        _ = stage_of(models, "numbers.csv", augment_drop=0.0, augment_span=0.0, augment_join=0.0).training_rows


@pytest.mark.parametrize("script", [DISTIL, PRUNE])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--augment -1", "--augment -1: allowed is 0 to 100"),
        ("--augment_replace 1.5", "--augment_replace 1.5: allowed is 0 to 1"),
        ("--augment_neighbors 0", "--augment_neighbors 0: allowed is at least 1"),
        ("--augment_drop nan", "--augment_drop nan: allowed are finite numbers"),
        ("--augment 1" + "".join(f" --augment_{name} 0" for name in ("replace", "drop", "span", "join")), "above 0"),
    ],
)
def test_bad_values_end_in_one_line(script, words, message):
    error = run_script(script, "--dry_run", *words.split(), expect=2).stderr
    assert message in error and len(error.strip().splitlines()) == 1

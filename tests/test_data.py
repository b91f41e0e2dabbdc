"""Splits, tokenization and batches."""

import bz2
import csv
import hashlib

import pytest
import torch
from conftest import tiny_bert
from datasets import Dataset, DatasetDict
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from compression.assets import NotOnHub
from compression.batching import batches, length_grouped_order, model_inputs
from compression.classifier import data as data_module
from compression.classifier.data import Encoded, Split, encode, ensure_data, find_data, load_data
from compression.classifier.metrics import classification_metrics, score
from compression.classifier.report import confusion_columns, results_columns
from compression.classifier.tasks import Metric, Task
from compression.embedded import reviews_file
from compression.runtime import ROOT, UserError


def write_tsv(folder, train_rows=50):
    folder.mkdir(exist_ok=True)
    for name, rows in (("train.tsv", train_rows), ("dev.tsv", 8)):
        lines = [f"{name} sentence {row} \t{row % 2}" for row in range(rows)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return str(folder)


def test_selection_is_held_out_of_training_and_validation_is_whole(tmp_path):
    data = load_data(write_tsv(tmp_path / "sst2"))
    assert (len(data.train), len(data.selection), len(data.validation)) == (45, 5, 8)
    assert not set(data.train.sentences) & set(data.selection.sentences)
    assert data.validation.sentences[3] == "dev.tsv sentence 3" and data.validation.labels[3] == 1
    assert data.name == "SST-2 (GLUE)"


@pytest.mark.parametrize("line", ["no label here", "a sentence\t2", "\t1"])
def test_malformed_line_is_named(tmp_path, line):
    folder = write_tsv(tmp_path / "sst2")
    with (tmp_path / "sst2" / "train.tsv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="train.tsv, line 52: found"):
        load_data(folder)


ACCURACY = Metric("Accuracy", accuracy_score)
MRPC = Task(
    name="MRPC",
    about="paraphrase",
    text=("sentence1", "sentence2"),
    labels=("different", "same"),
    metrics={"f1": Metric("F1", f1_score), "accuracy": ACCURACY},
    primary="f1",
    tsv=("label", "", "", "sentence1", "sentence2"),
    tsv_header="Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    repository="nyu-mll/glue",
    subset="mrpc",
    folder=ROOT / "mrpc_data",
)
COLA = Task(
    name="CoLA",
    about="acceptability",
    text=("sentence",),
    labels=("wrong", "right"),
    metrics={"accuracy": ACCURACY, "mcc": Metric("Matthews", matthews_corrcoef)},
    primary="mcc",
    tsv=("", "label", "", "sentence"),
    tsv_header=None,
    repository="nyu-mll/glue",
    subset="cola",
    folder=ROOT / "cola_data",
)
LINES = {
    "MRPC": [f"{row % 2}\t1\t2\tfirst {row}\tsecond {row} " for row in range(20)],
    "CoLA": [f"gj04\t{row % 2}\t*\t first {row}" for row in range(20)],
}


def expected(task, row):
    return (f"first {row}", f"second {row}") if task is MRPC else f"first {row}"


@pytest.mark.parametrize("task", [MRPC, COLA], ids=lambda task: task.name)
def test_another_task_is_one_record(tmp_path, task):
    (tmp_path / task.name).mkdir()
    header = [] if task.tsv_header is None else [task.tsv_header]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / task.name / name).write_text("\n".join([*header, *LINES[task.name]]) + "\n")
    data = load_data(str(tmp_path), task)
    assert data.name == f"{task.name} (GLUE)" and len(data.train) == 18
    assert data.validation == Split([expected(task, row) for row in range(20)], [0, 1] * 10)
    with (tmp_path / task.name / "dev.tsv").open("a") as file:
        file.write("2\t2\t2\t2\n")
    shape = {
        "MRPC": "0 or 1<TAB>...<TAB>...<TAB>sentence1<TAB>sentence2",
        "CoLA": "...<TAB>0 or 1<TAB>...<TAB>sentence",
    }
    with pytest.raises(UserError, match=rf"dev.tsv, line {21 + len(header)}: found .*, expected {shape[task.name]}$"):
        load_data(str(tmp_path), task)


@pytest.mark.parametrize("task", [MRPC, COLA], ids=lambda task: task.name)
def test_saved_data_of_another_task(tmp_path, task):
    words = {"sentence": "first", "sentence1": "first", "sentence2": "second"}
    columns = {name: [f"{words[name]} {row}" for row in range(20)] for name in task.text}
    rows = Dataset.from_dict(columns | {"label": [0, 1] * 10, "idx": list(range(20))})
    DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "glue" / task.subset)
    assert load_data(str(tmp_path), task).validation == Split([expected(task, row) for row in range(20)], [0, 1] * 10)
    with pytest.raises(UserError, match=f"--data_dir {tmp_path}: no sentiment data there"):
        load_data(str(tmp_path))


def test_the_reviews_stand_in_for_their_task_only(tmp_path, monkeypatch):
    def unreachable(*_):
        raise NotOnHub("the hub is not reachable")

    monkeypatch.setattr(data_module, "hub_answers", lambda: False)
    monkeypatch.setattr(data_module, "hub_snapshot", unreachable)
    monkeypatch.setattr(data_module, "install_reviews", lambda *_: pytest.fail("the reviews were fetched"))
    (tmp_path / "embedded").mkdir()
    reviews_file(tmp_path / "embedded").touch()
    assert find_data(tmp_path).kind == "embedded" and find_data(tmp_path, COLA) is None
    with pytest.raises(UserError, match="^CoLA: the hub is not reachable; give its files with --data_dir$"):
        ensure_data(task=COLA, folder=tmp_path)


def test_a_tasks_own_metrics():
    logits, labels = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 1]]), torch.tensor([1, 0, 0, 1])
    metrics = classification_metrics(logits, labels, COLA)
    assert list(metrics) == ["n", "accuracy", "accuracy_standard_error", "mcc", "roc_auc", "confusion_matrix"]
    assert score(logits, labels, COLA) == metrics["mcc"] == pytest.approx(1 / 3**0.5)
    assert score(logits, labels, MRPC) == pytest.approx(0.8) and score(logits, labels) == metrics["accuracy"] == 0.75
    titles = [column.title for column in results_columns(128, COLA)]
    assert titles[:6] == ["Model", "Engine", "Computes in", "Accuracy (%)", "Matthews", "ROC-AUC"]
    assert [column.title for column in confusion_columns(COLA.labels)][1:3] == ["True wrong", "False right"]


def test_no_film_is_in_two_parts(tmp_path, monkeypatch):
    path = tmp_path / "reviews.csv.bz2"
    with bz2.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, ["category", "text", "movie_name"])
        writer.writeheader()
        for film in range(60):
            for review in range(5):
                category = "fresh" if review % 2 else "rotten"
                writer.writerow(
                    {"category": category, "text": f"film {film} review {review}", "movie_name": f"film_{film}"}
                )
            writer.writerow({"category": "plot", "text": f"plot of {film}", "movie_name": f"film_{film}"})
    source = data_module.DataSource("embedded", path, "Reviews", "embedded")
    monkeypatch.setattr(data_module, "ensure_data", lambda data_dir, task: source)
    loaded = load_data()
    films = [
        {sentence.split(" review")[0] for sentence in part.sentences}
        for part in (loaded.train, loaded.selection, loaded.validation)
    ]
    assert all(films) and len(films[0]) > 40
    assert not films[0] & films[1] and not films[0] & films[2] and not films[1] & films[2]
    assert sum(len(part) for part in (loaded.train, loaded.selection, loaded.validation)) == 300
    assert loaded.train.labels[:5] == [0, 1, 0, 1, 0]


def test_sample_is_seeded_and_keeps_pairs_together():
    split = Split([f"s{row}" for row in range(100)], list(range(100)))
    first, again, other = split.sample(0.3, 1), split.sample(0.3, 1), split.sample(0.3, 2)
    assert len(first) == 30 and first == again and first != other
    assert all(sentence == f"s{label}" for sentence, label in zip(first.sentences, first.labels, strict=True))


@pytest.fixture
def encoded():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (700,), generator=generator).tolist()
    return Encoded({"input_ids": [[7] * length for length in lengths]}, torch.arange(700))


def test_every_row_is_seen_once_an_epoch_in_a_new_order(encoded):
    first, second = (length_grouped_order(encoded.lengths, 8, seed=3, epoch=epoch) for epoch in (1, 2))
    assert sorted(row for rows in first for row in rows) == list(range(700))
    assert first != second
    assert first == length_grouped_order(encoded.lengths, 8, seed=3, epoch=1)


def test_batches_are_grouped_by_length(encoded):
    def padding(order):
        padded = sum(len(rows) * max(int(encoded.lengths[row]) for row in rows) for rows in order)
        return padded / int(encoded.lengths.sum()) - 1

    grouped = padding(length_grouped_order(encoded.lengths, 8, seed=3, epoch=1))
    mixed = padding([list(range(start, min(start + 8, 700))) for start in range(0, 700, 8)])
    assert grouped < 0.1 < mixed


def test_collate_pads_and_masks():
    encoded = Encoded({"input_ids": [[5, 6, 7], [8]]}, torch.tensor([1, 0]))
    batch = encoded.collate([1, 0], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]


def test_evaluation_batches_say_their_rows(encoded):
    seen = torch.cat([batch["rows"] for batch in batches(encoded, 64, 0)])
    assert sorted(seen.tolist()) == list(range(700))
    for batch in batches(encoded, 64, 0):
        assert batch["labels"].tolist() == batch["rows"].tolist()


def test_single_sentences_have_no_token_types_and_the_digest_that_they_had(tokenizer):
    encoded = encode(tokenizer, Split(["a b", "c"], [0, 1]), 9)
    ids = [[2, 5, 6, 3], [2, 7, 3]]
    assert encoded.inputs == {"input_ids": ids}
    assert encoded.digest() == hashlib.sha256(repr(ids).encode()).hexdigest()
    assert set(encoded.collate([0, 1], 0)) == {"input_ids", "attention_mask", "labels"}


def test_pairs_carry_which_sentence_a_token_is_of(tokenizer):
    pairs = encode(tokenizer, Split([("a b", "c"), ("d", "e f g")], [0, 1]), 6)
    ids, types = [[2, 5, 6, 3, 7, 3], [2, 8, 3, 9, 10, 3]], [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert pairs.inputs == {"input_ids": ids, "token_type_ids": types}, "the longer sentence of a pair is cut"
    inputs = {"input_ids": [*ids, [2, 5, 3, 6, 3]], "token_type_ids": [*types, [0, 0, 0, 1, 1]]}
    short = Encoded(inputs, torch.tensor([0, 1, 0]))
    batch = short.collate([2, 1], pad_token_id=9)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert pairs.digest() == hashlib.sha256(repr((ids, types)).encode()).hexdigest()
    without = Encoded({"input_ids": ids}, pairs.labels)
    assert pairs.digest() != without.digest(), "the teacher's logits depend on the types"


def test_what_else_a_tokenizer_gives_goes_to_the_models_that_take_it(tokenizer):
    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask, language=None, labels=None):
            raise NotImplementedError

    def with_language(texts, **options):
        return tokenizer(texts, **options) | {"language": [[7] * (len(text.split()) + 2) for text in texts]}

    encoded = encode(with_language, Split(["a b", "c"], [0, 1]), 9)
    batch = encoded.collate([1, 0], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[2, 7, 3, 9], [2, 5, 6, 3]]
    assert batch["language"].tolist() == [[7, 7, 7, 0], [7, 7, 7, 7]]
    assert set(model_inputs(Model(), batch)) == {"input_ids", "attention_mask", "language"}
    assert set(model_inputs(tiny_bert(), batch)) == {"input_ids", "attention_mask"}

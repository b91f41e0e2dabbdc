"""Splits, tokenization and batches."""

import bz2
import csv
import hashlib
from dataclasses import replace

import pytest
import torch
from conftest import bytes_tokenizer, tiny_bert
from tokenizers.processors import TemplateProcessing

from compression.batching import batches, length_grouped_order, model_inputs
from compression.classifier.data import DatasetSettings, Encoded, encode, load_data
from compression.classifier.glue import COLA, MRPC
from compression.classifier.metrics import classification_metrics, score
from compression.classifier.parts import Split
from compression.classifier.tasks import SST2, make_task
from compression.embedded import reviews_file
from compression.runtime import UserError


def write_tsv(folder, train_rows=50):
    folder.mkdir(exist_ok=True)
    for name, rows in (("train.tsv", train_rows), ("dev.tsv", 8)):
        lines = [f"{name} sentence {row} \t{row % 2}" for row in range(rows)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return str(folder)


def load(**settings):
    return load_data(DatasetSettings(**settings))


def test_selection_is_held_out_of_training_and_validation_is_whole(tmp_path):
    data = load(data_dir=write_tsv(tmp_path / "sst2"))
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
        load(data_dir=folder)


def test_a_tasks_own_metrics():
    logits, labels = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 1]]), torch.tensor([1, 0, 0, 1])
    cola = classification_metrics(logits, labels, task=COLA)
    assert score(logits, labels, task=COLA) == cola["matthews_correlation"] == pytest.approx(1 / 3**0.5)
    assert score(logits, labels, task=MRPC) == cola["f1"] == pytest.approx(0.8)
    assert score(logits, labels, task=SST2) == cola["accuracy"] == 0.75
    three = make_task("three", ["text"], ["a", "b", "c"])
    logits, labels = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 0, 2])
    assert classification_metrics(logits, labels, task=three)["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert set(three.metrics) == {"accuracy", "f1_macro"} and "f1_macro" not in COLA.metrics


def test_the_digest_tells_data_labels_and_metric(tmp_path):
    data = load(data_dir=write_tsv(tmp_path / "sst2"))
    other = make_task("SST-2", ["sentence"], ["bad", "good"]), make_task("SST-2", ["sentence"], SST2.labels, "f1")
    changed = [replace(data, task=task) for task in other] + [replace(data, validation=data.selection)]
    assert len({one.digest() for one in [data, *changed]}) == 4
    assert replace(data, name="moved", source="elsewhere").digest() == data.digest()


@pytest.mark.parametrize(
    ("dataset", "labels"), [("sst2", ["mockery", "praise"]), ("reviews3", ["mockery", "praise", "plot"])]
)
def test_no_film_is_in_two_parts(tmp_path, dataset, labels):
    path = reviews_file(tmp_path / "embedded")
    path.parent.mkdir()
    with bz2.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, ["category", "text", "movie_name"])
        writer.writeheader()
        for film in range(60):
            rows = [("fresh", f"praise of {film}"), ("rotten", f"mockery of {film}"), ("plot", f"plot of {film}")]
            for category, text in [*rows, ("fresh", f"praise of {film}")]:
                writer.writerow({"category": category, "text": text, "movie_name": f"film_{film}"})
    loaded = load(dataset=dataset, data_dir=str(tmp_path))
    parts = loaded.train, loaded.selection, loaded.validation
    films = [{sentence.split()[-1] for sentence in part.sentences} for part in parts]
    assert all(films) and len(films[0]) > 40
    assert not films[0] & films[1] and not films[0] & films[2] and not films[1] & films[2]
    assert sum(map(len, parts)) == 60 * len(labels), "a text that is there twice counts once"
    for part in parts:
        assert [text.split()[0] for text in part.sentences] == [labels[label] for label in part.labels]
    assert loaded.task.labels == (("negative", "positive") if dataset == "sst2" else ("rotten", "fresh", "plot"))


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


def test_pairs_of_a_tokenizer_without_token_types():
    words = bytes_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    words.model_input_names = ["input_ids", "attention_mask"]  # as RoBERTa's
    found = encode(words, Split([("one", "two"), ("three", "four")], [0, 1]), 40)
    first, second = (words(text, add_special_tokens=False)["input_ids"] for text in ("one", "two"))
    assert found.inputs.keys() == {"input_ids"}
    assert found.inputs["input_ids"][0] == [0, *first, 1, 1, *second, 1]

"""The user's own data: CSV, TSV, JSON lines, Parquet, folders of them, the hub."""

import csv
import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from test_data import load

from compression.classifier import own_data
from compression.classifier.parts import Split
from compression.classifier.table_files import read_table
from compression.runtime import UserError

WORDS = ["no", "yes"]
COUNT = 40
ROWS = [{"text": f"text {row}", "label": WORDS[row % 2]} for row in range(COUNT)]


def write(path, rows):
    """A file of rows, by its suffix."""
    names = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in [names, *(row.values() for row in rows)]))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([names, *(row.values() for row in rows)])
    return str(path)


def refused(message, **settings):
    with pytest.raises(UserError) as caught:
        load(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(own_data.log, "propagate", True)
    caplog.set_level("INFO")
    return caplog


SUFFIXES = ["csv", "tsv", "jsonl", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_split_the_same_way_whatever_its_form(tmp_path, suffix, said):
    data = load(dataset=write(tmp_path / f"mine.{suffix}", ROWS), validation_fraction=0.2)
    parts = data.train, data.selection, data.validation
    assert [len(part) for part in parts] == [28, 4, 8] and data.name == f"mine.{suffix}"
    assert data.task.labels == ("no", "yes") and data.task.text == ("text",)
    pairs = {
        (text, data.task.labels[label])
        for part in parts
        for text, label in zip(part.sentences, part.labels, strict=True)
    }
    assert pairs == {(row["text"], row["label"]) for row in ROWS}
    assert all(2 * sum(part.labels) == len(part) for part in parts), "each class has its share"
    other = load(dataset=write(tmp_path / "other.csv", ROWS), validation_fraction=0.2)
    assert other.digest() == data.digest()
    assert f"mine.{suffix}: no validation part, so 8 of its rows are held out for that" in said.text


@pytest.mark.parametrize("validation", ["validation", "dev", "valid"])
def test_a_folder_has_its_parts(tmp_path, validation, said):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / f"{validation}.jsonl", [{"text": "new", "label": "yes"}, ROWS[3]])
    write(tmp_path / "test.tsv", ROWS)
    (tmp_path / "README.md").write_text("about it")
    data = load(dataset=str(tmp_path))
    assert data.validation == Split(["new", "text 3"], [1, 1]) and len(data.train) + len(data.selection) == COUNT
    assert data.name == tmp_path.name and data.duplicates == 1 and data.describe()["duplicates"] == 1
    assert "1 of 2 validation texts are in the training data, too" in said.text
    assert "its test part is not used; what is reported is the validation part" in said.text


def test_a_folder_without_a_validation_part_is_split(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    assert len(load(dataset=str(tmp_path)).validation) == 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["dev.csv", "notes.md"], "no train part; found dev"),
        ([], "no train part; found nothing"),
        (["train.csv", "train.tsv"], "has train.csv and train.tsv; allowed is one of them"),
        (["train.csv", "dev.csv", "validation.csv"], "has validation and dev; allowed is one validation part"),
    ],
)
def test_folders_that_do_not_say_what_is_what(tmp_path, files, message):
    for file in files:
        write(tmp_path / file, ROWS)
    refused(f"--dataset {tmp_path}: {message}", dataset=str(tmp_path))


def test_rows_of_one_text_stay_on_one_side(tmp_path):
    rows = [{"text": f"text {row % 12}", "label": WORDS[row % 2]} for row in range(60)]
    data = load(dataset=write(tmp_path / "mine.csv", rows), validation_fraction=0.3)
    train, selection, validation = (set(part.sentences) for part in (data.train, data.selection, data.validation))
    assert not train & validation and not train & selection and not selection & validation
    assert len(validation) == 4 and len(data.validation) == 20 and data.duplicates == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 1], ("0", "1")),
        ([10, 9, -1], ("-1", "9", "10")),
        ([1, 2, 3, 4, 5], ("1", "2", "3", "4", "5")),
        (["ham", "spam", "Eggs"], ("Eggs", "ham", "spam")),
        (["01", "2"], ("01", "2")),
        ([True, False], ("false", "true")),
    ],
    ids=str,
)
def test_labels_are_numbers_by_size_or_words_by_the_alphabet(tmp_path, suffix, values, labels):
    rows = [{"text": f"text {row}", "label": values[row % len(values)]} for row in range(COUNT)]
    data = load(dataset=write(tmp_path / f"mine.{suffix}", rows))
    if values == [True, False] and suffix in ("csv", "tsv"):
        labels = ("False", "True")  # as Python spells them
    assert data.task.labels == labels
    assert set(data.task.metrics) == {"accuracy", "f1" if len(labels) == 2 else "f1_macro"}
    of = {row["text"]: str(row["label"]) for row in rows}
    found = zip(data.train.sentences, data.train.labels, strict=True)
    assert all(labels[label].lower() == of[text].lower() for text, label in found)


def test_names_that_the_file_gives_its_classes_keep_their_order(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    columns = {"text": [row["text"] for row in ROWS], "label": [row % 2 for row in range(COUNT)]}
    rows = Dataset.from_dict(columns, features)
    rows.to_parquet(tmp_path / "mine.parquet")
    DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    for name in ("mine.parquet", "saved"):
        data = load(dataset=str(tmp_path / name))
        assert data.task.labels == ("yes", "no") and data.task.metrics.keys() == {"accuracy", "f1"}
        assert all(
            int(text.split()[1]) % 2 == label
            for text, label in zip(data.train.sentences, data.train.labels, strict=True)
        )
    Dataset.from_dict(columns | {"label": [-1] * COUNT}, features).to_parquet(tmp_path / "mine.parquet")
    message = "mine.parquet, row 1: found label -1, allowed is a number from 0 of 2 labels (yes, no)"
    refused(message, dataset=str(tmp_path / "mine.parquet"))
    three = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no", "maybe"])})
    Dataset.from_dict(columns, three).to_parquet(tmp_path / "mine.parquet")
    refused("mine.parquet: no training rows of 1 labels (maybe)", dataset=str(tmp_path / "mine.parquet"))


# Columns of a file: texts (one or two), then the label, then others; and flags that name what has no usual name.
NAMED = [
    (["text", "label"], 1, {}),
    (["Review", "Sentiment", "id"], 1, {}),
    (["question", "passage", "answer", "title"], 2, {}),
    (["premise", "hypothesis", "gold_label"], 2, {}),
    (["sentence1", "sentence2", "class", "idx"], 2, {}),
    (["question", "sentence", "label"], 2, {}),
    (["subject", "stars"], 1, {"text_column": "subject", "label_column": "stars"}),
    (["body text", "label", "text"], 1, {"text_column": "body text"}),
    (["a", "b", "label"], 2, {"text_column": "a", "text_pair_column": "b"}),
    (["sentence1", "label", "sentence2"], 1, {"text_column": "sentence1"}),
    (["text", "category", "label"], 1, {"label_column": "category"}),
]


@pytest.mark.parametrize(("names", "texts", "flags"), NAMED)
def test_columns_are_found_by_their_usual_names_or_flags(tmp_path, names, texts, flags):
    rows = [{name: f"{name} {row}" for name in names} | {names[texts]: WORDS[row % 2]} for row in range(COUNT)]
    data = load(dataset=write(tmp_path / "mine.csv", rows), **flags)
    assert data.task.text == tuple(names[:texts])
    expected = [tuple(row[name] for name in names[:texts]) if texts == 2 else row[names[0]] for row in rows]
    assert set(data.train.sentences) < set(expected)


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        ("phrase label", {}, "no text by its usual name among the columns phrase, label; name it with --text_column"),
        ("text stars", {}, "no label by its usual name among the columns text, stars; name it with --label_column"),
        ("text review label", {}, "more than one text by its usual name (text, review) among"),
        ("text label class", {}, "more than one label by its usual name (label, class) among"),
        ("question passage sentence label", {}, "(question + passage, question + sentence) among"),
        ("text;label x", {}, "no text by its usual name among the columns text;label, x"),
        (
            "text label",
            {"label_column": "stars"},
            "--label_column stars: --dataset {} has no such column; it has text, l",
        ),
        ("text label", {"text_column": "label", "label_column": "label"}, "--text_column label --label_column label: "),
        ("a b label", {"text_pair_column": "b"}, "--text_pair_column b: give --text_column, too"),
        ("text text label", {}, "has more than one column 'text'"),
    ],
)
def test_columns_that_are_not_clear_name_the_flag(tmp_path, names, flags, message):
    path = tmp_path / "mine.csv"
    columns = names.split()
    path.write_text(
        "".join(",".join(line) + "\n" for line in [columns, *([f"{row}"] * len(columns) for row in "abcd")])
    )
    refused(message.format(path), dataset=str(path), **flags)


CSV = "text,label\n" + "".join(f"text {row},{WORDS[row % 2]}\n" for row in range(COUNT))
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.csv", CSV + "one field\n", "line 42: found 1 fields (['one field']), allowed is 2: text, label"),
        ("a.csv", CSV + "a,b,c\n", "line 42: found 3 fields (['a', 'b', 'c']), allowed is 2: text, label"),
        ("a.csv", CSV + '"two\nlines, ""quoted""",no\n\n ,no\n', "line 45: found text ' ', allowed is a text"),
        ("a.csv", CSV + '"two\nlines",\n', "line 42: found label '', allowed is a word or a whole number"),
        ("a.csv", CSV + 'a,no\n"never closed,no\nb,no\n', "line 43: is no valid CSV (unexpected end of data)"),
        ("a.csv", CSV + '"a"b,no\n', "line 42: is no valid CSV"),
        ("a.csv", "text,label\n", "found 0 labels () in label, allowed are two or more"),
        ("a.csv", "\n\n", "holds no rows; allowed is a header line"),
        ("a.csv", "text,label\na,no\nb,no\n", "found 1 labels (no) in label, allowed are two or more"),
        ("a.csv", "text,label\na,1.5\nb,1.6\nc,0.2\n", "found 3 different labels in 3 rows of label, allowed are half"),
        ("a.csv", "text,label\n" + "a,no\nb,yes\n" * 4, "8 training rows; at least 10 are needed"),
        ("a.csv", "", "is empty"),
        ("a.tsv", CSV.replace(",", "\t") + "a\tb\tno\n", "line 42: found 3 fields"),
        ("a.tsv", CSV.replace(",", "\t") + '"a\tno\n \tno\n', "line 43: found text ' '"),
        ("a.jsonl", JSONL + "\n[1]\n", "line 42: found [1], allowed is an object"),
        ("a.jsonl", JSONL + "{\n", "(line 41: "),
        ("a.jsonl", JSONL + '{"label": "no"}\n', "line 41: found text None, allowed is a text"),
        ("a.jsonl", JSONL + '{"text": 7, "label": "no"}\n', "line 41: found text 7, allowed is a text"),
        ("a.jsonl", JSONL + '{"text": "\\ud800", "label": "no"}\n', "line 41: found text '\\ud800', allowed is a text"),
        ("a.jsonl", JSONL + '{"text": "a"}\n', "line 41: found label None, allowed is a word or a whole number"),
        ("a.jsonl", JSONL + '{"text": "a", "label": 1.5}\n', "line 41: found label 1.5, allowed is a word or a whole"),
        ("a.jsonl", JSONL + '{"text": "a", "label": ["no"]}\n', "line 41: found label ['no'], allowed is a word"),
        ("a.parquet", "no table", "cannot be read as Parquet"),
        ("a.xlsx", "no table", "allowed are files of .csv, .tsv, .jsonl, .parquet"),
        ("a.csv", CSV.encode("utf-16"), "begins as UTF-16"),
        ("a.csv", CSV.replace("text 3", "caf\xe9").encode("latin-1"), "is 0xe9; allowed is text in UTF-8"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(message, dataset=str(path))


def test_a_row_of_parquet_is_named_by_its_number(tmp_path):
    write(tmp_path / "mine.parquet", [*ROWS, {"text": None, "label": "no"}])
    refused("mine.parquet, row 41: found text None, allowed is a text", dataset=str(tmp_path / "mine.parquet"))


def test_a_label_that_training_lacks_is_named(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "validation.csv", [ROWS[0], {"text": "a", "label": "maybe"}])
    message = "validation.csv, line 3: found label 'maybe', allowed are the 2 labels (no, yes) of the training data"
    refused(message, dataset=str(tmp_path))
    write(tmp_path / "validation.csv", [{"sentence": "a", "label": "no"}])
    refused(
        "validation.csv: has no column text, as the training data has; it has sentence, label", dataset=str(tmp_path)
    )


def test_marks_line_ends_and_quoted_newlines_are_read(tmp_path):
    path = tmp_path / "mine.csv"
    text = '\ufefftext,label\r\n"two\r\nlines, ""here""",yes\r\n' + CSV.split("\n", 1)[1].replace("\n", "\r\n")
    path.write_bytes(text.encode())
    assert read_table(path, "--dataset").columns["text"][0] == 'two\nlines, "here"'
    long = "word " * 100_000
    path.write_text(f"{CSV}{long},no\n")
    assert read_table(path, "--dataset").columns["text"][-1] == long


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "nowhere.csv"}, "--dataset nowhere.csv: no such file or folder; allowed are files of .csv, .tsv"),
        ({"dataset": "./nowhere"}, "--dataset ./nowhere: no such file or folder"),
        ({"dataset": "a/b/c"}, "--dataset a/b/c: no such file or folder"),
        ({"dataset": "rte", "text_column": "a"}, "--text_column a: the columns of rte are known; leave it out"),
        ({"dataset": "reviews3", "label_column": "a"}, "--label_column a: the columns of reviews3 are known"),
        ({"dataset": "mine.csv", "data_dir": "x"}, "--data_dir x: is for sst2, cola, mrpc"),
        ({"dataset": "reviews3", "data_dir": "nowhere"}, "--data_dir nowhere: has no embedded/rotten_tomatoes"),
        ({"validation_fraction": 0.9}, "--validation_fraction 0.9: allowed is 0.001 to 0.5"),
    ],
)
def test_flags_that_do_not_fit_together(settings, message):
    refused(message, **settings)


# The hub.


@pytest.fixture
def hub(monkeypatch):
    """A hub with data sets by name and configuration; what it was asked for."""
    asked = []
    rows = Dataset.from_list(ROWS)
    held = {
        ("some/words", None): DatasetDict(train=rows, test=rows),
        ("some/words", "short"): DatasetDict(train=rows, validation=rows.select([1, 2]), test=rows),
        ("some/tests", None): DatasetDict(test=rows),
        ("multi", None): DatasetDict(
            train=Dataset.from_dict(
                {"text": ["a", "b"], "labels": [[0], [1]]},
                Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=WORDS))}),
            )
        ),
    }

    def load_dataset(name, config=None):
        asked.append((name, config))
        if (name, config) not in held:
            raise ValueError(f"BuilderConfig {config!r} not found.\nAvailable: ['short']")
        return held[name, config]

    monkeypatch.setattr(own_data, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_data_sets_of_the_hub(hub, said):
    data = load(dataset="some/words")
    assert (len(data.train), len(data.selection), len(data.validation)) == (32, 4, 4)
    assert "no validation part, so 4 of its rows are held out" in said.text and "test part is not used" in said.text
    data = load(dataset="some/words:short")
    assert data.name == "some/words:short" and data.validation == Split(["text 1", "text 2"], [1, 0])
    assert hub == [("some/words", None), ("some/words", "short")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some/words:long", "--dataset some/words:long: no file, no folder, and no data set of the hub (BuilderConfig"),
        ("some/tests", "--dataset some/tests: no train part; found test"),
        ("multi", "--dataset multi, train, row 1: found labels [0], allowed is a word or a whole number"),
    ],
)
def test_data_sets_of_the_hub_that_are_no_use(hub, name, message):
    refused(message, dataset=name)


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(own_data, "hub_answers", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    refused("the hub is not reachable and its cache lacks it", dataset="no/such_data")
    assert datasets.config.HF_HUB_OFFLINE

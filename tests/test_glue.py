"""GLUE's classification tasks: their own files, saved data sets, the hub."""

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from test_data import load

from compression.assets import NotOnHub
from compression.classifier import glue as glue_module
from compression.classifier.glue import GLUE, ensure_glue, find_glue
from compression.classifier.parts import Split
from compression.embedded import reviews_file
from compression.runtime import UserError

MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse"]
MNLI += ["sentence2_parse", "sentence1", "sentence2", "label1"]
# The first line of train.tsv, and a line of it: {0} is the row, {1} the label as that file has it.
FILES = {
    "sst2": ("sentence\tlabel", "first {0} \t{1}"),
    "cola": (None, "gj04\t{1}\t*\tfirst {0}"),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{1}\t1\t2\tfirst {0}\tsecond {0} "),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tfirst {0}\tsecond {0}\t{1}"),
    "mnli": ("\t".join([*MNLI, "gold_label"]), "1\t2\t3\tfiction\t(\t(\t(\t(\tfirst {0}\tsecond {0}\tneutral\t{1}"),
    "qnli": ("index\tquestion\tsentence\tlabel", "7\tfirst {0}\tsecond {0}\t{1}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "7\tfirst {0}\tsecond {0}\t{1}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "7\tfirst {0}\tsecond {0}\t{1}"),
}
WORDS = {
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}
ROWS = 24


def expected(name):
    glue = GLUE[name]
    texts = [f"first {row}" if len(glue.task.text) == 1 else (f"first {row}", f"second {row}") for row in range(ROWS)]
    return Split(texts, [row % len(glue.task.labels) for row in range(ROWS)])


def write_files(folder, name):
    """Both of the task's files, of the same rows; MNLI's dev file has more columns than its other one."""
    folder.mkdir()
    first, line = FILES[name]
    words = WORDS.get(name, ["0", "1"])
    lines = [line.format(row, words[row % len(words)]) for row in range(ROWS)]
    for file in ("train.tsv", GLUE[name].dev):
        (folder / file).write_text("\n".join([*([first] if first else []), *lines]) + "\n", encoding="utf-8")
    if name == "mnli":
        header = "\t".join([*MNLI, "label2", "label3", "label4", "label5", "gold_label"])
        lines = ["\t".join([*line.split("\t")[:11], *"nnnn", line.split("\t")[11]]) for line in lines]
        (folder / GLUE[name].dev).write_text("\n".join([header, *lines]) + "\n")


@pytest.mark.parametrize("name", GLUE)
def test_glues_own_files(tmp_path, name):
    glue = GLUE[name]
    write_files(tmp_path / glue.name, name)
    data = load(dataset=name, data_dir=str(tmp_path))
    assert data.name == f"{glue.name} (GLUE)" and data.task == glue.task and len(data.train) == ROWS - ROWS // 10
    assert data.validation == expected(name) and data.duplicates == ROWS


@pytest.mark.parametrize("name", GLUE)
def test_a_malformed_line_is_named(tmp_path, name):
    write_files(tmp_path / "here", name)
    train, number = tmp_path / "here" / "train.tsv", ROWS + 1 + (FILES[name][0] is not None)
    whole, line = train.read_text(), FILES[name][1]
    label = WORDS.get(name, ["0"])[0]
    for bad, found in (
        (line.format(99, label).replace("first 99", " "), "found .+ ' +', allowed is a text"),
        (line.format(99, "7"), rf"found \w+ '7', allowed are .*{', '.join(GLUE[name].task.labels)}"),
    ):
        train.write_text(f"{whole}{bad}\n")
        with pytest.raises(UserError, match=rf"^--data_dir .*train.tsv, line {number}: {found}"):
            load(dataset=name, data_dir=str(train.parent))


def test_lines_of_qqp_that_are_broken_are_counted_and_those_of_others_refused(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(glue_module.log, "propagate", True)
    for name in ("qqp", "rte"):
        write_files(tmp_path / name, name)
        with (tmp_path / name / "train.tsv").open("a") as file:
            file.write("1\t2\n")
    assert len(load(dataset="qqp", data_dir=str(tmp_path / "qqp")).train) == ROWS - ROWS // 10
    assert "train.tsv: 1 broken lines of 25 passed over" in caplog.text
    with pytest.raises(UserError, match=r"line 26: found 2 fields \(\['1', '2'\]\), allowed is 4: index, sentence1,"):
        load(dataset="rte", data_dir=str(tmp_path / "rte"))


def test_files_of_another_task_are_refused(tmp_path):
    write_files(tmp_path / "here", "rte")
    with pytest.raises(
        UserError, match="train.tsv: the first line must name question, sentence and label.*found index"
    ):
        load(dataset="qnli", data_dir=str(tmp_path / "here"))
    with pytest.raises(
        UserError, match="no data of MNLI there; allowed .* train.tsv and dev_matched.tsv, or .*glue/mnli"
    ):
        load(dataset="mnli", data_dir=str(tmp_path / "here"))


def as_dataset(name, named=True):
    glue = GLUE[name]
    rows = expected(name)
    texts = zip(*rows.sentences, strict=True) if len(glue.task.text) == 2 else [rows.sentences]
    columns = {column: list(values) for column, values in zip(glue.task.text, texts, strict=True)}
    kinds = dict.fromkeys(glue.task.text, Value("string"))
    kinds |= {"label": ClassLabel(names=list(glue.task.labels)) if named else Value("int64"), "idx": Value("int32")}
    return Dataset.from_dict(columns | {"label": rows.labels, "idx": list(range(ROWS))}, Features(kinds))


@pytest.mark.parametrize("named", [False, True], ids=["numbers", "names"])
@pytest.mark.parametrize("name", GLUE)
def test_saved_data_sets(tmp_path, name, named):
    rows = as_dataset(name, named)
    DatasetDict({"train": rows, GLUE[name].validation: rows}).save_to_disk(tmp_path / "glue" / name)
    assert load(dataset=name, data_dir=str(tmp_path)).validation == expected(name)


def test_a_saved_data_set_of_other_labels_is_refused(tmp_path):
    rows = as_dataset("wnli").cast_column("label", ClassLabel(names=["no", "yes"]))
    DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "glue" / "wnli")
    with pytest.raises(UserError, match="train, row 1: found label 'no', allowed are .*not_entailment, entailment"):
        load(dataset="wnli", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["cola", "mnli"])
def test_the_hub_is_asked_once(tmp_path, monkeypatch, name):
    asked = []

    def snapshot(repository, kind, patterns, use_hub):
        asked.append(patterns)
        for part in ("train", GLUE[name].validation):
            (tmp_path / "cache" / name).mkdir(parents=True, exist_ok=True)
            as_dataset(name).to_parquet(tmp_path / "cache" / name / f"{part}-00000-of-00001.parquet")
        return tmp_path / "cache"

    monkeypatch.setattr(glue_module, "hub_answers", lambda: True)
    monkeypatch.setattr(glue_module, "hub_snapshot", snapshot)
    for _ in range(2):
        found = ensure_glue(GLUE[name], folder=tmp_path / "glue_data")
    assert found.path == tmp_path / "glue_data" / "glue" / name and found.source == "hub nyu-mll/glue cache"
    assert asked == [[f"{name}/train-*.parquet", f"{name}/{GLUE[name].validation}-*.parquet"]]
    assert load(dataset=name, data_dir=str(tmp_path / "glue_data")).validation == expected(name)


def test_the_reviews_stand_in_for_their_task_only(tmp_path, monkeypatch):
    def unreachable(*_):
        raise NotOnHub("the hub is not reachable")

    monkeypatch.setattr(glue_module, "hub_answers", lambda: False)
    monkeypatch.setattr(glue_module, "hub_snapshot", unreachable)
    monkeypatch.setattr(glue_module, "install_reviews", lambda *_: pytest.fail("the reviews were fetched"))
    (tmp_path / "embedded").mkdir()
    reviews_file(tmp_path / "embedded").touch()
    assert find_glue(tmp_path, GLUE["sst2"]).kind == "embedded" and find_glue(tmp_path, GLUE["cola"]) is None
    with pytest.raises(UserError, match="^CoLA: the hub is not reachable; give its files with --data_dir$"):
        ensure_glue(GLUE["cola"], folder=tmp_path)


def test_a_class_without_training_rows_is_named(tmp_path):
    write_files(tmp_path / "here", "mnli")
    train = tmp_path / "here" / "train.tsv"
    train.write_text(train.read_text().replace("contradiction", "neutral"))
    with pytest.raises(UserError, match=r"MNLI \(GLUE\): no training rows of 1 labels \(contradiction\)"):
        load(dataset="mnli", data_dir=str(train.parent))

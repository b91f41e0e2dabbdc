"""What is no text, no JSON or no row of instructions is refused in one line that names the place."""

import json
import os

import pytest
from test_data import write_tsv

from compression.classifier.data import DatasetSettings, load_data
from compression.llm.rows import read_instructions
from compression.llm.text import load_corpus
from compression.runtime import UserError
from compression.text_files import read_text

NOT_TEXT = [
    (b"", "is empty"),
    ("words\n".encode("utf-16"), "byte 0 begins as UTF-16.*iconv -f UTF-16 -t UTF-8"),
    (b"two words\0 more", "byte 9 is zero.*allowed is text in UTF-8"),
    ("caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"), "byte 3 is 0xe9.*iconv -f LATIN1 -t UTF-8"),
    (b"\xef\xbb\xbfabc\xff", "byte 6 is 0xff"),
]


def refused(call, match):
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("content", "message"), NOT_TEXT)
def test_what_is_no_text_is_refused_wherever_text_is_read(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    assert refused(lambda: load_corpus(str(path), "train"), message).startswith(f"--dataset {path}: ")
    in_folder = tmp_path / "wikitext2" / "wiki.train.raw"
    in_folder.parent.mkdir()
    in_folder.write_bytes(content)
    assert f"--data_dir {in_folder}: " in refused(lambda: load_corpus("wikitext2", "train", str(tmp_path)), message)
    folder = write_tsv(tmp_path / "sst2")
    (tmp_path / "sst2" / "dev.tsv").write_bytes(content)
    assert "dev.tsv: " in refused(lambda: load_data(DatasetSettings(data_dir=folder)), message)
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_bytes(content)
        refused(lambda name=name: read_instructions(tmp_path / name), message)


def test_marks_and_line_ends_are_no_part_of_the_text(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\u2028four\n".encode())
    assert read_text(path, "--dataset") == "one\ntwo\nthree\u2028four\n"


def test_folders_and_loops_of_links_are_named(tmp_path):
    folder = tmp_path / "wikitext2"
    (folder / "wiki.train.raw").mkdir(parents=True)
    refused(lambda: load_corpus("wikitext2", "train", str(tmp_path)), "wiki.train.raw: cannot be read .Is a directory")
    os.symlink("wiki.test.raw", folder / "wiki.test.raw")
    refused(lambda: load_corpus("wikitext2", "test", str(tmp_path)), "wiki.test.raw: cannot be read .Too many levels")
    for name in (str(folder / "wiki.test.raw"), "x" * 5000, str(folder)):
        refused(lambda name=name: load_corpus(name, "test"), "no such file; allowed is a text file or one of")


GOOD = {"instruction": "Say a.", "output": "a"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"instruction": "b", "output": NaN}', "row 2 is .*NaN.*must have instruction, input and output as text"),
        ('{"instruction": "b"}', "row 2 is .*must have instruction"),
        ('{"instruction": "b", "output": "\\ud800"}', "row 2 is .*must have instruction"),
        ('{"instruction": "b", "output": %s}' % ("9" * 5000), "is no valid JSON.*limit"),
        ("[" * 100_000, "is no valid JSON.*nested too deeply"),
        ("[" * 900 + "]" * 900, "row 2 is "),
        ("null", "row 2 is null"),
        ("{", "is no valid JSON"),
    ],
)
def test_rows_that_are_no_instructions_are_named(tmp_path, second, message):
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f"{json.dumps(GOOD)}\n{second}\n")
    whole.write_text(f"[{json.dumps(GOOD)}, {second}]")
    for path in (lines, whole):
        assert str(path) in refused(lambda path=path: read_instructions(path), message)
    if "no valid" in message:
        refused(lambda: read_instructions(lines), r"\(line 2: ")


def test_rows_may_hold_any_character_that_ends_a_line_elsewhere(tmp_path):
    row = {"instruction": "one\u2028two", "output": "\x85", "input": ""}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n" + json.dumps(GOOD))
    assert read_instructions(path) == [row, GOOD]


def test_a_damaged_folder_of_datasets_is_named(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {"sentence": [f"words {row}" for row in range(20)], "label": [0, 1] * 10}
    DatasetDict({name: Dataset.from_dict(rows) for name in ("train", "validation")}).save_to_disk(tmp_path / "sst2")
    assert len(load_data(DatasetSettings(data_dir=str(tmp_path / "sst2"))).train) == 18
    for path in (tmp_path / "sst2" / "validation").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    refused(
        lambda: load_data(DatasetSettings(data_dir=str(tmp_path / "sst2"))),
        "--data_dir .*sst2: cannot be read .*download_model.py",
    )

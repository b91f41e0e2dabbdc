"""A record of checksums: what was damaged or changed since it was written does not pass."""

import json

import pytest

from compression.integrity import differing, files_in, read_record, seal, verify
from compression.runtime import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "deep" / "config").write_text("{}")
    seal(tmp_path, {"stage": "teacher", "value": 0.1 + 0.2, "pair": (1, 2)})
    return tmp_path


def test_an_untouched_folder_passes(folder):
    verify(folder)
    record = read_record(folder)
    assert set(record["files"]) == {"weights", "deep/config"} and record["files"]["weights"]["size"] == 256 * 64
    (folder / "notes.txt").write_text("beside it")
    verify(folder)


@pytest.mark.parametrize("name", ["weights", "deep/config"])
def test_every_change_of_a_file_is_noticed(folder, name):
    path, whole = folder / name, (folder / name).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for bad in (flipped, whole[:-1], b"", whole + b" "):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"{path}: is damaged or was changed"):
            verify(folder)
    path.write_bytes(whole)
    verify(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing, though stage.json lists it"):
        verify(folder)
    assert differing(folder, "stage.json") == [name]


def test_a_change_of_the_record_itself_is_noticed(folder):
    path = folder / "stage.json"
    path.write_text(path.read_text().replace("teacher", "student"))
    with pytest.raises(UserError, match="stage.json: is damaged or was changed"):
        read_record(folder)
    with pytest.raises(UserError):
        verify(folder)


def test_another_layout_of_the_same_record_passes(folder):
    path = folder / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    verify(folder)


def test_every_truncation_of_the_record_is_noticed(folder):
    path = folder / "stage.json"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="stage.json"):
            read_record(folder)


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "", "{"])
def test_a_record_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "stage.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/stage.json"):
        read_record(tmp_path)


def test_a_folder_made_elsewhere_has_nothing_to_check(tmp_path):
    (tmp_path / "weights").touch()
    verify(tmp_path)
    (tmp_path / "stage.json").write_text('{"stage": "teacher"}')
    verify(tmp_path)
    assert read_record(tmp_path) == {"stage": "teacher"}


def test_links_count_as_files(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert files_in(tmp_path) == ["dangling", "link"]

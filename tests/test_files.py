"""Whole or not at all, by one process at a time, and nothing that a killed run left is taken for anything else."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from scripts import start_program

from compression import files
from compression.files import (
    leftovers,
    locked,
    new_file,
    new_folder,
    read_json,
    real_path,
    remove_leftovers,
    restore_replaced,
    write_json,
)
from compression.runtime import UserError

HOLD = """
import sys, time
from pathlib import Path
from compression.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
REPLACE = """
import sys
from pathlib import Path
from compression import files
if sys.argv[2] == "two renames":
    files._exchange = lambda *_: False
for number in range(30):
    with files.new_folder(Path(sys.argv[1])) as folder:
        (folder / "a").write_text(str(number))
        (folder / "b").write_text(str(number))
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def held(tmp_path):
    """Another process holds the lock of `target`."""
    process = start_program(HOLD, tmp_path / "target")
    process.wait_until(lambda: process.said == "held\n")
    yield process
    process.process.kill()
    process.wait()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for text in ("old", "new"):
        with new_folder(tmp_path / "target") as folder:
            (folder / text).write_text(text)
            assert names(tmp_path / "target") == ["old"] if text == "new" else not (tmp_path / "target").exists()
    assert names(tmp_path) == ["target"] and names(tmp_path / "target") == ["new"]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A crash of the machine leaves no named folder with empty files: every file is synced, then the rename."""
    events, fsync, rename = [], os.fsync, os.rename
    inodes = {}

    def note_sync(file):
        events.append(inodes.get(os.fstat(file).st_ino, "parent"))
        fsync(file)

    def note_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr("os.fsync", note_sync)
    monkeypatch.setattr("os.rename", note_rename)
    with new_folder(tmp_path / "target") as folder:
        (folder / "deep").mkdir()
        for path in (folder / "weights", folder / "deep" / "config"):
            path.write_text("x")
            inodes[path.stat().st_ino] = path.name
        inodes[(folder / "deep").stat().st_ino], inodes[folder.stat().st_ino] = "deep", "folder"
    assert set(events[: events.index("rename")]) == {"weights", "config", "deep", "folder"}
    assert events[events.index("rename") :] == ["rename", "parent"]


def test_a_failure_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "target" / "kept", 1)
    for replace in (lambda: new_folder(tmp_path / "target"), lambda: new_file(tmp_path / "target" / "kept")):
        with pytest.raises(RuntimeError), replace():
            raise RuntimeError
    assert names(tmp_path) == ["target"] and read_json(tmp_path / "target" / "kept") == 1


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "target").write_text("mine")
    with pytest.raises(UserError, match="is a file"), new_folder(tmp_path / "target"):
        pass
    assert (tmp_path / "target").read_text() == "mine" and names(tmp_path) == ["target"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "target") as folder:
        (folder / "new").touch()
    assert (tmp_path / "target").is_symlink() and names(tmp_path / "disk") == ["new"]


def test_readers_see_the_old_or_the_new_folder_while_another_process_replaces_it(tmp_path):
    target = tmp_path / "target"
    with new_folder(target) as folder:
        (folder / "a").write_text("-1")
        (folder / "b").write_text("-1")
    for how in ("exchange", "two renames"):
        writer = start_program(REPLACE, target, how)
        reads = 0
        while writer.process.exitcode is None:
            restore_replaced(target)
            try:
                folder = os.open(target, os.O_RDONLY)  # one folder, whatever its name is by now
            except FileNotFoundError:
                assert how == "two renames", "an exchange leaves no moment without a folder"
                continue
            try:
                values = [Path(f"/proc/self/fd/{folder}/{name}").read_text() for name in "ab"]
            except FileNotFoundError:
                continue  # it was removed after it was opened
            finally:
                os.close(folder)
            assert values[0] == values[1]
            reads += 1
        writer.wait().check()
        assert reads
        assert (target / "a").read_text() == "29" and names(tmp_path) == ["target"]


# Replaces a folder where the system cannot exchange two names, and is killed between the two renames.
BETWEEN = """
import os, signal, sys
from pathlib import Path
from compression import files

def rename(source, target, rename=os.rename):
    rename(source, target)
    if target.name.endswith(".old"):
        os.kill(os.getpid(), signal.SIGKILL)

files._exchange, os.rename = lambda *_: False, rename
with files.new_folder(Path(sys.argv[1])) as folder:
    (folder / "new").touch()
"""


def test_a_replacement_that_is_killed_between_its_renames_is_undone(tmp_path):
    target = tmp_path / "target"
    for _ in range(2):
        with new_folder(target) as folder:
            (folder / "old").touch()
        start_program(BETWEEN, target).wait().check(-signal.SIGKILL)
        assert not target.exists() and [path.suffix for path in tmp_path.glob(".target.*.old")] == [".old"]
        restore_replaced(target)  # as every reader does first
        assert names(target) == ["old"]
    with new_folder(target) as folder:
        (folder / "next").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["target"] and names(target) == ["next"]


def test_the_lock_names_who_holds_it(tmp_path, held):
    with pytest.raises(UserError) as caught, locked(tmp_path / "target", wait=0):
        pass
    assert f"process {held.pid} on host " in str(caught.value) and str(tmp_path / "target") in str(caught.value)
    held.end()
    with locked(tmp_path / "target", wait=0):
        assert json.loads((tmp_path / ".target.compression.lock").read_text())["process"] == os.getpid()
    assert names(tmp_path) == []


def test_a_lock_is_waited_for(tmp_path, held):
    threading.Timer(0.3, held.process.kill).start()
    write_json(tmp_path / "target", 1)
    assert held.wait().status == -signal.SIGKILL, "it was not waited for"
    assert read_json(tmp_path / "target") == 1


def test_what_killed_runs_left_goes_and_what_runs_write_stays(tmp_path, held):
    for name in (f".target.{'1' * 16}.tmp", f".dead.{'2' * 16}.tmp", f".gone.{'3' * 16}.old"):
        (tmp_path / name).mkdir()
    (tmp_path / f".file.json.{'4' * 16}.tmp").touch()
    (tmp_path / ".dead.compression.lock").touch()
    (tmp_path / ".yarn.lock").touch()
    (tmp_path / ".target.0.tmp").mkdir()
    assert len(leftovers(tmp_path)) == 6
    remove_leftovers(tmp_path)
    used = [f".target.{'1' * 16}.tmp", ".target.compression.lock"]
    assert names(tmp_path) == [".target.0.tmp", *used, ".yarn.lock", "gone"]


def test_own_temporary_folders_are_not_leftovers(tmp_path):
    with new_folder(tmp_path / "target") as folder:
        remove_leftovers(tmp_path)
        assert folder.is_dir()


def behind_another(error):
    """As a library raises that fails while it cleans up."""
    other = AttributeError("'Stream' object has no attribute 'pos'")
    other.__context__ = error
    return other


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict(tmp_path, value):
    with pytest.raises(UserError, match=r"a\.1\.b \(-?(nan|inf)\) is not a finite number"):
        write_json(tmp_path / "file", {"a": [1.0, {"b": value}]})
    assert names(tmp_path) == []
    (tmp_path / "file").write_text(f'{{"a": {json.dumps(value)}}}')
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000])
def test_what_is_no_json_is_said_in_one_line(tmp_path, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/file is not valid JSON"):
        read_json(tmp_path / "file")


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path, said in ((tmp_path / "a" / "x", "--flag .*circle"), (tmp_path / ("n" * 300), "--flag .*too long")):
        with pytest.raises(UserError, match=said):
            real_path(path, "--flag")
    with pytest.raises(UserError, match="longer than 200 bytes"):
        real_path(tmp_path / ("n" * 220), "--flag")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        behind_another(OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_is_said_in_one_line(tmp_path, error):
    with pytest.raises(UserError, match=f"{tmp_path}/target: cannot be written .No space left on device"):
        with new_folder(tmp_path / "target"):
            raise error
    assert names(tmp_path) == []

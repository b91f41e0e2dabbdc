"""A folder's record of what it is and of its files' checksums, and the check that it still holds that.

The record is a JSON object in the folder (`stage.json` of checkpoints, `source.json` of what was fetched, `run.json` of
a pruning run's results, `state.json` of what a killed run goes on from). `files` holds the sha256 and size of every
other file, `record_sha256` that of the record itself. A folder made elsewhere has no record, and nothing to check.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compression.files import json_text, read_object
from compression.runtime import UserError, log

STAGE_FILE, SOURCE_FILE, RUN_FILE, STATE_FILE = "stage.json", "source.json", "run.json", "state.json"
RECORDS = (STAGE_FILE, SOURCE_FILE, RUN_FILE, STATE_FILE)
RECORD_SHA256 = "record_sha256"
CARD = "README.md"
WEIGHT_FILES = (".safetensors", ".onnx", ".gguf")
"""Ends of the names of weight files, of checkpoints and exports."""
"""A checkpoint's model card: text that its reader may change or delete."""
SETTLED_NANOSECONDS = 2 * 10**9


def seal(folder: Path, record: dict[str, Any], name: str = STAGE_FILE) -> None:
    """Write a folder's record, with the checksums of all files that are in the folder now; the last thing to do.

    Raises:
        UserError: a number in the record is not finite.
    """
    files = {path: _entry(Path(folder) / path) for path in files_in(folder) if path != name}
    record = json.loads(json_text(record | {"files": files}, Path(folder) / name))
    record[RECORD_SHA256] = _digest_of(record)
    # No line end at its end: so every byte counts, and a record that lacks its last one is none.
    (Path(folder) / name).write_text(json_text(record, Path(folder) / name).rstrip(), encoding="utf-8")


def read_record(folder: Path, name: str = STAGE_FILE) -> dict[str, Any] | None:
    """A folder's record, None where there is none.

    Raises:
        UserError: it was changed since it was written, or is not a JSON object.
    """
    path = Path(folder) / name
    if not path.is_file():
        return None
    record = read_object(path)
    digest = record.get(RECORD_SHA256)
    if digest is not None and digest != _digest_of(record):
        raise _damaged(path, folder, name)
    return record


def _damaged(path: Path, folder: Path, record: str) -> UserError:
    return UserError(
        f"{path}: is damaged or was changed since it was written (its sha256 differs); make or fetch {folder} again, "
        f"or delete its {record} if the change was meant"
    )


def verify(folder: Path) -> None:
    """Check a folder's files against its record, where it has one; model cards may differ. A file is read once until it
    changes.

    Raises:
        UserError: a file is missing or differs; names it.
    """
    for name in RECORDS:
        for path in differing(folder, name):
            if Path(path).name == CARD:
                continue
            if not (Path(folder) / path).exists():
                raise UserError(f"{folder}: {path} is missing, though {name} lists it; make or fetch the folder again")
            raise _damaged(Path(folder) / path, folder, name)


def is_sound(folder: Path) -> bool:
    """Whether nothing of a folder is missing or damaged, see `verify`; what is, is logged."""
    try:
        verify(folder)
    except UserError as problem:
        log.info("%s", problem)
        return False
    return True


def differing(folder: Path, name: str) -> list[str]:
    """The files that a record lists and that are missing or are not as it says."""
    record = read_record(folder, name) or {}
    listed = record.get("files") or {}
    if not isinstance(listed, dict):
        raise UserError(f"{Path(folder) / name}: `files` is no object; make or fetch the folder again")
    return [path for path, entry in sorted(listed.items()) if not _is_as_listed(Path(folder) / path, entry)]


def _is_as_listed(path: Path, entry: Any) -> bool:
    if not isinstance(entry, dict) or not path.is_file() or path.stat().st_size != entry.get("size"):
        return False
    return sha256_of(path) == entry.get("sha256")


def files_in(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it; links count as files, whatever they lead to."""
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [str(Path(parent, name).relative_to(folder)) for name in files + links]
    return sorted(found)


def sha256_of(path: Path) -> str:
    """The sha256 of a file; it is read once, under whatever name, until its size or modification time changes."""
    status = os.stat(path)
    # A file may change twice within one tick of the clock that its times are taken from.
    if time.time_ns() - status.st_mtime_ns <= SETTLED_NANOSECONDS:
        return _sha256(path)
    contents = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if contents not in _known_sha256:
        _known_sha256[contents] = _sha256(path)
    return _known_sha256[contents]


def _sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# By device, inode, size and modification time.
_known_sha256: dict[tuple[int, ...], str] = {}


def _entry(path: Path) -> dict[str, str | int]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def weights_digest(sha256s: Iterable[str]) -> str:
    """A hash of weights, of the sha256 of their files in the order of the files' names."""
    return digest_of(b"".join(map(bytes.fromhex, sha256s)), 16)


def recorded_weights(record: dict[str, Any]) -> str | None:
    """The hash of the weights that a folder's record lists; None where it lists none."""
    files = record.get("files")
    listed = files if isinstance(files, dict) else {}
    weights = [name for name in sorted(listed) if name.endswith(".safetensors") and "/" not in name]
    return weights_digest(listed[name]["sha256"] for name in weights) if weights else None


def _digest_of(record: dict[str, Any]) -> str:
    """Of a record's values, whatever their order and layout, without the digest itself."""
    values = {name: value for name, value in record.items() if name != RECORD_SHA256}
    return digest_of(values)


def digest_of(content: Any, digits: int = 64) -> str:
    """The sha256 of a text, of bytes or of JSON values (objects in any order), cut to this many hex digits."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content, sort_keys=True)
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:digits]

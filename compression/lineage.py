"""What a checkpoint was made from, by the records of the folders; and paths as they may be shown to anyone."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.integrity import SOURCE_FILE, STAGE_FILE, read_record, recorded_weights
from compression.runtime import ROOT, UserError, relative_path

Record = dict[str, Any]


@dataclass(frozen=True)
class Ancestor:
    """A folder that a checkpoint was made from, and its record: empty where it has none or holds other weights now."""

    path: Path
    record: Record

    @property
    def place(self) -> str:
        return public_path(self.path)

    @property
    def about(self) -> str:
        """Where it lies, and where it was fetched from."""
        name, kind = self.record.get("name"), self.record.get("source")
        fetched = {"hub": f"{name} on the hub", "embedded": f"the package {name} {self.record.get('version')}"}
        origin = fetched.get(kind) if isinstance(kind, str) else None
        return f"`{self.place}` ({origin})" if origin else f"`{self.place}`"


def ancestors(stage: Record) -> list[Ancestor]:
    """The checkpoint's parent, that one's parent and so on, as far as the folders are still what they were."""
    found: list[Ancestor] = []
    step = input_of(stage, "parent")
    while step is not None and step not in found:
        found.append(step)
        step = input_of(step.record, "parent")
    return found


def data_of(stage: Record) -> list[Record]:
    """What a stage's data is, as its record says; each with a name."""
    data = as_object(stage.get("data"))
    entries = next((data[name] for name in ("calibration", "texts") if isinstance(data.get(name), list)), [data])
    return [entry for entry in map(as_object, entries) if isinstance(entry.get("name"), str)]


def texts_behind(stage: Record) -> set[str]:
    """What the texts are called that a checkpoint, and what it was made from, were calibrated and trained on."""
    records = [stage, *(step.record for step in ancestors(stage))]
    return {entry["name"] for record in records for entry in data_of(record)}


def input_of(stage: Record, role: str) -> Ancestor | None:
    """An input of a stage by its role, None where it has none."""
    entry = as_object(as_object(stage.get("inputs")).get(role))
    if not isinstance(entry.get("path"), str):
        return None
    path = ROOT / entry["path"]
    return Ancestor(path, _record_of(path, entry.get("sha256")))


def _record_of(folder: Path, weights: Any) -> Record:
    for name in (STAGE_FILE, SOURCE_FILE):
        with suppress(UserError):  # a damaged one says nothing
            record = read_record(folder, name)
            if record is not None and recorded_weights(record) == weights:
                return record
    return {}


def as_object(value: Any) -> Record:
    """A value of a record where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


# Paths.


def public(value: Any) -> Any:
    """A JSON value in which of every path outside the repository only the last name is left."""
    if isinstance(value, dict):
        return {name: public(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    return ",".join(map(_public_part, value.split(","))) if isinstance(value, str) else value


OUTSIDE = ("/", "~", "..")
"""How a path begins that does not lie in the current folder."""


def _public_part(text: str) -> str:
    if text.startswith(OUTSIDE):  # a path, which may hold spaces
        return public_path(Path(text))
    return re.sub(r"(?<!\S)(/|~|\.\.)\S*", lambda path: public_path(Path(path[0])), text)


def public_path(path: Path) -> str:
    """A path inside the repository relative to it, of any other the last name."""
    inside = relative_path(path)
    return short_name(path) if inside.startswith(OUTSIDE) else inside


def short_name(path: Path) -> str:
    """The last name of a path, with the one before where the last says nothing by itself."""
    around = path.parent.name
    return f"{around}/{path.name}" if path.name in PARTS and around and around[0] != "." else path.name


PARTS = ("models", "finetuned", "onnx", "gguf")
"""Names of folders inside a result's or a checkpoint's."""

"""What a run's result is, apart from when and where it was made: to be compared with an undisturbed run's."""

import hashlib
import json
from pathlib import Path
from typing import Any

# What differs between two runs of the same command.
VOLATILE = {
    "created",
    "environment",
    "stage",
    "files",
    "record_sha256",
    "models_dir",
    "resume",
    "skip_existing",
    "overwrite",
    "path",
    "parent",
    "latency",
    "throughput",
    "relative",
    "size",
    "finetune",
    "seconds",
}
TABLES = (".safetensors", ".csv", ".json")


def result_of(clone: Path, pattern: str) -> dict[str, str]:
    """Digests of the weights, tables and figures below an output; of several outputs, the newest.

    Pictures and logs say no more than the tables and are left out.
    """
    found = [path for path in clone.glob(pattern) if path.is_dir()]
    if not found:
        return {}
    output = max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    return digests(output)


def digests(output: Path) -> dict[str, str]:
    files = [path for path in sorted(output.rglob("*")) if path.suffix in TABLES and path.is_file()]
    return {str(path.relative_to(output)): _digest(path) for path in files if not _is_hidden(path, output)}


def _is_hidden(path: Path, output: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(output).parts)


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        try:
            data = json.dumps(_steady(json.loads(data)), sort_keys=True).encode()
        except ValueError:
            return "no JSON"
    return hashlib.sha256(data).hexdigest()[:16]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(entry) for key, entry in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_steady(entry) for entry in value]
    if isinstance(value, str) and value.startswith("/"):  # each case has a folder of its own
        return Path(value).name
    return value

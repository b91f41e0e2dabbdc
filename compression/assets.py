"""Where a model comes from, and how anything is fetched from the hub.

In this order: a path the user gives; a folder that is already there (under `models/`); the Hugging
Face hub or its local cache; the embedded default, which is a real pretrained model that ships inside a
package for pip. The embedded default stands in for the default names only: a model that the user
asks for by another name is fetched or is an error.

Folders are written beside their target and renamed, so an interrupted download leaves nothing that looks
complete. Of several processes the first one fetches, the others wait and find it there.
"""

import filecmp
import shutil
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from compression.embedded import make_embedded_llm, make_embedded_student, make_embedded_teacher
from compression.files import read_object, real_path, restore_replaced
from compression.integrity import SOURCE_FILE
from compression.modeling.pruned_encoder import LAYOUTS
from compression.runtime import UserError, first_line, log, processes, shown
from compression.sources import (
    LLM,
    LLM_FOLDER,
    SENTENCEPIECE,
    STUDENT,
    STUDENT_FOLDER,
    TEACHER,
    TEACHER_FOLDER,
    fetched,
    missing_file,
    read_source,
    source_record,
)
from compression.structures import DECODERS, unsupported

MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    *SENTENCEPIECE,
    "chat_template.jinja",
]
PROBE_SECONDS = 4.0


@dataclass(frozen=True)
class Role:
    """What a model is for: its name in messages, the model that is meant by default, the types that can do it."""

    name: str
    default: str
    model_types: tuple[str, ...]


TEACHER_ROLE = Role("teacher", TEACHER, tuple(LAYOUTS))
STUDENT_ROLE = Role("student", STUDENT, tuple(LAYOUTS))
LLM_ROLE = Role("base_model", LLM, tuple(DECODERS))


# ---------------------------------------------------------------- models


def ensure_teacher(
    name_or_path: str = TEACHER, folder: Path = TEACHER_FOLDER, use_hub: bool = True, copy: bool = False
) -> Path:
    """Make sure that a teacher encoder lies on the disk. Nothing is fetched where it already does.

    Args:
        name_or_path: a model folder, or a name on the hub. The default name takes whatever `folder` holds.
        folder: where a fetched model goes.
        use_hub: False skips the hub.
        copy: copy a model folder that the user gives into `folder`, for later stages to find.

    Returns:
        A folder with config.json, model.safetensors and tokenizer files, of a type that the role allows.

    Raises:
        UserError: the model cannot be had or is not a supported one; the text says what was tried.
    """
    return _ensure_model(TEACHER_ROLE, name_or_path, Path(folder), use_hub, copy)


def ensure_student(
    name_or_path: str = STUDENT, folder: Path = STUDENT_FOLDER, use_hub: bool = True, copy: bool = False
) -> Path:
    """Make sure that a student encoder lies on the disk: see `ensure_teacher`.

    The embedded default is a DistilBERT of alternate layers of the embedded BERT, which is taken from the
    teacher's folder beside `folder` when it is there.
    """
    return _ensure_model(STUDENT_ROLE, name_or_path, Path(folder), use_hub, copy)


def ensure_llm(name_or_path: str = LLM, folder: Path = LLM_FOLDER, use_hub: bool = True, copy: bool = False) -> Path:
    """Make sure that a LLaMA-class language model lies on the disk: see `ensure_teacher`.

    The embedded default is a SmolLM2-135M-Instruct whose weights are stored in 4 bits; they are unpacked to fp32.
    """
    return _ensure_model(LLM_ROLE, name_or_path, Path(folder), use_hub, copy)


def _ensure_model(role: Role, name: str, folder: Path, use_hub: bool, copy: bool) -> Path:
    with processes().main_process_first():
        return _find_or_fetch_model(role, name, folder, use_hub, copy)


def _find_or_fetch_model(role: Role, name: str, folder: Path, use_hub: bool, copy: bool) -> Path:
    given = _given_folder(role, name)
    if given is not None:
        _check_model(role, given)
        if copy:
            _copy_model(given, folder)
        return folder if copy else given
    if not _is_there(role, name, folder):
        _fetch_model(role, name, folder, use_hub)
    _check_model(role, folder)
    return folder


def _given_folder(role: Role, name: str) -> Path | None:
    """The folder that the user means, or None where the name is one of the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise UserError(f"{role.name} {name}: no such folder; name a model folder, or a model of the hub")
    return None


def _is_there(role: Role, name: str, folder: Path) -> bool:
    """Whether `folder` already holds what the user asks for; one log line where that is not plain."""
    restore_replaced(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    source, missing = read_source(folder), missing_file(folder)
    if source is None:
        if missing:
            raise UserError(f"{shown(folder)} has no {missing}; complete that folder or delete it")
        if name != role.default:
            raise UserError(f"{role.name} {name}: {shown(folder)} was put there by hand; name that folder or delete it")
        log.info("%s: %s was put there by hand (no %s); using it", role.name, shown(folder), SOURCE_FILE)
        return True
    if missing:
        return False
    if name != role.default:
        return source.get("name") == name
    if source.get("name") != role.default and source.get("source") != "embedded":
        held = f"{shown(folder)} holds {source.get('name')}"
        log.info("%s: %s; using it (delete it to get %s)", role.name, held, role.default)
    return True


def _fetch_model(role: Role, name: str, folder: Path, use_hub: bool) -> None:
    try:
        _fetch_model_from_hub(role, name, folder, use_hub)
        return
    except NotOnHub as problem:
        if name != role.default:
            raise UserError(f"{role.name} {name}: {problem}; name a model folder or a hub model") from None
        if use_hub and hub_answers():
            log.warning("%s: %s; taking the embedded default", name, problem)
    make_embedded = {
        TEACHER_ROLE: make_embedded_teacher,
        STUDENT_ROLE: make_embedded_student,
        LLM_ROLE: make_embedded_llm,
    }
    make_embedded[role](folder)


def _check_model(role: Role, folder: Path) -> None:
    label, missing = shown(folder), missing_file(folder)
    if missing:
        raise UserError(f"{label} has no {missing}; a model is config, tokenizer and safetensors weights")
    _check_model_type(role, label, folder)


def _check_model_type(role: Role, label: str, folder: Path) -> None:
    found = read_object(folder / "config.json").get("model_type")
    if found not in role.model_types:
        raise UserError(f"{label}: {unsupported(found, role.model_types)}")


def _copy_model(given: Path, folder: Path) -> None:
    """Copy a model folder that the user gives, unless the copy is there and up to date."""
    given = real_path(given)
    if given == real_path(folder, "--models_dir"):
        return
    restore_replaced(folder)
    source, names = read_source(folder), _matching_files(given, MODEL_FILES)
    if source is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{shown(folder)} was put there by hand; delete it to get {given} instead")
    _, differing, unreadable = filecmp.cmpfiles(given, folder, names)
    if source and source.get("name") == str(given) and not differing and not unreadable:
        return
    log.info("Copying %s -> %s", given, shown(folder))
    with fetched(folder, source_record("path", str(given)), [given]) as temporary:
        for name in names:
            shutil.copy2(given / name, temporary)


def _matching_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


# ---------------------------------------------------------------- the hub


class NotOnHub(Exception):
    """A model or data set could not be had from the hub; the text says why, in one line."""


@cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub can be used: asked once per process, said in one line where it cannot."""
    from huggingface_hub import HfApi

    problems: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(STUDENT, timeout=PROBE_SECONDS)
            problems.append(None)
        except Exception as error:  # of several libraries; whichever it is, the hub is of no use
            problems.append(first_line(error))

    # A name server that does not answer ignores the timeout of the request, so the wait itself is bounded.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    problem = problems[0] if problems else f"no answer within {PROBE_SECONDS:g} seconds"
    if problem:
        log.info("Hugging Face hub: not reachable (%s); looking in its local cache only", problem)
    return problem is None


def _fetch_model_from_hub(role: Role, name: str, folder: Path, use_hub: bool) -> None:
    # The type is known before gigabytes are spent on a model that is of no use here.
    _check_model_type(role, name, hub_snapshot(name, "model", ["config.json"], use_hub))
    log.info("Fetching %s from the Hugging Face %s", name, "hub" if hub_answers() else "cache")
    snapshot = hub_snapshot(name, "model", MODEL_FILES, use_hub)
    missing = missing_file(snapshot)
    if missing:
        raise NotOnHub(f"it has no {missing} (pickled weights are not read)")
    with fetched(folder, source_record("hub", name, snapshot.name)) as temporary:
        for file in _matching_files(snapshot, MODEL_FILES):
            shutil.copy(snapshot / file, temporary)


def hub_snapshot(name: str, repo_type: str, patterns: list[str], use_hub: bool) -> Path:
    """A folder of the hub's cache, named for the commit, with the repository's files that match."""
    if not use_hub:
        raise NotOnHub("the hub is not to be asked")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import enable_progress_bars

    if sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    online = hub_answers()
    try:
        return Path(snapshot_download(name, repo_type=repo_type, allow_patterns=patterns, local_files_only=not online))
    except Exception as error:  # of several libraries; whichever it is, the name was not fetched
        reason = first_line(error) if online else "the hub is not reachable and its cache does not hold it"
        raise NotOnHub(reason) from error

"""What a run may write where: nothing is replaced that this project did not write as the same kind of output.

Before any work: the place is no folder that holds more than one output (the root, the home folder, the repository,
models, results), is no input of the run, and does not contain one or lie inside one; and what lies there, if anything,
is an earlier output of the same kind, all of its files as they were written and no other file among them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from compression.files import (
    locked,
    new_folder,
    read_object,
    real_path,
    remove_folder,
    remove_leftovers,
    scratch_folder,
    sync,
    write_json,
    writing,
)
from compression.integrity import STAGE_FILE, differing, files_in, is_sound, read_record, seal, sha256_of
from compression.runtime import MODELS, RESULTS, ROOT, UserError, log, processes, shown

# In a folder for loose files that a user names: the sha256 of those that this project wrote there.
WRITTEN_FILE = ".written.json"
STATES_END = ".resume"
"""The end of the hidden folders that hold what a killed run goes on from."""
KEPT_LOGITS = ".teacher_logits_"
"""The beginning of the hidden folders that hold teachers' logits, computed once."""
KEPT_TIMES = ".latency_"
"""The beginning of the hidden folders that hold how long parts of a model take, measured once."""
EXPORT_FORMATS = ("onnx", "gguf")
HISTORY_FILE = "training_history.json"
"""Beside a trained model: what each epoch gave."""
EVALUATION_FILE = Path("evaluation", "evaluation_results.json")
"""In the folder of a language model's pruning run: what was measured."""
STUDIES = "studies"
"""The folder of studies among the results."""
OWN_TEXT = "own_text"
"""The kind of a folder with a text that a language model wrote."""
FETCHED = "fetched"
"""The kind of every folder with a `source.json`, wherever it came from."""


@dataclass(frozen=True)
class Output:
    """A folder that a run writes.

    Attributes:
        path: where; an earlier output there is replaced once the new one is complete.
        flag: what named it, for error texts.
        kind: what its record says it is; None: nothing that lies there may be replaced.
        record: the name of the record, see `integrity`.
    """

    path: Path
    flag: str
    kind: str | None
    record: str = STAGE_FILE

    def check(self, inputs: Iterable[Path] = (), shared: Iterable[Path] = ()) -> None:
        """Refuse a place that must not be written, before any work.

        Args:
            inputs: what the run reads.
            shared: folders that hold more than this output, besides those that always do.

        Raises:
            UserError: names the flag, what was found, and what to do.
        """
        check_place(self.path, self.flag, inputs, shared)
        self.check_replaceable()

    def check_replaceable(self) -> None:
        """Raise UserError unless nothing lies there, or an untouched output of the same kind."""
        path = real_path(self.path, self.flag)
        if not path.exists():
            return
        if not path.is_dir():
            raise self._refusal("is a file")
        if not any(path.iterdir()):
            return
        record = None if self.kind is None else read_record(path, self.record)
        if record is None:
            raise self._refusal("holds files that are not an earlier result of this command")
        found = FETCHED if "source" in record else record.get("stage")
        if found != self.kind:
            raise self._refusal(f"holds a result of another kind ({found!r}, not {self.kind!r})")
        known = record.get("files")
        if not isinstance(known, dict):
            raise self._refusal(
                f"holds a result whose {self.record} has no checksums, so what else is there is unknown"
            )
        exports = exports_of(path)
        own = [name for name in files_in(path) if not any((path / name).is_relative_to(export) for export in exports)]
        if foreign := [name for name in own if name not in known and name != self.record]:
            raise self._refusal(f"holds files that were put there by hand ({some(foreign)})")
        if changed := [name for name in differing(path, self.record) if (path / name).exists()]:
            raise self._refusal(f"holds files that were changed since they were written ({some(changed)})")
        for export in exports:
            Output(export, self.flag, (read_record(export) or {}).get("stage")).check_replaceable()

    def check_same(self, same: bool, overwrite: bool) -> None:
        """Raise UserError where a result with other settings or inputs would be replaced unasked."""
        path = real_path(self.path, self.flag)
        if not same and not overwrite and path.is_dir() and any(path.iterdir()):
            raise UserError(
                f"{self.flag} {self.path}: holds a result with other settings or inputs; keep it by naming another "
                "place, or replace it: --overwrite"
            )

    def _refusal(self, found: str) -> UserError:
        return UserError(f"{self.flag} {self.path}: {found}; nothing was touched; name another place, or move it away")

    @contextmanager
    def written(self) -> Iterator[Path]:
        """Yield an empty temporary folder; on success it takes the output's place, see `files.new_folder`."""
        outdated = exports_of(self.path)
        with new_folder(self.path, self.check_replaceable) as temporary:
            yield temporary
        for export in outdated:
            log.info("%s went with the model that it was made of: export the new one", shown(export))


def exports_of(folder: Path) -> list[Path]:
    """The exports that lie in a checkpoint's folder or below: made of it later, they are replaced along with it."""
    folders = (Path(folder, name).parent for name in files_in(folder) if Path(name).name == STAGE_FILE)
    return [path for path in folders if path != Path(folder) and is_export(read_object(path / STAGE_FILE).get("stage"))]


def export_stage(parent: str | None, format: str) -> str:
    """What the `stage.json` of an export says it is.

    Args:
        parent: what the checkpoint's own says.
    """
    return f"{parent}_{format}" if parent else format


def is_export(stage: Any, *formats: str) -> bool:
    """Whether a stage's name is that of an export, to one of these formats where any are given."""
    return isinstance(stage, str) and stage.rpartition("_")[2] in (formats or EXPORT_FORMATS)


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_place(path: Path, flag: str, inputs: Iterable[Path] = (), shared: Iterable[Path] = ()) -> None:
    """Raise UserError where a folder to write is, contains or lies in what a run must leave alone: see `Output`."""
    target = real_path(path, flag)
    for folder in inputs:
        given = real_path(folder)
        if target == given:
            raise UserError(f"{flag} {path}: is an input of this run; name another place")
        if given.is_relative_to(target):
            raise UserError(f"{flag} {path}: contains an input of this run ({folder}); name another place")
        if target.is_relative_to(given):
            raise UserError(f"{flag} {path}: lies inside an input of this run ({folder}); name another place")
    known = {Path("/"): "the root folder", ROOT: "this repository", Path.cwd(): "the current folder"}
    with suppress(RuntimeError):  # some users of containers have no home
        known[Path.home()] = "the home folder"
    known |= dict.fromkeys([MODELS, RESULTS, *shared], "a folder of several results")
    for folder, name in known.items():
        if real_path(folder).is_relative_to(target):
            is_it = real_path(folder) == target
            raise UserError(f"{flag} {path}: {'is' if is_it else 'contains'} {name}; name a folder of its own")


@contextmanager
def owned(*paths: Path) -> Iterator[None]:
    """Let no other process write these paths, and remove what killed runs left beside them.

    Raises:
        UserError: another process writes one of them just now (names it), or they cannot be written.
    """
    if not processes().is_main_process:
        yield
        return
    for parent in {real_path(path).parent for path in paths}:
        remove_leftovers(parent)
    with ExitStack() as stack:
        for path in map(real_path, paths):
            with writing(path):
                stack.enter_context(locked(path, wait=0))
        yield


def remove_states(folder: Path) -> list[Path]:
    """Remove what a folder holds to resume from and what is kept there, but for what runs that go on just now use.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(".*")):
        if path.is_dir() and (path.name.endswith(STATES_END) or path.name.startswith((KEPT_LOGITS, KEPT_TIMES))):
            try:
                with locked(path, wait=0):
                    remove_folder(path)
            except UserError as problem:
                log.info("%s", problem)
                continue
            removed.append(path)
    return removed


def kept_folder(path: Path, kind: str, make: Callable[[Path], None]) -> Path:
    """A folder that is made once and kept, by the first process while the others wait; where damaged, made anew.

    Args:
        kind: what its record calls it.
        make: writes its files into a new folder.
    """
    with processes().main_process_first():
        if not ((path / STAGE_FILE).is_file() and is_sound(path)):
            with new_folder(path) as temporary:
                make(temporary)
                seal(temporary, {"stage": kind})
    return path


def fresh_path(parent: Path, prefix: str) -> Path:
    """A path under `parent` that is not taken: the prefix and the time, or the next second that is free."""
    now = datetime.now()
    while (path := Path(parent) / f"{prefix}_{now:%Y%m%d_%H%M%S}").exists():
        now += timedelta(seconds=1)
    return path


# Loose files in a folder that holds others too.


def check_files(folder: Path, names: Sequence[str], flag: str) -> None:
    """Raise UserError where files of these names lie in the folder that this project did not write there."""
    folder = real_path(folder, flag)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {folder}: is a file; name a folder")
    known = _written(folder)
    for name in names:
        path = folder / name
        if path.is_symlink() or path.is_dir() or (path.exists() and sha256_of(path) not in known.get(name, [])):
            raise UserError(
                f"{flag} {folder}: holds a {name} that is not an earlier result or was changed since; nothing was "
                "touched; name another place, or move it away"
            )


@contextmanager
def new_files(folder: Path, names: Sequence[str], flag: str, outdated: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder to write files of these names to; on success they go into the folder, one by one.

    Files of the `outdated` names are removed before that where an earlier result wrote them and they are as it did.

    Which files are its own is noted in the folder before they get there, so that a kill in between leaves none that
    the next run would take for the user's.

    Raises:
        UserError: see `check_files`, or a disk that takes no more.
    """
    folder = real_path(folder, flag)
    record = folder / WRITTEN_FILE
    remove_leftovers(folder)
    with writing(record), locked(record), scratch_folder(record) as temporary:
        yield temporary
        check_files(folder, names, flag)
        written = {name: sha256_of(temporary / name) for name in names}
        known = _written(folder)
        write_json(record, known | {name: [*known.get(name, []), digest] for name, digest in written.items()})
        for name in outdated:
            if (folder / name).is_file() and sha256_of(folder / name) in known.pop(name, []):
                (folder / name).unlink()
        for name in names:
            sync(temporary / name)
            os.replace(temporary / name, folder / name)
        sync(folder)
        write_json(record, known | {name: [digest] for name, digest in written.items()})


def _written(folder: Path) -> dict[str, list[str]]:
    path = folder / WRITTEN_FILE
    known = read_object(path) if path.is_file() else {}
    return {name: digests for name, digests in known.items() if isinstance(digests, list)}

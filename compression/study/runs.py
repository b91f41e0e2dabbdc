"""One run: scripts one after another, as commands, in a folder of its own that says how far it is.

`run.json` in the folder has the settings, what each script took and wrote, its figures, and in the end `figures` or
`error`. Whoever works on a run holds the folder's lock; a run that is taken up again begins with the script that was
killed, which goes on by its own --resume.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.files import locked, read_object, write_json
from compression.integrity import files_in
from compression.runtime import UserError
from compression.study.figures import Figures, read_figures, records_in
from compression.study.scripts import SEED, Script

RUN_FOLDER, RUN_RECORD, LOG, MODELS_FOLDER = "runs", "run.json", "log.txt", "models"
LAST_LINES = 15
"""Lines of a failed script's output that are kept in the tables; all of it is in the run's log."""
HERE = "{run}"
"""Stands for the run's folder in the flags of --then."""
MODEL_FIELDS = ("pruned_model_path", "pruned_model", "model")
"""What later scripts read the first script's model by."""
SECONDS_TO_END = 10.0
"""How long a script that is asked to end may take for it."""


@dataclass(frozen=True)
class Step:
    """A script with the flags that the user gives it.

    Attributes:
        resolved: what its result depends on.
    """

    script: Script
    words: tuple[str, ...]
    resolved: dict[str, Any] = field(default_factory=dict)

    def given(self, name: str) -> bool:
        """Whether the user gives a flag."""
        return any(word.partition("=")[0] == f"--{name}" for word in self.words)


@dataclass(frozen=True)
class Run:
    """A run of a study.

    Attributes:
        identity: a hash of its settings and inputs.
        folder: where it is run.
        links: folders of models that its scripts find by name.
        models_dir: where language models lie that are fetched.
        described: what `identity` is the hash of.
    """

    identity: str
    folder: Path
    steps: tuple[Step, ...]
    links: dict[str, Path]
    models_dir: Path
    point: dict[str, Any]
    seed: int
    described: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """How far it is."""
        path = self.folder / RUN_RECORD
        return read_object(path) if path.is_file() else {}

    def command(self, number: int, done: list[dict[str, Any]]) -> list[str]:
        """The command line of a script of the run.

        Args:
            done: the records of those before it.
        """
        step = self.steps[number]
        known, name = step.script.types, self.name_of(number)
        words = [word.replace(HERE, str(self.folder)) for word in step.words]
        more: dict[str, Any] = self._places(step, name)
        if number and SEED in known:
            more[SEED] = self.seed
        model = next((self.folder / path for path in done[0]["records"]), None) if done else None
        if model is not None:
            more |= {name: model.parent for name in MODEL_FIELDS if name in known}
        flags = [word for key, value in more.items() if not step.given(key) for word in (f"--{key}", str(value))]
        flags += [f"--{key}" for key in ("resume", "skip_existing") if key in known]
        return [sys.executable, str(step.script.path), *words, *flags]

    def name_of(self, number: int) -> str:
        """What the results of a script of the run are called: its name, with a number where it is there twice."""
        names = [step.script.name for step in self.steps]
        name, before = names[number], names[:number].count(names[number])
        return f"{name}_{before + 1}" if before else name

    def _places(self, step: Step, name: str) -> dict[str, Path | str]:
        """Where a script writes, by the fields that it has for that."""
        known = step.script.types
        places: dict[str, Path | str] = {}
        if {"results_dir", "output_name"} <= known.keys():
            places |= {"results_dir": self.folder, "output_name": name, "models_dir": self.models_dir}
        else:
            places["models_dir"] = self.folder / MODELS_FOLDER
        if step.script.default("output_dir") is not None:
            places["output_dir"] = self.folder / name
        places["output_file"] = self.folder / f"{name}.json"
        return {key: value for key, value in places.items() if key in known}


class Ended(Exception):
    """The run was stopped, or is another worker's now."""


class Processes:
    """The scripts that this command runs just now, so that it can end them."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = threading.Event()

    def wait(
        self, command: list[str], environment: dict[str, str], log: Path, alive: Callable[[], None], every: float
    ) -> int:
        """Run a command and give its exit status.

        Args:
            log: gets what it says.
            alive: called every so many seconds; an exception of it ends the command.

        Raises:
            Ended: `stop` was called.
        """
        if self.stopped.is_set():
            raise Ended
        with log.open("ab") as said:
            said.write(f"$ {shlex.join(command)}\n".encode())
            said.flush()
            options: dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
            process = subprocess.Popen(command, env=environment, preexec_fn=_die_with(os.getpid()), **options)
        self.running.add(process)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(every)
                    if self.stopped.is_set():
                        raise Ended
                    return status
                alive()
        finally:
            self._end(process)
            self.running.discard(process)

    def stop(self) -> None:
        """End all of them; their runs are taken up again by whoever comes next."""
        self.stopped.set()
        for process in list(self.running):
            self._end(process)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


try:
    _LIBC: ctypes.CDLL | None = ctypes.CDLL(None)
except (OSError, TypeError):
    _LIBC = None


def _die_with(parent: int) -> Callable[[], None]:
    """What a child process calls so that Linux kills it where its parent is killed: nothing goes on unattended."""
    set_death_signal = 1

    def call() -> None:
        if _LIBC is not None and hasattr(_LIBC, "prctl"):
            _LIBC.prctl(set_death_signal, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return call


def perform(
    run: Run, processes: Processes, environment: dict[str, str], alive: Callable[[], None], every: float
) -> dict[str, Any]:
    """Do what is left to do of a run; gives its record, with `figures` or `error` in it.

    Args:
        environment: of its scripts.
        alive: called every so many seconds; an exception of it ends the run.

    Raises:
        Ended: see `Processes.wait`.
    """
    with _only_here(run.folder, alive, every, processes.stopped):
        record = run.record
        if "figures" in record:
            return record
        models = run.folder / MODELS_FOLDER
        models.mkdir(parents=True, exist_ok=True)
        for name, path in run.links.items():
            with suppress(FileExistsError):
                (models / name).symlink_to(path.resolve())
        steps: list[dict[str, Any]] = record.get("steps", [])
        about = {"point": run.point, "seed": run.seed, "described": run.described}
        for number in range(len(steps), len(run.steps)):
            write_json(run.folder / RUN_RECORD, about | {"steps": steps})
            command, started = run.command(number, steps), time.perf_counter()
            status = processes.wait(command, environment, run.folder / LOG, alive, every)
            seconds = time.perf_counter() - started
            if status:
                failed = {"command": shlex.join(command), "status": status, "last_lines": _last_lines(run.folder / LOG)}
                write_json(run.folder / RUN_RECORD, about | {"steps": steps, "error": failed})
                return run.record
            steps.append({"script": run.steps[number].script.name, "seconds": seconds} | _written(run, number, steps))
        write_json(run.folder / RUN_RECORD, about | {"steps": steps, "figures": [step["figures"] for step in steps]})
        return run.record


def _written(run: Run, number: int, before: list[dict[str, Any]]) -> dict[str, Any]:
    """The records that a script wrote, and its figures."""
    claimed = {path for step in before for path in step["records"]}
    records = [path for path in records_in(run.folder) if path not in claimed]
    name = run.name_of(number)
    figures: Figures = read_figures(run.folder, records, [run.folder / name, run.folder / f"{name}.json"])
    return {"records": records, "figures": figures}


def _last_lines(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip()][-LAST_LINES:]


# Of this process's threads one works on a run, and of all processes one does.
_IN_HERE: dict[Path, threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def _only_here(folder: Path, alive: Callable[[], None], every: float, stopped: threading.Event) -> Iterator[None]:
    """Be the only worker on a run; where another one is, wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _IN_HERE[folder]
    while not lock.acquire(timeout=every):
        alive()
    try:
        with ExitStack() as stack:
            while not _taken(stack, folder):
                if stopped.wait(min(every, 1.0)):
                    raise Ended
                alive()
            yield
    finally:
        lock.release()


def _taken(stack: ExitStack, folder: Path) -> bool:
    """Take a folder's lock for as long as the stack lasts, unless another process has it."""
    try:
        stack.enter_context(locked(folder, wait=0))
    except UserError:
        return False
    return True


def discard_models(run: Run) -> None:
    """Remove what a finished run's scripts have made but for their records: weights, tokenizers, code."""
    for name in files_in(run.folder):
        path = run.folder / name
        if not path.is_symlink() and path.suffix not in KEPT:
            path.unlink()


KEPT = (".json", ".csv", ".md", ".png", ".txt", ".log")
"""Ends of the names of files that stay where models are discarded."""


def describe(run: Run) -> str:
    """A run in a line: its values and its seed."""
    values = [f"{name} {value}" for name, value in run.point.items()]
    return ", ".join([*values, *[f"seed {run.seed}"] * (SEED in run.steps[0].script.types)])

"""Runs the project's scripts, each in a forked child of this process, which has imported all that they need.

A start from nothing costs seconds of imports, a fork a few hundredths. The child has the script's own command line,
current folder, home folder and streams; it can be made to die at a chosen change of the disk's names.
"""

import builtins
import gc
import importlib
import io
import json
import os
import pkgutil
import re
import runpy
import select
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIED = 137
TIME_LIMIT = 60.0


def import_all(code: Path) -> None:
    """Import what the scripts use, from a copy of the project's code; no library may be left to start threads."""
    sys.path.insert(0, str(code))
    import torch

    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import lm_eval.models.huggingface  # noqa: F401
    import lm_eval.tasks  # noqa: F401
    import matplotlib
    import peft  # noqa: F401

    matplotlib.use("Agg")
    import matplotlib.pyplot  # noqa: F401
    from transformers import (  # noqa: F401
        AutoTokenizer,
        BertForSequenceClassification,
        DistilBertForSequenceClassification,
        LlamaForCausalLM,
    )

    import compression

    assert Path(compression.__file__).is_relative_to(code), "the project's own code must not be the one attacked"
    for module in pkgutil.walk_packages(compression.__path__, "compression."):
        importlib.import_module(module.name)
    from compression.llm import zeroshot

    if manager := getattr(zeroshot, "_manager", None):  # what it keeps takes many seconds to find
        manager()
    gc.freeze()  # a collection in a child would copy what it shares with this process


# One script in one child.


@dataclass
class Outcome:
    """How a script ended."""

    command: str
    code: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool = False

    def last_words(self) -> str:
        lines = (self.stderr.strip() or self.stdout.strip() or "nothing on stderr").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")[:240]


@dataclass
class World:
    """One case's own copy of everything that a script can see.

    Attributes:
        root: the folder of the case; `clone` in it stands for the repository, `home` for the user's home.
        code: the copy of the project's code that is run; its paths under the repository are moved into `clone`.
    """

    root: Path
    code: Path
    notes: Path = field(init=False)

    def __post_init__(self) -> None:
        self.notes = self.root.parent / f"{self.root.name}.notes"
        self.notes.mkdir(exist_ok=True)

    @property
    def clone(self) -> Path:
        return self.root / "clone"

    def start(self, arguments: Iterable[Any], setup: Callable[[], None] | None = None) -> "Child":
        return Child(self, [str(argument) for argument in arguments], setup)

    def run(
        self, arguments: Iterable[Any], setup: Callable[[], None] | None = None, limit: float = TIME_LIMIT
    ) -> Outcome:
        """Run a script of the project to its end: its file name, then its flags."""
        return self.start(arguments, setup).wait(limit)

    def start_function(self, function: Callable[[], None]) -> "Child":
        """Run a function in a child, as a script would be run."""
        return Child(self, [f"({function.__name__})"], None, function)

    def call(self, function: Callable[[], Any], limit: float = TIME_LIMIT) -> Any:
        """What a function gives in a child, as JSON; its exception's text where there is one."""
        path = self.notes / "answer.json"
        path.unlink(missing_ok=True)

        def answer() -> None:
            path.write_text(json.dumps(function()))

        outcome = Child(self, ["(reader)"], None, answer).wait(limit)
        if outcome.code or not path.exists():
            return {"error": outcome.last_words()}
        return json.loads(path.read_text())


class Child:
    """A script that is running."""

    count = 0

    def __init__(
        self,
        world: World,
        arguments: list[str],
        setup: Callable[[], None] | None = None,
        instead: Callable[[], None] | None = None,
    ):
        Child.count += 1
        self.command = "python " + shlex.join(arguments)
        self.out, self.err = (world.notes / f"{Child.count}.{name}" for name in ("out", "err"))
        self.started = time.perf_counter()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(world, arguments, self.out, self.err, setup, instead)

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, limit: float = TIME_LIMIT) -> Outcome:
        handle = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        timed_out = not poll.poll(1000 * max(0.0, limit - (time.perf_counter() - self.started)))
        os.close(handle)
        if timed_out:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return Outcome(
            self.command,
            os.waitstatus_to_exitcode(status),
            *(path.read_text(errors="replace") if path.exists() else "" for path in (self.out, self.err)),
            time.perf_counter() - self.started,
            timed_out,
        )


def _become(world, arguments, out, err, setup, instead) -> None:
    """Never returns: the child is the script from here on."""
    code = 1
    try:
        for stream, path in ((0, os.devnull), (1, out), (2, err)):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, stream)
            os.close(handle)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(world.clone)
        os.environ["HOME"] = str(world.root / "home")
        move_paths(world.code, world.clone)
        if setup is not None:
            setup()
        if instead is not None:
            instead()
        else:
            sys.argv = arguments
            sys.path[0] = str(world.code)
            runpy.run_path(str(world.code / arguments[0]), run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(code)


def move_paths(old: Path, new: Path) -> None:
    """Let the project's modules take `new` for the repository: their paths, and defaults of their dataclasses."""

    def moved(value: Any) -> Any:
        if isinstance(value, Path) and value.is_relative_to(old) and not value.is_relative_to(old / "compression"):
            return new / value.relative_to(old)
        if isinstance(value, (tuple, list, set, frozenset)) and any(isinstance(item, Path) for item in value):
            return type(value)(map(moved, value))
        return value

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "compression":
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, type) and "__dataclass_fields__" in vars(value):
                for entry in vars(value)["__dataclass_fields__"].values():
                    entry.default = moved(entry.default)
                    if isinstance(entry.default, Path):
                        setattr(value, entry.name, entry.default)
                value.__init__.__defaults__ = tuple(map(moved, value.__init__.__defaults__ or ()))
            elif callable(value) and getattr(value, "__module__", None) == name and hasattr(value, "__defaults__"):
                value.__defaults__ = value.__defaults__ and tuple(map(moved, value.__defaults__))
            elif not key.startswith("__"):
                setattr(module, key, moved(value))


# Dying at a change of the disk's names.

CHANGES = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir")


@dataclass
class Death:
    """Lets the process note every change of names below `inside`, and die at one of them.

    Attributes:
        notes: a file that gets a line [change, path] for each.
        at: the number of the change that the process dies at, from 0; None for an undisturbed run.
        after: dies once that change is made, not before it.
    """

    inside: Path
    notes: Path
    at: int | None = None
    after: bool = False

    def __call__(self) -> None:
        self.count, self.handle = 0, os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for name in CHANGES:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        opened = self._wrap("create", io.open, lambda args, kw: set("wxa") & set(str((*args, kw.get("mode", "r"))[1])))
        builtins.open = io.open = opened
        self._wrap_exchange()

    def _wrap_exchange(self) -> None:
        """A function of the project around the system call that swaps two names."""
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] != "compression":
                continue
            for key, value in list(vars(module).items()):
                code = getattr(value, "__code__", None)
                if code and "renameat2" in (*code.co_names, *code.co_consts) and len(code.co_varnames) >= 2:
                    setattr(module, key, self._wrap("renameat2", value))

    def _wrap(self, name: str, function: Callable, counts: Callable = lambda args, kw: True) -> Callable:
        def wrapper(*args, **kw):
            path = self._place(args, kw) if args else None
            if path is None or not counts(args, kw) or not _changes(name, self.inside / path):
                return function(*args, **kw)
            mine, self.count = self.count, self.count + 1
            os.write(self.handle, (json.dumps([name, path]) + "\n").encode())
            if mine == self.at and not self.after:
                os._exit(DIED)
            value = function(*args, **kw)
            if mine == self.at:
                os._exit(DIED)
            return value

        return wrapper

    def _place(self, args: tuple, kw: dict) -> str | None:
        """The path below `inside` that a call is about, None for calls about others."""
        try:
            path = os.fsdecode(args[0])
        except TypeError:
            return None
        handle = next((kw[key] for key in ("dir_fd", "src_dir_fd") if kw.get(key) is not None), None)
        base = os.getcwd() if handle is None else os.readlink(f"/proc/self/fd/{handle}")
        full = Path(os.path.normpath(os.path.join(base, path)))
        return str(full.relative_to(self.inside)) if full.is_relative_to(self.inside) else None


def _changes(name: str, path: Path) -> bool:
    """Whether a call changes names: not where a folder is there, or a file gone, already.

    A new file in a hidden place may be half-written; the call that gives it its visible name counts.
    """
    if name == "create":
        return not any(part.startswith(".") for part in path.parts)
    return os.path.lexists(path) != (name == "mkdir")


def read_changes(notes: Path) -> list[tuple[str, str]]:
    return [tuple(json.loads(line)) for line in notes.read_text().splitlines()]


# What lies on the disk, and what a refusal is.

LEFTOVER = re.compile(r"^\..*(\.tmp|\.previous|\.resume|\.parts)$")
CACHE = re.compile(r"^\.teacher_logits_|^\..*\.(resume|parts)$")


def everything(root: Path, but_caches: bool = True) -> dict[str, str]:
    """Every file and link below a folder with its contents' digest.

    Left out: hidden lock files, log files, and with `but_caches` what a later run takes up (states, kept logits).
    """
    import hashlib

    found = {}
    for folder, names, files in os.walk(root):
        if but_caches:
            names[:] = [name for name in names if not CACHE.match(name)]
        for name in [*names, *files]:
            path = Path(folder, name)
            shown = str(path.relative_to(root))
            if path.is_symlink():
                found[shown] = f"-> {os.readlink(path)}"
            elif path.is_dir() or re.match(r"^\..*\.lock$", name) or (path.parent.name == "logs" and ".log" in name):
                continue
            elif path.is_file():
                found[shown] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            else:
                found[shown] = "special"
    return found


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    """What changed, in a few words; empty where nothing did."""
    gone, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    other = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    parts = [
        f"{len(names)} {what} (such as {names[0]})"
        for what, names in (("gone", gone), ("changed", other), ("new", new))
        if names
    ]
    return ", ".join(parts)


def leftovers(root: Path, before: Iterable[str] = ()) -> list[str]:
    """Temporary and state folders below a folder that were not there before."""
    found = [str(path.relative_to(root)) for path in root.rglob(".*") if LEFTOVER.match(path.name)]
    return sorted(set(found) - set(before))


def refusal_problems(outcome: Outcome, names: Iterable[str]) -> list[str]:
    """Why a script's end is no proper refusal; empty where it is one.

    Args:
        names: one of these must be in the line.
    """
    stderr = outcome.stderr.strip()
    if outcome.timed_out:
        return [f"did not end within {outcome.seconds:.0f} s"]
    if outcome.code == 0:
        return ["accepted, exit 0"]
    if "Traceback" in stderr:
        return [f"traceback: {outcome.last_words()}"]
    if outcome.code != 2:
        return [f"exit {outcome.code}: {outcome.last_words()}"]
    if re.search(r"usage:|Parsing error|Unrecognized|Required options|full helptext", stderr):
        return []
    problems = []
    lines = [line for line in stderr.splitlines() if line.strip()]
    if len(lines) != 1 or not lines[0].startswith("error: "):
        problems.append(f"{len(lines)} lines on stderr, the last: {outcome.last_words()}")
    elif not any(name in stderr for name in names):
        problems.append(f"names none of {', '.join(names)}: {outcome.last_words()}")
    elif stderr.startswith("error: [Errno"):
        problems.append(f"bare error of the system: {outcome.last_words()}")
    return problems


# Many cases, several at a time.


@dataclass
class Case:
    """One attack. `attack` returns what did not hold, an empty list where all did; None where it cannot be tried."""

    name: str
    attack: Callable[[World], list[str] | None]
    command: str = ""


def run_cases(cases: Iterable[Case], jobs: int, work: Path, new_world: Callable[[Path], World]) -> Iterator[dict]:
    """Each case in a process of its own with a world of its own; yields what was found in the order of the ends."""
    running: dict[int, tuple[Case, Path, float]] = {}
    waiting = enumerate(cases)
    left = True
    while left or running:
        while left and len(running) < jobs:
            number, case = next(waiting, (None, None))
            if case is None:
                left = False
                break
            folder = work / f"{number:04d}"
            pid = os.fork()
            if pid == 0:
                _attack(case, folder, new_world)
            running[pid] = (case, folder, time.perf_counter())
        if not running:
            return
        pid, _ = os.wait()
        case, folder, started = running.pop(pid)
        answer = folder.parent / f"{folder.name}.json"
        found = json.loads(answer.read_text()) if answer.exists() else {"broken": "the case's process died"}
        yield {"case": case.name, "seconds": time.perf_counter() - started, "folder": str(folder)} | found


def _attack(case: Case, folder: Path, new_world: Callable[[Path], World]) -> None:
    try:
        world = new_world(folder)
        problems = case.attack(world)
        found = {"problems": problems, "command": case.command}
    except BaseException:
        found = {"broken": traceback.format_exc()}
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(found))
    os._exit(0)


def remove(folder: Path) -> None:
    """Remove a case's folder and notes, also where the case took rights away."""
    for path in (folder, folder.parent / f"{folder.name}.notes"):
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            for inner in path.rglob("*"):
                if inner.is_dir() and not inner.is_symlink():
                    inner.chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)

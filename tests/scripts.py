"""Ways to run the project's scripts: in this process, or in one of its own that skips the imports.

`run_script` takes no time but the script's own. `start_script` is for what needs a process: kills, signals, several
processes at once. It forks a server that has imported the libraries, and nothing of the project.
"""

import itertools
import logging
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("bert", "camembert", "deberta_v2", "distilbert", "electra", "modernbert", "roberta", "xlm_roberta")
FAMILIES += ("gemma2", "gemma3", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
LIBRARIES = ["torch", "accelerate", "bitsandbytes", "peft", "sklearn.metrics", "matplotlib.pyplot", "tyro"]
LIBRARIES += [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES]
SECONDS = 120.0


@dataclass
class Result:
    """How a script ended: its exit status (the negative number of a signal that ended it) and what it said."""

    status: int
    stdout: str
    stderr: str

    def check(self, expect: int = 0) -> "Result":
        assert self.status == expect, self.stdout + self.stderr
        return self


def run_script(script: str, *flags: Any, expect: int = 0) -> Result:
    """Run a script of the project in this process, from the repository's folder; what it sets up is undone."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    out, err, status = StringIO(), StringIO(), 0
    path = ROOT / script
    log, arguments = logging.getLogger("compression"), [str(path), *map(str, flags)]
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        stack.callback(GradientState._reset_state)
        for name in ("handlers", "level", "propagate"):
            stack.enter_context(patch.object(log, name, getattr(log, name)))
        stack.enter_context(patch.object(logging, "raiseExceptions", True))
        stack.enter_context(patch.object(sys, "argv", arguments))
        stack.enter_context(patch.object(sys, "path", [str(path.parent), *sys.path]))
        stack.enter_context(patch.dict(os.environ))
        for context in (
            warnings.catch_warnings(),
            torch.enable_grad(),
            chdir(ROOT),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            stack.enter_context(context)
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return Result(status, out.getvalue(), err.getvalue()).check(expect)


# Processes.


@dataclass
class Running:
    """A script in a process of its own."""

    process: multiprocessing.Process
    folder: tempfile.TemporaryDirectory

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition that comes true while the script runs."""
        wait_until(lambda: condition() or self.process.exitcode is not None)
        assert self.process.exitcode is None, f"it ended before: {self.wait()}"

    @property
    def said(self) -> str:
        """What it has written to stdout so far."""
        return Path(self.folder.name, "out").read_text()

    def end(self, number: int = signal.SIGKILL) -> Result:
        """Send a signal and wait for the end."""
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> Result:
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, f"process {self.pid} did not end"
        return Result(self.process.exitcode, self.said, Path(self.folder.name, "err").read_text())


def start_script(script: str, *flags: Any, kill_at: tuple[str, int] | None = None, **environment: Any) -> Running:
    """Start a script of the project in the repository's folder.

    Args:
        kill_at: dotted name of a function, and at which call of it the process kills itself.
        environment: variables to set.
    """
    variables = {name: str(value) for name, value in environment.items()}
    return _start(ROOT, [str(ROOT / script), *flags], environment=variables, kill_at=kill_at)


def run_killed(script: str, *flags: Any, at: str, call: int = 1) -> None:
    """Run a script that is killed at the n-th call of a function."""
    start_script(script, *flags, kill_at=(at, call)).wait().check(-signal.SIGKILL)


def run_distributed(script: str, *flags: Any, processes: int = 2, kill_at: tuple[str, int] | None = None) -> Result:
    """Run a script on several processes, with the environment that `torchrun` gives them; what the first one says.

    Args:
        kill_at: see `start_script`.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    places = [dict(RANK=rank, LOCAL_RANK=rank) for rank in range(processes)]
    ranks = [start_script(script, *flags, kill_at=kill_at, **place, **world) for place in places]
    results = [rank.wait() for rank in ranks]
    if kill_at:
        assert all(result.status for result in results)
        return results[0]
    return [result.check() for result in results][0]


def start_program(program: str, *arguments: Any) -> Running:
    """Start a program that uses the project's package."""
    return _start(ROOT, ["-c", *arguments], program)


def run_elsewhere(program: str, folder: Path, *arguments: Any) -> Result:
    """Run a program in a process that starts in a folder and finds nothing of this project."""
    program += "\nimport sys; assert 'compression' not in sys.modules"
    return _start(folder, ["-c", *arguments], program, project=False).wait()


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.01)


def _start(folder: Path, arguments: list[Any], program: str | None = None, **options: Any) -> Running:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    said = tempfile.TemporaryDirectory()
    for name in ("out", "err"):
        Path(said.name, name).touch()
    given = (Path(said.name), folder, [str(argument) for argument in arguments], program)
    process = context.Process(target=_child, args=given, kwargs=options, daemon=True)
    process.start()
    return Running(process, said)


def _child(
    said: Path,
    folder: Path,
    arguments: list[str],
    program: str | None,
    project: bool = True,
    environment: dict[str, str] | None = None,
    kill_at: tuple[str, int] | None = None,
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_WRONLY), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.chdir(folder)
    os.environ.update(environment or {})
    others = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    start = [str(Path(arguments[0]).parent)] if program is None else []
    sys.argv, sys.path[:] = arguments, start + [str(ROOT)] * project + others
    if kill_at:
        _kill_at(*kill_at)
    if program:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def _kill_at(name: str, last: int) -> None:
    owner, attribute = pkgutil.resolve_name(name.rpartition(".")[0]), name.rpartition(".")[2]
    function, calls = getattr(owner, attribute), itertools.count(1)

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, attribute, counted)

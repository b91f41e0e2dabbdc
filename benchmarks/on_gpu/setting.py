"""What all parts share: sizes, folders, and running the project's scripts."""

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from compression.llm.memory import SHAPES, Shape
from compression.runtime import ROOT

Figures = dict[str, float | int | str]
"""What a part found: values by what they are, units included."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    hidden: int
    heads: int
    neurons: int
    teacher_layers: int
    student_layers: int
    vocabulary: int
    sentences: int
    """That classifiers are trained on; an eighth as many validate."""
    sentence_length: int
    batch_size: int
    large: str
    """Name of the shape that benchmarks/large_model.py prunes."""
    decoder: Shape
    """Of the language model that attention and compilation are timed on."""
    length: int
    """Tokens per window of a language model's text."""
    windows: int
    """Of calibration text, for scores; twice as many for repair."""
    prompt: int
    """Tokens that attention and compilation are timed on."""
    adapter_windows: int
    """Windows that adapters are trained on."""
    repeats: int
    """Timed calls of each kind."""
    compiler: str
    """Backend of torch.compile."""


FULL = Sizes(
    hidden=768,
    heads=12,
    neurons=3072,
    teacher_layers=12,
    student_layers=6,
    vocabulary=30_522,
    sentences=8192,
    sentence_length=64,
    batch_size=32,
    large="Llama-3-8B",
    decoder=SHAPES["Llama-3.2-1B"],
    length=1024,
    windows=32,
    prompt=4096,
    adapter_windows=400,
    repeats=30,
    compiler="inductor",
)
REHEARSAL = Sizes(
    hidden=32,
    heads=4,
    neurons=48,
    teacher_layers=2,
    student_layers=2,
    vocabulary=120,
    sentences=48,
    sentence_length=16,
    batch_size=8,
    large="tiny",
    decoder=Shape(64, 3, 8, 4, 128, vocabulary=300, positions=512),
    length=32,
    windows=2,
    prompt=64,
    adapter_windows=8,
    repeats=2,
    compiler="eager",
)


class Failure(Exception):
    """A command of a part failed."""


@dataclass(frozen=True)
class Setting:
    """One run of the parts.

    Attributes:
        work: folder for models and what scripts write.
        base_model: the small language model, a folder or a name on the hub.
        teacher, student, sentiment_dir: for the classifier parts, where the user names them.
        data_dir: folder with texts, None asks the hub.
        recovery_tokens: that recovery trains on, all passes together.
    """

    rehearse: bool
    work: Path
    base_model: str
    data_dir: str | None
    teacher: Path | None
    student: Path | None
    sentiment_dir: str | None
    recovery_tokens: int

    @property
    def sizes(self) -> Sizes:
        return REHEARSAL if self.rehearse else FULL

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self, script: str, *flags: object, on_cpu: bool = False) -> float:
        """Run a script of the project; a rehearsal does it in this process, for the imports take longer than the rest.

        Args:
            on_cpu: hide the GPU from it.

        Returns:
            Seconds.

        Raises:
            Failure: it ended with an error; says its last line.
        """
        started = time.perf_counter()
        words = [script, *map(str, flags)]
        if self.rehearse:
            run_here(words)
        else:
            run_apart(words, {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
        return time.perf_counter() - started


def run_here(words: list[str]) -> None:
    with patch.object(sys, "argv", [str(ROOT / words[0]), *words[1:]]):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise Failure(f"{words[0]} ended with status {end.code}") from None


def run_apart(words: list[str], variables: dict[str, str]) -> None:
    command, environment = [sys.executable, *words], os.environ | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(f"{words[0]} ended with status {done.returncode}: {last}")


@dataclass(frozen=True)
class Part:
    """Something that only a GPU can show."""

    help: str
    run: Callable[[Setting], Figures]

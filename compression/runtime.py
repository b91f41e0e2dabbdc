"""Where and with what a script runs: device, seeds, logging, the environment that a result is reported with."""

import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
RESULTS = ROOT / "results"

Value = TypeVar("Value")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

log = logging.getLogger("compression")
# They advise packages and ways of use that this project does without.
for _library in ("bitsandbytes", "lm_eval"):
    logging.getLogger(_library).setLevel(logging.ERROR)


class UserError(Exception):
    """An error that the user can mend: one line naming the flag or path, what was found and what is allowed."""


def first_line(error: Exception) -> str:
    """The kind of an exception of whatever library, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def relative_path(path: str | Path) -> str:
    """A path inside the repository without the repository's own, any other path as it is."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def shown(path: Path) -> str:
    """A path as a user would type it: relative where it lies under the current folder."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def setup_logging() -> None:
    """Log plain lines to stdout; on several processes only the first one speaks."""
    logging.raiseExceptions = False  # a full disk ends the run in one line, not the log file in a traceback
    log.handlers = [logging.StreamHandler(sys.stdout)]
    log.setLevel(logging.INFO if int(os.environ.get("LOCAL_RANK", "0")) == 0 else logging.ERROR)
    log.propagate = False


def log_phase(name: str) -> None:
    """Log that a part of a run begins, in a form that can be looked for, and what the one before took of a GPU."""
    if torch.cuda.is_available():
        log.info("Peak on the GPU: %.2f GB", torch.cuda.max_memory_allocated() / 1e9)
        torch.cuda.reset_peak_memory_stats()
    log.info("Phase: %s", name)


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Lines that are logged inside also go to a new file of that folder, named by the time, with the time of each."""
    if not processes().is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"{datetime.now():%Y%m%d_%H%M%S}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    try:
        yield
    except UserError as error:
        log.error("error: %s", error)
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # of a full disk, which says so where it matters
            handler.close()


def quiet_libraries() -> None:
    """Silence the advice and progress bars of transformers: the scripts say themselves what they load."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # A single process saves its states with the library that several ones use.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    # One of them uses an old name of the other's.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)


def processes() -> PartialState:
    """The processes of this run, of which there are several under `accelerate launch` or `torchrun`."""
    # Accelerate sets up several processes on the CPU only where it is told that the CPU is meant.
    return PartialState(cpu=not torch.cuda.is_available())


def own_share(items: Sequence[Value]) -> list[Value]:
    """Those of some items that this process works on: every item has one process."""
    state = processes()
    return list(items[state.process_index :: state.num_processes])


def sum_over_processes(*tensors: Tensor) -> None:
    """Replace tensors by their sums over all processes, in place."""
    state = processes()
    if state.num_processes > 1:
        for tensor in tensors:
            moved = tensor.to(state.device)
            torch.distributed.all_reduce(moved)
            tensor.copy_(moved)


def from_main_process(make: Callable[[], Value]) -> Value:
    """What the first process makes, for all of them; the others wait."""
    made = [make() if processes().is_main_process else None]
    return broadcast_object_list(made)[0]


def pick_device(name: str = "auto") -> torch.device:
    """The device that a model is on; it is logged in one line.

    Args:
        name: auto, this process's CUDA GPU when there is one, else the CPU; or a device of `device_named`.
    """
    device = processes().device if name == "auto" else device_named(name)
    if device.type == "cuda":
        log.info("Device: %s (%s)", device, torch.cuda.get_device_name(device))
    else:
        log.info("Device: cpu (%d threads; torch %s, no GPU in use)", torch.get_num_threads(), torch.__version__)
    return device


def device_named(name: str) -> torch.device:
    """A device by its name.

    Raises:
        UserError: it is neither the CPU nor a GPU that this machine has.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    full = "cuda:0" if name == "cuda" else name
    if full not in there:
        raise UserError(f"--device_map {name}: allowed are auto and what this machine has: {', '.join(there)}")
    return torch.device(full)


def pick_dtype(name: Dtype, use: str) -> torch.dtype:
    """A data type by name; `auto` is bfloat16 where the hardware multiplies it, else float32, and is logged.

    Args:
        use: what it is for, as the log calls it.
    """
    if name != "auto":
        return getattr(torch, name)
    fast = multiplies_bf16()
    dtype = torch.bfloat16 if fast else torch.float32
    log.info("%s: %s (this machine %s bf16 instructions)", use, str(dtype)[6:], "has" if fast else "has no")
    return dtype


def multiplies_bf16() -> bool:
    """Whether the hardware has instructions that multiply bfloat16: the GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    from bitsandbytes.functional import has_avx512bf16  # its import takes seconds

    return has_avx512bf16()


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed dropout for one training step.

    Every step draws from its own stream, a function of (seed, step, rank) alone, so a resumed run draws what the
    undisturbed one would have drawn and no generator state has to be saved.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def seed_everything(seed: int) -> None:
    """Seed every generator the project draws from (all of them are torch's)."""
    torch.manual_seed(seed)


@cache
def fingerprint() -> dict[str, str | int]:
    """Library versions, git commit and hardware: what a measured number depends on besides the config."""
    import accelerate
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "git_commit": _git_commit(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware_name(device: torch.device) -> str:
    """What a device is: the GPU's name or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

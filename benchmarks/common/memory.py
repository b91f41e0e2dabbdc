"""Peak memory of what is measured: of this process on the CPU (Linux), else what is allocated on the GPU."""

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


def in_own_process(function: Callable[..., Any], *given: Any) -> Any:
    """What a module's function gives, computed in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def start_peak(device: torch.device) -> int:
    """Forget the peak so far; the bytes that this process holds now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to set the peak back to what is held
    return _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

"""The memory of a running process and its children, sampled, and the peaks of the phases that its log names."""

import re
import shlex
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from compression.runtime import ROOT, UserError, log

PHASE = re.compile(r"Phase: (.+)")
START = "start"
# Points of a curve that are kept.
POINTS = 400
# What Linux says of a process's resident memory: the whole; of it what no file holds, so that it must be kept; of it
# pages of mapped files, which the system can drop and read again; of it what processes share.
STATUS = {"rss": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "shared": "RssShmem"}
LINE = re.compile(rf"^({'|'.join(STATUS.values())}):\s+(\d+) kB", re.MULTILINE)


def resident_bytes(pid: int) -> dict[str, int]:
    """Resident memory of a process and all its children, in bytes, by the names of `STATUS`; zeros once it is gone."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        pids = [pid, *(child.pid for child in process.children(recursive=True))]
        found = [_status(one) for one in pids]
        return {name: sum(status.get(line, 0) for status in found) for name, line in STATUS.items()}
    return dict.fromkeys(STATUS, 0)


def _status(pid: int) -> dict[str, int]:
    with suppress(OSError):
        return {name: 1024 * int(size) for name, size in LINE.findall(Path(f"/proc/{pid}/status").read_text())}
    return {}


def gpu_of(device: str) -> int | None:
    """The number of the GPU that a run on a device uses; None where it uses none."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.device("cuda" if device == "auto" else device).index or 0


def gpu_bytes(gpu: int | None) -> int:
    """Bytes in use on a GPU, of all processes."""
    if gpu is None:
        return 0
    free, total = torch.cuda.mem_get_info(gpu)
    return total - free


class Watch:
    """Samples a process's memory until it is closed.

    Args:
        interval: seconds between two samples.
        device: that the process computes on, as --device_map names it.

    Attributes:
        samples: seconds since the start, and bytes: those of `resident_bytes`, and `device`, what the GPU holds more
            than before the start: the process's CUDA context and what its allocator keeps for later too.
        phases: name and first second of each phase, in order.
    """

    def __init__(self, interval: float, device: str = "cpu"):
        self.interval, self.gpu = interval, gpu_of(device)
        self.samples: list[dict[str, float]] = []
        self.phases: list[tuple[str, float]] = [(START, 0.0)]
        self._before, self._started = gpu_bytes(self.gpu), time.perf_counter()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, pid: int) -> None:
        """Start to sample a process."""
        self._thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        self._thread.start()

    def read(self, line: str) -> None:
        """Take note of a line of the process's log; a line `Phase: NAME` begins a phase."""
        if found := PHASE.search(line):
            self.phases.append((found[1].strip(), self._seconds()))

    def close(self) -> float:
        """Stop sampling; the seconds that it lasted."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        return self._seconds()

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _sample(self, pid: int) -> None:
        while not self._closed.is_set():
            used = resident_bytes(pid) | {"device": max(0, gpu_bytes(self.gpu) - self._before)}
            self.samples.append({"seconds": self._seconds()} | used)
            self._closed.wait(self.interval)


def peaks(watch: Watch, total: float) -> list[dict[str, Any]]:
    """Of each phase its name, seconds, and the highest sample of each kind of memory, in bytes.

    Args:
        total: seconds at the end of the last phase.
    """
    ends = [start for _, start in watch.phases[1:]] + [total]
    rows = []
    for (name, start), end in zip(watch.phases, ends, strict=True):
        inside = [sample for sample in watch.samples if start <= sample["seconds"] <= end]
        highest = {f"peak_{kind}_bytes": _highest(inside, kind) for kind in (*STATUS, "device")}
        rows.append({"phase": name, "seconds": end - start, "samples": len(inside)} | highest)
    return rows


def _highest(samples: list[dict[str, float]], kind: str) -> int | None:
    return max((int(sample[kind]) for sample in samples), default=None)


def thinned(samples: list[dict[str, float]], count: int) -> list[dict[str, float]]:
    """At most so many samples, each the highest resident memory of its stretch of time."""
    size = -(-len(samples) // count) or 1
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [max(part, key=lambda sample: sample["rss"]) for part in parts]


def run_watched(command: list[str], interval: float, device: str = "cpu") -> dict[str, Any]:
    """Run a command of this repository under watch: see `measured`. What it says is logged.

    Raises:
        UserError: it failed; says what its last line was.
    """
    watch, last = Watch(interval, device), ""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch.begin(process.pid)
    try:
        for line in process.stdout:
            watch.read(line)
            last = line.strip() or last
            log.info("    %s", line.rstrip())
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        seconds = watch.close()
    if status:
        raise UserError(f"{shlex.join(command[:3])} ended with status {status}: {last}")
    return measured(watch, seconds)


def measured(watch: Watch, seconds: float) -> dict[str, Any]:
    """What a watch saw: its seconds, its phases and its memory over time."""
    return {"seconds": seconds, "phases": peaks(watch, seconds), "samples": thinned(watch.samples, POINTS)}

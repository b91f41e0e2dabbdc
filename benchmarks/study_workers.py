"""Two workers share a study, one of them is killed: is every run done, none twice, and how much faster are two?

    python benchmarks/study_workers.py [--storages journal sqlite postgresql] [--fixed data_dir=SST2]

For each storage, two processes of ablate.py start the same study; once both are on a run, one is killed. Every run's
log says how often its script was started. Then the study is timed on a journal file, by one process and by two, each
with one thread. For PostgreSQL a server is started on a free port with a new database, which needs Debian's package
postgresql and `pip install 'psycopg[binary]'`. Writes results/study_workers.json.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression.config import AtLeast, Config, run_script
from compression.files import read_json, remove_folder, write_json
from compression.runtime import MODELS, RESULTS, ROOT, UserError, fingerprint, log
from compression.study.runs import LOG, RUN_FOLDER, RUN_RECORD

NAME = "study_workers"
STORAGES = ("journal", "sqlite", "postgresql")
POLL_SECONDS = 0.05


@dataclass
class WorkersConfig(Config):
    script: Path = Path("8_pruning_with_finetuning.py")
    """The script whose runs are shared."""
    grid: tuple[str, ...] = ("importance_mode=l2,kd_grad,l2+kd_grad", "head_final_sparsity=0.2,0.4")
    """What is varied, as for ablate.py."""
    fixed: tuple[str, ...] = ("train_fraction=0.02",)
    """What is the same in all runs."""
    seeds: Annotated[int, AtLeast(1)] = 3
    """Runs of each point."""
    storages: tuple[Literal[STORAGES], ...] = STORAGES
    """Which storages."""
    timed: bool = True
    """Also measure the time of one worker and of two."""
    models_dir: Path = MODELS
    """Where the models are that the script starts from."""


class Workers:
    """Processes of one study, in an emptied folder."""

    def __init__(self, config: WorkersConfig, name: str, *flags: str):
        self.folder = RESULTS / NAME / "studies" / name
        remove_folder(self.folder)
        study = ["--grid", *config.grid, "--seeds", str(config.seeds), "--fast", "--discard_models"]
        fixed = ["--fixed", *config.fixed] if config.fixed else []
        places = ["--results_dir", str(RESULTS / NAME), "--models_dir", str(config.models_dir), "--name", name]
        self.command = [sys.executable, str(ROOT / "ablate.py"), str(config.script), *study, *fixed, *places, *flags]

    def start(self) -> Any:
        """One more process."""
        return subprocess.Popen(self.command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def starts(self) -> dict[str, int]:
        """How often the script of each run was started."""
        logs = (self.folder / RUN_FOLDER).glob(f"*/{LOG}")
        text = {path.parent.name: path.read_text(encoding="utf-8", errors="replace") for path in logs}
        return {name: sum(line.startswith("$ ") for line in said.splitlines()) for name, said in text.items()}

    def underway(self) -> int:
        """Runs whose script was started and that have no result yet."""
        records = (self.folder / RUN_FOLDER / name / RUN_RECORD for name in self.starts())
        return sum("figures" not in read_json(record) for record in records)

    def wait(self, worker: Any, count: int) -> None:
        """Wait until so many runs are underway, for which a worker was started."""
        while self.underway() < count:
            if worker.poll() is not None:
                raise UserError(f"--storages {self.folder.name}: a worker ended before {count} were on a run")
            time.sleep(POLL_SECONDS)

    def done(self) -> int:
        """Runs with a result."""
        return sum(len(row["runs"]) for row in read_json(self.folder / "study.json")["rows"])


def killed(config: WorkersConfig, name: str, *flags: str) -> dict[str, Any]:
    """What comes of a study of two workers of which one is killed while both are on a run."""
    workers = Workers(config, name, *flags, "--grace_seconds", "5")
    first = workers.start()
    workers.wait(first, 1)
    first.send_signal(signal.SIGSTOP)  # it is on a run for as long as the other one needs to start
    second = workers.start()
    workers.wait(second, 2)
    first.kill()
    first.wait()
    if second.wait():
        raise UserError(f"--storages {name}: the other worker failed")
    starts = sorted(workers.starts().values())
    return {"runs": workers.done(), "starts": starts, "taken_up_again": starts.count(2), "twice": max(starts) > 2}


def seconds(config: WorkersConfig, count: int) -> float:
    """The time that so many workers need for the study."""
    workers = Workers(config, f"time_{count}")
    started = time.perf_counter()
    processes = [workers.start() for _ in range(count)]
    if any([process.wait() for process in processes]):
        raise UserError("a worker failed")
    return time.perf_counter() - started


@contextmanager
def storage_flags(name: str) -> Iterator[list[str]]:
    """The flags for a storage that is new."""
    if name == "journal":
        yield []
    elif name == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield ["--storage", f"sqlite:///{folder}/study.db"]
    else:
        with postgresql() as url:
            yield ["--storage", url]


@contextmanager
def postgresql() -> Iterator[str]:
    """The address of a database on a server that runs for as long as the context lasts; it is no one else's."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise UserError("--storages postgresql: is not installed; install it with: apt-get install postgresql")
    # The server refuses to run as root; Debian's package brings a user for it.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="postgresql_")
    if user:
        shutil.chown(folder, "postgres")
    data, options = f"{folder}/data", f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
    control = [*user, str(programs[-1] / "pg_ctl"), "-D", data, "-w"]
    quiet: dict[str, Any] = dict(check=True, stdout=subprocess.DEVNULL, cwd=folder)
    try:
        subprocess.run([*user, str(programs[-1] / "initdb"), "-D", data, "-A", "trust", "-U", "study"], **quiet)
        subprocess.run([*control, "-o", options, "-l", f"{folder}/log", "start"], **quiet)
        try:
            yield f"postgresql+psycopg://study@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(config: WorkersConfig) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = {"config": config.as_dict(), "environment": fingerprint(), "killed": {}, "seconds": {}}
    for name in config.storages:
        with storage_flags(name) as flags:
            results["killed"][name] = killed(config, name, *flags)
        log.info("%s: %s", name, results["killed"][name])
        write_json(RESULTS / f"{NAME}.json", results)
    for count in (1, 2) if config.timed else ():
        results["seconds"][count] = seconds(config, count)
        log.info("%d worker(s): %.1f s", count, results["seconds"][count])
    if config.timed:
        results["ratio"] = results["seconds"][2] / results["seconds"][1]
    write_json(RESULTS / f"{NAME}.json", results)


if __name__ == "__main__":
    run_script(WorkersConfig, main)

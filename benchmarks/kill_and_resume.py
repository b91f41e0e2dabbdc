"""Kill pruning runs at random moments with SIGKILL, resume each, and compare with an undisturbed run.

    python benchmarks/kill_and_resume.py [--kills 5] [--data_dir DIR]

Needs models/student_model and models/teacher_model. Uses a small share of the training data; writes
results/kill_and_resume.json.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression.config import Config, run_script
from compression.files import read_json, write_json
from compression.inputs import find_newest, require
from compression.runtime import MODELS, RESULTS, ROOT, UserError, log
from compression.stage_record import identify, read_stage


@dataclass
class KillConfig(Config):
    kills: int = 5
    """How many runs are killed, each once, and resumed."""
    train_fraction: float = 0.02
    """Share of the training data."""
    data_dir: str | None = None
    """Folder with SST-2, as for the stages."""
    models_dir: Path = MODELS
    """Where the student and the teacher are."""
    seed: int = 0
    """Fixes the moments of the kills."""


def command(config: KillConfig, models_dir: Path) -> list[str]:
    return [
        sys.executable,
        "8_pruning_with_finetuning.py",
        "--fast",
        "--resume",
        "--save_steps",
        "3",
        "--train_fraction",
        str(config.train_fraction),
        "--models_dir",
        str(models_dir.resolve()),
        "--student_path",
        str((config.models_dir / "student_model").resolve()),
        "--teacher_path",
        str((config.models_dir / "teacher_model").resolve()),
        *(["--data_dir", config.data_dir] if config.data_dir else []),
    ]


def result_of(models_dir: Path) -> dict:
    """What must be the same: metrics, history and weights."""
    folder = find_newest(models_dir, "pruned")
    history = read_json(folder / "training_history.json")
    return {"metrics": read_stage(folder)["metrics"], "history": history, "weights": identify(folder)["sha256"]}


def kill_and_resume(config: KillConfig, folder: Path, wait: float) -> str:
    """Kill a run after `wait` seconds and resume it; returns what was there at the kill."""
    process = subprocess.Popen(command(config, folder), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=wait)
        return "it had ended before"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    states = sorted(path.name for path in folder.glob(".pruned_*.resume/step_*"))
    subprocess.run(command(config, folder), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return f"saved states: {', '.join(states) or 'none'}"


def main(config: KillConfig) -> None:
    require(config.models_dir / "student_model", "--models_dir", "python 2_distill_student.py")
    work = RESULTS / "kill_and_resume"
    shutil.rmtree(work, ignore_errors=True)
    # The first run computes the teacher's outputs, which all later ones read: the second one is timed.
    for name in ("first", "undisturbed"):
        started = time.perf_counter()
        subprocess.run(command(config, work / name), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        duration = time.perf_counter() - started
    log.info("Undisturbed: %.0f s", duration)
    expected = result_of(work / "undisturbed")

    moments, kills = random.Random(config.seed), []
    for number in range(config.kills):
        wait = moments.uniform(0.2, 1.0) * duration
        state = kill_and_resume(config, work / str(number), wait)
        found = result_of(work / str(number))
        same = {name: expected[name] == found[name] for name in expected}
        kills.append({"after_seconds": wait, "state": state, "same": same})
        log.info("Killed after %.1f s (%s), resumed; same as undisturbed: %s", wait, state, same)
    write_json(RESULTS / "kill_and_resume.json", {"duration": duration, "kills": kills, "metrics": expected["metrics"]})
    shutil.rmtree(work)
    if not all(all(kill["same"].values()) for kill in kills):
        raise UserError(f"a resumed run differs from the undisturbed one; see {RESULTS / 'kill_and_resume.json'}")


if __name__ == "__main__":
    run_script(KillConfig, main)

"""Kill a pruning run at random moments with SIGKILL, resume it each time, and compare with an undisturbed run.

    python benchmarks/kill_and_resume.py [--kills 5]

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

from compression.checkpoint import find_newest, identify, read_json, read_stage, require, write_json
from compression.config import StageConfig, run_script
from compression.runtime import RESULTS, ROOT, UserError, log


@dataclass
class KillConfig(StageConfig):
    kills: int = 5
    """How many times the run is killed."""
    train_fraction: float = 0.02
    """Share of the training data."""
    data_dir: str | None = None
    """Folder with SST-2, as for the stages."""
    models_dir: Path = Path("models")
    """Where the student and the teacher are."""
    seed: int = 0
    """Fixes the moments of the kills."""


def command(config: KillConfig, models_dir: Path) -> list[str]:
    return [
        sys.executable, "8_pruning_with_finetuning.py", "--fast", "--resume", "--save_steps", "3",
        "--train_fraction", str(config.train_fraction), "--models_dir", str(models_dir.resolve()),
        "--student_path", str((config.models_dir / "student_model").resolve()),
        "--teacher_path", str((config.models_dir / "teacher_model").resolve()),
        *(["--data_dir", config.data_dir] if config.data_dir else []),
    ]  # fmt: skip


def result_of(models_dir: Path) -> dict:
    """What must be the same: metrics, history and weights."""
    folder = find_newest(models_dir, "pruned")
    history = read_json(folder / "training_history.json")
    return {"metrics": read_stage(folder)["metrics"], "history": history, "weights": identify(folder)["sha256"]}


def main(config: KillConfig) -> None:
    require(config.models_dir / "student_model", "--models_dir", "python 2_distill_student.py")
    work = RESULTS / "kill_and_resume"
    shutil.rmtree(work, ignore_errors=True)
    undisturbed, killed = work / "undisturbed", work / "killed"

    started = time.perf_counter()
    subprocess.run(command(config, undisturbed), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    duration = time.perf_counter() - started
    log.info("Undisturbed: %.0f s", duration)

    moments = random.Random(config.seed)
    waits = [moments.uniform(0.15, 0.8) * duration for _ in range(config.kills)]
    for wait in waits:
        process = subprocess.Popen(command(config, killed), cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=wait)
            log.info("Finished before its kill at %.1f s", wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            states = sorted(path.name for path in killed.glob(".pruned.resume/step_*"))
            log.info("Killed after %.1f s, saved states: %s", wait, states)
    subprocess.run(command(config, killed), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    expected, found = result_of(undisturbed), result_of(killed)
    same = {name: expected[name] == found[name] for name in expected}
    write_json(RESULTS / "kill_and_resume.json", {"kills": waits, "same": same, "metrics": found["metrics"]})
    log.info("Same as undisturbed: %s", same)
    if not all(same.values()):
        raise UserError(f"the resumed run differs from the undisturbed one: {same}; see {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    run_script(KillConfig, main)

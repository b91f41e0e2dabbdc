"""Recovery training of a model that is spread over two processes, undisturbed and killed, against one process.

    python benchmarks/sharded_recovery.py --pruned_model results/NAME/models [--data_dir TEXTS] [--finetune_method lora]

Runs of post_training.py's own command line: on one process; with --shard on two; the same killed with SIGKILL half
way and resumed on two, and resumed on one. Writes results/sharded_recovery.json.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from compression.checkpoint import load_tensors
from compression.config import AtLeast, Config, run_script
from compression.files import read_json, write_json
from compression.inputs import require_language_model
from compression.outputs import STATES_END, check_place
from compression.runtime import RESULTS, ROOT, UserError, fingerprint, log
from compression.tables import Column, at, text_table

FOLDER = "sharded_recovery"
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
SECONDS = 1800


@dataclass
class ShardedRecoveryConfig(Config):
    pruned_model: Path = RESULTS / "hgsp" / "models"
    """Model to train on."""
    data_dir: str | None = None
    """Folder with wikitext2/."""
    finetune_method: Literal["lora", "full"] = "full"
    """Train adapters, or all weights."""
    finetune_samples: Annotated[int, AtLeast(8)] = 32
    """Windows that are trained on."""
    max_length: Annotated[int, AtLeast(8)] = 128
    """Tokens per window."""
    num_epochs: Annotated[int, AtLeast(2)] = 4
    """Passes over them."""
    processes: Annotated[int, AtLeast(2)] = 2
    """Processes that the model is spread over."""
    results_dir: Path = field(default_factory=lambda: RESULTS)
    """Folder that the results go to, and the models while the runs last."""

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.num_epochs * -(-self.finetune_samples // 8)


def command(config: ShardedRecoveryConfig, name: str, processes: int, *more: str) -> list[str]:
    """The command line of one run, whose output has that name."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    flags: dict[str, Any] = {"results_dir": config.results_dir / FOLDER, "output_name": name, "run_evaluation": "none"}
    for same in ("pruned_model", "finetune_method", "finetune_samples", "max_length", "num_epochs"):
        flags[same] = getattr(config, same)
    flags |= {"batch_size": 8, "save_steps": 1, "validation_samples": 4}
    if config.data_dir is not None:
        flags["data_dir"] = config.data_dir
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [sys.executable, *launch, "post_training.py", *words, *more]


def run(command: list[str]) -> float:
    """Run a command of this repository; the seconds that took."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"post_training.py ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - started


def states_of(config: ShardedRecoveryConfig, name: str) -> list[Path]:
    """What a run of that name could resume from."""
    return sorted((config.results_dir / FOLDER).glob(f".{name}*{STATES_END}"))


def run_killed(config: ShardedRecoveryConfig, name: str) -> int:
    """Kill a run on several processes once half of its steps are saved; the step of its last state."""
    process = subprocess.Popen(
        command(config, name, config.processes, "--shard", "--resume"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end, half, reached = time.monotonic() + SECONDS, config.steps // 2, 0
    while reached < half and process.poll() is None and time.monotonic() < end:
        saved = [path for states in states_of(config, name) for path in states.glob("step_*")]
        reached = max((int(path.name.split("_")[1]) for path in saved), default=0)
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for one in [*launcher.children(recursive=True), launcher]:  # what a launcher starts outlives it
        one.kill()
    process.wait()
    if reached < half:
        raise UserError(f"post_training.py ended before step {half}; run it alone to see why")
    return reached


def outcome(config: ShardedRecoveryConfig, name: str) -> dict[str, Any]:
    """The losses of the epochs, and the weights."""
    folder = config.results_dir / FOLDER / name
    losses = [epoch["loss"] for epoch in read_json(folder / "training_history.json")]
    return {"losses": losses, "weights": load_tensors(folder / WEIGHTS[config.finetune_method])}


def compare(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The largest relative difference of an epoch's loss, and the largest difference of a weight."""
    pairs = zip(first["losses"], other["losses"], strict=True)
    weights = [(other["weights"][name] - value).abs().max().item() for name, value in first["weights"].items()]
    return {
        "losses": other["losses"],
        "largest_loss_difference": max(abs(mine / expected - 1) for expected, mine in pairs),
        "largest_weight_difference": max(weights),
    }


def main(config: ShardedRecoveryConfig) -> None:
    require_language_model(config.pruned_model, "--pruned_model")
    work = config.results_dir / FOLDER
    check_place(work, "--results_dir", shared=[config.results_dir])
    shutil.rmtree(work, ignore_errors=True)
    seconds = {"one": run(command(config, "one", 1)), "two": run(command(config, "two", config.processes, "--shard"))}
    step = run_killed(config, "killed_two")
    for states in states_of(config, "killed_two"):
        shutil.copytree(states, states.with_name(states.name.replace("killed_two", "killed_one")))
    run(command(config, "killed_two", config.processes, "--shard", "--resume"))
    run(command(config, "killed_one", 1, "--shard", "--resume"))
    first = outcome(config, "one")
    found = {name: compare(first, outcome(config, name)) for name in ("one", "two", "killed_two", "killed_one")}
    record = {"config": config.as_dict(), "environment": fingerprint(), "seconds": seconds, "killed_at_step": step}
    path = config.results_dir / f"{FOLDER}.json"
    write_json(path, record | {"runs": found})
    shutil.rmtree(work)
    columns = [
        Column("run", at("run")),
        Column("loss of the last epoch", lambda row: row["losses"][-1], "{:.6f}"),
        Column("largest difference of a loss", at("largest_loss_difference"), "{:.1e}"),
        Column("of a weight", at("largest_weight_difference"), "{:.1e}"),
    ]
    log.info("Killed at step %d of %d", step, config.steps)
    log.info("%s\n-> %s", text_table(columns, [{"run": name} | row for name, row in found.items()]), path)


if __name__ == "__main__":
    run_script(ShardedRecoveryConfig, main)

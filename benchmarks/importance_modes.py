"""Compare the importance modes and repairs of stage 8 at equal sparsity, or at equal shares of the teacher's MACs.

    python benchmarks/importance_modes.py [--seeds 3] [--data_dir DIR]
    python benchmarks/importance_modes.py --mac_shares 0.4 0.2 0.05 --repairs none events [--seeds 3] [--data_dir DIR]

Runs stage 8 once for each mode, repair, target and seed, with the same schedule, and writes accuracy with mean and
spread to results/importance_modes.json, after each run; run again with the same settings, it goes on behind what is
there. Needs models/teacher_model, and models/student_model where heads and neurons have targets of their own: shares of
MACs are left of the teacher itself.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression.checkpoint import find_newest, read_stage, require
from compression.config import AtLeast, Between, Config, run_script
from compression.files import read_json, write_json
from compression.runtime import MODELS, RESULTS, ROOT, fingerprint, log

MODES = ("l2", "kd_grad", "l2+kd_grad", "fisher", "obs")
OUTPUT = RESULTS / "importance_modes.json"


@dataclass
class ModesConfig(Config):
    modes: tuple[str, ...] = MODES
    """Which modes."""
    repairs: tuple[str, ...] = ("none",)
    """Which repairs, with each mode."""
    mac_shares: tuple[Annotated[float, Between(0.01, 1)], ...] = ()
    """Shares of the teacher's encoder MACs to leave; without any, the sparsities below."""
    seeds: Annotated[int, AtLeast(1)] = 3
    """Runs of each."""
    head_final_sparsity: float = 0.5
    """Share of the heads to remove: high, so that the modes differ."""
    ffn_final_sparsity: float = 0.5
    """Share of the FFN neurons to remove."""
    train_fraction: float = 0.3
    """Share of the training data."""
    num_epochs: int = 4
    """Passes over it."""
    pruning_epochs: int = 2
    """The first of them, in which it is pruned; the rest is finetuning."""
    pruning_frequency: int = 20
    """Steps between pruning events."""
    amp: str = "auto"
    """Mixed precision."""
    data_dir: str | None = None
    """Folder with SST-2, as for the stages."""
    models_dir: Path = MODELS
    """Where the student and the teacher are."""

    @property
    def targets(self) -> dict[str, list[str]]:
        """What is told stage 8 of how much goes, by name."""
        if not self.mac_shares:
            sparsities = {name: getattr(self, name) for name in ("head_final_sparsity", "ffn_final_sparsity")}
            student = ["--student_path", str((self.models_dir / "student_model").resolve())]
            return {
                "sparsity": student + [word for name, value in sparsities.items() for word in (f"--{name}", str(value))]
            }
        deep = ["--preset", "half"]  # what the presets of deep compression share; the target is another
        return {f"mac {share}": [*deep, "--target", "mac", str(share)] for share in self.mac_shares}


def run(config: ModesConfig, mode: str, repair: str, target: str, seed: int, work: Path) -> dict[str, float]:
    """Metrics of one run of stage 8."""
    shutil.rmtree(work, ignore_errors=True)
    flags = {
        "importance_mode": mode,
        "repair": repair,
        "seed": seed,
        "train_fraction": config.train_fraction,
        "num_epochs": config.num_epochs,
        "pruning_end_epoch": config.pruning_epochs,
        "pruning_frequency": config.pruning_frequency,
        "amp": config.amp,
        "models_dir": work.resolve(),
        "teacher_path": (config.models_dir / "teacher_model").resolve(),
    } | ({"data_dir": config.data_dir} if config.data_dir else {})
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "8_pruning_with_finetuning.py", "--fast", *words, *config.targets[target]]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    metrics = read_stage(find_newest(work, "pruned"))["metrics"]
    shutil.rmtree(work)
    return metrics


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Accuracies of some seeds, their mean and their spread."""
    accuracies = [metrics["accuracy"] for metrics in runs]
    spread = stdev(accuracies) if len(accuracies) > 1 else None
    return {"accuracies": accuracies, "mean": mean(accuracies), "stdev": spread, "runs": runs}


def main(config: ModesConfig) -> None:
    require(config.models_dir / "teacher_model", "--models_dir", "python 1_finetune_teacher.py")
    if not config.mac_shares:
        require(config.models_dir / "student_model", "--models_dir", "python 2_distill_student.py")
    found = read_json(OUTPUT) if OUTPUT.is_file() else {}
    results: dict[str, dict[str, Any]] = found["results"] if found.get("config") == config.as_dict() else {}
    for seed, target, mode, repair in product(range(config.seeds), config.targets, config.modes, config.repairs):
        name = f"{target}, {mode}" + (f", repair {repair}" if repair != "none" else "")
        runs = results.get(name, {}).get("runs", [])
        if len(runs) > seed:
            continue
        runs = [*runs, run(config, mode, repair, target, seed, RESULTS / "importance_modes")]
        results[name] = {"mode": mode, "repair": repair, "target": target} | summary(runs)
        log.info("%-30s mean %.4f  %s", name, results[name]["mean"], results[name]["accuracies"])
        write_json(OUTPUT, {"config": config.as_dict(), "environment": fingerprint(), "results": results})


if __name__ == "__main__":
    run_script(ModesConfig, main)

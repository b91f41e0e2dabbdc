"""Compare the importance modes of stage 8 at equal sparsity.

    python benchmarks/importance_modes.py [--seeds 3] [--data_dir DIR]

Runs stage 8 once for each mode and seed, with the same targets and schedule, and writes accuracy with mean and spread
to results/importance_modes.json. Needs models/student_model and models/teacher_model.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression.checkpoint import find_newest, read_stage, require
from compression.config import Config, run_script
from compression.files import write_json
from compression.runtime import MODELS, RESULTS, ROOT, fingerprint, log

MODES = ("l2", "kd_grad", "l2+kd_grad", "fisher")


@dataclass
class ModesConfig(Config):
    modes: tuple[str, ...] = MODES
    """Which modes."""
    seeds: int = 3
    """Runs of each mode."""
    head_final_sparsity: float = 0.5
    """Share of the heads to remove: high, so that the modes differ."""
    ffn_final_sparsity: float = 0.5
    """Share of the FFN neurons to remove."""
    train_fraction: float = 0.3
    """Share of the training data."""
    num_epochs: int = 4
    """Passes over it: two of pruning, the rest finetuning."""
    data_dir: str | None = None
    """Folder with SST-2, as for the stages."""
    models_dir: Path = MODELS
    """Where the student and the teacher are."""


def run(config: ModesConfig, mode: str, seed: int, work: Path) -> dict[str, float]:
    """Metrics of one run of stage 8."""
    shutil.rmtree(work, ignore_errors=True)
    command = [
        sys.executable,
        "8_pruning_with_finetuning.py",
        "--fast",
        "--importance_mode",
        mode,
        "--seed",
        str(seed),
        "--head_final_sparsity",
        str(config.head_final_sparsity),
        "--ffn_final_sparsity",
        str(config.ffn_final_sparsity),
        "--train_fraction",
        str(config.train_fraction),
        "--num_epochs",
        str(config.num_epochs),
        "--pruning_frequency",
        "20",
        "--models_dir",
        str(work.resolve()),
        "--student_path",
        str((config.models_dir / "student_model").resolve()),
        "--teacher_path",
        str((config.models_dir / "teacher_model").resolve()),
        *(["--data_dir", config.data_dir] if config.data_dir else []),
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    metrics = read_stage(find_newest(work, "pruned"))["metrics"]
    shutil.rmtree(work)
    return metrics


def main(config: ModesConfig) -> None:
    require(config.models_dir / "student_model", "--models_dir", "python 2_distill_student.py")
    results: dict[str, dict] = {}
    for mode in config.modes:
        runs = [run(config, mode, seed, RESULTS / "importance_modes") for seed in range(config.seeds)]
        accuracies = [metrics["accuracy"] for metrics in runs]
        spread = stdev(accuracies) if len(accuracies) > 1 else None
        results[mode] = {"accuracies": accuracies, "mean": mean(accuracies), "stdev": spread, "runs": runs}
        log.info("%-12s mean %.4f  %s", mode, mean(accuracies), " ".join(f"{value:.4f}" for value in accuracies))
        write_json(
            RESULTS / "importance_modes.json",
            {"config": config.as_dict(), "environment": fingerprint(), "results": results},
        )


if __name__ == "__main__":
    run_script(ModesConfig, main)

"""What checksums, their verification and writing through to the disk add to the classifier track.

    python benchmarks/integrity_cost.py [--train_fraction 0.05] [--work_dir DIR] [--data_dir DIR]

Runs all stages one after the other in this process, as run_pipeline.sh does, into a folder of its own, and adds up the
time inside the functions that exist for integrity alone. Writes results/integrity_cost.json.
"""

import runpy
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression import checkpoint, files, integrity, outputs
from compression.config import Config, run_script
from compression.files import write_json
from compression.runtime import RESULTS, ROOT, fingerprint, log
from compression.sources import STUDENT, TEACHER
from compression.tables import Column, text_table


@dataclass
class CostConfig(Config):
    fast: bool = True
    """Quick settings of all stages."""
    train_fraction: float = 0.0
    """Share of the training data, above 0: fewer steps, as many checkpoints, so what is printed is an upper bound."""
    work_dir: Path = RESULTS / "integrity_cost"
    """Where models and reports go; emptied first and afterwards."""
    data_dir: str | None = None
    """Folder with SST-2, as for the stages."""
    teacher: str = TEACHER
    """Encoder that the teacher starts from, as for download_model.py."""
    student: str = STUDENT
    """Encoder that the student starts from."""


class Timer:
    """Seconds inside functions, of which one may call another: the outer one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.depth = 0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to what is called `name`."""

        def timed(*arguments, **options):
            started = time.perf_counter()
            self.depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return timed


def stages(config: CostConfig) -> list[list[str]]:
    """The command lines of the classifier track."""
    models, report = ["--models_dir", str(config.work_dir / "models")], ["--output_dir", str(config.work_dir)]
    data = ["--data_dir", config.data_dir] if config.data_dir else []
    fast = ["--fast"] if config.fast else []
    train = [*fast, *(["--train_fraction", str(config.train_fraction)] if config.train_fraction else [])]
    student = str(config.work_dir / "models" / "student_model")
    return [
        ["download_model.py", "--teacher", config.teacher, "--student", config.student, *models, *data],
        ["1_finetune_teacher.py", *models, *data, *train],
        ["2_distill_student.py", *models, *data, *train],
        ["2_distill_student.py", "--variant", "soft_labels", *models, *data, *train],
        ["8_pruning_with_finetuning.py", *models, *data, *train],
        ["9_quantize_pruned_model.py", *models, "--pruned_model_path", student, "--output_dir", f"{student}_quantized"],
        ["9_quantize_pruned_model.py", *models],
        ["10_qat_kd_4bit.py", *models, *data, *train],
        ["7_evaluate_and_generate_report.py", *models, *data, *fast, *report],
        ["evaluate_plot.py", *models, *data, *fast, *report],
    ]


def measure(timer: Timer, command: list[str]) -> dict[str, Any]:
    """Run a stage in this process; its seconds, and those inside what `timer` watches."""
    timer.seconds.clear()
    integrity._known_sha256.clear()  # a stage is a process of its own otherwise
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    started = time.perf_counter()
    runpy.run_path(sys.argv[0], run_name="__main__")
    return {"stage": " ".join(command[:3]), "seconds": time.perf_counter() - started, "integrity": dict(timer.seconds)}


def main(config: CostConfig) -> None:
    timer, commands = Timer(), stages(config)
    for module in (integrity, outputs, checkpoint):
        if hasattr(module, "verify"):
            module.verify = timer.wrap("verification", module.verify)
        if hasattr(module, "sha256_of"):
            module.sha256_of = timer.wrap("checksums", module.sha256_of)
    for module in (files, outputs):
        module.sync = timer.wrap("writing through to the disk", module.sync)
    checkpoint.check_finite = timer.wrap("finite weights", checkpoint.check_finite)

    shutil.rmtree(config.work_dir, ignore_errors=True)
    rows = [measure(timer, command) for command in commands]
    total = sum(row["seconds"] for row in rows)
    names = sorted({name for row in rows for name in row["integrity"]})
    parts = {name: sum(row["integrity"].get(name, 0.0) for row in rows) for name in names}
    share = sum(parts.values()) / total
    columns = [
        Column("", itemgetter(0)),
        Column("seconds", itemgetter(1), "{:.2f}"),
        Column(f"% of {total:.0f} s", lambda part: 100 * part[1] / total, "{:.3f}"),
    ]
    log.info("%s", text_table(columns, [*parts.items(), ("all", sum(parts.values()))]))
    found = {"share": share, "seconds": parts, "total_seconds": total, "stages": rows}
    write_json(RESULTS / "integrity_cost.json", found | {"config": config.as_dict(), "environment": fingerprint()})
    shutil.rmtree(config.work_dir)


if __name__ == "__main__":
    run_script(CostConfig, main)

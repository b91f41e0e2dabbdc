"""Every stage writes to a disk of 5 MB that is full, or gets full while it writes, or cannot be written at all."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from faults.kills import user_files
from faults.namespaces import NEW_MOUNTS, allowed, enter, mount
from faults.process import Case, World, difference, everything, refusal_problems
from faults.world import command

SIZE, READ_ONLY = 5 * 2**20, 1
# Bytes that are left: the writing fails at its first file, in the weights, behind them. A tiny result has about 100 kB.
LEFT = (0, 8, 32, 80, 160)
# Stage -> its flags with {} for the small disk, what is on that disk, what the line must name one of.
ON_THE_DISK = {
    "1": (("--models_dir {}",), "", ("--models_dir", "teacher_model")),
    "2": (("--models_dir {}", "--teacher_path models/teacher_model"), "", ("--models_dir", "student_model")),
    "8": (
        ("--models_dir {}", "--teacher_path models/teacher_model", "--student_path models/student_model"),
        "",
        ("--models_dir",),
    ),
    "9": (("--output_dir {}/quantized",), "models/pruned_quantized_final", ("--output_dir", "quantized")),
    "10": (
        ("--models_dir {}", "--teacher_path models/teacher_model", "--pruned_model_path models/student_model"),
        "",
        ("--models_dir",),
    ),
    "7": (("--output_dir {}",), "", ("--output_dir", "final_report")),
    "plot": (("--output_dir {}",), "", ("--output_dir", "model_comparison")),
    "prune": (("--results_dir {}",), "results/hgsp", ("--results_dir", "hgsp")),
    "gqa": (("--results_dir {}",), "results/gqa", ("--results_dir", "gqa")),
    "lora": (("--results_dir {}",), "results/recovered", ("--results_dir", "recovered")),
    "full": (("--results_dir {}",), "results/full", ("--results_dir", "full")),
    "merge": (("--output_dir {}/merged",), "results/merged", ("--output_dir", "merged")),
    "evaluate": (("--output_file {}/lora_evaluation.json",), "", ("--output_file", "lora_evaluation")),
    "write": (("--results_dir {}",), "results/own_text", ("--results_dir", "own_text")),
    "download": (("--models_dir {}",), "downloads", ("--models_dir", "bert-local")),
}
HAVING_SEED = ("1", "2", "8", "10", "prune", "gqa", "lora", "full", "write")
SEEDED = ["--seed 5"]


def cases() -> Iterable[Case]:
    if not allowed():
        return [Case("no namespaces here: unshare is not allowed", lambda world: None)]
    return [
        Case(
            f"{stage}: {'a disk that cannot be written' if kilobytes is None else f'{kilobytes} kB left'}",
            attack(stage, kilobytes),
            " ".join(command(stage, *(flag.format("small") for flag in flags))),
        )
        for stage, (flags, _, _) in ON_THE_DISK.items()
        for kilobytes in (*LEFT, None)
    ]


def attack(stage: str, kilobytes: int | None) -> Callable[[World], list[str] | None]:
    flags, present, names = ON_THE_DISK[stage]

    def run(world: World) -> list[str] | None:
        small = world.clone / "small"
        enter(NEW_MOUNTS)
        mount("tmpfs", small, f"size={SIZE}")
        if present:
            name = present if "/" not in present else Path(present).name
            target = small if present == "downloads" else small / ("quantized" if stage == "9" else Path(name).name)
            shutil.copytree(world.clone / present, target, dirs_exist_ok=True)
        (small / "thesis.txt").write_text("on a small disk\n")
        if kilobytes is None:
            mount("tmpfs", small, f"size={SIZE}", flags=READ_ONLY)
        else:
            fill(small, 1024 * kilobytes)
        arguments = command(stage, *(flag.format("small") for flag in flags), *SEEDED * (stage in HAVING_SEED))
        users, before = user_files(world.root), everything(world.root)
        outcome = world.run(arguments)
        problems = ["a user's file is gone"] * (user_files(world.root) != users)
        if outcome.code == 0 and kilobytes:
            return problems  # there was room enough
        problems += refusal_problems(outcome, (*names, "small"))
        if not problems and not any(
            text in outcome.stderr for text in ("No space left", "Read-only", "cannot be written")
        ):
            problems.append(f"does not say why: {outcome.last_words()}")
        changed = difference(before, everything(world.root))
        return problems + ([f"files: {changed}"] if changed else [])

    return run


def fill(folder: Path, left: int) -> None:
    """Leave so many bytes on the disk."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with (folder / "filler").open("wb") as file:
        for _ in range(max(0, free - left) // 4096):
            file.write(bytes(4096))

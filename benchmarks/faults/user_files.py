"""A user's file in every place that a flag can name as an output: it is never deleted or changed."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from faults.process import Case, World
from faults.world import USER_FILE, command

TEACHER, STUDENT = "--teacher_path models/teacher_model", "--student_path models/student_model"
# Stage, its flags with {} for the folder that they name, and the place below that folder which the stage would write.
OUTPUTS = [
    ("1", ("--models_dir {}",), "teacher_model"),
    ("2", ("--models_dir {}", TEACHER), "student_model"),
    ("2", ("--models_dir {}", TEACHER, "--variant soft_labels"), "student_softlabel_model"),
    ("8", ("--models_dir {}", TEACHER, STUDENT), ""),
    ("9", ("--models_dir {}", "--pruned_model_path models/student_model"), "pruned_quantized_final"),
    ("9", ("--output_dir {}", "--pruned_model_path models/student_model"), ""),
    ("10", ("--models_dir {}", TEACHER, "--pruned_model_path models/student_model"), ""),
    ("7", ("--output_dir {}",), ""),
    ("7", ("--output_dir {}",), "final_report.json"),
    ("plot", ("--output_dir {}",), ""),
    ("plot", ("--output_dir {}",), "model_comparison.csv"),
    *(
        (stage, ("--results_dir {}", "--output_name mine"), place)
        for stage in ("prune", "gqa")
        for place in ("mine", "mine/models", "mine/analysis", "mine/evaluation", "mine/logs")
    ),
    ("prune", ("--results_dir {}", "--output_name mine", "--finetune", "--finetune_samples 4"), "mine/finetuned"),
    ("lora", ("--results_dir {}", "--output_name mine"), "mine"),
    ("lora", ("--output_dir {}",), ""),
    ("full", ("--results_dir {}", "--output_name mine"), "mine"),
    ("full", ("--output_dir {}",), ""),
    ("merge", ("--output_dir {}",), ""),
    ("evaluate", ("--output_file {}/figures.json",), "figures.json"),
    ("evaluate", ("--output_file {}/figures.json",), ""),
    ("write", ("--results_dir {}", "--output_name mine"), "mine"),
    ("download", ("--models_dir {}",), "bert-local"),
    ("download", ("--models_dir {}",), "distilbert-local"),
]
WORK = "years of work\n"


def cases() -> Iterable[Case]:
    kinds = {
        "a folder with thesis.txt": plain,
        "an earlier output with thesis.txt added": earlier,
        "a file": file,
        "a link to a folder with thesis.txt": link,
        "thesis.txt deep below": deep,
    }
    return [
        Case(
            f"{' '.join((stage, *flags)).format('mine_too')} [{place or 'the folder itself'}: {what}, {again}]",
            attack(stage, flags, place, make, again),
            " ".join(command(stage, *flags)),
        )
        for stage, flags, place in OUTPUTS
        for what, make in kinds.items()
        for again in ("first", "with --overwrite")
    ]


def attack(stage: str, flags: tuple, place: str, make: Callable, again: str) -> Callable[[World], list[str] | None]:
    def run(world: World) -> list[str] | None:
        arguments = command(stage, *(flag.format("mine_too") for flag in flags))
        if again == "first":
            arguments = [word for word in arguments if word != "--overwrite"]
        elif "--overwrite" not in arguments:
            return None
        target = world.clone / "mine_too" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if make(world, target, arguments) is False:
            return None
        before = works(world.root)
        outcome = world.run(arguments)
        after = works(world.root)
        problems = [f"{path}: gone" for path in before if path not in after]
        problems += [f"{path}: changed" for path in before if path in after and before[path] != after[path]]
        if "Traceback" in outcome.stderr:
            problems.append(f"traceback: {outcome.last_words()}")
        return problems

    return run


def works(root: Path) -> dict[str, str]:
    """The user's files and links, by place. (A hidden place is none that a user would find them in.)"""
    found = {}
    for path in root.rglob("*"):
        shown = str(path.relative_to(root))
        if path.is_symlink():
            found[shown] = "a link"
        elif path.is_file() and (path.name == USER_FILE or path.read_bytes() == WORK.encode()):
            found[shown] = path.read_text()
    return {shown: text for shown, text in found.items() if "/." not in shown.replace("/.git", "")}


# What lies at the place. Each gives False where that cannot be there.


def plain(world: World, target: Path, arguments: list[str]) -> bool | None:
    if target.suffix:
        return False
    target.mkdir(exist_ok=True)
    (target / USER_FILE).write_text(WORK)


def deep(world: World, target: Path, arguments: list[str]) -> bool | None:
    if target.suffix:
        return False
    (target / "chapters" / "one").mkdir(parents=True)
    (target / "chapters" / "one" / USER_FILE).write_text(WORK)


def file(world: World, target: Path, arguments: list[str]) -> None:
    target.write_text(WORK) if not target.is_dir() else target.rmdir() or target.write_text(WORK)


def link(world: World, target: Path, arguments: list[str]) -> bool | None:
    if target.suffix:
        return False
    shutil.rmtree(target, ignore_errors=True)
    target.symlink_to(world.root / "other" / "documents")


def earlier(world: World, target: Path, arguments: list[str]) -> bool | None:
    """The same command has run, then the user put a file beside its results."""
    if target.suffix or world.run(arguments).code or not target.is_dir():
        return False
    (target / USER_FILE).write_text(WORK)

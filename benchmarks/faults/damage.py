"""Every file of a checkpoint, an adapter, a state and a cache: bytes flipped, cut off, replaced, the file gone."""

import random
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from faults.bad_inputs import pruned
from faults.process import Case, Death, Outcome, World, difference, everything, read_changes, refusal_problems
from faults.results import result_of
from faults.world import command

FLIPS = ("start", "middle", "end", "somewhere")


def damages(seed: int) -> dict[str, Callable[[bytes], bytes | None]]:
    """What is done to a file's contents, by name; None takes the file away."""

    def flip(place: Callable[[int], int]) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            at = place(len(data))
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

        return change

    draw = random.Random(seed)
    share = draw.random()
    return {
        "first byte flipped": flip(lambda size: 0),
        "middle byte flipped": flip(lambda size: size // 2),
        "last byte flipped": flip(lambda size: size - 1),
        f"byte at {share:.2f} flipped": flip(lambda size: int(share * size)),
        "emptied": lambda data: b"",
        "half of it": lambda data: data[: len(data) // 2],
        "last byte off": lambda data: data[:-1],
        "random bytes": lambda data: random.Random(seed + 1).randbytes(len(data)),
        "gone": lambda data: None,
    }


@dataclass
class Target:
    """A folder whose files are damaged, and what reads it.

    Attributes:
        name: in the output.
        folder: gives it in a case's clone.
        read: the arguments of the run that reads it.
        result: the undisturbed run's result, where taking another's place (computing it again) is as good as a refusal.
        prepare: what is done first, such as a run that is killed.
    """

    name: str
    folder: Callable[[Path], Path]
    read: list[str]
    output: str
    expected: dict | None = None
    prepared: Path | None = None


def attack(target: Target, file: str, change: Callable[[bytes], bytes | None]) -> Callable[[World], list[str] | None]:
    def run(world: World) -> list[str] | None:
        if target.prepared is not None:
            shutil.rmtree(world.root)
            shutil.copytree(target.prepared, world.root, symlinks=True)
        path = target.folder(world.clone) / file
        data = path.read_bytes()
        new = change(data) if data else None
        if new == data:
            return None
        if new is None:
            path.unlink()
        else:
            path.write_bytes(new)
        before = everything(world.root)
        outcome = world.run(target.read)
        return judge(target, path, outcome, world, before)

    return run


def judge(target: Target, path: Path, outcome: Outcome, world: World, before: dict) -> list[str]:
    """Refused in a line that names the file; or, for a cache or a state, the undisturbed result."""
    # Without its record a checkpoint is as one that was made elsewhere, which loads.
    elsewhere = path.name == "stage.json" and not path.exists()
    if outcome.code == 0 and target.expected is not None:
        found = result_of(world.clone, target.output)
        return [] if found == target.expected else ["exit 0, but another result than the undisturbed one"]
    if outcome.code == 0 and elsewhere:
        return []
    # A file that is gone may be missed by the folder's name; without its record a folder is no result of a stage.
    names = [path.name] if path.exists() else [path.name, path.parent.name, *["no pruned model there"] * elsewhere]
    problems = refusal_problems(outcome, names)
    changed = difference(before, everything(world.root)) if target.expected is None else ""
    return problems + ([f"files: {changed}"] if changed else [])


# What is damaged.


def hidden(pattern: str) -> Callable[[Path], Path]:
    """The last of the folders that match: of a run's states the one it goes on from."""
    return lambda clone: [path for path in sorted(clone.glob(pattern)) if path.is_dir()][-1]


def cases(context) -> Iterable[Case]:
    found = []
    for target in targets(context):
        root = target.prepared or context.template
        folder = target.folder(root / "clone")
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        # A model card may be changed or deleted.
        damaged = [file for file in files if not file.endswith((".lock", "README.md"))]
        for number, file in enumerate(damaged):
            for what, change in damages(context.seed + number).items():
                found.append(
                    Case(f"{target.name}: {file}: {what}", attack(target, file, change), " ".join(target.read))
                )
    return found


def targets(context) -> list[Target]:
    """All of them; those that a killed run leaves are made here, once."""
    again = ["--models_dir models", "--output_dir models/again"]
    prune = command("prune", "--output_name again", "--base_model results/hgsp/models", "--pruning_ratio 0.1")
    train = ("--save_steps 2", "--resume")
    return [
        Target("classifier", pruned, command("9", *again), "models/again"),
        Target("decoder", lambda clone: clone / "results/hgsp/models", prune, "results/again"),
        Target(
            "adapter",
            lambda clone: clone / "results/recovered",
            command("merge", "--output_dir results/again"),
            "results/again",
        ),
        killed(
            context,
            "state of stage 8",
            command("8", *train, "--seed 5"),
            "models/pruning_with_finetuning_*",
            "models/.pruned_*.resume/step_*",
            2,
        ),
        killed(
            context,
            "state of LoRA",
            command("lora", *train, "--output_name again", "--seed 5", "--num_epochs 2"),
            "results/again",
            "results/.again_*.resume/step_*",
            2,
        ),
        killed(
            context,
            "parts of a pruning run",
            command("prune", "--output_name again", "--seed 5", "--resume", "--temperature 1"),
            "results/again",
            "results/.again_*.resume",
            None,
        ),
        kept_logits(context),
    ]


def kept_logits(context) -> Target:
    read = command("2", "--seed 5")
    world = context.new_world(context.work / "kept_logits")
    outcome = world.run(read)
    if outcome.code:
        raise RuntimeError(f"{outcome.command}: {outcome.last_words()}")
    expected = result_of(world.clone, "models/student_model")
    return Target("teacher's logits", hidden("models/.teacher_logits_*"), read, "models/student_model", expected)


def killed(context, name: str, arguments: list[str], output: str, state: str, after: int | None) -> Target:
    """A run that died with a state on the disk, and what it gives undisturbed.

    Args:
        state: pattern of its folder.
        after: it died once so many states were saved; None: right before the first file of the result.
    """
    label = re.sub(r"\W+", "_", name)
    world = context.new_world(context.work / f"{label}_undisturbed")
    notes = world.notes / "changes"
    outcome = world.run(arguments, Death(world.root, notes))
    if outcome.code:
        raise RuntimeError(f"{outcome.command}: {outcome.last_words()}")
    changes = read_changes(notes)
    if after is None:
        place = next(n for n, (_, path) in enumerate(changes) if re.search(r"/\.again\.[0-9a-f]{16}\.tmp", path))
    else:
        saved = [
            number
            for number, (kind, path) in enumerate(changes)
            if kind in ("rename", "replace", "renameat2") and "/.step_" in path and path.endswith(".tmp")
        ]
        place = saved[after - 1] + 1
    expected = result_of(world.clone, output)
    dead = context.new_world(context.work / f"{label}_killed")
    dead.run(arguments, Death(dead.root, dead.notes / "changes", at=place))
    folder = hidden(state)
    next_folder = folder(dead.clone)
    if not any(next_folder.iterdir()):
        raise RuntimeError(f"{name}: the killed run left nothing in {next_folder}")
    return Target(name, folder, arguments, output, expected, dead.root)

"""Every stage dies before and after each change that it makes to names on the disk, and is run again."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from faults.process import DIED, Case, Death, World, leftovers, read_changes
from faults.results import digests
from faults.world import STAGES, USER_FILE, command


@dataclass(frozen=True)
class Scenario:
    """A run that is killed.

    Attributes:
        outputs: patterns of the folders that it writes; each must be of one run at any time.
        reports: files that it writes, whose figures are times: each run's are others.
    """

    name: str
    stage: str
    flags: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()


# The report's picture has no times in it: it is the same in each run.
REPORT = tuple(f"results/final_report.{end}" for end in ("json", "md"))
COMPARISON = tuple(f"results/model_comparison.{end}" for end in ("csv", "png", "pdf"))
SEED = "--seed 5"
SCENARIOS = (
    Scenario("1 over a result", "1", (SEED,), ("models/teacher_model",)),
    Scenario("2 over a result", "2", (SEED,), ("models/student_model",)),
    Scenario("2, another variant", "2", ("--variant soft_labels",), ("models/student_softlabel_model",)),
    Scenario("8", "8", (SEED,), ("models/pruning_with_finetuning_*",)),
    Scenario("9 over a result", "9", ("--double_quant",), ("models/pruned_quantized_final",)),
    Scenario("10", "10", (SEED,), ("models/pruned_qkd4bit_*",)),
    Scenario("7 over a report", "7", (), (), REPORT),
    Scenario("evaluate_plot over a comparison", "plot", (), (), COMPARISON),
    Scenario("pruning over a result", "prune", (SEED, "--pruning_ratio 0.5"), ("results/hgsp",)),
    Scenario("pruning", "prune", (SEED, "--output_name new"), ("results/new",)),
    Scenario(
        "pruning with training",
        "prune",
        (SEED, "--output_name new", "--finetune", "--finetune_samples 4"),
        ("results/new",),
    ),
    Scenario("GQA-aware pruning over a result", "gqa", (SEED, "--pruning_ratio 0.4"), ("results/gqa",)),
    Scenario("LoRA over a result", "lora", (SEED,), ("results/recovered",)),
    Scenario("full training", "full", (SEED, "--output_name new"), ("results/new",)),
    Scenario(
        "merge over a result",
        "merge",
        ("--pruned_model results/full", "--output_dir results/full_merged"),
        ("results/full_merged",),
    ),
    Scenario("merge over the same", "merge", (), ("results/merged",)),
    Scenario(
        "evaluate_lora_model over a result", "evaluate", ("--eval_samples 3",), (), ("results/lora_evaluation.json",)
    ),
    Scenario("own text over a result", "write", (SEED,), ("results/own_text",)),
    Scenario("download", "download", ("--models_dir fetched",), ("fetched/bert-local", "fetched/distilbert-local")),
    Scenario("download over another", "download", ("--teacher models/teacher_model",), ("downloads/bert-local",)),
)


@dataclass
class Undisturbed:
    """A scenario's run without a kill: its arguments, what was there before it, after it, and what it changed."""

    scenario: Scenario
    arguments: list[str]
    again: list[str]
    old: dict
    new: dict
    changes: list[tuple[str, str]]
    left: list[str]


def cases(context) -> Iterable[Case]:
    return [
        Case(
            f"{undisturbed.scenario.name}: {'after' if after else 'before'} change {number} of "
            f"{len(undisturbed.changes)}, {kind} {shown(path)}",
            attack(undisturbed, number, after),
            " ".join(undisturbed.arguments),
        )
        for undisturbed in map(lambda scenario: watch(scenario, context), SCENARIOS)
        for number, after in moments(undisturbed.changes)
        for kind, path in [undisturbed.changes[number]]
    ]


def shown(path: str) -> str:
    return path if len(path) < 60 else "..." + path[-57:]


def flags_of(context, stage: str) -> str:
    """A script's help text: which flags it has."""
    return World(context.template, context.code).run([STAGES[stage].split()[0], "--help"]).stdout


@cache
def watch(scenario: Scenario, context) -> Undisturbed:
    """Run it without a kill, and note what it changes.

    Raises:
        RuntimeError: it does not run.
    """
    known = flags_of(context, scenario.stage)
    arguments = command(scenario.stage, *scenario.flags)
    world = context.new_world(Path(tempfile.mkdtemp(prefix="undisturbed.", dir=context.work)) / "world")
    old, left = state(world.clone, scenario), leftovers(world.root)
    notes = world.notes / "changes"
    outcome = world.run(arguments, Death(world.root, notes))
    if outcome.code:
        raise RuntimeError(f"{outcome.command} does not run: {outcome.last_words()}")
    again = arguments + ["--resume"] * ("--resume" in known)
    return Undisturbed(scenario, arguments, again, old, state(world.clone, scenario), read_changes(notes), left)


def moments(changes: list[tuple[str, str]]) -> list[tuple[int, bool]]:
    """The changes to die before, and those to die after.

    What lies on the disk after a change is what lies there before the next one, but for what is written into hidden
    temporary names in between: so only the last change is died after, and the making of a visible file, which is empty
    then. Of a row of deletions in one folder the first two and the last stand for all.
    """
    found = []
    for number, (kind, path) in enumerate(changes):
        here = (kind, str(Path(path).parent))
        around = [
            (changes[other][0], str(Path(changes[other][1]).parent)) if 0 <= other < len(changes) else None
            for other in (number - 2, number - 1, number + 1)
        ]
        if kind == "unlink" and around == [here] * 3:
            continue
        found.append((number, False))
        if kind == "create" or number == len(changes) - 1:
            found.append((number, True))
    return found


def state(clone: Path, scenario: Scenario) -> dict[str, dict[str, str]]:
    """What lies in the output folders and reports, by place."""
    found = {
        str(path.relative_to(clone)): digests(path)
        for pattern in scenario.outputs
        for path in sorted(clone.glob(pattern))
        if not path.name.startswith(".") and digests(path)
    }
    reports = {name: (clone / name) for name in scenario.reports}
    return found | {name: {"bytes": path.read_bytes().hex()} for name, path in reports.items() if path.is_file()}


def read_by_the_project(clone: Path, scenario: Scenario) -> None:
    """Look at the outputs as the next script would, which may first finish what was interrupted."""
    from compression.stage_record import read_stage

    for pattern in scenario.outputs:
        for folder in ("", "models", "finetuned"):
            if "*" not in pattern:
                read_stage(clone / pattern / folder)


def attack(undisturbed: Undisturbed, number: int, after: bool) -> Callable[[World], list[str] | None]:
    scenario = undisturbed.scenario

    def run(world: World) -> list[str] | None:
        users = user_files(world.root)
        outcome = world.run(undisturbed.arguments, Death(world.root, world.notes / "changes", number, after))
        if outcome.code == 0:
            return None  # it took a change less this time
        if outcome.code != DIED:
            return [f"before the kill: {outcome.last_words()}"]
        problems = []
        answer = world.call(lambda: read_by_the_project(world.clone, scenario))
        if answer is not None:
            problems.append(f"reading after the kill: {answer['error']}")
        problems += half(undisturbed, state(world.clone, scenario))
        if user_files(world.root) != users:
            problems.append("a user's file is gone")
        outcome = world.run(undisturbed.again)
        if outcome.code:
            return problems + [f"again: exit {outcome.code}: {outcome.last_words()}"]
        problems += differs(undisturbed, state(world.clone, scenario))
        if user_files(world.root) != users:
            problems.append("again: a user's file is gone")
        if left := leftovers(world.root, undisturbed.left):
            problems.append(f"again: left {', '.join(left)[:200]}")
        return problems

    return run


def user_files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob(USER_FILE))}


def half(undisturbed: Undisturbed, found: dict) -> list[str]:
    """What is neither the old result nor the new one."""
    scenario, old, new = undisturbed.scenario, undisturbed.old, undisturbed.new
    if scenario.reports:
        there = [name for name in scenario.reports if name in found]
        fresh = [name for name in there if found[name] != old.get(name)]
        if there and (len(there) < len(scenario.reports) or 0 < len(fresh) < len(there)):
            return [f"of two runs: {', '.join(fresh) or 'none'} new, of {', '.join(there)}"]
        return []
    if any("*" in pattern for pattern in scenario.outputs):
        gone = [name for name in old if found.get(name) != old[name]]
        made = [name for name in found.keys() - old.keys() if found[name] not in new.values()]
        return [f"{name} is not what it was" for name in gone] + [f"{name} is not complete" for name in made]
    problems = []
    for name in old.keys() | new.keys():
        if name in found or name in old:
            mine = found.get(name, {})
            before, after = old.get(name, {}), new.get(name, {})
            if mine not in (before, after) and not is_complete_but_training(mine, after):
                problems.append(f"{name} is neither the old result nor the new one: {mixture(mine, before, after)}")
    return problems


def is_complete_but_training(found: dict[str, str], new: dict[str, str]) -> bool:
    """Of a pruning run with training after it, all that is complete before the training has ended."""

    def pruning(digest: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in digest.items() if not name.startswith(("finetuned/", "evaluation/"))}

    trained = {name: value for name, value in new.items() if name.startswith("finetuned/")}
    mine = {name: value for name, value in found.items() if name.startswith("finetuned/")}
    evaluated = any(name.startswith("evaluation/") for name in found)
    return bool(trained) and evaluated and mine in ({}, trained) and pruning(found) == pruning(new)


def mixture(found: dict, old: dict, new: dict) -> str:
    if not found:
        return "nothing there"
    differing = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    is_new = sorted(name for name in differing if name in found and found.get(name) == new.get(name))
    is_old = sorted(name for name in differing if name in found and found.get(name) == old.get(name))
    missing = sorted(name for name in new if name not in found)
    return f"new {is_new[:3]}, old {is_old[:3]}, missing {missing[:3]}"


def differs(undisturbed: Undisturbed, found: dict) -> list[str]:
    """What the second run made otherwise than the undisturbed one."""
    scenario, old, new = undisturbed.scenario, undisturbed.old, undisturbed.new
    if scenario.reports:
        stale = [name for name in scenario.reports if found.get(name) == old.get(name)]
        return [f"again: {', '.join(stale)} not written"] if stale else []
    expected = [new[name] for name in new if new[name] != old.get(name)] or list(new.values())
    missing = [value for value in expected if value not in found.values()]
    return ["again: another result than the undisturbed one"] if missing else []

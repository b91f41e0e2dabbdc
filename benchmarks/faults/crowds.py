"""Two identical runs at once, and readers of a folder that is replaced all the time."""

import os
import re
import socket
import time
from collections.abc import Callable, Iterable

from faults.kills import SCENARIOS, Undisturbed, differs, half, state, user_files, watch
from faults.process import Case, Outcome, World, leftovers

ROUNDS = 2
READERS, REPLACEMENTS = 2, 150


def cases(context) -> Iterable[Case]:
    pairs = [
        Case(
            f"{undisturbed.scenario.name}: twice at once, round {number + 1}",
            twice(undisturbed),
            " ".join(undisturbed.arguments),
        )
        for undisturbed in (watch(scenario, context) for scenario in SCENARIOS)
        for number in range(ROUNDS)
    ]
    kinds = {"read_stage": read_stage, "identify": identify, "load_classifier": load_classifier}
    readers = [
        Case(
            f"{READERS} processes: {name} during {REPLACEMENTS} replacements by {writers} writer(s)",
            readers_and_writers(read, writers),
            f"save_folder against {name}",
        )
        for name, read in kinds.items()
        for writers in (1, 2)
    ]
    return pairs + readers


def twice(undisturbed: Undisturbed) -> Callable[[World], list[str]]:
    def run(world: World) -> list[str]:
        users = user_files(world.root)
        start = time.time() + 0.3

        def together() -> None:
            time.sleep(max(0.0, start - time.time()))

        children = [world.start(undisturbed.arguments, together) for _ in range(2)]
        outcomes = [child.wait() for child in children]
        problems = [problem for outcome in outcomes for problem in refused_or_done(outcome, children)]
        if all(outcome.code for outcome in outcomes):
            problems.append("neither succeeded")
        found = state(world.clone, undisturbed.scenario)
        problems += half(undisturbed, found) + differs(undisturbed, found)
        if left := leftovers(world.root, undisturbed.left):
            problems.append(f"left {', '.join(left)[:200]}")
        return problems + ["a user's file is gone"] * (user_files(world.root) != users)

    return run


def refused_or_done(outcome: Outcome, children: list) -> list[str]:
    """A run beside another may wait for it, or refuse in a line with the other's process and host."""
    if outcome.code == 0:
        return []
    lines = outcome.stderr.strip().splitlines()
    if outcome.code != 2 or "Traceback" in outcome.stderr or len(lines) != 1:
        return [f"one: exit {outcome.code}: {outcome.last_words()}"]
    others = [str(child.pid) for child in children if child.command]
    if not any(re.search(rf"\b{pid}\b", lines[0]) for pid in others) or socket.gethostname() not in lines[0]:
        return [f"one does not name the other's process and host: {lines[0][:200]}"]
    return []


# Readers against writers, by the project's own functions.


def read_stage(folder) -> str:
    from compression.stage_record import read_stage

    stage = read_stage(folder)
    return "nothing there" if stage is None else "" if stage["config"]["number"] is not None else "half of it"


def identify(folder) -> str:
    from compression.stage_record import identify

    return "" if identify(folder)["sha256"] else "nothing"


def load_classifier(folder) -> str:
    from compression.checkpoint import load_classifier

    load_classifier(folder)
    return ""


def readers_and_writers(read: Callable, writers: int) -> Callable[[World], list[str]]:
    def run(world: World) -> list[str]:
        folder, done = world.clone / "models" / "replaced", world.notes / "done"

        def write(number: int) -> None:
            from compression.runtime import UserError

            refused = 0
            for _ in range(REPLACEMENTS):
                try:
                    replace(folder, world, number)
                except UserError:  # another writer is at it
                    refused += 1
            if refused == REPLACEMENTS:
                raise RuntimeError("no replacement at all")

        def watch_it() -> None:
            problems, times = {}, 0
            while not done.exists():
                times += 1
                try:
                    problem = read(folder)
                except Exception as error:
                    problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                if problem:
                    problems[problem] = problems.get(problem, 0) + 1
            for problem, count in problems.items():
                print(f"{count} of {times} readings: {problem}")

        world.call(lambda: replace(folder, world, 0))
        if not folder.exists():
            return ["the folder to replace could not be written"]
        looking = [world.start_function(watch_it) for _ in range(READERS)]
        writing = [world.start_function(lambda number=number: write(number)) for number in range(writers)]
        outcomes = [child.wait(120) for child in writing]
        done.touch()
        problems = [f"a writer: {outcome.last_words()}" for outcome in outcomes if outcome.code]
        for child in looking:
            outcome = child.wait(30)
            text = outcome.stdout if outcome.code == 0 else outcome.last_words()
            problems += [f"a reader: {line[:200]}" for line in text.strip().splitlines()[:3]]
        if left := [name for name in leftovers(world.root) if "replaced" in name]:
            problems.append(f"left {', '.join(left)[:200]}")
        return problems

    return run


def replace(folder, world: World, number: int) -> None:
    """Write the folder anew, as a copy of the teacher."""
    from compression.checkpoint import save_folder

    source = world.clone / "models" / "teacher_model"

    def put(temporary) -> None:
        for name in os.listdir(source):
            if name != "stage.json":
                (temporary / name).write_bytes((source / name).read_bytes())

    stage = {"stage": "teacher", "parent": None, "config": {"number": number}, "inputs": {}, "metrics": {}, "data": {}}
    save_folder(folder, put, stage)

"""Scripts that are process 1 of a namespace of their own, as in a container: on one disk, blind to each other."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from faults.kills import SEED, Scenario, Undisturbed, differs, half, moments, state, user_files, watch
from faults.namespaces import NEW_MOUNTS, NEW_PROCESSES, allowed, enter, mount
from faults.process import DIED, Case, Child, Death, Outcome, World, leftovers

SCENARIOS = (
    Scenario("1", "1", (SEED,), ("models/teacher_model",)),
    Scenario("8", "8", (SEED,), ("models/pruning_with_finetuning_*",)),
    Scenario("9", "9", ("--double_quant",), ("models/pruned_quantized_final",)),
    Scenario("pruning", "prune", (SEED,), ("results/hgsp",)),
    Scenario("LoRA", "lora", (SEED,), ("results/recovered",)),
    Scenario("merge", "merge", (), ("results/merged",)),
)
POINTS = 5


def as_first(world: World, arguments: list[str], setup: Callable[[], None] | None = None) -> Outcome:
    """Run a script as process 1 of a new namespace."""
    return start_as_first(world, arguments, setup).wait()


def start_as_first(world: World, arguments: list[str], setup: Callable[[], None] | None = None) -> Child:
    def into_namespace() -> None:
        enter(NEW_PROCESSES | NEW_MOUNTS)
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) % 256)
        mount("proc", Path("/proc"))
        if os.getpid() != 1:
            raise AssertionError(f"process {os.getpid()}, not 1")
        if setup is not None:
            setup()

    return world.start(arguments, into_namespace)


def cases(context) -> Iterable[Case]:
    if not allowed():
        return [Case("no namespaces here: unshare is not allowed", lambda world: None)]
    found = []
    for undisturbed in (watch(scenario, context) for scenario in SCENARIOS):
        points = moments(undisturbed.changes)
        for number, after in points[:: max(1, len(points) // POINTS)]:
            kind, path = undisturbed.changes[number]
            found.append(
                Case(
                    f"{undisturbed.scenario.name}: process 1 dies before change {number}, {kind} {path[-50:]}, "
                    "and again",
                    die_and_again(undisturbed, number, after),
                    " ".join(undisturbed.arguments),
                )
            )
        found.append(
            Case(
                f"{undisturbed.scenario.name}: another container starts while process 1 writes",
                two_containers(undisturbed),
                " ".join(undisturbed.arguments),
            )
        )
    return found


def die_and_again(undisturbed: Undisturbed, number: int, after: bool) -> Callable[[World], list[str] | None]:
    def run(world: World) -> list[str] | None:
        users = user_files(world.root)
        first = as_first(world, undisturbed.arguments, Death(world.root, world.notes / "changes", number, after))
        if first.code != DIED:
            return None if first.code == 0 else [f"before the kill: {first.last_words()}"]
        second = as_first(world, undisturbed.again)
        if second.code:
            return [f"again: exit {second.code}: {second.last_words()}"]
        problems = differs(undisturbed, state(world.clone, undisturbed.scenario))
        if left := leftovers(world.root, undisturbed.left):
            problems.append(f"again: left {', '.join(left)[:200]}")
        return problems + ["a user's file is gone"] * (user_files(world.root) != users)

    return run


def two_containers(undisturbed: Undisturbed) -> Callable[[World], list[str] | None]:
    """The first one stops in its save until the second one has ended; what it has written must still be there."""

    def run(world: World) -> list[str] | None:
        scenario = undisturbed.scenario
        go, waits = world.notes / "go", world.notes / "waits"

        def stop_in_the_save() -> None:
            import compression.checkpoint

            seal = compression.checkpoint.seal

            def slow(folder, record, *name):
                waits.write_text(str(folder))
                while not go.exists():
                    time.sleep(0.02)
                seal(folder, record, *name)

            compression.checkpoint.seal = slow

        first = start_as_first(world, undisturbed.arguments, stop_in_the_save)
        deadline = time.perf_counter() + 30
        while not waits.exists() and time.perf_counter() < deadline and not first.ended():
            time.sleep(0.02)
        if not waits.exists():
            go.touch()
            first.wait()
            return None
        second_run = start_as_first(world, undisturbed.arguments)
        deadline = time.perf_counter() + 8
        while not second_run.ended() and time.perf_counter() < deadline:
            time.sleep(0.05)
        go.touch()
        one, two = first.wait(), second_run.wait()
        problems = []
        if one.code:
            problems.append(f"the first: exit {one.code}: {one.last_words()}")
        if two.code and (two.code != 2 or "Traceback" in two.stderr or not two.stderr.startswith("error: ")):
            problems.append(f"the second: exit {two.code}: {two.last_words()}")
        return problems + half(undisturbed, state(world.clone, scenario))

    return run

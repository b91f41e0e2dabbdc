"""Workers: threads of one command, each with a share of its cores or GPUs, that take trials until none is left."""

import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from optuna.trial import FrozenTrial

from compression.runtime import UserError, log
from compression.study.figures import Figures, look_up
from compression.study.plan import Plan
from compression.study.runs import Ended, Processes, describe, discard_models, perform
from compression.study.scripts import SEED
from compression.study.shared import BEATS, POINT, SharedStudy
from compression.study.space import Point

LOOK_SECONDS = 2.0
"""Longest pause between two looks for what is left to do."""
GPUS, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Goal:
    """A figure that is to be as large, or as small, as possible."""

    figure: str
    maximize: bool

    @property
    def flag(self) -> str:
        return "--maximize" if self.maximize else "--minimize"

    def of(self, steps: list[Figures]) -> float:
        """Its value in a run; UserError where it has none."""
        return look_up(steps, self.figure, self.flag)


@dataclass(frozen=True)
class Work:
    """What all workers of a command do.

    Attributes:
        points: of a grid, with their seeds; None where points are drawn.
        trials: number of them that are drawn.
        folder: of the study.
        discard: whether models go once their figures are noted.
        noted: called after each run.
    """

    plan: Plan
    study: SharedStudy
    goals: tuple[Goal, ...]
    points: list[Point] | None
    trials: int
    folder: Path
    discard: bool
    noted: Callable[[], object]

    def next(self) -> FrozenTrial | None:
        """A trial that is this worker's, None where there is none to be had just now."""
        self.study.take_up_killed()
        trial = self.study.claim()
        return trial or (self.study.draw(self.trials) if self.points is None else None)

    def is_over(self) -> bool:
        """Whether nothing is left to do, for others neither."""
        if self.study.is_open():
            return False
        return self.points is None or not self.study.fill(self.points)

    def do(self, trial: FrozenTrial, processes: Processes, environment: dict[str, str]) -> None:
        """Run a trial's point with its seed, or with all seeds, and note what comes out.

        Raises:
            Ended: the command is stopped, or the trial is another worker's.
            UserError: a run's figures lack one that is asked for.
        """

        def alive() -> None:
            if not self.study.beat(trial.number):
                raise Ended

        point = dict(trial.user_attrs[POINT])
        seeds = range(self.plan.seeds) if self.points is None else [point.pop(SEED, 0)]
        results = []
        for seed in seeds:
            started = time.perf_counter()
            try:
                run = self.plan.run(point, seed, self.folder)
                record = perform(run, processes, environment, alive, self.study.grace / BEATS)
            except UserError as problem:  # settings that do not go together, a full disk
                self.study.fail(trial.number, {"seed": seed, "last_lines": [str(problem)]})
                log.info("failed: %s", problem)
                return
            if "error" in record:
                self.study.fail(trial.number, {"seed": seed, "run": run.identity} | record["error"])
                log.info("failed: %s: %s", describe(run), record["error"]["last_lines"][-1:])
                return
            if self.discard:
                discard_models(run)
            steps = record["figures"]
            values = {goal.figure: goal.of(steps) for goal in self.goals}
            said = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
            log.info("%s: %s (%.0f s)", describe(run) or run.identity, said, time.perf_counter() - started)
            results.append({"seed": seed, "run": run.identity, "figures": steps, "goals": values})
        means = [sum(found["goals"][goal.figure] for found in results) / len(results) for goal in self.goals]
        self.study.finish(trial.number, results, means)
        self.noted()


def work_through(work: Work, jobs: int) -> None:
    """Take trials, so many at once, until none is left that this worker or another one has to do.

    Raises:
        UserError: see `Work.do`; what runs then is ended.
    """
    processes, shares = Processes(), environments(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[None]] = [pool.submit(_work, work, processes, share) for share in shares]
        try:
            while pending := wait(futures, timeout=1.0, return_when=FIRST_EXCEPTION).not_done:
                if any(future.exception() for future in futures if future not in pending):
                    break
        finally:
            processes.stop()
    for future in futures:
        future.result()


def _work(work: Work, processes: Processes, environment: dict[str, str]) -> None:
    while not processes.stopped.is_set():
        trial = work.next()
        if trial is not None:
            try:
                work.do(trial, processes, environment)
            except Ended:
                continue
        elif work.is_over():
            return
        else:
            processes.stopped.wait(min(LOOK_SECONDS, work.study.grace / BEATS))


def environments(jobs: int) -> list[dict[str, str]]:
    """The variables of each worker's scripts: its share of the GPUs, or of the cores where there is none.

    A single worker has all; where there are more workers than GPUs, some share one.
    """
    own = dict(os.environ)
    if jobs == 1:
        return [own]
    threads = own.get(THREADS) or str(max(1, torch.get_num_threads() // jobs))
    gpus = visible_gpus()
    shares = [gpus[job::jobs] or gpus[job % len(gpus) : job % len(gpus) + 1] if gpus else [] for job in range(jobs)]
    return [own | {THREADS: threads} | ({GPUS: ",".join(share)} if share else {}) for share in shares]


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    if GPUS in os.environ:
        return [name.strip() for name in os.environ[GPUS].split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]

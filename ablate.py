"""A study: a script's runs over fields of its configuration, with seeds, tables and pictures.

    python ablate.py 8_pruning_with_finetuning.py --grid importance_mode=l2,fisher head_final_sparsity=0.2,0.4 \\
        --seeds 3 --fast
    python ablate.py 8_pruning_with_finetuning.py --search nsga2 --trials 40 --fast \\
        --grid head_final_sparsity=0.1..0.7 ffn_final_sparsity=0.1..0.7 --maximize accuracy --minimize gflops
    python ablate.py --config studies/importance_modes.yaml [--jobs 2]

Writes results/studies/NAME: table.csv, table.md, effects.csv, a picture, study.json, and runs/ with a folder for each
run. The same command again goes on where it was; started several times at once, on one machine or on many that see the
same folder or database, all work on the same study.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
import shlex
import sys
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from compression.config import AtLeast, Between, Config, FolderName, run_script
from compression.files import locked
from compression.integrity import digest_of
from compression.outputs import STUDIES
from compression.page import update_page
from compression.runtime import MODELS, RESULTS, UserError, log, shown
from compression.study.file import with_file
from compression.study.outcome import Outcome, read_outcome
from compression.study.plan import Plan, make_plan
from compression.study.scripts import SEED, load_script
from compression.study.shared import SharedStudy, make_sampler, open_storage, without_password
from compression.study.space import read_axes, read_fixed
from compression.study.tables import write_outcome
from compression.study.workers import Goal, Work, work_through


@dataclass
class AblationConfig(Config):
    script: tyro.conf.Positional[Path | None] = None
    """The script that is run."""
    config: Path | None = None
    """YAML file with any of these settings; flags beside it win."""
    grid: tuple[str, ...] = ()
    """What is varied: NAME=A,B for values, NAME=LOW..HIGH for a range to search in (NAME=LOW..HIGH:log: evenly in the
    logarithm). Any field of the script, or preset."""
    fixed: tuple[str, ...] = ()
    """What is the same in all runs: NAME=VALUE."""
    fast: bool = False
    """Run the script, and those after it, with --fast."""
    seeds: Annotated[int, AtLeast(1)] = 1
    """Runs of each point: seeds 0, 1, ..."""
    then: tuple[str, ...] = ()
    """Scripts that follow in each run, each with its flags in quotes. They read what the script wrote; {run} stands for
    the run's folder."""
    search: Literal["none", "tpe", "nsga2"] = "none"
    """none: every combination; else points are drawn, by tree-structured Parzen estimators or a genetic algorithm."""
    trials: Annotated[int, AtLeast(1)] = 40
    """Number of points that are drawn."""
    maximize: tuple[str, ...] = ()
    """Figures that should be large, by their name in the run's stage.json. Without a goal: accuracy."""
    minimize: tuple[str, ...] = ()
    """Figures that should be small."""
    jobs: Annotated[int, AtLeast(1)] = 1
    """Runs at a time, with cores or GPUs divided among them."""
    name: Annotated[str | None, FolderName()] = None
    """Name of the study's folder; by default that of --config, else of the script."""
    storage: str | None = None
    """Database of the study, such as sqlite:///FILE or postgresql+psycopg://HOST/NAME; by default a journal file in its
    folder."""
    grace_seconds: Annotated[float, Between(1, 86400)] = 60.0
    """Time without a sign of life after which a worker counts as killed, and its run is taken up again."""
    retry_failed: bool = False
    """Run again what has failed before."""
    discard_models: bool = False
    """Remove the models of a run once its figures are noted; the records stay."""
    seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Fixes what a search draws."""
    models_dir: Path = MODELS
    """Where the models are that the script starts from."""
    results_dir: Path = RESULTS
    """Folder of all results."""

    presets: ClassVar = {"fast": dict(fast=True)}

    @classmethod
    def expanded(cls, arguments: list[str]) -> list[str]:
        return with_file(cls, arguments)

    def check(self) -> None:
        if self.script is not None:
            _ = self.plan

    @cached_property
    def plan(self) -> Plan:
        """What is run; every setting has been checked then."""
        if self.script is None:
            raise UserError("no script given; name one: python ablate.py 8_pruning_with_finetuning.py --grid NAME=A,B")
        script = load_script(self.script, "")
        axes = read_axes(script, self.grid, self.search != "none")
        if self.search != "none" and not axes:
            raise UserError(f"--search {self.search}: needs --grid with what is searched over")
        for figure in self.maximize:
            if figure in self.minimize:
                raise UserError(f"--maximize {figure}: is in --minimize, too; give one of the two")
        fixed = read_fixed(script, self.fixed)
        return make_plan(script, self.then, axes, fixed, self.fast, self.seeds, self.models_dir, self.studies)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """Maximized ones first."""
        goals = [Goal(name, True) for name in self.maximize] + [Goal(name, False) for name in self.minimize]
        return tuple(goals) or (Goal("accuracy", True),)

    @property
    def title(self) -> str:
        """The study's name."""
        return self.name or self.plan.script.name

    @property
    def folder(self) -> Path:
        """Where the study goes."""
        return self.studies / self.title

    @property
    def studies(self) -> Path:
        """The folder of all studies."""
        return self.results_dir.resolve() / STUDIES

    @property
    def points(self) -> list[dict[str, Any]] | None:
        """The points of a grid with their seeds, all with the first seed first; None in a search."""
        if self.search != "none":
            return None
        seeded = SEED in self.plan.script.types
        return [p | ({SEED: s} if seeded else {}) for s in range(self.seeds) for p in self.plan.points()]

    @property
    def study_name(self) -> str:
        """The study's name in the storage: another one where anything but the number of seeds or trials
        is another."""
        return f"{self.title} {digest_of([self.plan.signature, repr(self.goals), self.search], 6)}"


def open_study(config: AblationConfig) -> SharedStudy:
    """The study in its storage, with all points of a grid in it."""
    points = config.points
    storage = open_storage(config.storage, config.folder / "journal.log")
    study = SharedStudy(
        storage,
        config.study_name,
        config.plan.axes,
        seeded=points is not None and SEED in config.plan.script.types,
        goals={goal.figure: goal.maximize for goal in config.goals},
        sampler=make_sampler(config.search, config.seed, config.trials),
        grace=config.grace_seconds,
    )
    with locked(config.folder / "points"):  # of several workers that start at once one adds them
        study.fill(points or [])
    if config.retry_failed:
        study.retry_failed()
    return study


def described(config: AblationConfig) -> dict[str, Any]:
    """The command and its settings, as they may be shown to anyone."""
    words, settings = sys.argv[1:], config.as_dict()
    if config.storage:
        settings["storage"] = without_password(config.storage)
        words = [word.replace(config.storage, settings["storage"]) for word in words]
    command = shlex.join(["python", Path(sys.argv[0]).name, *words])
    return {"command": command, "config": settings}


def main(config: AblationConfig) -> None:
    plan, points, folder = config.plan, config.points, config.folder
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(config)
    about = {"name": config.title} | described(config)
    writing = threading.Lock()

    def write(last: bool = False) -> Outcome:
        with writing:
            outcome = read_outcome(study, about, config.goals, points, explained=last and points is None)
            write_outcome(folder, outcome, pictures=last)
        return outcome

    count = config.trials if points is None else len(points)
    log.info("Study %s of %s: %d trials, %d at a time", config.study_name, plan.script.name, count, config.jobs)
    work = Work(plan, study, config.goals, points, config.trials, folder, config.discard_models, noted=write)
    work_through(work, config.jobs)
    outcome = write(last=True)
    update_page(config.models_dir, config.results_dir)
    log.info("-> %s", shown(folder / ("table.md" if outcome.rows else "study.json")))
    if outcome.failed:
        log.info("%d failed; run them again with --retry_failed", len(outcome.failed))
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(AblationConfig, main)

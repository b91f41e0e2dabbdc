"""A study in Optuna's storage, which any number of workers on any number of machines share.

A trial is one point: of a grid with one seed, of a search with all of them. It belongs to the worker that has set it
to RUNNING, which the storage lets only one do. That worker gives a sign of life every few seconds, in an attribute of
the trial, so that a journal file and a database have it alike. A trial without one is withdrawn and its point comes
again; so is one that two workers made at the same moment. What is withdrawn is FAIL in Optuna and counts nowhere here.
"""

import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from compression.integrity import digest_of
from compression.runtime import UserError, first_line, log
from compression.study.scripts import SEED
from compression.study.space import Axis, Choices, Point, Range

POINT, ALIVE, RESULTS, ERROR = "point", "alive", "results", "error"
WITHDRAWN, INSTEAD_OF = "withdrawn", "instead_of"
ATTEMPTS = 5
"""How often a database is tried."""
BEATS = 4
"""Signs of life in the time after which a worker without one counts as killed."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_storage(url: str | None, journal: Path) -> BaseStorage:
    """A database, or the journal file of a study's folder.

    Raises:
        UserError: the database cannot be reached, or its driver is not installed.
    """
    if url is None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(journal)))
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}  # writers wait for each other
    for left in reversed(range(ATTEMPTS)):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except ModuleNotFoundError as error:
            raise _unusable(url, f"it needs the package {error.name}; install it with pip") from None
        except (SQLAlchemyError, ImportError, ValueError) as error:
            # Of workers that start at once one makes the tables, and the others fail for a moment.
            if not left or isinstance(error, ArgumentError):
                raise _unusable(url, first_line(error)) from None
            time.sleep(0.2)
    raise AssertionError("the last attempt returns or raises")


def _unusable(url: str, reason: str) -> UserError:
    return UserError(f"--storage {without_password(url)}: cannot be used ({reason}); name another, or leave it out")


def without_password(url: str) -> str:
    """A database's address without the password."""
    head, at, tail = url.rpartition("@")
    return f"{head.rpartition(':')[0]}:***@{tail}" if at and ":" in head.partition("://")[2] else url


def make_sampler(search: str, seed: int, trials: int) -> BaseSampler:
    """What draws the points of a search; of a grid nothing is drawn."""
    if search == "tpe":
        return SeededByTrial(lambda number: TPESampler(seed=seed + number))
    if search == "nsga2":
        # Its populations are small enough that there are generations: by default a first one has 50.
        size = max(4, min(50, trials // 5))
        return SeededByTrial(lambda number: NSGAIISampler(population_size=size, seed=seed + number))
    return RandomSampler(seed)


class SeededByTrial(BaseSampler):
    """A sampler whose draws depend on the seed, the trial's number and what is known then: a study that is continued,
    by this worker or by others, does not draw the same points again.

    Args:
        make: gives the sampler for a trial of a number.
    """

    def __init__(self, make: Callable[[int], BaseSampler]):
        self.make = make

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.make(trial.number).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.make(trial.number).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # Every parameter of a trial draws from a stream of its own.
        seed = int(digest_of([trial.number, param_name], 7), 16)
        return self.make(seed).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.make(trial.number).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.make(trial.number).after_trial(study, trial, state, values)


def distribution(axis: Axis) -> BaseDistribution:
    """What Optuna is told that a field takes."""
    if isinstance(axis, Choices):
        return CategoricalDistribution([_category(value) for value in axis.values])
    if isinstance(axis.low, int):
        return IntDistribution(axis.low, int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _category(value: Any) -> Any:
    """A value as Optuna stores it."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


class SharedStudy:
    """The trials of a study.

    Args:
        name: of the study in the storage; it is made there where it is not.
        axes: what is varied.
        seeded: whether each trial has a seed of its own, as those of a grid do.
        goals: names of the figures, and whether each is maximized.
        grace: seconds without a sign of life after which a worker counts as killed.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        axes: Sequence[Axis],
        seeded: bool,
        goals: dict[str, bool],
        sampler: BaseSampler,
        grace: float,
    ):
        self.storage, self.name, self.grace = storage, name, grace
        directions = [StudyDirection.MAXIMIZE if up else StudyDirection.MINIMIZE for up in goals.values()]
        self.study = optuna.create_study(
            storage=storage, study_name=name, directions=directions, sampler=sampler, load_if_exists=True
        )
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            self.study.set_metric_names(list(goals))
        self.axes = {axis.name: axis for axis in axes}
        self.distributions = {name: distribution(axis) for name, axis in self.axes.items()}
        if seeded:
            self.distributions[SEED] = IntDistribution(0, 2**31 - 1)
        self._seen: dict[int, tuple[Any, float]] = {}

    def trials(self) -> list[FrozenTrial]:
        """All trials that count, by their numbers."""
        trials = self.study.get_trials(deepcopy=False)
        gone = {trial.user_attrs.get(INSTEAD_OF) for trial in trials}
        gone |= {trial.number for trial in trials if trial.state == TrialState.FAIL and WITHDRAWN in trial.user_attrs}
        return [trial for trial in trials if trial.number not in gone]

    def fill(self, points: Sequence[Point]) -> int:
        """Add those points that no trial has yet; gives their number."""
        there = {_key(trial.user_attrs.get(POINT)) for trial in self.trials()}
        missing = [point for point in points if _key(point) not in there]
        for point in missing:
            self._add(point)
        return len(missing)

    def _add(self, point: Point, **attributes: Any) -> None:
        params = {name: _category(value) for name, value in point.items()}
        trial = create_trial(
            state=TrialState.WAITING,
            params=params,
            distributions=self.distributions,
            user_attrs={POINT: point} | attributes,
        )
        self.study.add_trial(trial)

    def claim(self) -> FrozenTrial | None:
        """A waiting trial, which is this worker's from now on."""
        for trial in self.trials():
            if trial.state == TrialState.WAITING and self._take(trial):
                if any(other.number < trial.number for other in self._same(trial)):
                    self.withdraw(trial.number, "its point has a trial already")
                    continue
                return trial
        return None

    def _take(self, trial: FrozenTrial) -> bool:
        try:
            return self.storage.set_trial_state_values(self._id(trial.number), TrialState.RUNNING) and self.beat(
                trial.number
            )
        except UpdateFinishedTrialError:
            return False

    def _same(self, trial: FrozenTrial) -> list[FrozenTrial]:
        key = _key(trial.user_attrs[POINT])
        return [other for other in self.trials() if _key(other.user_attrs.get(POINT)) == key]

    def draw(self, count: int) -> FrozenTrial | None:
        """A new point of a search, None where there are so many trials already."""
        if len(self.trials()) >= count:
            return None
        drawn = self.study.ask(self.distributions)
        self.beat(drawn.number)
        if sum(trial.number < drawn.number for trial in self.trials()) >= count:
            self.withdraw(drawn.number, "there are enough")
            return None
        point = {name: self._value(name, value) for name, value in drawn.params.items()}
        self._set(drawn.number, POINT, point)
        return self._trial(drawn.number)

    def _value(self, name: str, stored: Any) -> Any:
        """A field's value from what Optuna has of it."""
        axis = self.axes[name]
        if isinstance(axis, Range):
            return stored
        return next(value for value in axis.values if _category(value) == stored)

    def finish(self, number: int, results: list[dict[str, Any]], values: list[float]) -> None:
        """Note what a trial gave; nothing where it is another worker's now."""
        with self._mine():
            self._set(number, RESULTS, results)
            self.study.tell(number, values)

    def fail(self, number: int, error: dict[str, Any]) -> None:
        """Note that a trial's run has failed."""
        with self._mine():
            self._set(number, ERROR, error)
            self.study.tell(number, state=TrialState.FAIL)

    @contextmanager
    def _mine(self) -> Iterator[None]:
        with suppress(UpdateFinishedTrialError, ValueError):
            yield

    def withdraw(self, number: int, reason: str) -> bool:
        """Let a trial count no more; False where another worker was faster, or has finished it."""
        try:
            self._set(number, WITHDRAWN, reason)
            return self.storage.set_trial_state_values(self._id(number), TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False

    def beat(self, number: int) -> bool:
        """Give a sign of life for a trial; False where it is this worker's no more."""
        sign = {"host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
        try:
            self._set(number, ALIVE, sign)
        except UpdateFinishedTrialError:
            return False
        except StorageInternalError as error:  # out of reach for a moment
            log.warning("No sign of life could be given (%s)", first_line(error))
        return True

    def take_up_killed(self) -> None:
        """Withdraw the trials of workers that were killed; their points come again."""
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if self._is_dead(trial) and self.withdraw(trial.number, "its worker was killed"):
                log.info("Trial %d was left by a worker that was killed: it is taken up again", trial.number)
                if POINT in trial.user_attrs:
                    self._add(trial.user_attrs[POINT])

    def retry_failed(self) -> None:
        """Let the points of failed trials come again."""
        for trial in self.trials():
            if trial.state == TrialState.FAIL and POINT in trial.user_attrs:
                self._add(trial.user_attrs[POINT], **{INSTEAD_OF: trial.number})

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether a trial's worker is gone: a process of this machine that is not there, or one of whom for too long
        nothing was heard. That is measured by this machine's clock alone."""
        sign = trial.user_attrs.get(ALIVE)
        if sign and sign["host"] == socket.gethostname() and not psutil.pid_exists(sign["process"]):
            return True
        now = time.monotonic()
        last, since = self._seen.setdefault(trial.number, (sign, now))
        if last != sign:
            self._seen[trial.number] = sign, now
            return False
        return now - since > self.grace

    def is_open(self) -> bool:
        """Whether a trial waits, or a worker is on one."""
        return any(not trial.state.is_finished() for trial in self.trials())

    def _set(self, number: int, key: str, value: Any) -> None:
        self.storage.set_trial_user_attr(self._id(number), key, value)

    def _trial(self, number: int) -> FrozenTrial:
        return self.storage.get_trial(self._id(number))

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(self.name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)


def _key(point: Point | None) -> str:
    return digest_of(point)

"""Which runs a study has: the scripts of each, their settings and inputs, and the folder that follows from both."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.config import flag_words
from compression.inputs import find_newest
from compression.integrity import digest_of, files_in, sha256_of
from compression.runtime import UserError
from compression.sources import LLM_FOLDER
from compression.stage_record import identify
from compression.study.runs import RUN_FOLDER, Run, Step
from compression.study.scripts import FAST, OWN, SEED, Script, load_script
from compression.study.space import Axis, Point, points

LINKED = {
    "bert-local": None,
    "distilbert-local": None,
    "teacher_model": "1_finetune_teacher",
    "student_model": "2_distill_student",
}
"""What the scripts find under these names in their folder of models, and the script that writes it there."""
BASE, PRUNED = "base_model", "pruned_model_path"


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        script: the one whose fields are varied.
        then: the scripts that follow it in each run.
        axes: what is varied.
        fixed: settings of the script that are the same in all runs.
        seeds: number of runs at each point.
        models_dir: where the inputs are that are not named.
        studies: the folder of all studies, which is no input of any.
    """

    script: Script
    then: tuple[Step, ...]
    axes: tuple[Axis, ...]
    fixed: dict[str, Any]
    seeds: int
    models_dir: Path
    studies: Path

    def __post_init__(self) -> None:
        if self.seeds > 1 and SEED not in self.script.types:
            raise UserError(f"--seeds {self.seeds}: {self.script.path.name} draws nothing; allowed is 1")
        if both := self.fixed.keys() & {axis.name for axis in self.axes}:
            raise UserError(f"--fixed {min(both)}: is in --grid, too; give one of the two")
        for point in self.points():
            self.script.config(self.settings(point, 0))

    def points(self) -> Iterator[Point]:
        """Every point of the grid; of ranges the ends."""
        return points(self.axes)

    def settings(self, point: Point, seed: int) -> dict[str, Any]:
        """All that the script is told of its fields, in the order of a command line."""
        seeded = {SEED: seed} if SEED in self.script.types else {}
        return self.fixed | point | seeded

    def run(self, point: Point, seed: int, folder: Path) -> Run:
        """The run at a point.

        Args:
            folder: of the study.

        Raises:
            UserError: the settings are refused.
        """
        settings = self.settings(point, seed)
        described = {
            "scripts": self._names,
            "settings": self._resolved(settings),
            "then": [[step.resolved, list(step.words)] for step in self.then],
            "inputs": self._inputs(settings),
        }
        words = tuple(word for name, value in settings.items() for word in flag_words(name, value))
        steps = (Step(self.script, words), *self.then)
        identity = digest_of(described, 12)
        place = folder / RUN_FOLDER / identity
        return Run(identity, place, steps, self._links, self.models_dir, dict(point), seed, described)

    @property
    def signature(self) -> str:
        """A hash of what all runs have in common, and of what may differ between them: settings, axes, inputs."""
        taken: dict[str, str] = {}
        for point in self.points():
            taken |= self._inputs(self.settings(point, 0))
        then = [list(step.words) for step in self.then]
        return digest_of(repr([self._names, self.fixed, then, self.axes, sorted(taken.items())]))

    @property
    def _names(self) -> list[str]:
        return [self.script.name, *(step.script.name for step in self.then)]

    @property
    def _links(self) -> dict[str, Path]:
        """The folders of models that the scripts find by their names."""
        paths = {name: self.models_dir / name for name, writer in LINKED.items() if writer not in self._names}
        return {name: path for name, path in paths.items() if path.is_dir()}

    def _resolved(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What the result depends on, and what is given besides; the names of presets say nothing more."""
        given = {name: value for name, value in settings.items() if name in self.script.types}
        return _of_result(self.script.config(settings).result_fields()) | given

    def _inputs(self, settings: dict[str, Any]) -> dict[str, str]:
        """The contents of the models that scripts find by name, and of files and folders that settings name."""
        found = list(self._links.values())
        if BASE in self.script.types and (fetched := self.models_dir / LLM_FOLDER.name).is_dir():
            found.append(fetched)
        words = [str(value) for value in settings.values() if isinstance(value, str)]
        words += [word for step in self.then for word in step.words]
        paths = {word: Path(word).expanduser() for word in words if not word.startswith("-")}
        named = {word: self._contents(path.resolve()) for word, path in paths.items() if path.exists()}
        return {path.name: self._contents(path) for path in found} | named

    def _contents(self, path: Path) -> str:
        """A hash of a file, of a checkpoint's weights, or of all files of a folder."""
        if path.is_file():
            return sha256_of(path)
        if any(path.glob("*.safetensors")):
            return identify(path)["sha256"]
        files = [name for name in files_in(path) if (path / name).is_file()]
        own = [name for name in files if not (path / name).is_relative_to(self.studies)]
        return digest_of([[name, sha256_of(path / name)] for name in own])


def make_plan(
    script: Script,
    then: Sequence[str],
    axes: Sequence[Axis],
    fixed: dict[str, Any],
    fast: bool,
    seeds: int,
    models: Path,
    studies: Path,
) -> Plan:
    """A plan whose settings have been checked.

    Raises:
        UserError: a setting, a flag or a script that is not there or not allowed.
    """
    if fast and FAST not in script.presets:
        raise UserError(f"--fast: {script.path.name} has no such preset")
    settings = fixed | ({FAST: True} if fast else {})
    if PRUNED in script.types and PRUNED not in [*settings, *(axis.name for axis in axes)]:
        if (newest := find_newest(models, "pruned")) is not None:
            settings[PRUNED] = str(newest)
    return Plan(script, _later_steps(then, fast), tuple(axes), settings, seeds, models, studies)


def _later_steps(commands: Sequence[str], fast: bool) -> tuple[Step, ...]:
    """The scripts of --then with their flags."""
    steps = []
    for command in commands:
        name, *words = shlex.split(command)
        script = load_script(name, "--then")
        if fast and FAST in script.presets and f"--{FAST}" not in words:
            words.append(f"--{FAST}")
        config = script.parsed(words, "--then")
        steps.append(Step(script, tuple(words), _of_result(config.result_fields())))
    return tuple(steps)


def _of_result(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in (*OWN, SEED)}

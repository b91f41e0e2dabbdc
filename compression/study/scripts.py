"""A script of the repository as a study sees it: the fields of its configuration, and command lines for it."""

import importlib.util
import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from compression.config import Config, Settings, parse
from compression.runtime import ROOT, UserError

PRESET, FAST, SEED = "preset", "fast", "seed"
PLACES = ("models_dir", "results_dir", "output_name", "output_dir", "output_file")
OWN = (*PLACES, "resume", "skip_existing", "overwrite")
"""Fields that a study sets itself, in every script that has them."""


@dataclass(frozen=True)
class Script:
    """A script and the types of its configuration's fields, by name."""

    path: Path
    config_class: type[Config]

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def types(self) -> dict[str, Any]:
        return _types(self.config_class)

    def default(self, name: str) -> Any:
        """The default of a field; of a name that is no field None."""
        return self._defaults.get(name)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return self.config_class().as_dict()

    def check_name(self, name: str, flag: str) -> None:
        """Raise UserError for what a study cannot set of this script."""
        known = [*(field for field in self.types if field not in (*OWN, SEED)), *[PRESET] * bool(self.presets)]
        if name in (*OWN, SEED):
            instead = "--seeds sets it" if name == SEED else "a study sets it itself"
            raise UserError(f"{flag} {name}: {instead}; leave it out")
        if name not in known:
            raise UserError(f"{flag} {name}: no field of {self.path.name}; there are {', '.join(known)}")

    @property
    def presets(self) -> list[str]:
        return sorted(self.config_class.presets)

    def read(self, name: str, given: Any, flag: str) -> Any:
        """A value of a field from how it is written: text, or what YAML or JSON make of it. As plain JSON.

        Raises:
            UserError: it is of another type than the field.
        """
        if name == PRESET:
            if given not in self.presets:
                raise UserError(f"{flag} {PRESET}={given}: unknown; allowed: {', '.join(self.presets)}")
            return given
        value = _typed(self.types[name], _words(self.types[name], given))
        if value is _BAD:
            raise UserError(f"{flag} {name}={_text(given)}: allowed is {_described(self.types[name])}")
        return _plain(value)

    def config(self, settings: Mapping[str, Any]) -> Config:
        """The configuration of a run.

        Args:
            settings: plain values of fields, and names of presets under `preset` and `fast`.

        Raises:
            UserError: it is refused.
        """
        presets = [*filter(None, [settings.get(PRESET)]), *[FAST] * bool(settings.get(FAST))]
        values = {
            name: _typed(self.types[name], _words(self.types[name], value))
            for name, value in settings.items()
            if name not in (PRESET, FAST)
        }
        try:
            return self.config_class.preset(*presets).updated(**values)
        except UserError as problem:
            raise UserError(f"{self.path.name}: {problem}") from None

    def parsed(self, words: Sequence[str], flag: str) -> Config:
        """The configuration of a command line.

        Raises:
            UserError: its flags are refused, in one line.
        """
        said = io.StringIO()
        try:
            with redirect_stderr(said), redirect_stdout(said):
                return parse(self.config_class, words)
        except UserError as problem:
            raise UserError(f"{flag} {self.path.name}: {problem}") from None
        except SystemExit:
            raise UserError(f"{flag} {self.path.name}: {_in_one_line(said.getvalue())}") from None


def _in_one_line(box: str) -> str:
    """What the parser says in a box: behind its title, and up to the line in it under which it gives advice."""
    lines = [line.strip("│| ") for line in box.splitlines()][1:]
    sections = [list(group) for ruled, group in groupby(lines, lambda line: not line.strip("─-")) if not ruled]
    return " ".join(sections[0]) if sections else "its flags are refused"


def load_script(name: str | Path, flag: str) -> Script:
    """A script by its path, or its name in the repository.

    Raises:
        UserError: there is none, or it has no configuration.
    """
    path = find_file(name, flag, "a script of this repository")
    classes = [
        value
        for value in vars(_module(path)).values()
        if isinstance(value, type) and issubclass(value, Config) and value.__module__ == _module(path).__name__
    ]
    if len(classes) != 1:
        raise UserError(f"{flag} {name}: has {len(classes)} configurations; allowed is a script with one")
    return Script(path, classes[0])


def find_file(name: str | Path, flag: str, what: str) -> Path:
    """A file that a user names, in the current folder or the repository.

    Raises:
        UserError: there is none.
    """
    for folder in (Path.cwd(), ROOT):
        if (path := folder / Path(name).expanduser()).is_file():
            return path.resolve()
    raise UserError(f"{flag} {name}: no such file; name {what}")


@cache
def _module(path: Path) -> ModuleType:
    name = f"study_of_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if path.suffix != ".py" or specification is None or specification.loader is None:
        raise UserError(f"{path}: is no Python script")
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _types(settings: type[Settings]) -> dict[str, Any]:
    """The type of each field that is no group, those of groups included."""
    found: dict[str, Any] = {}
    hints = get_type_hints(settings)
    for entry in fields(settings):
        hint = hints[entry.name]
        found |= _types(hint) if isinstance(hint, type) and issubclass(hint, Settings) else {entry.name: hint}
    return found


# Values.

_BAD = object()


def _words(hint: Any, given: Any) -> tuple[str, ...]:
    """How a value is written on a command line."""
    if isinstance(given, list | tuple):
        return tuple(map(str, given))
    text = str(given)
    if hint is bool:
        return (text.capitalize(),)
    return (
        tuple(text.split())
        if isinstance(given, str) and any(get_origin(arm) is tuple for arm in _arms(hint))
        else (text,)
    )


@cache
def _typed(hint: Any, words: tuple[str, ...]) -> Any:
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            return tyro.cli(hint, args=list(words))
    except SystemExit:
        return _BAD


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _text(given: Any) -> str:
    return " ".join(map(str, given)) if isinstance(given, list | tuple) else str(given)


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}


def _described(hint: Any) -> str:
    """What values a type has, for error texts."""
    if len(arms := _arms(hint)) > 1:
        return " or ".join(_described(arm) for arm in arms)
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "several words: " + ", ".join(_described(part) for part in get_args(hint) if part is not ...)
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))

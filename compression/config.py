"""A script's configuration: a dataclass, presets of it, a command line made from it, and its dump beside the output.

What is said of one field stands at that field, as a note in its type: the range that is allowed (`Between`, `AtLeast`),
that it does not change the result (`NO_EFFECT`), a name (`formerly`) or a meaning (`Originally`) that it had before.
Groups of settings that several scripts share are fields of type `Flat[Group]`: their flags, and their names in
`stage.json`, are those of the group's fields alone.
"""

import math
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_type_hints

import torch
import tyro

from compression.files import disk_error
from compression.runtime import UserError, log, quiet_libraries, relative_path, setup_logging

LARGEST_WHOLE_NUMBER = 2**31 - 1
Group = TypeVar("Group")
Flat = Annotated[Group, tyro.conf.OmitArgPrefixes]
"""A group of settings without a name of its own on the command line."""


# Notes on fields.


@dataclass(frozen=True)
class Between:
    """The least and the largest value that a number may have."""

    low: float
    high: float = math.inf

    def check(self, name: str, value: Any) -> None:
        """Raise UserError for a value outside; None is not looked at."""
        if value is not None and not self.low <= value <= self.high:
            allowed = f"at least {self.low}" if self.high == math.inf else f"{self.low} to {self.high}"
            raise UserError(f"--{name} {value}: allowed is {allowed}")


def AtLeast(low: float) -> Between:  # noqa: N802 (reads as Between does)
    """The least value that a number may have."""
    return Between(low)


class FolderName:
    """A plain folder name, no path."""

    def check(self, name: str, value: str | None) -> None:
        """Raise UserError for anything else; None is not looked at."""
        if value is None:
            return
        if value in ("", ".", "..") or Path(value).name != value or not value.isprintable():
            raise UserError(f"--{name} {value!r}: allowed is a plain folder name")


@dataclass(frozen=True)
class _Formerly:
    name: str


def formerly(name: str) -> tuple[Any, ...]:
    """Notes of a field that had another name: the flag is still taken, and old records are still understood.

    To be unpacked: `Annotated[int, *formerly("old_name")]`.
    """
    return _Formerly(name), tyro.conf.arg(aliases=[f"--{name}"])


@dataclass(frozen=True)
class Originally:
    """What records that do not name the field were made with, where it has no default, or another one."""

    value: Any


def flag_words(name: str, value: Any) -> list[str]:
    """A setting, as plain JSON, as words of a command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def choice_of(entries: Mapping[str, Any], what: str) -> Any:
    """The type of a field whose values are the names of a registry; its help says the `help` of each entry."""
    listed = "; ".join(f"{name}: {entry.help}" for name, entry in entries.items())
    return Annotated[Literal[tuple(entries)], tyro.conf.arg(help=f"{what}. {listed}.")]


NO_EFFECT = object()
"""The result does not depend on this field (but for rounding), or the input that it names is compared itself."""


# Settings.


@dataclass
class Settings:
    """Settings that are checked when they are built: every number by its range, then what `check` says."""

    def __post_init__(self) -> None:
        for name, value, notes in _described(self):
            for number in value if isinstance(value, tuple) else (value,):
                _check_number(name, number)
            for note in notes:
                if isinstance(note, Between | FolderName):
                    note.check(name, value)
        self.check()

    def check(self) -> None:
        """Refuse what the ranges of single fields allow.

        Raises:
            UserError: names the flag, the value found and what is allowed.
        """

    def as_dict(self) -> dict[str, Any]:
        """All values as plain JSON, those of groups beside the others; paths inside the repository relative to it."""
        return {name: _plain(value) for name, value, _ in _leaves(self)}

    def result_fields(self) -> dict[str, Any]:
        """Those values that the result depends on."""
        values = self.as_dict()
        return {name: values[name] for name, _, notes in _leaves(self) if NO_EFFECT not in notes}

    def originals(self) -> dict[str, Any]:
        """What older records were made with that lack a field, where that is noted, see `Originally`."""
        return {name: note.value for name, _, notes in _leaves(self) for note in notes if isinstance(note, Originally)}

    def updated(self, **values: Any) -> Self:
        """A copy with other values, named as on the command line.

        Raises:
            TypeError: there is no such field.
        """
        own = {}
        for entry in fields(self):
            group = getattr(self, entry.name)
            if isinstance(group, Settings):
                own[entry.name] = group.updated(**{n: values.pop(n) for n, _, _ in _leaves(group) if n in values})
            elif entry.name in values:
                own[entry.name] = values.pop(entry.name)
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")
        return replace(self, **own)


def group(kind: Callable[..., Group], **defaults: Any) -> Group:
    """The default of a field that is a group of settings: the group's own, with these values laid over them."""
    return field(default_factory=lambda: kind(**defaults))


def pick(kind: Callable[..., Group], config: Settings, **more: Any) -> Group:
    """Settings of a kind from the fields of a configuration that have the same names.

    Args:
        more: values that the configuration does not have under these names.
    """
    return kind(**{name: getattr(config, name) for name in signature(kind).parameters if name not in more} | more)


def _described(settings: Settings) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, value and notes of each field, groups included."""
    hints = get_type_hints(type(settings), include_extras=True)
    for entry in fields(settings):
        yield entry.name, getattr(settings, entry.name), getattr(hints[entry.name], "__metadata__", ())


def _leaves(settings: Settings) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, value and notes of each field that is no group, those of groups included."""
    for name, value, notes in _described(settings):
        if isinstance(value, Settings):
            yield from _leaves(value)
        else:
            yield name, value, notes


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return relative_path(value) if isinstance(value, Path) else value


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} {value}: allowed are finite numbers")
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE_NUMBER:
        raise UserError(f"--{name} {value}: allowed is at most {LARGEST_WHOLE_NUMBER}")


@dataclass
class Config(Settings):
    """Base of every script's configuration; each field is documented by the line under it."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def make(cls, **values: Any) -> Self:
        """The defaults with these values laid over them, named as on the command line."""
        return cls().updated(**values)

    @classmethod
    def preset(cls, *names: str) -> Self:
        """The defaults with the named presets laid over them; of two presets the later one wins."""
        overrides: dict[str, Any] = {}
        for name in names:
            if name not in cls.presets:
                raise UserError(f"--preset {name}: unknown; allowed: {', '.join(sorted(cls.presets)) or 'none'}")
            overrides |= cls.presets[name]
        return cls.make(**overrides)

    @classmethod
    def modernized(cls, noted: dict[str, Any]) -> dict[str, Any]:
        """The settings of an older record under today's names; what did not exist then has its default."""
        default = cls()
        settings = default.as_dict() | default.originals() | noted
        for name, _, notes in _leaves(default):
            for note in notes:
                if isinstance(note, _Formerly) and note.name in noted:
                    settings[name] = noted[note.name]
        return settings

    @classmethod
    def fast(cls) -> Self:
        """The preset for quick iteration."""
        return cls.preset("fast")

    @classmethod
    def expanded(cls, arguments: list[str]) -> list[str]:
        """A command line with what a file that it names stands for in the file's place; by default as it is."""
        return arguments


AnyConfig = TypeVar("AnyConfig", bound=Config)


def parse(config_class: type[AnyConfig], arguments: Sequence[str], description: str = "") -> AnyConfig:
    """Build a configuration from command-line arguments.

    `--fast` and `--preset NAME` choose where the defaults come from (they combine, `--fast` on top); any other flag
    given beside them wins.

    Raises:
        UserError: a value outside its allowed range, or an unknown preset.
        SystemExit: tyro's own exit on an unknown flag (status 2) or `--help` (status 0).
    """
    names, rest = _split_presets(config_class.expanded(list(arguments)))
    default = config_class.preset(*names)
    if presets := ", ".join(sorted(config_class.presets)):
        description += f"\nPresets, which any flag beside them overrides: --fast, --preset NAME (NAME: {presets})."
    description += "\n--dry_run checks the flags and does nothing."
    return tyro.cli(config_class, default=default, args=rest, description=description, use_underscores=True)


def _split_presets(arguments: list[str]) -> tuple[list[str], list[str]]:
    names, rest, fast = [], [], False
    iterator = iter(arguments)
    for argument in iterator:
        flag, _, value = argument.partition("=")
        if argument == "--fast":
            fast = True
        elif flag == "--preset":
            names.append(value or next(iterator, ""))
        else:
            rest.append(argument)
    return names + ["fast"] * fast, rest


def run_script(config_class: type[AnyConfig], main: Callable[[AnyConfig], None]) -> None:
    """Parse the command line, run `main`, and end a user's mistake in one line on stderr and exit status 2.

    With `--dry_run` the flags are checked and nothing is run.
    """
    setup_logging()
    quiet_libraries()
    description = textwrap.dedent(sys.modules[main.__module__].__doc__ or "")
    arguments = [argument for argument in sys.argv[1:] if argument != "--dry_run"]
    signal.signal(signal.SIGTERM, _terminated)
    try:
        config = parse(config_class, arguments, description)
        if len(arguments) == len(sys.argv) - 1:
            main(config)
    except UserError as error:
        _end(str(error))
    except torch.OutOfMemoryError as error:
        _end(f"{str(error).splitlines()[0]}; use a smaller batch, --amp auto or a smaller model")
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        _end(f"{reason}; check that the path is right, readable and writable, and that the disk has space")
    except Terminated:
        log.info("Terminated; run again with --resume where the script has it.")
        raise SystemExit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        log.info("Interrupted; run again with --resume where the script has it.")
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _end(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None


class Terminated(BaseException):
    """The process was asked to end: what is half-written is removed on the way out."""


def _terminated(*_: Any) -> None:
    raise Terminated

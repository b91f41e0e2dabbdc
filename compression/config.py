"""A script's configuration: a dataclass, presets of it, a command line made from it, and its dump beside the output."""

import math
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
import tyro

from compression.files import disk_error
from compression.runtime import UserError, log, quiet_libraries, relative_path, setup_logging

LARGEST_WHOLE_NUMBER = 2**31 - 1


@dataclass
class StageConfig:
    """Base of every script's configuration. Subclasses document each field with one line under it."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def preset(cls, *names: str) -> Self:
        """The defaults with the named presets laid over them; of two presets the later one wins."""
        overrides: dict[str, Any] = {}
        for name in names:
            if name not in cls.presets:
                raise UserError(f"--preset {name}: unknown; allowed: {', '.join(sorted(cls.presets)) or 'none'}")
            overrides |= cls.presets[name]
        return cls(**overrides)

    @classmethod
    def fast(cls) -> Self:
        """The preset for quick iteration."""
        return cls.preset("fast")

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            for value in values if isinstance(values, tuple) else (values,):
                self._check_number(field.name, value)
        self.check()

    @staticmethod
    def _check_number(name: str, value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: allowed are finite numbers")
        if isinstance(value, int) and abs(value) > LARGEST_WHOLE_NUMBER:
            raise UserError(f"--{name} {value}: allowed is at most {LARGEST_WHOLE_NUMBER}")

    def check(self) -> None:
        """Refuse bad values.

        Raises:
            UserError: names the flag, the value found and the allowed range.
        """

    def check_range(self, name: str, low: float, high: float = float("inf")) -> None:
        """Raise UserError unless low <= field <= high."""
        value = getattr(self, name)
        if not low <= value <= high:
            allowed = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise UserError(f"--{name} {value}: allowed is {allowed}")

    def check_name(self, name: str) -> None:
        """Raise UserError unless the field is the name of a folder and no path."""
        value = getattr(self, name)
        if value in ("", ".", "..") or Path(value).name != value or not value.isprintable():
            raise UserError(f"--{name} {value!r}: allowed is a plain folder name")

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON values; paths inside the repository are relative to it."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: relative_path(value) if isinstance(value, Path) else value for name, value in values.items()}


Config = TypeVar("Config", bound=StageConfig)


def parse(config_class: type[Config], arguments: Sequence[str], description: str = "") -> Config:
    """Build a configuration from command-line arguments.

    `--fast` and `--preset NAME` choose where the defaults come from (they combine, `--fast` on top); any other flag
    given beside them wins.

    Raises:
        UserError: a value outside its allowed range, or an unknown preset.
        SystemExit: tyro's own exit on an unknown flag (status 2) or `--help` (status 0).
    """
    names, rest = _split_presets(list(arguments))
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


def run_script(config_class: type[Config], main: Callable[[Config], None]) -> None:
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

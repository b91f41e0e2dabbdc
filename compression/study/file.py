"""A study's file: the flags of the command, as YAML."""

import json
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from compression.config import Config, flag_words
from compression.runtime import UserError
from compression.study.scripts import find_file

FLAG = "--config"
ASSIGNED = ("grid", "fixed")
"""Settings that have a mapping in the file."""


def with_file(config_class: type[Config], arguments: list[str]) -> list[str]:
    """A command line with the settings of the file that it names before its own flags, which win therefore.

    Raises:
        UserError: the file is not there, or says what is no setting.
    """
    given = [word.partition("=") for word in arguments]
    place = next((place for place, (flag, _, _) in enumerate(given) if flag == FLAG), None)
    if place is None:
        return arguments
    name = given[place][2] or (arguments[place + 1] if place + 1 < len(arguments) else "")
    if not name:
        return arguments  # the parser says what is missing
    path = find_file(name, FLAG, "a study, such as studies/importance_modes.yaml")
    settings = _read(path, {entry.name for entry in fields(config_class)} - {"config"})
    script = [str(settings.pop("script"))] if "script" in settings else []
    if not arguments[0].startswith("-"):
        script, arguments = arguments[:1], arguments[1:]
    for name in ASSIGNED:
        _check_assigned(path, name, settings.get(name, {}))
        arguments, settings = _merged(arguments, name, settings)
    words = [word for name, value in ({"name": path.stem} | settings).items() for word in _words(name, value)]
    return [*script, *words, *arguments]  # the script first: flags that take several words would take it, too


def _merged(arguments: list[str], name: str, settings: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Of a flag that takes NAME=VALUE, those of the file beside those given: of one name the given one."""
    if f"--{name}" not in arguments or name not in settings:
        return arguments, settings
    place = arguments.index(f"--{name}") + 1
    given = {word.partition("=")[0] for word in takewhile(lambda word: not word.startswith("-"), arguments[place:])}
    kept = [f"{field}={_assigned(value)}" for field, value in settings[name].items() if field not in given]
    return [*arguments[:place], *kept, *arguments[place:]], {n: v for n, v in settings.items() if n != name}


def _read(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{FLAG} {path}: is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise UserError(f"{FLAG} {path}: holds a {type(found).__name__}; allowed is NAME: VALUE on each line")
    if unknown := [str(name) for name in found if name not in known]:
        raise UserError(f"{FLAG} {path}: {unknown[0]} is no setting; there are {', '.join(sorted(known))}")
    return found


def _check_assigned(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        found = type(value).__name__
        raise UserError(f"{FLAG} {path}: {name} holds a {found}; allowed is FIELD: VALUE on each line")


def _words(name: str, value: Any) -> list[str]:
    """A setting of the file as words of a command line."""
    if name in ASSIGNED:
        return [f"--{name}", *(f"{field}={_assigned(each)}" for field, each in value.items())]
    return flag_words(name, value)


def _assigned(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)

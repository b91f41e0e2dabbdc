"""Results that grow row by row: a benchmark that is run again goes on behind those that are there."""

import importlib.util
from pathlib import Path
from typing import Any

from compression.files import read_json
from compression.runtime import UserError, fingerprint, log


def earlier(path: Path, settings: dict[str, Any], **empty: Any) -> dict[str, Any]:
    """What was found before with these settings.

    Args:
        settings: what a row depends on, beside what names it.
        empty: what there is besides where nothing was found yet.

    Raises:
        UserError: rows of other settings are there.
    """
    if not path.is_file():
        return {"config": settings, "environment": fingerprint(), **empty}
    found = read_json(path)
    noted = found.get("config", {})
    if differing := [name for name, value in settings.items() if noted.get(name) != value]:
        name = differing[0]
        raise UserError(
            f"--{name} {settings[name]}: {path} has rows of {noted.get(name)}; name another --output_name, or move it "
            "away"
        )
    return found


def missing(method: str, package: tuple[str, str] | None) -> bool:
    """Whether a method's package is not there; it is said in one line.

    Args:
        package: the module that it needs, and how that is installed.
    """
    if package is None or importlib.util.find_spec(package[0]) is not None:
        return False
    log.warning("%s is left out: not installed; pip install --no-deps %s", method, package[1])
    return True

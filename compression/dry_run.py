"""Check the flags of several scripts before the first one works.

    python -P compression/dry_run.py SCRIPT [flags] [--then SCRIPT [flags]] ...

Each script runs in this process with --dry_run, which ends it once its configuration is made and checked: libraries
whose import takes seconds are loaded once. The first refusal is said with the script's name, and its status returned.
"""

import io
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

THEN = "--then"


def check_all(arguments: Sequence[str]) -> int:
    """Status of the first script that refuses its flags, 0 where none does.

    Args:
        arguments: scripts with their flags; `--then` is between two of them, and may be before the first.
    """
    commands: list[list[str]] = [[]]
    for argument in arguments:
        if argument == THEN:
            commands.append([])
        else:
            commands[-1].append(argument)
    return next((status for command in commands if command and (status := check(*command))), 0)


def check(script: str, *flags: str) -> int:
    """Exit status of a script that is run with these flags and --dry_run; a refusal is printed on stderr."""
    sys.argv = [script, *flags, "--dry_run"]
    folder = str(Path(script).resolve().parent)
    if folder not in sys.path:  # as where Python itself runs the script
        sys.path.insert(0, folder)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            _say_refusal(Path(script).name, said.getvalue())
            return int(end.code)
    sys.stderr.write(said.getvalue())
    return 0


def _say_refusal(script: str, text: str) -> None:
    """The script's one line with its name in it, or where it has none (unknown flags) all that it said."""
    line = next((line for line in text.splitlines() if line.startswith("error: ")), None)
    if line is None:
        sys.stderr.write(text)
    print(f"error: {script}: {(line or 'its flags are refused').removeprefix('error: ')}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(check_all(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

"""The flags of all scripts are checked in one process, and the script that refuses is named."""

import subprocess
import sys
from pathlib import Path

import pytest

DRY_RUN = Path(__file__).resolve().parent.parent / "compression" / "dry_run.py"
# Refuses --bad as the project's scripts do and --unknown as their parser does; does work unless it is a dry run.
SCRIPT = """
import os, sys
from pathlib import Path
import beside
if __name__ == "__main__":
    with open("seen", "a") as file:
        print(Path(sys.argv[0]).name, os.getpid(), *sys.argv[1:], file=file)
    print("a warning", file=sys.stderr)
    if "--bad" in sys.argv:
        print("error: --bad: allowed is good", file=sys.stderr)
        sys.exit(2)
    if "--unknown" in sys.argv:
        print("unrecognized\\noptions", file=sys.stderr)
        sys.exit(2)
    sys.exit("worked" if "--dry_run" not in sys.argv else 0)
"""


@pytest.fixture
def check(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").touch()
    for name in ("1_first.py", "second.py"):
        (tmp_path / "scripts" / name).write_text(SCRIPT)

    def run(*words):
        arguments = [f"scripts/{word}" if word.endswith(".py") else word for word in words]
        command = [sys.executable, "-P", DRY_RUN, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        seen = tmp_path / "seen"
        return result, [line.split() for line in seen.read_text().splitlines()] if seen.exists() else []

    return run


def test_every_script_sees_its_own_flags_in_one_process(check):
    result, seen = check(
        "--then", "1_first.py", "--fast", "--then", "second.py", "--then", "1_first.py", "--name", "a b"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "a warning\n" * 3)
    assert [[name, *flags] for name, _, *flags in seen] == [
        ["1_first.py", "--fast", "--dry_run"],
        ["second.py", "--dry_run"],
        ["1_first.py", "--name", "a", "b", "--dry_run"],
    ]
    assert len({process for _, process, *_ in seen}) == 1


def test_a_refusal_is_one_line_that_names_the_script(check):
    result, seen = check("1_first.py", "--then", "second.py", "--bad", "--then", "1_first.py")
    assert result.returncode == 2 and [name for name, *_ in seen] == ["1_first.py", "second.py"]
    assert result.stderr.splitlines()[-1] == "error: second.py: --bad: allowed is good"


def test_what_a_parser_says_is_shown_whole(check):
    result, _ = check("1_first.py", "--unknown")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-3:] == ["unrecognized", "options", "error: 1_first.py: its flags are refused"]

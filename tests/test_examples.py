"""The examples for clusters: their syntax, their schedulers' settings, and the flags of the commands in them."""

import re
import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from compression.dry_run import check
from compression.runtime import ROOT

FOLDER = ROOT / "examples" / "cluster"
SBATCH, SKY = sorted(FOLDER.glob("*.sbatch")), sorted(FOLDER.glob("*.sky.yaml"))
# What a directive of Slurm may say here.
SIZE, COUNT = r"0|\d+[GM]", r"\d+"
DIRECTIVES = {"job-name": r"\w+", "nodes": COUNT, "ntasks": COUNT, "ntasks-per-node": COUNT, "gpus-per-node": COUNT}
DIRECTIVES |= {"cpus-per-task": COUNT, "mem": SIZE, "time": r"\d+:\d\d:\d\d", "output": r"[\w%.]+", "requeue": ""}
DIRECTIVES |= {"array": r"\d+-\d+"}
VALUES = {"MODEL": "model", "model": "model", "NAME": "made", "name": "made", "RATIO": "0.5"}
VALUES |= {"study": "studies/importance_modes.yaml"}


def commands(script):
    """(script, flags) of the project's commands in a shell script, its variables filled in."""
    text = re.sub(r"\$(\w+)", lambda found: VALUES.get(found[1], "1"), script.replace("\\\n", " ").replace('"$@"', ""))
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word.endswith(".py"):
                yield word, words[place + 1 :]


def holds(text):
    """Whether bash reads a script."""
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


def test_there_are_examples_of_both():
    assert SBATCH and SKY


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_slurm_reads_every_directive(path):
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n") and holds(text)
    head, _, rest = text.partition("\nset -euo pipefail\n")
    assert rest and "#SBATCH" not in rest, "Slurm stops reading at the first command"
    directives = [line for line in head.splitlines() if "SBATCH" in line]
    found = dict(re.fullmatch(r"#SBATCH --([\w-]+)(?:=(\S+))?", line).groups("") for line in directives)
    assert len(found) == len(directives) and found.keys() >= {"nodes", "time", "gpus-per-node", "output"}
    for name, value in found.items():
        assert re.fullmatch(DIRECTIVES[name], value), f"--{name}={value}"


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
def test_skypilot_finds_what_it_needs(path):
    task = yaml.safe_load(path.read_text())
    assert task.keys() >= {"name", "resources", "setup", "run"}
    assert task.keys() <= {"name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run"}
    assert task["resources"]["accelerators"] and task["resources"]["disk_size"] > 0
    assert holds(task["setup"]) and holds(task["run"])
    used = set(re.findall(r"\$(\w+)", task["run"]))
    assert used <= task["envs"].keys()


@pytest.fixture
def as_a_script(monkeypatch):
    """What a dry run changes is put back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("path", [*SBATCH, *SKY], ids=lambda path: path.name)
def test_commands_parse(path, capsys, as_a_script):
    text = path.read_text()
    found = list(commands(yaml.safe_load(text)["run"] if path in SKY else text))
    assert found
    for script, flags in found:
        assert check(str(ROOT / script), *flags) == 0, capsys.readouterr().err


def test_the_check_tells_good_from_bad():
    assert not holds("if true; then") and holds("true")
    assert list(commands('python a.py --b "$MODEL" "$@"')) == [("a.py", ["--b", "model"])]

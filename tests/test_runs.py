"""Runs as processes: two at once, killed ones, signals, and what they leave."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import tiny_bert, tiny_distilbert
from scripts import ROOT, run_script, start_program, start_script
from test_global_pruning import run as prune
from test_global_pruning import words_of

from compression.checkpoint import save_checkpoint
from compression.outputs import WRITTEN_FILE
from compression.page import PAGE
from compression.stage_record import describe_stage, read_stage

LETTERS = "abcdefghijklmnopqrst"


@pytest.fixture
def models(tmp_path, tokenizer):
    """A teacher, a student, and sentences."""
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{letter} a b{' c' * index}\t{index % 2}" for index, letter in enumerate(LETTERS)]
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    for stage, model in (("teacher", tiny_bert()), ("student", tiny_distilbert())):
        save_checkpoint(tmp_path / f"{stage}_model", model, tokenizer, describe_stage(stage, {}, {}, {}, {"name": "x"}))
    return tmp_path


def command(script, models, *flags):
    known = ["--data_dir", models, "--models_dir", models, "--max_length", 32]
    return [script, *known, *flags]


def fine_tuning(models, *flags):
    start_from = ["--teacher", models / "student_model", "--overwrite"]
    return command("1_finetune_teacher.py", models, *start_from, *flags)


def test_of_two_identical_runs_one_refuses_and_names_the_other(models):
    words = fine_tuning(models, "--num_epochs", 2000)
    first = start_script(*words)
    first.wait_until(lambda: list(models.glob(".teacher_*.resume/step_*")))
    err = run_script(*words, expect=2).stderr
    assert len(err.strip().splitlines()) == 1
    assert f"process {first.pid} on host " in err and "1_finetune_teacher.py" in err
    first.end(signal.SIGTERM).check(128 + signal.SIGTERM)
    assert not list(models.glob(".*.lock")), "who was asked to end lets go of what it held"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_does_so_in_one_line_and_leaves_what_to_resume_from(models, number):
    words = fine_tuning(models, "--num_epochs", 500)
    before = read_stage(models / "teacher_model")
    process = start_script(*words)
    process.wait_until(lambda: list(models.glob(".teacher_*.resume/step_*")))
    result = process.end(number).check(128 + number)
    assert "run again with --resume" in result.stdout and "Traceback" not in result.stderr
    assert read_stage(models / "teacher_model") == before
    left = {path.name.rpartition(".")[2] for path in models.glob(".*") if not path.name.startswith(".teacher_logits")}
    assert left == {"resume"}


def test_an_interrupt_while_libraries_are_imported_is_one_line():
    command = [sys.executable, "-v", ROOT / "1_finetune_teacher.py", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # every import is said
        if "/torch/" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.wait()
    said = [line for line in rest.splitlines() if not line.startswith(("import ", "#"))]
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in rest
    assert "Interrupted." in said


def test_what_killed_runs_left_is_cleaned_by_the_next_run_and_on_request(models):
    leftover = models / f".pruning_with_finetuning_20200101_000000.{'a' * 16}.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(bytes(1000))
    words = fine_tuning(models, "--num_epochs", 1)
    run_script(*words)
    assert not leftover.exists()

    for name in (".pruned_0123.resume", ".teacher_logits_0123"):
        (models / name).mkdir()
    (models / ".mine").mkdir()
    results = models / "results"
    shutil.copytree(models / "teacher_model", results / ".gqa_0123.resume")
    result = run_script("download_model.py", "--clean", "--models_dir", models, "--results_dir", results)
    assert f"{models}: 2 leftovers of killed runs removed" in result.stdout
    assert sorted(path.name for path in models.glob(".*")) == [".mine"] and not list(results.iterdir())


def test_flags_are_checked_without_work(models):
    before = sorted(models.rglob("*"))
    for flags, expected in ((["--dry_run"], 0), (["--dry_run", "--num_epochs", "0"], 2)):
        result = run_script(*command("8_pruning_with_finetuning.py", models, *flags), expect=expected)
        assert result.stdout == ""
    assert sorted(models.rglob("*")) == before


def test_a_truncated_teacher_is_neither_skipped_nor_built_on(models):
    words = fine_tuning(models, "--num_epochs", 1)
    run_script(*words)
    path = models / "teacher_model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    distillation = command("2_distill_student.py", models, "--student", models / "student_model", "--overwrite")
    for again in (words, distillation):
        err = run_script(*again, "--skip_existing", expect=2).stderr
        assert f"{path}: is damaged" in err and len(err.strip().splitlines()) == 1


KILLED = """
import os, signal, sys
from compression import files
from compression.config import run_script
import run_global_pruning

put, calls, last = files._put, [], int(sys.argv.pop(1))

def counted(temporary, target):
    calls.append(target)
    if target.name == "one" and len([name for name in calls if name.name == "one"]) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    put(temporary, target)

files._put = counted
run_script(run_global_pruning.GlobalPruningConfig, run_global_pruning.main)
"""


def test_model_analysis_and_evaluation_are_of_one_run(base, tmp_path):
    """Killed right before the new results take the place of the old ones, and before the trained ones do."""

    def state():
        folder = tmp_path / "one"
        found = json.loads((folder / "evaluation" / "evaluation_results.json").read_text())
        return read_stage(folder / "models")["metrics"]["reduction"], found["reduction"], "finetuned" in found

    prune(base, tmp_path, "--output_name", "one", "--pruning_ratio", "0.3")
    flags = ["--output_name", "one", "--pruning_ratio", "0.5", "--overwrite", "--finetune", "--finetune_samples", "4"]
    words = words_of(base, tmp_path, *flags, "--resume")
    first = state()
    for last, changed in ((1, False), (2, True)):
        start_program(KILLED, last, *words[1:]).wait().check(-signal.SIGKILL)
        model, evaluation, finetuned = state()
        assert model == evaluation and (model != first[0]) == changed and not finetuned
        assert (tmp_path / "one" / "finetuned").exists() == finetuned
    result = prune(base, tmp_path, *flags, "--resume")
    assert "exists and matches configuration and inputs: skipped" in result.stdout, "training is not done again"
    model, evaluation, finetuned = state()
    assert model == evaluation != first[0] and finetuned
    assert (tmp_path / "one" / "finetuned" / "adapter_model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"one", PAGE, WRITTEN_FILE}


# Writes a folder as process number one, and dies halfway where it is told to.
NUMBER_ONE = """
import ctypes, os, sys
from pathlib import Path
from compression.files import new_folder

target, end, user, group = Path(sys.argv[1]), sys.argv[2], os.getuid(), os.getgid()
if ctypes.CDLL(None).unshare(0x30000000):  # a namespace of its own for users and processes
    sys.exit(77)
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"0 {user} 1")
Path("/proc/self/gid_map").write_text(f"0 {group} 1")
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert os.getpid() == 1
with new_folder(target) as folder:
    (folder / "half").touch()
    if end == "killed":
        os._exit(9)
os._exit(0)
"""


def test_process_number_one_goes_on_after_it_was_killed(tmp_path):
    """As in a container, where every run has the same process number."""
    if (killed := start_program(NUMBER_ONE, tmp_path / "target", "killed").wait()).status == 77:
        pytest.skip("no namespaces here")
    killed.check(9)
    assert len(list(tmp_path.glob(".target.*.tmp"))) == 1
    start_program(NUMBER_ONE, tmp_path / "target", "whole").wait().check()
    assert (tmp_path / "target" / "half").exists()

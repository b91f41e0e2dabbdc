"""What the shell scripts run, with which flags, from where; and what becomes of signals."""

import os
import re
import shutil
import signal
import subprocess

import pytest
from scripts import ROOT, wait_until

SCRIPTS = ("run_pipeline.sh", "run_gqa_aware_pruning.sh", "finetune_gqa_aware_pruned.sh", "setup_env.sh")
# Stands in for python: logs what it is to run, fails or waits where it is told to, and says which signal ended it.
STAND_IN = """#!/bin/bash
case "$1" in -c) exit 0 ;; --version) echo Python 3; exit 0 ;; esac
[ "$1" = -P ] && shift
[ -f {folder}/folder ] && pwd >> {folder}/folder
echo "$@" >> {folder}/log
if [ -f {folder}/waits ] && grep -q "$(cat {folder}/waits)" <<< "$1"; then
    sleep 60 & waits=$!
    for name in INT TERM; do trap "echo $name >> {folder}/signals; kill -KILL $waits; exit 99" $name; done
    touch {folder}/waiting
    wait $waits
fi
[ -f {folder}/fails ] && grep -q "$(cat {folder}/fails)" <<< "$1" && exit 3
exit 0
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts in a folder whose .venv holds the stand-in."""
    folder = tmp_path / "a project"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for script in SCRIPTS:
        shutil.copy(ROOT / script, folder)
    for name in ("requirements.txt", "constraints.txt"):
        (folder / name).write_text("torch\n")
    (folder / ".venv" / "installed.txt").write_text("torch\ntorch\nPython 3\n")
    (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{folder}/.venv/bin:$PATH"\n')
    python = folder / ".venv" / "bin" / "python"
    python.write_text(STAND_IN.format(folder=tmp_path))
    python.chmod(0o755)
    return folder


@pytest.fixture
def commands(project, tmp_path):
    """Runs a script with the stand-in; returns what subprocess says, and the commands without the project's folder."""

    def run(*flags, script="run_pipeline.sh", cwd=tmp_path):
        environment = os.environ | {"PYTHON": str(project / ".venv" / "bin" / "python")}
        command = ["bash", os.path.relpath(project / script, cwd), *flags]
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        assert all(line.startswith(f"{project}/") for line in lines)
        return result, [line.replace(f"{project}/", "") for line in lines]

    return run


@pytest.mark.parametrize("changed", ["requirements.txt", "constraints.txt"])
def test_a_change_of_either_list_of_packages_is_installed_once(project, tmp_path, changed):
    (project / changed).write_text("torch==2\n")
    environment = os.environ | {"PYTHON": str(project / ".venv" / "bin" / "python")}
    for _ in range(2):
        subprocess.run(["bash", project / "run_gqa_aware_pruning.sh"], env=environment, check=True)
    (line,) = (line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("-m pip install "))
    assert line.endswith(f"-r {project}/requirements.txt -c {project}/constraints.txt")


def stages(lines):
    """The commands that do the work: behind the one that checks all flags."""
    assert lines[0].startswith("compression/dry_run.py --then ")
    assert lines[0].removeprefix("compression/dry_run.py --then ").split(" --then ") == lines[1:]
    return lines[1:]


def test_stages_run_in_order_and_only_what_changed(commands):
    result, lines = commands("--fast")
    assert result.returncode == 0
    assert stages(lines) == [
        "download_model.py",
        "1_finetune_teacher.py --fast --skip_existing --resume",
        "2_distill_student.py --fast --skip_existing --resume",
        "2_distill_student.py --variant soft_labels --fast --skip_existing --resume",
        "8_pruning_with_finetuning.py --fast --skip_existing --resume",
        "9_quantize_pruned_model.py --pruned_model_path models/student_model"
        " --output_dir models/student_quantized_model --skip_existing --overwrite",
        "9_quantize_pruned_model.py --skip_existing --overwrite",
        "10_qat_kd_4bit.py --fast --skip_existing --resume",
        "export_model.py --precision int8 --skip_existing --overwrite",
        "export_model.py --precision nf4 --skip_existing --overwrite",
        "7_evaluate_and_generate_report.py --fast",
        "evaluate_plot.py --fast",
    ]


def test_the_end_tells_the_time_of_each_stage_and_where_the_report_is(commands, project):
    result, lines = commands("--fast")
    *_, title = result.stdout.split("--- ")
    title, *table, report = title.splitlines()
    assert title == "minutes of each stage"
    for row, line in zip(table, stages(lines), strict=True):
        assert re.fullmatch(rf" +\d+:\d\d  {re.escape(line.split()[0])}", row)
    assert report == f"Report: {project}/results/report.html"


def test_fresh_runs_everything_again(commands):
    lines = stages(commands("--fresh")[1])
    assert not any("--skip_existing" in line or "--resume" in line for line in lines) and len(lines) == 12


@pytest.mark.parametrize("flag", ["--overwrite", "--fresh"])
def test_overwrite_goes_to_the_stages_whose_output_has_one_name(commands, flag):
    always = ["9", "9", "export", "export"]
    lines = stages(commands(flag)[1])
    assert [line.split("_")[0] for line in lines if "--overwrite" in line] == ["1", "2", "2", *always]
    assert [line.split("_")[0] for line in stages(commands()[1]) if "--overwrite" in line] == always


@pytest.mark.parametrize("flags", [("--data_dir", "/a b", "--models_dir", "m"), ("--data_dir=/a b", "--models_dir=m")])
def test_data_and_models_reach_every_stage(commands, flags):
    lines = stages(commands(*flags)[1])
    assert len(lines) == 12 and all("--models_dir m" in line for line in lines)
    assert all("--data_dir /a b" in line for line in lines if not line.startswith(("9_", "export_")))
    assert sum("--pruned_model_path m/student_model --output_dir m/student_quantized" in line for line in lines) == 1


def test_what_names_the_data_reaches_the_stages_that_read_it(commands):
    words = ["--dataset", "a b.csv", "--text_column", "t", "--text_pair_column", "p", "--label_column", "l"]
    words += ["--validation_fraction", "0.2"]
    lines = stages(commands(*words)[1])
    reading = [line.split("_")[0] for line in lines if " ".join(words) in line]
    assert reading == ["download", "1", "2", "2", "8", "10", "7", "evaluate"]
    assert not any("--dataset" in line for line in lines if line.startswith(("9_", "export_")))


def test_flags_go_to_the_stages_that_have_them(commands):
    lines = stages(commands("--preset", "aggressive", "--teacher", "t", "--student", "s", "--seed", "7")[1])
    flags = ("--preset", "--teacher", "--student ", "--seed")
    having = {flag: [line.split("_")[0] for line in lines if flag in line] for flag in flags}
    assert having == {
        "--preset": ["8"],
        "--teacher": ["download", "1"],
        "--student ": ["download", "2", "2"],
        "--seed": ["1", "2", "2", "8", "10"],
    }


def test_the_teachers_layers_go_to_the_stages_that_make_students(commands):
    lines = stages(commands("--student_layers", "3")[1])
    assert [line.split("_")[0] for line in lines if "--student_layers 3" in line] == ["2", "2"]


def test_more_text_goes_to_the_stages_that_learn_from_a_teacher(commands):
    lines = stages(commands("--augment", "2", "--augment_drop=0")[1])
    having = [line.split("_")[0] for line in lines if "--augment 2 --augment_drop 0" in line]
    assert having == ["2", "2", "8"] == [line.split("_")[0] for line in lines if "--augment" in line]


def test_how_much_goes_is_said_to_the_stage_that_prunes(commands):
    words = ["--preset", "tenth", "--target", "latency", "0.3", "--start", "teacher", "--trim_vocabulary"]
    lines = stages(commands(*words, "--embedding_rank=64", "--seed", "7")[1])
    (pruning,) = [
        line for line in lines if any(word in line for word in ("--target", "--trim", "--embedding", "tenth"))
    ]
    assert pruning.startswith("8_") and " ".join([*words, "--embedding_rank", "64"]) in pruning


def test_a_failing_stage_ends_the_pipeline(commands, tmp_path):
    (tmp_path / "fails").write_text("2_distill")
    result, lines = commands("--fast")
    assert result.returncode == 3
    assert [line.split(".")[0] for line in lines[1:]] == ["download_model", "1_finetune_teacher", "2_distill_student"]


@pytest.mark.parametrize("script", ["run_pipeline.sh", "finetune_gqa_aware_pruned.sh"])
def test_nothing_runs_where_a_flag_is_refused(commands, tmp_path, script):
    (tmp_path / "fails").write_text("dry_run")
    result, lines = commands("--preset", "nope", script=script)
    assert result.returncode == 3 and len(lines) == 1 and lines[0].startswith("compression/dry_run.py")


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_help_runs_nothing(commands, script):
    result, lines = commands("--help", script=script)
    assert f"bash {script} [" in result.stdout and "set -euo" not in result.stdout and lines == []
    assert result.stdout.rstrip().endswith("."), "the help is cut off"


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_the_users_folder_stays_the_current_one(commands, tmp_path, script):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").touch()
    result, lines = commands("--data_dir", "../texts", script=script, cwd=tmp_path / "elsewhere")
    assert result.returncode == 0 and "--data_dir ../texts" in lines[-1] + lines[0]
    assert set((tmp_path / "folder").read_text().splitlines()) == {str(tmp_path / "elsewhere")}


def test_pruning_runs_with_its_flags(commands):
    result, lines = commands("--output_name", "a b", script="run_gqa_aware_pruning.sh")
    assert result.returncode == 0 and lines == ["gqa_aware_pruning.py --resume --output_name a b"]


def test_the_authors_recipe_goes_through_both_scripts(commands):
    flags = ["--preset", "headline"]
    _, lines = commands("--output_name", "headline", *flags, script="run_gqa_aware_pruning.sh")
    assert lines == ["gqa_aware_pruning.py --resume --output_name headline --preset headline"]
    _, lines = commands("headline", *flags, "--dataset", "alpaca.json", script="finetune_gqa_aware_pruned.sh")
    assert stages(lines)[0].startswith("post_training.py --pruned_model results/headline/models ")
    assert stages(lines)[0].endswith(" --preset headline --dataset alpaca.json")


def test_recovery_is_trained_and_merged(commands):
    result, lines = commands("mine", "--kd_weight", "0.5", "--overwrite", script="finetune_gqa_aware_pruned.sh")
    assert result.returncode == 0
    assert stages(lines) == [
        "post_training.py --pruned_model results/mine/models --output_name mine_lora --resume --kd_weight 0.5"
        " --overwrite",
        "merge_and_save_lora.py --pruned_model results/mine/models --lora_dir results/mine_lora"
        " --output_dir results/mine_merged --overwrite",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gqa", "--finetune_method", "full"], "use python post_training.py --pruned_model results/gqa/models"),
        (["mine", "--finetune-method=full"], "--output_name mine_full --finetune_method full"),
        (["--output_name", "x"], "--output_name: is set by NAME; instead use python post_training.py"),
        (["gqa", "--output_dir=x"], "--output_dir: is set by NAME"),
        (["gqa", "--results-dir", "x"], "--results-dir: is set by NAME"),
        (["gqa", "--pruned_model", "x"], "--pruned_model: is set by NAME"),
        (["gqa", "--lora_dir", "x"], "--lora_dir: is set by NAME"),
        ([".."], "NAME '..': allowed is the plain name of a folder in results"),
        ([""], "NAME '': allowed is"),
        (["a/b"], "NAME 'a/b': allowed is"),
    ],
)
def test_what_could_not_be_merged_is_refused_before_training(commands, flags, message):
    result, lines = commands(*flags, script="finetune_gqa_aware_pruned.sh")
    assert result.returncode == 2 and lines == [] and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_adapters_may_be_asked_for_by_name(commands):
    result, lines = commands("gqa", "--finetune_method", "lora", script="finetune_gqa_aware_pruned.sh")
    assert result.returncode == 0 and "--finetune_method lora" in stages(lines)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("script", "waiting"),
    [
        ("run_pipeline.sh", "1_finetune"),
        ("run_pipeline.sh", "dry_run"),
        ("finetune_gqa_aware_pruned.sh", "post_training"),
        ("run_gqa_aware_pruning.sh", "gqa_aware"),
    ],
)
def test_a_signal_ends_the_command_and_the_script(project, tmp_path, script, waiting, number):
    (tmp_path / "waits").write_text(waiting)
    environment = os.environ | {"PYTHON": str(project / ".venv" / "bin" / "python")}
    process = subprocess.Popen(["bash", project / script], env=environment, stdout=subprocess.DEVNULL)
    wait_until((tmp_path / "waiting").exists)
    process.send_signal(number)
    returned = process.wait(timeout=20)
    assert (tmp_path / "signals").read_text().split() == [number.name[3:]], "once"
    assert waiting in last_line(tmp_path / "log"), "another stage has run"
    # Where the script has become the command, the status is the command's own.
    assert returned == (99 if script == "run_gqa_aware_pruning.sh" else 128 + number)


def test_ctrl_c_of_the_terminal_reaches_the_command_once(project, tmp_path):
    """The terminal sends it to all processes of its group."""
    (tmp_path / "waits").write_text("1_finetune")
    environment = os.environ | {"PYTHON": str(project / ".venv" / "bin" / "python")}
    process = subprocess.Popen(["bash", project / "run_pipeline.sh"], env=environment, start_new_session=True)
    wait_until((tmp_path / "waiting").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert (tmp_path / "signals").read_text().split() == ["INT"]


def last_line(path):
    """The program of the last command."""
    return path.read_text().splitlines()[-1].split(" --")[0] if path.exists() and path.read_text() else ""

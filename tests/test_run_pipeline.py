"""Which commands run_pipeline.sh runs, with which flags."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def commands(tmp_path):
    """Runs the script with a stand-in for python; returns the commands by script, and the exit status."""
    shutil.copy(ROOT / "run_pipeline.sh", tmp_path)
    (tmp_path / "setup_env.sh").write_text(f'export PATH="{tmp_path}:$PATH"\n')
    (tmp_path / "python").write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/log\n[ -f {tmp_path}/fails ] && exit 3 || exit 0\n'
    )
    (tmp_path / "python").chmod(0o755)

    def run(*flags):
        result = subprocess.run(["bash", tmp_path / "run_pipeline.sh", *flags], capture_output=True, text=True)
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return result, lines

    return run


def test_stages_run_in_order_and_only_what_changed(commands):
    result, lines = commands("--fast")
    assert result.returncode == 0
    assert lines == [
        "download_model.py",
        "1_finetune_teacher.py --fast --skip_existing --resume",
        "2_distill_student.py --fast --skip_existing --resume",
        "2_distill_student.py --variant soft_labels --fast --skip_existing --resume",
        "8_pruning_with_finetuning.py --fast --skip_existing --resume",
        "9_quantize_pruned_model.py --pruned_model_path models/student_model"
        " --output_dir models/student_quantized_model --skip_existing",
        "9_quantize_pruned_model.py --skip_existing",
        "10_qat_kd_4bit.py --fast --skip_existing --resume",
        "7_evaluate_and_generate_report.py --fast",
        "evaluate_plot.py --fast",
    ]


def test_fresh_runs_everything_again(commands):
    _, lines = commands("--fresh")
    assert not any("--skip_existing" in line or "--resume" in line for line in lines) and len(lines) == 10


@pytest.mark.parametrize("flags", [("--data_dir", "/a b", "--models_dir", "m"), ("--data_dir=/a b", "--models_dir=m")])
def test_data_and_models_reach_every_stage(commands, flags):
    _, lines = commands(*flags)
    assert len(lines) == 10 and all("--models_dir m" in line for line in lines)
    assert all("--data_dir /a b" in line for line in lines if not line.startswith("9_"))
    assert sum("--pruned_model_path m/student_model --output_dir m/student_quantized" in line for line in lines) == 1


def test_flags_go_to_the_stages_that_have_them(commands):
    _, lines = commands("--preset", "aggressive", "--teacher", "t", "--student", "s", "--seed", "7")
    having = {
        flag: [line.split("_")[0] for line in lines if flag in line] for flag in ("--preset", "--teacher", "--seed")
    }
    assert having == {"--preset": ["8"], "--teacher": ["download", "1"], "--seed": ["1", "2", "2", "8", "10"]}


def test_a_failing_stage_ends_the_pipeline(commands, tmp_path):
    (tmp_path / "fails").touch()
    result, lines = commands("--fast")
    assert result.returncode == 3 and lines == ["download_model.py"]


def test_help_runs_nothing(commands):
    result, lines = commands("--help")
    assert "bash run_pipeline.sh [--fast]" in result.stdout and lines == []

"""Command lines, presets and refused values."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from conftest import load_script

from compression.config import Between, Config, FolderName, _leaves, parse, pick
from compression.llm.recovery_settings import Recovery
from compression.llm.run_settings import recovery_after
from compression.runtime import ROOT, UserError
from gqa_aware_pruning import GQAAwarePruningConfig
from post_training import PostTrainingConfig
from run_global_pruning import GlobalPruningConfig

GradualPruningConfig = load_script("8_pruning_with_finetuning").GradualPruningWithFinetuningConfig


@dataclass
class ExampleConfig(Config):
    num_epochs: Annotated[int, Between(1, 50)] = 15
    """Passes over the data."""
    models_dir: Path = Path("models")
    """Where models are."""

    presets: ClassVar = {"fast": dict(num_epochs=4), "long": dict(num_epochs=40)}


def test_flags_win_over_presets_and_presets_over_defaults():
    assert parse(ExampleConfig, []).num_epochs == 15
    assert parse(ExampleConfig, ["--fast"]).num_epochs == 4
    assert parse(ExampleConfig, ["--num_epochs", "7", "--fast"]).num_epochs == 7
    assert parse(ExampleConfig, ["--preset", "long"]).num_epochs == 40
    assert parse(ExampleConfig, ["--fast", "--preset=long"]).num_epochs == 4


def test_bad_value_names_flag_value_and_range():
    with pytest.raises(UserError, match="--num_epochs 0: allowed is 1 to 50"):
        parse(ExampleConfig, ["--num_epochs", "0"])


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(UserError, match="--preset slow: unknown; allowed: fast, long"):
        parse(ExampleConfig, ["--preset", "slow"])


def test_dump_is_plain_json():
    assert ExampleConfig().as_dict() == {"num_epochs": 15, "models_dir": "models"}


def test_presets_of_gradual_pruning_change_what_they_say():
    config = GradualPruningConfig().as_dict()
    aggressive = dict(head_final_sparsity=0.40, ffn_final_sparsity=0.35)
    conservative = dict(lambda_mag=0.6, lambda_grad=0.4, head_final_sparsity=0.20, ffn_final_sparsity=0.15)
    assert GradualPruningConfig.aggressive().as_dict() == config | aggressive
    assert GradualPruningConfig.conservative().as_dict() == config | conservative | {"pruning_window_steps": 100}


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha_start": 1.5},
        {"temperature_end": 0.0},
        {"head_final_sparsity": 1.0},
        {"pruning_end_epoch": 0},
        {"pruning_start_epoch": 9},
        {"patience": 0},
        {"lambda_mag": 0.0, "lambda_grad": 0.0},
        {"neuron_multiple": 0},
        {"batch_size": 0},
    ],
)
def test_gradual_pruning_refuses(arguments):
    with pytest.raises(UserError, match=f"--{list(arguments)[-1]}"):
        GradualPruningConfig.make(**arguments)


@dataclass
class NumbersConfig(Config):
    rate: float = 0.1
    """A number."""
    limit: float | None = None
    """A number or none."""
    factors: tuple[float, ...] = (1.0,)
    """Numbers."""
    seed: int = 0
    """A whole number."""
    name: Annotated[str, FolderName()] = "mine"
    """A folder's name."""


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize("flag", ["rate", "limit", "factors"])
def test_numbers_that_are_not_finite_are_refused(flag, value):
    with pytest.raises(UserError, match=f"--{flag} (nan|inf|-inf): allowed are finite numbers"):
        parse(NumbersConfig, [f"--{flag}={value}"])


@pytest.mark.parametrize("value", [2**31, -(2**63) - 1, 2**64, 10**30])
def test_whole_numbers_that_no_library_takes_are_refused(value):
    with pytest.raises(UserError, match=f"--seed {value}: allowed is at most 2147483647"):
        parse(NumbersConfig, [f"--seed={value}"])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/", "a\nb"])
def test_a_name_is_no_path(name):
    with pytest.raises(UserError, match="--name .*: allowed is a plain folder name"):
        parse(NumbersConfig, ["--name", name])


def test_every_script_refuses_what_is_not_finite():
    """Fields without a range of their own are checked all the same."""
    for config, fields in (
        (GlobalPruningConfig, {"tau": float("nan")}),
        (GlobalPruningConfig, {"attention_factors": (1.0, float("inf"))}),
        (PostTrainingConfig, {"lora_alpha": float("inf")}),
        (PostTrainingConfig, {"kd_temperature": float("nan")}),
        (GQAAwarePruningConfig, {"target_perplexity": float("inf")}),
    ):
        with pytest.raises(UserError, match=f"--{next(iter(fields))} .*finite"):
            config.make(**fields)


SCRIPTS = {
    "download_model": "DownloadConfig",
    "1_finetune_teacher": "TeacherConfig",
    "2_distill_student": "DistillationConfig",
    "8_pruning_with_finetuning": "GradualPruningWithFinetuningConfig",
    "9_quantize_pruned_model": "QuantizationConfig",
    "10_qat_kd_4bit": "QATKDConfig",
    "7_evaluate_and_generate_report": "EvaluationConfig",
    "evaluate_plot": "ComparisonConfig",
    "run_global_pruning": "GlobalPruningConfig",
    "gqa_aware_pruning": "GQAAwarePruningConfig",
    "post_training": "PostTrainingConfig",
    "merge_and_save_lora": "MergeConfig",
    "evaluate_lora_model": "LoraEvaluationConfig",
}


# Defaults that have changed since, by measurements (docs/results.md) or because more is measured.
TEXTS = {"eval_ppl_datasets": "auto"}  # with the default --dataset the same
TRAINED = {"learning_rate": 4e-4, "kd_temperature": 1.0}
CHANGED = {"post_training": TRAINED | TEXTS, "run_global_pruning": TEXTS, "gqa_aware_pruning": TEXTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_there_ever_was_still_parses_and_has_its_default(script):
    """tests/flags.json: the flags of the first version, with their defaults."""
    config_class = getattr(load_script(script), SCRIPTS[script])
    flags = json.loads((ROOT / "tests" / "flags.json").read_text())[f"{script}.py"] | CHANGED.get(script, {})
    defaults = config_class.modernized({}) | {"iterative_rounds": 1}
    for name, value in flags.items():
        assert defaults[name] == value, name
        if isinstance(value, bool):
            words = [f"--{name}" if value else f"--no_{name}"]
        else:
            values = value if isinstance(value, list) else [value]
            words = [f"--{name}", *("None" if one is None else str(one) for one in values)]
        assert parse(config_class, words).as_dict() == config_class().as_dict(), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_stands_once_and_is_documented(script, capsys):
    config_class = getattr(load_script(script), SCRIPTS[script])
    names = [name for name, _, _ in _leaves(config_class())]
    assert len(names) == len(set(names)), "two groups have a field of one name"
    with pytest.raises(SystemExit):
        parse(config_class, ["--help"])
    help_text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name in names:
        found = re.search(rf"--{name}(?:,| [A-Z{{\[])(.{{0,2000}}?)\((?:default|required)", help_text)
        assert found and len(re.findall(r"[a-z]{2,}", found[1])) >= 2, f"--{name} is not documented"


def test_a_record_of_before_is_understood():
    noted = GQAAwarePruningConfig().as_dict() | {"iterative_rounds": 3}
    del noted["iterative_steps"], noted["uniform"]
    expected = GQAAwarePruningConfig.make(iterative_steps=3).result_fields()
    found = GQAAwarePruningConfig.modernized(noted)
    assert {name: found[name] for name in expected} == expected


def test_records_of_before_the_loss_behind_scores_could_be_chosen_were_made_with_the_texts():
    config = GlobalPruningConfig()
    noted = config.as_dict()
    assert noted["score_loss"] == "kl" and GlobalPruningConfig.modernized(noted)["score_loss"] == "kl"
    del noted["score_loss"]
    assert GlobalPruningConfig.modernized(noted)["score_loss"] == "text"


@pytest.mark.parametrize(("method", "loss"), [("fisher", "kl"), ("taylor", "text"), ("wanda", "text")])
def test_the_loss_behind_scores_is_recorded_as_it_is_used(method, loss):
    for config in (GlobalPruningConfig, GQAAwarePruningConfig):
        assert config.make(importance_method=method).as_dict()["score_loss"] == loss


def test_what_trains_on_after_pruning_is_post_training_with_its_defaults():
    expected = pick(Recovery, PostTrainingConfig())
    for config in (GlobalPruningConfig(), GQAAwarePruningConfig()):
        found = recovery_after(config)
        assert found.as_dict() == expected.as_dict()


def test_groups_are_flat_in_records_and_on_the_command_line():
    config = parse(GlobalPruningConfig, ["--num_samples", "3", "--output_name", "x", "--eval_samples", "5"])
    assert (config.calibration.num_samples, config.run.output_name, config.evaluation.eval_samples) == (3, "x", 5)
    assert config.as_dict()["num_samples"] == 3 and "output_name" not in config.result_fields()
    with pytest.raises(TypeError, match="no_such_field"):
        GlobalPruningConfig.make(no_such_field=1)

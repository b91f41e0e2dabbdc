"""Command lines, presets and refused values."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from compression.classifier.gradual_pruning import GradualPruningConfig
from compression.classifier.qat import QuantizationAwareConfig
from compression.config import StageConfig, parse
from compression.runtime import ROOT, UserError
from gqa_aware_pruning import GQAAwarePruningConfig
from post_training import PostTrainingConfig
from run_global_pruning import GlobalPruningConfig


@dataclass
class ExampleConfig(StageConfig):
    num_epochs: int = 15
    """Passes over the data."""
    models_dir: Path = Path("models")
    """Where models are."""

    presets: ClassVar = {"fast": dict(num_epochs=4), "long": dict(num_epochs=40)}

    def check(self):
        self.check_range("num_epochs", 1, 50)


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


def stated(cell, names):
    """Names and values of the fields that a cell of the README gives a plain value for."""
    words = cell.split(", ")
    if len(words) == 1 < len(names):  # one value, of whichever of them
        return
    for name, word in zip(names, words, strict=False):
        if word in ("on", "off"):
            yield name, word == "on"
        elif re.fullmatch(r"[\d.e-]+", word):
            yield name, float(word)
        elif re.fullmatch(r"`[\w+]+`", word):
            yield name, word.strip("`")


def value_of(config, name):
    return getattr(config, name) if hasattr(config, name) else config.as_dict()[name]


@pytest.mark.parametrize(
    ("title", "config_class", "least"),
    [
        ("GradualPruningWithFinetuningConfig", GradualPruningConfig, 34),
        ("QATKDConfig", QuantizationAwareConfig, 14),
        ("GlobalPruningConfig", GlobalPruningConfig, 15),
        ("GQAAwarePruningConfig", GQAAwarePruningConfig, 17),
        ("PostTrainingConfig", PostTrainingConfig, 15),
    ],
)
def test_defaults_are_those_that_the_readme_states(title, config_class, least):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (first,) = (place for place, line in enumerate(lines) if line.startswith(f"| field of `{title}` |"))
    with_fast, found = "`--fast`" in lines[first], 0
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :]):
        names, default, fast, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"`(\w+)`", names)
        columns = [(config_class(), default), (config_class.fast(), fast)] if with_fast else [(config_class(), default)]
        for config, cell in columns:
            for name, value in stated(cell, names):
                assert value_of(config, name) in (value, (value,)), (name, cell)
                found += 1
    assert found >= least, "the table is read wrong"


def test_presets_are_those_that_the_readme_states():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name, pattern in (
        ("conservative", r"`--preset conservative` \(lambdas (?P<lambda_mag>[\d.]+)/(?P<lambda_grad>[\d.]+), heads "
                         r"(?P<head_final_sparsity>[\d.]+), FFN (?P<ffn_final_sparsity>[\d.]+), window "
                         r"(?P<pruning_window_steps>\d+)\)"),
        ("aggressive", r"`--preset aggressive` \(heads (?P<head_final_sparsity>[\d.]+), FFN "
                       r"(?P<ffn_final_sparsity>[\d.]+)\)"),
    ):  # fmt: skip
        config, numbers = GradualPruningConfig.preset(name), re.search(pattern, text).groupdict()
        assert {field: float(getattr(config, field)) for field in numbers} == {k: float(v) for k, v in numbers.items()}


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
        GradualPruningConfig(**arguments)


@dataclass
class NumbersConfig(StageConfig):
    rate: float = 0.1
    """A number."""
    limit: float | None = None
    """A number or none."""
    factors: tuple[float, ...] = (1.0,)
    """Numbers."""
    seed: int = 0
    """A whole number."""
    name: str = "mine"
    """A folder's name."""

    def check(self):
        self.check_name("name")


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
            config(**fields)

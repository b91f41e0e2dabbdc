"""Time as H-GSP's budget: tables of times, what they choose, and what a run says of it."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import LAYOUTS, pruning_flags, tiny_decoder
from scripts import run_killed, run_script

from compression.config import pick
from compression.files import write_json
from compression.llm import speed
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring
from compression.llm.speed import PHASES, SpeedTable, described, measure_table
from compression.llm.text import CalibrationText
from compression.runtime import UserError
from compression.structures import CHANNELS, GROUPS, layers_of
from run_global_pruning import GlobalPruningConfig

ATTENTION = {1: 4.0, 2: 7.0, 3: 9.0, 4: 10.0}
MLP = {8: 3.0, 16: 4.5, 32: 6.0, 48: 9.0}


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(3, 120, (12, 16), generator=torch.Generator().manual_seed(4))
    return CalibrationText(scores=ids[:4], repair=ids, held_out=ids[4:10], batch_size=2)


def table(attention=ATTENTION, mlp=MLP):
    """Times of the tiny models' parts on a machine that there is not."""
    parts = {"attention": attention, "mlp": mlp}
    return SpeedTable(
        hardware="a machine elsewhere",
        threads=3,
        engine="none",
        dtype="bfloat16",
        batch_size=2,
        length=100,
        model=described(tiny_decoder()),
        rest={"prefill": 5.0, "decode": 1.0},
        parts={"prefill": parts, "decode": {name: {n: t / 10 for n, t in of.items()} for name, of in parts.items()}},
    )


def pruned(text, times, share=0.5, phase="prefill", **fields):
    settings = dict(target=(phase, share), round_to=8, epsilon=0.0, compensation="none") | fields
    config, model = GlobalPruningConfig.make(**settings), tiny_decoder()
    inputs = dict(costs=times.costs(model, phase), search=config.allocation_search)
    pruning = GlobalPruning(model, pick(Scoring, config), pick(Budget, config), text, **inputs)
    return pruning.prune(), pruning


def sizes(model):
    return [(parts.groups, parts.channels) for parts in layers_of(model)]


# Tables.


def test_between_measured_sizes_times_are_interpolated_and_never_fall():
    noisy = table(attention={1: 4.0, 2: 7.0, 3: 6.5, 4: 10.0})
    mlp, attention = noisy.cost("prefill", "mlp", 48), noisy.cost("prefill", "attention", 4)
    counts = [0, 1, 8, 12, 40, 48]
    assert [mlp.of(count) / 1e6 for count in counts] == [0, 3, 3, 3.75, 7.5, 9] and mlp.one == 9e6 / 48
    assert [attention.of(count) / 1e6 for count in range(5)] == [0, 4, 7, 7, 10]
    assert noisy.layers_time(tiny_decoder(), "decode") == pytest.approx(4 * 1.9)


def test_a_table_is_what_it_was_once_it_is_read():
    assert SpeedTable.of(json.loads(json.dumps(table().as_dict())), "--hardware x") == table()


@pytest.mark.parametrize("layout", ["qwen2, window first", "llama, biases"])
def test_every_part_is_measured_at_its_sizes_and_the_model_stays(monkeypatch, layout):
    monkeypatch.setattr(speed, "ROUNDS", dict.fromkeys(PHASES, 1))
    family, fields = LAYOUTS[layout]
    model = tiny_decoder(family, intermediate_size=512, **fields)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_table(model, 2, 12)
    types = ["sliding_attention", "full_attention"] if layout == "qwen2, window first" else ["attention"]
    for phase in PHASES:
        widths = {name: list(times) for name, times in found.parts[phase].items()}
        assert widths == {"mlp": [64 * n for n in range(1, 9)]} | dict.fromkeys(types, [1, 2, 3, 4])
        assert found.rest[phase] > 0
    assert found.check_fits(model, "x").is_of(model) and sizes(model) == [(4, 512)] * 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What a budget of time chooses.


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"share": 0.2},
        {"phase": "decode", "share": 0.8},
        {"iterative_steps": 3},
        {"epsilon": 0.4},
        {"protect_first": 1, "protect_last": 1, "share": 0.7},
        {"keep_attention": True},
        {"attention_factors": (0.1, 1.0)},
        {"compensation": "lstsq", "removal_steps": 3},
        {"importance_method": "wanda"},
        {"round_to": 1},
    ],
    ids=str,
)
def test_layers_take_their_share_of_the_time_and_hardly_less(text, fields):
    times, phase, share = table(), fields.get("phase", "prefill"), fields.get("share", 0.5)
    small, pruning = pruned(text, times, **fields)
    reached = times.layers_time(small, phase) / times.layers_time(tiny_decoder(), phase)
    assert share - 4 / 76 < reached <= share * (1 + 1e-9)
    if "epsilon" in fields:
        mlp = times.cost("prefill", "mlp", 48)
        layers = [ATTENTION.get(groups, 0) + mlp.of(channels) / 1e6 for groups, channels in sizes(small)]
        assert min(layers) == 0 and all(time >= 0.4 * 19 for time in layers if time)
    if "protect_first" in fields:
        assert sizes(small)[0] == sizes(small)[-1] == (4, 48)
    if "keep_attention" in fields:
        assert all(groups for groups, _ in sizes(small))
    assert len([row for row in pruning.table.values() if row["removed_in_step"] is None]) == sum(map(sum, sizes(small)))


def test_what_is_dear_goes_first(text):
    dear, cheap = {1: 30.0, 2: 60.0, 3: 90.0, 4: 120.0}, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    with_dear, _ = pruned(text, table(attention=dear), share=0.6)
    with_cheap, _ = pruned(text, table(attention=cheap), share=0.6)
    assert all(channels == 48 for _, channels in sizes(with_dear)) and sum(g for g, _ in sizes(with_dear)) < 11
    assert all(groups == 4 for groups, _ in sizes(with_cheap)) and sum(c for _, c in sizes(with_cheap)) < 150


def test_what_saves_no_time_stays(text):
    """An attention takes the same with one group as with four: it goes whole or not at all."""
    small, _ = pruned(text, table(attention=dict.fromkeys(ATTENTION, 10.0)), share=0.4)
    assert {groups for groups, _ in sizes(small)} == {0, 4}


def test_protected_layers_that_take_more_than_the_budget_are_refused(text):
    with pytest.raises(UserError, match=r"--target prefill 0.4: with 1 and 1 protected layers at most 0.500 can go"):
        pruned(text, table(), share=0.4, protect_first=1, protect_last=1)
    with pytest.raises(UserError, match="--target prefill 0.1: out of reach with --keep_attention; choose a higher"):
        pruned(text, table(), share=0.1, keep_attention=True)


@pytest.mark.parametrize("fields", [{"share": 0.4}, {"iterative_steps": 2}], ids=str)
def test_search_keeps_the_time(text, fields):
    few = dict(search="evolutionary", search_generations=8, search_population=6, search_tokens=32, search_levels=6)
    times, share = table(), fields.get("share", 0.5)
    small, pruning = pruned(text, times, **few | fields, compensation="lstsq")
    dense = times.layers_time(tiny_decoder(), "prefill")
    assert share - 4 / 76 < times.layers_time(small, "prefill") / dense <= share * (1 + 1e-9)
    for found in pruning.searches:
        assert found["divergence"]["found"] <= found["divergence"]["start"] or found["after"] == found["before"]
    attention, mlp = times.cost("prefill", "attention", 4), times.cost("prefill", "mlp", 48)
    after = sum(attention.of(each[GROUPS]) + mlp.of(each[CHANNELS]) for each in pruning.searches[-1]["after"])
    assert after / 1e6 == pytest.approx(times.layers_time(small, "prefill"))


# The command line.


@pytest.fixture
def hardware(tmp_path):
    path = tmp_path / "elsewhere.json"
    write_json(path, table().as_dict())
    return path


def flags_of(base, tmp_path, *more):
    places = ["--models_dir", tmp_path / "models", "--hardware_length", "24", "--round_to", "8"]
    return [*pruning_flags(base, tmp_path / "out"), *places, "--run_evaluation", "none", *more]


def result_of(tmp_path, name="hgsp"):
    return json.loads((tmp_path / "out" / name / "evaluation" / "evaluation_results.json").read_text())["speed"]


def test_table_of_another_machine_decides_and_nothing_is_measured(base, tmp_path, hardware, monkeypatch):
    monkeypatch.setattr(speed, "phase_times", None)
    flags = flags_of(base, tmp_path, "--hardware", hardware)
    result = run_script("run_global_pruning.py", *flags, "--target", "decode", "0.6")
    found = result_of(tmp_path)
    assert found["hardware"] == "a machine elsewhere" and "measured" not in found["decode"]["share"]
    assert found["decode"]["dense"]["predicted"] == pytest.approx(4 * 1.9 + 1)
    assert found["decode"]["pruned"]["predicted"] == pytest.approx(4 * 1.9 * found["decode"]["share"]["predicted"] + 1)
    assert 0.5 < found["decode"]["share"]["predicted"] <= 0.6
    assert f"in decode, as a share of the dense model's: {found['decode']['share']['predicted']:.3f}" in result.stdout
    assert json.loads((tmp_path / "out/hgsp/analysis/speed_table.json").read_text()) == table().as_dict()
    record = json.loads((tmp_path / "out/hgsp/run.json").read_text())
    assert record["config"]["pruning_ratio"] is None and record["config"]["target"] == ["decode", 0.6]
    write_json(hardware, table(mlp=ATTENTION | {48: 20.0}).as_dict())
    refused = run_script("run_global_pruning.py", *flags, "--target", "decode", "0.6", expect=2)
    assert "holds a result with other settings or inputs" in refused.stderr


def test_times_are_measured_here_once_and_again_of_what_comes_out(base, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", dict.fromkeys(PHASES, 2))
    flags = flags_of(base, tmp_path, "--target", "prefill", "0.7")
    run_script("run_global_pruning.py", *flags, "--output_name", "one")
    found = result_of(tmp_path, "one")
    assert all(found[phase][name]["measured"] > 0 for phase in PHASES for name in ("dense", "pruned"))
    assert found["prefill"]["share"]["predicted"] <= 0.7 and (found["batch_size"], found["length"]) == (1, 24)
    monkeypatch.setattr(speed, "measure_table", None)
    run_script("run_global_pruning.py", *flags, "--output_name", "two")
    weights = [(tmp_path / "out" / name / "models/model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    with pytest.raises(TypeError):
        run_script("run_global_pruning.py", *flags, "--hardware_length", "20", "--output_name", "other")


def test_killed_search_goes_on_to_the_same_result(base, tmp_path, hardware):
    search = (
        "--search evolutionary --search_generations 5 --search_population 5 --search_tokens 32 --held_out_samples 3"
    )
    flags = flags_of(base, tmp_path, "--target", "prefill", "0.5", "--hardware", hardware, *search.split())
    run_script("run_global_pruning.py", *flags, "--output_name", "whole")
    killed = ["run_global_pruning.py", *flags, "--output_name", "killed", "--resume"]
    run_killed(*killed, at="compression.llm.levels._select", call=3)
    run_script(*killed)
    for name in ("models/model.safetensors", "models/config.json", "analysis/global_group_table.csv"):
        assert (tmp_path / "out/killed" / name).read_bytes() == (tmp_path / "out/whole" / name).read_bytes()
    assert result_of(tmp_path, "killed") == result_of(tmp_path, "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "prefill", "0.5", "--pruning_ratio", "0.5"], "--pruning_ratio 0.5: not allowed with --target"),
        (["--target", "prefill", "0.5", "--uniform"], "--target prefill 0.5: not allowed with --uniform"),
        (["--target", "decode", "1.5"], "--target decode 1.5: allowed is a share of the dense layers' time"),
        (["--target", "decode", "0"], "--target decode 0: allowed is a share of the dense layers' time"),
        (["--hardware", "x.json"], "--hardware x.json: is for --target; name one"),
        (["--target", "decode", "0.5", "--hardware", "x.json"], "--hardware x.json: no such file; measure one: python"),
        (["--target", "decode", "0.5", "--hardware_length", "128"], "--hardware_length 129: allowed is at most 128"),
        (["--target", "decode", "0.5", "--hardware_batch", "0"], "--hardware_batch 0: allowed is at least 1"),
        (["--target", "decode", "0.5", "--offload", "disk"], "--target: times are measured with the model in memory"),
    ],
)
def test_mistakes_end_in_one_line(base, tmp_path, flags, message):
    result = run_script("run_global_pruning.py", *flags_of(base, tmp_path), *flags, expect=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "hgsp").exists()


def other_model(**values):
    return replace(table(), model=table().model | values).as_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (other_model(hidden_size=64), "is for a hidden_size of 64, the model has 32; measure one for this model"),
        (other_model(queries_per_group=4), "is for a queries_per_group of 4, the model has 2"),
        (other_model(head_size=8), "is for a head_size of 8, the model has 4"),
        (other_model(model_type="gemma2"), "is for a model_type of gemma2, the model has llama"),
        (table(attention={1: 1.0, 2: 2.0}).as_dict(), "has times of attention for 2 groups at most, the model has 4"),
        (table(mlp={}).as_dict(), "is no table of layers' times; measure one: python benchmarks/layer_times.py"),
        (table(mlp={48: -1.0}).as_dict(), "is no table of layers' times"),
        (table().as_dict() | {"more": 1}, "is no table of layers' times"),
        ({"parts": {}}, "is no table of layers' times"),
        ({"prefill": 3}, "is no table of layers' times"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(values, message):
    with pytest.raises(UserError) as refusal:
        SpeedTable.of(values, "--hardware x.json").check_fits(tiny_decoder(), "--hardware x.json")
    assert str(refusal.value).startswith(f"--hardware x.json: {message}")


def test_that_is_said_before_any_work(base, tmp_path, hardware):
    write_json(hardware, other_model(hidden_size=64))
    flags = flags_of(base, tmp_path, "--target", "prefill", "0.5", "--hardware", hardware)
    result = run_script("run_global_pruning.py", *flags, expect=2)
    assert "is for a hidden_size of 64" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "Perplexity" not in result.stdout and not (tmp_path / "out" / "hgsp").exists()


def test_layers_of_another_type_are_missed(text):
    windows = tiny_decoder("qwen2", use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 4)
    times = replace(table(), model=described(windows))
    with pytest.raises(UserError, match="has times of sliding_attention for 0 groups at most, the model has 4"):
        times.check_fits(windows, "--hardware x")

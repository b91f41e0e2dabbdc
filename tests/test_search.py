"""Search over the allocation: sizes, children, generations; stitched models; never worse, within budget, resumable."""

import copy
import json
import random

import pytest
import torch
from conftest import DECODERS, LAYOUTS, MORE_DECODERS, VARIANTS, pruning_flags, repair, tiny_decoder
from scripts import run_killed, run_script

from compression.allocation import Cost
from compression.config import pick
from compression.llm.agreement import divergence, last_states
from compression.llm.evolution import child, evolve
from compression.llm.exchange import exchange, exchanges
from compression.llm.expansion import Expansion
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring
from compression.llm.levels import Part, Search, cost_of, levels_of, rungs_of
from compression.llm.repair import LocalChoice, Repair
from compression.llm.repair_text import RepairText
from compression.llm.search import AllocationSearch
from compression.llm.stitching import solutions_of, stitched
from compression.llm.text import CalibrationText
from compression.runtime import UserError
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of
from compression.surgery import shrink_decoder
from run_global_pruning import GlobalPruningConfig

ERROR_SHARE = Repair().share


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(3, 120, (12, 16), generator=torch.Generator().manual_seed(4))
    return CalibrationText(scores=ids[:4], repair=ids, held_out=ids[4:10], batch_size=2)


# Sizes, children, generations.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1536, 1536, 0, 4, 32), (0, 384, 768, 1152, 1536)),
        ((992, 1536, 0, 4, 32), (0, 224, 608, 992, 1376, 1536)),
        ((0, 1536, 0, 3, 32), (0, 512, 1024, 1536)),
        ((50, 50, 0, 3, 16), (0, 16, 32, 48, 50)),
        ((2, 3, 1, 8), (1, 2, 3)),
    ],
)
def test_sizes_are_equal_steps_from_the_start(arguments, expected):
    assert levels_of(*arguments) == expected


def test_text_grows_until_it_is_all():
    assert rungs_of(16, 1024, 1024) == [1, 4, 16]
    assert rungs_of(6, 1024, 1500) == [2, 6]
    assert rungs_of(3, 16, 10_000) == [3]


def parts(layers=6):
    return [
        Part(layer, kind, Cost(parameters), counts)
        for layer in range(layers)
        for kind, parameters, counts in ((GROUPS, 70, (0, 1, 2, 3)), (CHANNELS, 3, (0, 16, 32, 48, 64)))
    ]


def cost(levels):
    return cost_of(parts(), levels)


def test_children_keep_the_budget_and_use_it():
    levels, draw = [2] * 12, random.Random(0)
    budget, seen = cost(levels), set()
    for _ in range(300):
        levels = child(parts(), levels, budget, draw)
        assert all(0 <= level < len(part.counts) for part, level in zip(parts(), levels, strict=True))
        assert budget - 70 < cost(levels) <= budget
        seen.add(tuple(levels))
    assert len(seen) > 250


def distance(wanted):
    """A fitness that needs some of the parts to be other than at the start; little text says it less exactly."""

    def fitness(levels, windows):
        noise = random.Random(f"{levels} {windows}").random() / windows
        return 1 + noise + sum((level - best) ** 2 for level, best in zip(levels, wanted, strict=True))

    return fitness


WANTED = [3, 2, 1, 3, 3, 1, 2, 2, 1, 3, 2, 1]


def search_in(found, fitness, search="evolutionary", steps=None, **settings):
    def cached(name, make):
        if name not in found:
            found[name] = make()
        return found[name]

    given = parts(), [2] * 12, fitness
    rest = [1, 4, 16], Search(search=search, **settings), cached
    return evolve(*given, *rest) if search == "evolutionary" else exchange(*given, steps, *rest)


def steps_in(fitness, windows=4):
    """What the divergence changes by where one part is a level lower or higher."""

    def steps(levels, _):
        changes = torch.full((12, 2), torch.inf, dtype=torch.double)
        for place, part in enumerate(parts()):
            for side, step in enumerate((-1, 1)):
                if 0 <= levels[place] + step < len(part.counts):
                    changed = [level + step * (other == place) for other, level in enumerate(levels)]
                    changes[place, side] = fitness(changed, windows) - fitness(levels, windows)
        return changes

    return steps


def test_exchanges_raise_what_gains_most_and_pay_with_what_loses_least():
    changes = torch.tensor([[1.0, -9.0], [1.0, -0.2], [1.0, -8.0], [0.1, -0.1], [9.0, -7.0], [0.2, 0.3]])
    six = [Part(layer, CHANNELS, Cost(3), (0, 16, 32, 48)) for layer in range(6)]
    budget = 3 * 16 * 12
    assert exchanges(six, [2] * 6, changes, budget) == [[3, 2, 2, 1, 2, 2], [3, 2, 3, 1, 2, 1], [3, 1, 3, 1, 3, 1]]
    assert exchanges(six, [2] * 6, changes, budget + 48) == [[3, 2, 2, 2, 2, 2], [3, 2, 3, 1, 2, 2], [3, 2, 3, 1, 3, 1]]
    # Where one part has twice the cost, another is paid with; at its largest size none is raised.
    six[0] = Part(0, CHANNELS, Cost(6), (0, 16, 32, 48))
    assert exchanges(six, [2] * 6, changes, budget + 96)[0] == [2, 2, 3, 1, 2, 2]
    assert exchanges(six, [3] * 6, changes, budget + 400) == []


@pytest.mark.parametrize("seed", range(3))
def test_exchanges_keep_the_budget_and_move_each_size_by_a_step_at_most(seed):
    changes = torch.rand(12, 2, generator=torch.Generator().manual_seed(seed)).double() * torch.tensor([1.0, -1.0])
    draw = random.Random(seed)
    levels = [draw.randint(0, 3) for _ in range(12)]
    found = exchanges(parts(), levels, changes, cost(levels))
    assert found and all(cost(one) <= cost(levels) for one in found)
    assert all(abs(one - other) <= 1 for each in found for one, other in zip(each, levels, strict=True))


def test_exchange_ends_where_nothing_is_better_and_needs_fewer_generations():
    fitness = distance(WANTED)
    found = search_in({}, fitness, "exchange", steps_in(fitness), search_generations=40)
    assert found.divergence[1] < 0.4 * found.divergence[0] and cost(found.levels) <= cost([2] * 12)
    best = [one["best"] for one in found.history]
    assert len(best) < 12 and best[-5] == best[-1] < best[0], "four in a row found nothing better"
    stuck = search_in({}, distance([2] * 12), "exchange", steps_in(distance([2] * 12)))
    assert stuck.levels == [2] * 12 and len(stuck.history) == 5
    nothing = search_in({}, fitness, "exchange", lambda *_: torch.full((12, 2), torch.inf))
    assert nothing.levels == [2] * 12 and nothing.history[1] == {"best": 1.0, "mean": None}


def test_search_finds_better_and_never_worse():
    found = search_in({}, distance(WANTED), search_generations=40)
    assert found.divergence[1] < 0.4 * found.divergence[0] and cost(found.levels) <= cost([2] * 12)
    best = [one["best"] for one in found.history]
    assert best == sorted(best, reverse=True) and len(best) == 41
    stuck = search_in({}, distance([2] * 12), search_generations=5)
    assert stuck.levels == [2] * 12 and stuck.divergence[0] == stuck.divergence[1]


def test_killed_search_goes_on_to_the_same_and_another_seed_to_another():
    whole, kept, calls = search_in({}, distance(WANTED)), {}, []

    def killed(levels, windows):
        calls.append(levels)
        if len(calls) == 200:
            raise KeyboardInterrupt
        return distance(WANTED)(levels, windows)

    with pytest.raises(KeyboardInterrupt):
        search_in(kept, killed)
    assert 3 < len(kept) < 30
    assert search_in(kept, distance(WANTED)) == whole
    assert search_in({}, distance(WANTED), search_seed=1) != whole


def test_little_text_passes_the_better_ones_on():
    judged = []

    def fitness(levels, windows):
        judged.append(windows)
        return distance(WANTED)(levels, windows)

    search_in({}, fitness, search_generations=1, search_population=20)
    assert judged == [1, 16] + [1] * 20 + [4] * 5 + [16]


def test_candidates_that_overflow_are_never_chosen():
    found = search_in({}, lambda levels, _: 1.0 if levels == [2] * 12 else torch.inf, search_generations=2)
    assert found.levels == [2] * 12 and found.history[1] == {"best": 1.0, "mean": None}
    with pytest.raises(UserError, match="--search evolutionary: the divergence of what it starts from is not finite"):
        search_in({}, lambda *_: torch.nan)


# Stitched models.

FAMILIES = {name: (name, {}) for name in (*DECODERS, *MORE_DECODERS)} | VARIANTS | LAYOUTS
SIZES = [{GROUPS: 4, CHANNELS: 48}, {GROUPS: 2, CHANNELS: 16}, {GROUPS: 0, CHANNELS: 30}, {GROUPS: 3, CHANNELS: 0}]
OTHER = [{GROUPS: 1, CHANNELS: 16}, {GROUPS: 0, CHANNELS: 0}, {GROUPS: 4, CHANNELS: 48}, {GROUPS: 3, CHANNELS: 30}]


def stays(layer, kind, count):
    every = 4 if kind == GROUPS else 48
    order = torch.randperm(every, generator=torch.Generator().manual_seed(100 * layer + every))
    return order < count


def solve(model, text, choice=None, cached=lambda _, make: make()):
    choices = [
        {
            kind: {count: stays(layer, kind, count) for count in {SIZES[layer][kind], OTHER[layer][kind]}}
            for kind in SIZES[0]
        }
        for layer in range(4)
    ]
    return solutions_of(lambda: RepairText(model, text.repair, 4, ERROR_SHARE), choices, SIZES, choice, cached)


def kept_of(sizes):
    return {kind: [stays(layer, kind, each[kind]) for layer, each in enumerate(sizes)] for kind in DECODER_KINDS}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_stitched_model_of_the_path_is_the_pruned_and_repaired_one(text, family):
    model = tiny_decoder(FAMILIES[family][0], **FAMILIES[family][1])
    before, dense = {name: value.clone() for name, value in model.state_dict().items()}, model(text.held_out).logits
    solutions = solve(model, text)
    with stitched(model, SIZES, solutions):
        found = model(text.held_out).logits
    with stitched(model, OTHER, solutions):
        other = model(text.held_out).logits
    assert torch.equal(model(text.held_out).logits, dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    repair(model, kept_of(SIZES), text.repair, 4, error_share=ERROR_SHARE, ridge=None)
    expected = shrink_decoder(model, kept_of(SIZES))(text.held_out).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert other.isfinite().all() and (other - found).abs().max() > 0.01


@torch.no_grad()
def test_sizes_are_chosen_within_layers_as_pruning_would(text):
    model, choice = tiny_decoder(), LocalChoice(3)
    solutions, kept = solve(model, text, choice), kept_of(SIZES)
    repair(model, kept, text.repair, 4, choice, ERROR_SHARE)
    assert torch.equal(solutions[1][f"{CHANNELS}.16.stays"], kept[CHANNELS][1])
    assert not torch.equal(kept[CHANNELS][1], stays(1, CHANNELS, 16))


@torch.no_grad()
def test_solutions_are_the_same_behind_those_of_an_earlier_run(text):
    whole, made = solve(tiny_decoder(), text), {}

    def cached(name, make):
        if name not in made:
            if len(made) == 2:
                raise KeyboardInterrupt
            made[name] = make()
        return made[name]

    with pytest.raises(KeyboardInterrupt):
        solve(tiny_decoder(), text, cached=cached)
    resumed = solve(tiny_decoder(), text, cached=lambda name, make: made.get(name) or make())
    for mine, other in zip(resumed, whole, strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# What a step in one size is worth.


def changed_layer(model, index, by):
    """A copy of a layer with the weights of its MLP's output moved by so much of their size."""
    layer = copy.deepcopy(model.model.layers[index])
    weight, draw = layer.mlp.down_proj.weight, torch.Generator().manual_seed(9)
    weight.data += by * weight.std() * torch.randn(weight.shape, generator=draw)
    return layer


@torch.no_grad()
def measured(model, index, layer, windows, states):
    before, own = divergence(model, windows, states), model.model.layers[index]
    model.model.layers[index] = layer
    after = divergence(model, windows, states)
    model.model.layers[index] = own
    return after - before


@pytest.mark.parametrize("family", [*DECODERS, *MORE_DECODERS])
def test_a_small_change_of_a_layer_is_the_gradient_times_it(text, family):
    model, windows = tiny_decoder(family), text.held_out
    states = last_states(tiny_decoder(family, seed=5), windows)
    expansion = Expansion(model, windows, states, batch_size=4)
    layers = [changed_layer(model, index, 0.001) for index in range(len(model.model.layers))]
    found = torch.tensor([expansion.change(index, layer) for index, layer in enumerate(layers)])
    expected = torch.tensor([measured(model, index, layer, windows, states) for index, layer in enumerate(layers)])
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_around_the_dense_model_a_change_is_the_fisher_informations_form(text):
    """Behind the last layer no token sees another, so that nothing is left out."""
    model, windows = tiny_decoder(), text.held_out
    states, layer = last_states(model, windows), changed_layer(model, 3, 0.3)
    expected = measured(model, 3, layer, windows, states)
    found = sum(Expansion(model, windows, states, 4, seed).change(3, layer) for seed in range(60)) / 60
    assert found == pytest.approx(expected, rel=0.1) and expected > 0


def test_steps_in_sizes_are_ranked_as_the_whole_models_divergence_ranks_them(text, monkeypatch):
    found = {}

    def keep(parts, start, fitness, steps, *_):
        for side, value in zip((-1, 1), steps(start, 0).T, strict=True):
            for place, part in enumerate(parts):
                changed = [level + side * (place == other) for other, level in enumerate(start)]
                known = 0 <= changed[place] < len(part.counts)
                assert value[place].isfinite() == known
                if known:
                    found[place, side] = value[place].item(), fitness(changed, 4) - fitness(start, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr("compression.llm.search.exchange", keep)
    with pytest.raises(KeyboardInterrupt):
        searched(text, search="exchange", search_tokens=64).prune()
    assert len(found) > 12 and torch.tensor(list(found.values())).T.corrcoef()[0, 1] > 0.8


# H-GSP with a search.


def searched(text, model=None, cached=lambda _, make: make(), **fields):
    few = dict(search="evolutionary", search_generations=6, search_population=6, search_tokens=32, search_levels=6)
    config = GlobalPruningConfig.make(**dict(pruning_ratio=0.4, round_to=1, epsilon=0.0) | few | fields)
    model = tiny_decoder() if model is None else model
    scoring, budget = pick(Scoring, config), pick(Budget, config)
    return GlobalPruning(model, scoring, budget, text, None, cached, search=config.allocation_search)


def parameters(model):
    return sum(parts.parameters for parts in layers_of(model))


@pytest.mark.parametrize("rounds", [0, 1])
def test_gates_are_solved_for_after_a_search_where_that_is_asked_for(text, rounds):
    small, dense = searched(text, mlp_rounds=rounds).prune(), tiny_decoder()
    stays = [parts for parts in layers_of(small) if parts.channels]
    rows = {tuple(row) for parts in layers_of(dense) for row in parts.split(CHANNELS)[0][0].module.weight.tolist()}
    own = [tuple(row) in rows for parts in stays for row in parts.split(CHANNELS)[0][0].module.weight.tolist()]
    assert any(own) != bool(rounds)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"search": "exchange"},
        {"search": "exchange", "pruning_ratio": 0.7, "round_to": 4},
        {"removal_steps": 4},
        {"pruning_ratio": 0.7},
        {"round_to": 4},
        {"iterative_steps": 2},
    ],
    ids=str,
)
def test_search_is_never_worse_on_held_out_text_and_keeps_the_budget(text, fields):
    dense = tiny_decoder()
    states, found = last_states(dense, text.held_out), {}
    for search in ("none", fields.get("search", "evolutionary")):
        pruning = searched(text, **fields | {"search": search})
        small = pruning.prune()
        found[search] = divergence(small, text.held_out, states, 2)
        removed = parameters(dense) - parameters(small)
        assert 0 <= removed - pruning.budget.pruning_ratio * parameters(dense) < 5 * 4 * 32 * 3, search
        rows = [row for row in pruning.table.values() if row["removed_in_step"] is None]
        assert sum(row["parameters"] for row in rows) == parameters(small)
    if "iterative_steps" not in fields:  # the second step's start is another one then
        assert found[search] <= found["none"] * (1 + 1e-5)
        only = pruning.searches[0]
        assert only["divergence"]["start"] == pytest.approx(found["none"], rel=1e-3)
        if only["after"] != only["before"]:
            assert only["divergence"]["found"] == pytest.approx(found[search], rel=1e-3)
    assert [each["step"] for each in pruning.searches] == list(range(1, pruning.budget.iterative_steps + 1))


@pytest.mark.parametrize(("search", "most"), [("evolutionary", 0.95), ("exchange", 0.98)])
def test_search_finds_what_the_scores_have_not(text, search, most):
    better = searched(text, pruning_ratio=0.5, search_generations=30, search=search)
    better.prune()
    (found,) = better.searches
    assert found["divergence"]["found"] < most * found["divergence"]["start"] and found["after"] != found["before"]


def test_what_was_found_is_the_repaired_model_of_its_sizes(text):
    pruning, model = searched(text, pruning_ratio=0.5, search_generations=30), tiny_decoder()
    small, kept = pruning.prune(), {GROUPS: [[] for _ in range(4)], CHANNELS: [[] for _ in range(4)]}
    for row in pruning.table.values():
        kept[row["kind"]][row["layer"]].append(row["removed_in_step"] is None)
    (found,) = pruning.searches
    assert found["after"] != found["before"]
    kept = {kind: [torch.tensor(stays) for stays in layers] for kind, layers in kept.items()}
    repair(model, kept, text.repair, 1, error_share=ERROR_SHARE, ridge=None)
    expected = shrink_decoder(model, kept)(text.held_out).logits
    torch.testing.assert_close(small(text.held_out).logits, expected, atol=1e-3, rtol=1e-3)


def test_what_is_worse_once_it_is_repaired_is_not_taken(text, monkeypatch):
    solve_all = AllocationSearch._solutions

    def spoiled(self, name, *more):
        solutions = solve_all(self, name, *more)
        if name == "found":
            for layer in solutions:
                layer |= {key: -value for key, value in layer.items() if key.endswith("weight")}
        return solutions

    monkeypatch.setattr(AllocationSearch, "_solutions", spoiled)
    pruning = searched(text, pruning_ratio=0.5, search_generations=15)
    small, plain = pruning.prune(), searched(text, pruning_ratio=0.5, search="none").prune()
    (found,) = pruning.searches
    assert found["after"] == found["before"] and found["divergence"]["found"] > found["divergence"]["start"]
    assert [parts.channels for parts in layers_of(small)] == [parts.channels for parts in layers_of(plain)]


@pytest.mark.parametrize("fields", [{"protect_first": 1, "protect_last": 1}, {"keep_attention": True}], ids=str)
def test_search_leaves_alone_what_the_budget_does(text, fields):
    pruning = searched(text, search_generations=12, **fields)
    small = pruning.prune()
    for layer, sizes in enumerate(pruning.searches[0]["after"]):
        if "protect_first" in fields and layer in (0, 3):
            assert sizes == {GROUPS: 4, CHANNELS: 48}
        if "keep_attention" in fields:
            assert sizes[GROUPS] or not sizes[CHANNELS]
    assert parameters(small) <= 0.6 * parameters(tiny_decoder())


def test_nothing_to_remove_is_nothing_to_search(text):
    pruning = searched(text, pruning_ratio=0.0)
    assert parameters(pruning.prune()) == parameters(tiny_decoder()) and not pruning.searches


# The command line.

FLAGS = ["--pruning_ratio", "0.5", "--round_to", "8", "--search", "evolutionary", "--search_generations", "8"]
FLAGS += ["--search_population", "5", "--search_tokens", "32", "--held_out_samples", "3", "--run_evaluation", "none"]


@pytest.mark.parametrize(
    ("search", "at", "call"),
    [
        ("evolutionary", "compression.llm.stitching._solve", 3),
        ("evolutionary", "compression.llm.levels._select", 3),
        ("evolutionary", "compression.llm.search.solutions_of", 2),
        ("exchange", "compression.llm.exchange.exchanges", 2),
    ],
)
def test_killed_command_goes_on_to_the_same_result(base, tmp_path, search, at, call):
    flags = [*pruning_flags(base, tmp_path), *FLAGS, "--search", search]
    run_script("run_global_pruning.py", *flags, "--output_name", "whole")
    killed = ["run_global_pruning.py", *flags, "--output_name", "killed", "--resume"]
    run_killed(*killed, at=at, call=call)
    assert list(tmp_path.glob(".killed_*.resume/search_of_step_1_*"))
    said = run_script(*killed).stdout
    assert "generation 8 of 8" in said or search == "exchange"
    names = ["models/model.safetensors", "models/config.json", "analysis/search_of_step_1.json"]
    for name in (*names, "analysis/global_group_table.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = json.loads((tmp_path / "whole" / "analysis" / "search_of_step_1.json").read_text())
    assert found["divergence"]["found"] < found["divergence"]["start"]
    assert len(found["history"]) == 9 or search == "exchange"
    for name in ("search_of_step_1.png", "search_of_step_1_allocation.png"):
        assert (tmp_path / "whole" / "analysis" / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--uniform"], "--search evolutionary: allowed with --uniform is none"),
        (["--compensation", "none"], "--search evolutionary: allowed with --compensation none is none"),
        (["--offload", "disk"], "--search evolutionary: needs the model in memory: --offload none"),
        (["--search_levels", "1"], "--search_levels 1: allowed is at least 2"),
        (["--search_generations", "0"], "--search_generations 0: allowed is at least 1"),
        (["--search_population", "0"], "--search_population 0: allowed is at least 1"),
        (["--search_tokens", "0"], "--search_tokens 0: allowed is at least 1"),
    ],
)
def test_mistakes_end_in_one_line(base, tmp_path, flags, message):
    result = run_script("run_global_pruning.py", *pruning_flags(base, tmp_path / "out"), *FLAGS, *flags, expect=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "hgsp").exists()

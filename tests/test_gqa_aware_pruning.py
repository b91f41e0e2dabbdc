"""GQA-aware pruning: importance of groups, rates, the budget, the sweep's gradients, the search, the command line."""

import copy
import csv
import json

import pytest
import torch
from conftest import DECODERS, leftovers, pruning_flags, repair, tiny_decoder
from scripts import run_killed, run_script

import compression.llm.score_passes as calibration
from compression.allocation import largest_ratio, split_budget, spread_rates
from compression.checkpoint import load_language_model
from compression.config import pick
from compression.llm import gqa_pruning
from compression.llm.gqa_pruning import (
    Cuts,
    LayerwisePruning,
    layer_rates,
    prunable_layers,
    prune_mlp_channels,
    ratio_range,
    search_ratio,
)
from compression.llm.layerwise import LayerStream
from compression.llm.perplexity import perplexity
from compression.llm.score_passes import score_layer, score_structures
from compression.llm.scoring import SCORES
from compression.llm.text import CalibrationText, load_corpus, tokenize, windows
from compression.runtime import UserError
from compression.stage_record import read_stage
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of
from compression.surgery import shrink_decoder, to_pruned
from gqa_aware_pruning import (
    GQAAwarePruningConfig,
    compute_gqa_group_importance,
    prune_attention_by_gqa_groups,
    select_gqa_groups_to_prune,
)

HEAD_COUNTS = {"MHA": (8, 8), "GQA": (8, 2), "MQA": (8, 1)}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 120, (12, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def text(ids):
    return CalibrationText(scores=ids[:4], repair=ids, held_out=ids[4:8], batch_size=2)


def fields(**values):
    defaults = dict(
        protect_first=0,
        protect_last=0,
        pruning_ratio=0.4,
        strategy="uniform",
        round_to=1,
        attention_ratio=1.0,
        compensation="none",
    )
    return GQAAwarePruningConfig.make(**defaults | values)


def rates_of(config, *inputs):
    return layer_rates(config.rates, *inputs)


def layerwise(model, rates, config, *inputs):
    return LayerwisePruning(model, rates, pick(Cuts, config), *inputs)


def total(model):
    return sum(parts.parameters for parts in layers_of(model))


# One layer.


@pytest.mark.parametrize("heads", HEAD_COUNTS.values(), ids=HEAD_COUNTS)
def test_importance_of_a_group_is_the_sum_over_all_that_belongs_to_it(ids, heads):
    query_heads, groups = heads
    model = tiny_decoder(num_attention_heads=query_heads, num_key_value_heads=groups, head_dim=8)
    found = compute_gqa_group_importance(model, 1, ids[:3], batch_size=2)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    expected, channels = torch.zeros(groups), torch.zeros(48)
    for batch in ids[:3].split(2):
        model.zero_grad()
        logits = model(batch).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        with torch.no_grad():
            q, k, v, o = (
                (linear.weight * linear.weight.grad).abs()
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
            )
            for query in range(query_heads):  # as repeat_kv: consecutive query heads share a key-value head
                group = query * groups // query_heads
                expected[group] += (q[8 * query : 8 * query + 8].sum() + o[:, 8 * query : 8 * query + 8].sum()) / 2
            for group in range(groups):
                expected[group] += (k[8 * group : 8 * group + 8].sum() + v[8 * group : 8 * group + 8].sum()) / 2
            for linear, axis in ((mlp.gate_proj, 1), (mlp.up_proj, 1), (mlp.down_proj, 0)):
                channels += (linear.weight * linear.weight.grad).abs().sum(axis) / 2
    torch.testing.assert_close(found[GROUPS], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[CHANNELS], channels, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_of_one_layer_are_those_of_the_whole_model(ids, method, checkpointing):
    model = tiny_decoder("qwen3")
    every = score_structures(model, ids[:3], method, batch_size=2)
    one = score_layer(model, 2, LayerStream(model, ids[:3], 2, layer=2), method, checkpointing)
    for kind in DECODER_KINDS:
        torch.testing.assert_close(one[kind], every[kind][2], rtol=1e-4, atol=1e-8)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_only_the_current_layer_takes_gradients(ids, method, monkeypatch):
    """While layer 2 is scored, the layers before it are not run, and no weight of another layer gets a gradient."""
    model = tiny_decoder()
    stream = LayerStream(model, ids[:4], 2, layer=2)
    assert not any(state.requires_grad for _, state, _ in stream)
    runs, trainable, gradients = [0] * 4, set(), set()
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: gradients.add(name))
    losses = calibration.token_losses

    def note(*arguments):
        trainable.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return losses(*arguments)

    monkeypatch.setattr(calibration, "token_losses", note)
    score_layer(model, 2, stream, method)
    assert runs == [0, 0, 2, 2]
    matrices = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    expected = {f"model.layers.2.{name}.weight" for name in matrices} if method == "taylor" else set()
    assert trainable == gradients == expected


def test_selection_takes_the_least_important():
    importance = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert select_gqa_groups_to_prune(importance, 0).tolist() == [False] * 4
    assert select_gqa_groups_to_prune(importance, 1).tolist() == [False, True, False, False]
    assert select_gqa_groups_to_prune(importance, 3).tolist() == [False, True, True, True]
    for count in (-1, 4):
        with pytest.raises(ValueError, match="of 4 groups cannot go"):
            select_gqa_groups_to_prune(importance, count)


@torch.no_grad()
@pytest.mark.parametrize("heads", HEAD_COUNTS.values(), ids=HEAD_COUNTS)
@pytest.mark.parametrize("family", sorted(DECODERS))
def test_pruned_layers_compute_what_masked_ones_do(ids, heads, family):
    query_heads, groups = heads
    model = tiny_decoder(family, num_attention_heads=query_heads, num_key_value_heads=groups, head_dim=8)
    gone = torch.arange(groups) % 2 == 1  # of one group none
    channels = torch.arange(48) % 3 == 0
    masked, dense = copy.deepcopy(model), model(ids[:2]).logits
    parts = layers_of(masked)[1]
    parts.o.weight[:, gone.repeat_interleave(8 * query_heads // groups)] = 0
    parts.down.weight[:, channels] = 0
    expected = masked(ids[:2]).logits
    assert (expected - dense).abs().max() > 1e-3
    prune_attention_by_gqa_groups(model, 1, gone)
    prune_mlp_channels(model, 1, channels)
    parts = layers_of(model)[1]
    assert parts.groups == groups - int(gone.sum()) and parts.query_heads * groups == parts.groups * query_heads
    q, k, v = (rows.module for rows in parts.attention)
    assert q.weight.shape == (8 * parts.query_heads, 32) and parts.o.weight.shape == (32, 8 * parts.query_heads)
    assert k.weight.shape == v.weight.shape == (8 * parts.groups, 32) and parts.channels == 32
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(ids[:2]).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(to_pruned(model)(ids[:2]).logits, expected, atol=1e-5, rtol=0)


def test_what_cannot_be_pruned_is_refused():
    model = tiny_decoder()
    with pytest.raises(ValueError, match="layer 1 has 4 groups, not 3"):
        prune_attention_by_gqa_groups(model, 1, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one of its groups has to stay"):
        prune_attention_by_gqa_groups(model, 1, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one of its channels has to stay"):
        prune_mlp_channels(model, 1, torch.ones(48, dtype=torch.bool))


# Rates.


@pytest.mark.parametrize("seed", range(20))
def test_rates_meet_the_mean_within_their_bounds(seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(7, generator=generator).double() ** 4 + 1e-3
    weights = torch.randint(1, 100, (7,), generator=generator)
    low, high = torch.full((7,), 0.1), torch.full((7,), 0.7)
    target = 0.1 + 0.6 * torch.rand(1, generator=generator).item()
    rates = spread_rates(1 / importance, weights, target, low, high)
    assert float((rates * weights).sum() / weights.sum()) == pytest.approx(target, abs=1e-9)
    assert rates.min() >= 0.1 - 1e-7 and rates.max() <= 0.7 + 1e-7
    ordered = rates[importance.argsort()]
    assert (ordered[1:] <= ordered[:-1] + 1e-12).all(), "more important layers lose no more"
    free = (rates > 0.1 + 1e-6) & (rates < 0.7 - 1e-6)
    products = (rates * importance)[free]
    torch.testing.assert_close(products, products[:1].expand_as(products))


def test_rates_at_and_beyond_the_bounds():
    preference, weights = torch.tensor([1.0, 5.0]), torch.tensor([1, 3])
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.6])
    for target, bound in ((0.175, low), (0.575, high)):
        torch.testing.assert_close(spread_rates(preference, weights, target, low, high), bound.double())
    for target in (0.17, 0.58):
        with pytest.raises(ValueError, match="out of reach: the bounds allow 0.1750 to 0.5750"):
            spread_rates(preference, weights, target, low, high)


def test_inverse_rates_follow_the_loss_that_removal_adds():
    layers = layers_of(tiny_decoder())
    removal = {"dense": 10.0, "layer": [40.0, 20.0, 80.0, 10.0]}  # adds ln 4, ln 2, ln 8, nothing
    rates = rates_of(fields(strategy="inverse", max_rate=0.8), layers, 0.3, removal, 0)
    assert rates[3] == pytest.approx(0.8) and sum(rates) / 4 == pytest.approx(0.3)
    assert rates[1] == pytest.approx(2 * rates[0]) == pytest.approx(3 * rates[2])


def test_uniform_and_random_rates():
    layers = layers_of(tiny_decoder())
    assert rates_of(fields(), layers, 0.3, None, 0) == pytest.approx([0.3] * 4)
    drawn = [rates_of(fields(strategy="random"), layers, 0.3, None, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(sum(rates) / 4 == pytest.approx(0.3) and len(set(rates)) == 4 for rates in drawn)


def test_layers_that_are_left_alone():
    layers = layers_of(tiny_decoder())
    assert rates_of(fields(protect_first=1, protect_last=1), layers, 0.3, None, 0) == pytest.approx([0, 0.6, 0.6, 0])
    assert rates_of(fields(layers="2"), layers, 0.3, None, 0) == pytest.approx([0, 0, 0.3, 0])
    assert rates_of(fields(layers="1-2"), layers, 0.3, None, 0) == pytest.approx([0, 0.3, 0.3, 0])
    assert rates_of(fields(layers="0-1", protect_first=1), layers, 0.3, None, 0) == pytest.approx([0, 0.6, 0, 0])
    with pytest.raises(UserError, match="--layers 0-1: all of them are protected by --protect_first 2"):
        prunable_layers(fields(layers="0-1", protect_first=2).rates, layers)
    with pytest.raises(UserError, match="--layers 3-4: the model has 4 layers; allowed are 0 to 3"):
        prunable_layers(fields(layers="3-4").rates, layers)
    message = "--pruning_ratio 0.5: with --min_rate 0, --max_rate 0.8 and 2 of 4 .* allowed is 0.000 to 0.400"
    with pytest.raises(UserError, match=message):
        rates_of(fields(protect_first=1, protect_last=1), layers, 0.5, None, 0)


# The budget.


def test_attention_gets_whole_groups_and_the_mlp_the_rest():
    assert split_budget(100, 3, 30, 50, 4, groups_wanted=1) == (1, 18)  # 70 more: 18 channels of 4
    assert split_budget(100, 3, 30, 50, 4, groups_wanted=0) == (0, 25)
    assert split_budget(100, 4, 40, 50, 4, groups_wanted=3) == (2, 5), "three would be too much"
    assert split_budget(100, 3, 30, 11, 4, groups_wanted=0) == (2, 10), "the channels alone do not suffice"
    assert split_budget(100, 3, 30, 0, 0, groups_wanted=0) == (2, 0), "there is no MLP"
    assert split_budget(100, 0, 0, 50, 4, groups_wanted=2) == (0, 25), "there is no attention"
    assert split_budget(0, 3, 30, 50, 4, groups_wanted=2) == split_budget(-5, 3, 30, 50, 4, 2) == (0, 0)
    assert split_budget(1e6, 3, 30, 50, 4, groups_wanted=2) == (2, 49), "one of each stays"


def test_round_widths_stay():
    assert split_budget(100, 3, 30, 48, 4, groups_wanted=0, multiple=8) == (0, 32), "25 would do"
    assert split_budget(90, 3, 30, 48, 4, groups_wanted=3, multiple=8) == (2, 8), "8 for 30 that are left"
    assert split_budget(60, 3, 30, 48, 4, groups_wanted=3, multiple=8) == (2, 0), "nothing is left"
    assert split_budget(12, 3, 30, 50, 4, groups_wanted=0, multiple=8) == (0, 10), "to the next multiple"
    assert split_budget(1e6, 3, 30, 50, 4, groups_wanted=2, multiple=8) == (2, 42), "one multiple stays"
    assert split_budget(1e6, 3, 30, 6, 4, groups_wanted=2, multiple=8) == (2, 0), "there is less than one"


@pytest.mark.parametrize("seed", range(8))
def test_budget_is_met_to_within_one_block_of_channels(text, seed):
    draw = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    model = tiny_decoder(sorted(DECODERS)[seed % len(DECODERS)])
    round_to = (1, 4)[seed // 4]
    before, block = total(model), round_to * layers_of(model)[0].structure_parameters(CHANNELS)
    config = fields(
        strategy="random",
        round_to=round_to,
        attention_ratio=2 * draw[0],
        iterative_steps=1 + seed % 3,
        layers=("all", "1-3")[seed % 2],
        importance_method=("taylor", "fisher", "wanda", "magnitude")[seed // 2],
        max_rate=0.9,
        compensation=("none", "lstsq")[seed % 2],
    )
    ratio = 0.1 + 0.7 * draw[1]
    rates = rates_of(config, layers_of(model), ratio, None, seed)
    pruning = layerwise(model, rates, config, text)
    small = pruning.prune()
    chosen = before if config.layers == "all" else 3 * before // 4
    assert 0 <= before - total(small) - ratio * chosen < block
    assert 0 <= pruning.removed(config.layers) - ratio < block / chosen
    for parts, rate, row in zip(layers_of(small), rates, pruning.table(), strict=True):
        assert parts.query_heads == 2 * parts.groups
        gone = row["parameters_before"] - row["parameters_after"]
        assert abs(gone - rate * row["parameters_before"]) < block, "each layer for itself too"
        assert row["removed"] == pytest.approx(gone / row["parameters_before"])


def test_attention_ratio_decides_what_attention_loses(text):
    heads = []
    for attention_ratio in (0.0, 1.0, 2.0):
        model, config = tiny_decoder(), fields(attention_ratio=attention_ratio)
        small = layerwise(model, [0.25] * 4, config, text).prune()
        heads.append([parts.groups for parts in layers_of(small)])
    assert heads == [[4] * 4, [3] * 4, [2] * 4]


def test_nothing_to_remove_leaves_the_model_as_it_is(text, ids):
    model = tiny_decoder()
    expected = perplexity(model, ids)
    small = layerwise(model, [0.0] * 4, fields(), text).prune()
    assert perplexity(small, ids) == pytest.approx(expected, rel=1e-6)


# The sweep.


def test_each_layer_is_scored_on_the_model_as_pruned_so_far(text):
    """The same as doing it by hand, with scores of the whole model at each layer."""
    config, rates = fields(iterative_steps=1), [0.5, 0.0, 0.3, 0.4]
    small = layerwise(tiny_decoder(), rates, config, text).prune()
    model = tiny_decoder()
    for index in (0, 2, 3):
        scores = score_structures(model, text.scores, "taylor", text.batch_size)
        kept = {kind: [torch.ones(parts.count(kind)).bool() for parts in layers_of(model)] for kind in DECODER_KINDS}
        for kind in DECODER_KINDS:
            left = layers_of(small)[index].count(kind)
            kept[kind][index] = torch.zeros(len(scores[kind][index])).bool()
            kept[kind][index][scores[kind][index].topk(left).indices] = True
        model = shrink_decoder(model, kept)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, small.state_dict()[name]), name


def test_repair_is_that_of_the_whole_model(text):
    """With scores that gradients do not enter, one sweep with repair is one call of `repair` and one cut."""
    config = fields(importance_method="magnitude", compensation="lstsq")
    small = layerwise(tiny_decoder(), [0.4] * 4, config, text).prune()
    model = tiny_decoder()
    scores, kept = score_structures(model, text.scores, "magnitude"), {kind: [] for kind in DECODER_KINDS}
    for index, parts in enumerate(layers_of(small)):
        for kind in DECODER_KINDS:
            mask = torch.zeros(len(scores[kind][index])).bool()
            mask[scores[kind][index].topk(parts.count(kind)).indices] = True
            kept[kind].append(mask)
    repair(model, kept, text.repair, text.batch_size, error_share=config.repair.share, ridge=None)
    model = shrink_decoder(model, kept)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, small.state_dict()[name], atol=1e-4, rtol=1e-3, msg=name)


def test_rounds_prune_a_bit_at_a_time(text):
    model, sizes = tiny_decoder(), []
    names = []

    def cached(name, make):
        sizes.append([parts.parameters for parts in layers_of(model)])
        names.append(name)
        return make()

    before = total(model)
    pruning = layerwise(model, [0.4] * 4, fields(iterative_steps=2), text, cached)
    pruning.prune()
    assert names == [f"scores_of_step{step}_layer_{index}" for step in (1, 2) for index in range(4)]
    assert 1 - sum(sizes[4]) / before == pytest.approx(0.2, abs=0.02), "half of it after the first round"
    assert pruning.removed("all") == pytest.approx(0.4, abs=0.02)


def test_a_pruned_model_can_be_pruned_again(text):
    """Layer 0 has no attention and layer 2 no MLP: what these cannot give is made up for behind them."""
    kept = {
        GROUPS: [torch.tensor(row).bool() for row in ([0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1])],
        CHANNELS: [torch.ones(48).bool(), torch.arange(48) < 30, torch.zeros(48).bool(), torch.ones(48).bool()],
    }
    model = shrink_decoder(tiny_decoder(), kept)
    before, channel = total(model), layers_of(model)[0].structure_parameters(CHANNELS)
    config = fields(compensation="lstsq", iterative_steps=2)
    rates = rates_of(config, layers_of(model), 0.3, None, 0)
    small = layerwise(model, rates, config, text).prune()
    assert 0 <= before - total(small) - 0.3 * before < channel
    sizes = [(parts.groups, parts.channels) for parts in layers_of(small)]
    assert sizes[0][0] == 0 == sizes[2][1] and sizes[0][1] < 48 and sizes[2][0] < 4


# The search.


def test_bisection_finds_the_largest_ratio_that_passes():
    tried = []
    assert largest_ratio(lambda ratio: tried.append(ratio) or ratio < 0.33, 0.0, 0.8, 8) == pytest.approx(
        0.33, abs=0.8 / 2**8
    )
    assert len(tried) == 8
    assert largest_ratio(lambda ratio: False, 0.0, 0.8, 4) is None
    assert largest_ratio(lambda ratio: True, 0.1, 0.8, 10) == pytest.approx(0.8, abs=1e-3)


def test_search_stays_under_the_target(text):
    def perplexity_at(ratio):
        model, config = tiny_decoder(), fields()
        rates = rates_of(config, layers_of(model), ratio, None, 0)
        return perplexity(layerwise(model, rates, config, text).prune(), text.held_out)

    limits = ratio_range(fields().rates, layers_of(tiny_decoder()))
    assert limits == pytest.approx((0, 0.8), abs=1e-9)
    tried = [perplexity_at(0.8 * step / 16) for step in range(17)]
    assert tried[0] != tried[16]
    # Between what the smallest trials give and more than any gives: a higher target never gives a lower ratio.
    targets = sorted([max(tried[1:3]) + 1e-6, max(tried[1:6]) + 1e-6, max(tried[1:9]) + 1e-6, 2 * max(tried)])
    ratios = [search_ratio(perplexity_at, target, *limits, steps=4) for target in targets]
    for target, ratio in zip(targets, ratios, strict=True):
        assert perplexity_at(ratio) < target
    assert ratios == sorted(ratios) and ratios[-1] == pytest.approx(0.8 * 15 / 16)
    with pytest.raises(UserError, match="--target_perplexity 5: the least ratio tried, 0.0500, gives 9.00 on held-out"):
        search_ratio(lambda ratio: 9.0, 5.0, 0.0, 0.8, steps=4)


# Mistakes.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pruning_ratio": 1.2}, "--pruning_ratio 1.2: allowed is 0 to 0.95"),
        ({"max_rate": 0.2, "min_rate": 0.3}, "--max_rate 0.2: allowed is 0.3 to 0.95"),
        ({"min_rate": -1}, "--min_rate -1: allowed is 0 to 0.95"),
        ({"attention_ratio": -1}, "--attention_ratio -1: allowed is 0 to 10"),
        ({"iterative_steps": 0}, "--iterative_steps 0: allowed is at least 1"),
        ({"search_steps": 0}, "--search_steps 0: allowed is at least 1"),
        ({"target_perplexity": 0.5}, "--target_perplexity 0.5: allowed is at least 1"),
        ({"round_to": 0}, "--round_to 0: allowed is at least 1"),
        ({"protect_last": -1}, "--protect_last -1: allowed is at least 0"),
        ({"layers": "14-10"}, "--layers 14-10: allowed is all, one layer such as 12, or a range"),
        ({"layers": "3-"}, "--layers 3-: allowed is all"),
        ({"layers": "first"}, "--layers first: allowed is all"),
        ({"num_samples": 0}, "--num_samples 0: allowed is at least 1"),
        ({"analysis_samples": 0}, "--analysis_samples 0: allowed is at least 1 with --strategy inverse"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        GQAAwarePruningConfig.make(**values)


# The command line.


def words_of(base, output, *flags):
    protection = ["--protect_first", "0", "--protect_last", "0"]
    flags = [*protection, "--round_to", "1", "--device_map", "cpu", *flags]
    return ["gqa_aware_pruning.py", *pruning_flags(base, output), *flags]


def run(base, output, *flags, expect=0):
    return run_script(*words_of(base, output, *flags), expect=expect)


def test_presets_of_the_authors_differ_in_how_much_goes():
    authors, headline = (GQAAwarePruningConfig.preset(name).as_dict() for name in ("authors", "headline"))
    assert (authors["pruning_ratio"], authors["max_rate"]) == (0.25, 0.5)
    assert {name for name in authors if authors[name] != headline[name]} == {"pruning_ratio", "max_rate"}
    assert headline["pruning_ratio"] == 0.8464 and headline["compensation"] == "none"
    ratios = ratio_range(GQAAwarePruningConfig.preset("authors").rates, layers_of(tiny_decoder()))
    assert ratios == pytest.approx((0.15, 0.5))


def test_the_headlines_recipe_end_to_end(base, tmp_path):
    """The share that goes is one of the decoder layers' parameters; then adapters are trained as the authors do."""
    run(base, tmp_path, "--output_name", "headline", "--preset", "headline")
    models = tmp_path / "headline" / "models"
    metrics = read_stage(models)["metrics"]
    one = max(parts.structure_parameters(GROUPS) for parts in layers_of(tiny_decoder()))
    structures = metrics["dense"]["parameters"]["structures"]
    assert abs(metrics["reduction"]["structures"] - 0.8464) * structures < one
    assert metrics["reduction"]["total"] < metrics["reduction"]["structures"], "embeddings stay"
    assert len(metrics["pruned"]["layers"]) == 4 and min(map(min, map(dict.values, metrics["pruned"]["layers"]))) > 0
    rows = [{"instruction": f"{letter} b", "output": "c d e"} for letter in "abcdefgh"]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    text = base.parent / "text.txt"
    texts = ["--dataset", tmp_path / "alpaca.json", "--validation_dataset", text, "--eval_ppl_datasets", text]
    flags = ["--pruned_model", models, "--output_dir", tmp_path / "lora", "--preset", "headline", *texts]
    lengths = ["--max_length", 100, "--eval_length", 32, "--eval_samples", 8, "--agreement_text", "none"]
    run_script("post_training.py", *flags, *lengths)
    stage = read_stage(tmp_path / "lora")
    assert (stage["config"]["batch_size"], stage["config"]["lora_r"], stage["data"]["rows"]) == (128, 8, 8)
    assert stage["metrics"]["after"]["perplexity"]["text.txt"] > 1


def test_command_writes_a_checkpoint_and_what_led_to_it(base, tmp_path):
    flags = ("--pruning_ratio", "0.4", "--max_rate", "0.6", "--run_evaluation", "ppl,efficiency")
    result = run(base, tmp_path, "--output_name", "some", *flags)
    folder = tmp_path / "some"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    logs = [name for name in files if name.startswith("logs/")]
    assert len(logs) == 1 and "are gone" in (folder / logs[0]).read_text()
    assert files == {
        "models/README.md",
        "models/config.json",
        "models/generation_config.json",
        "models/model.safetensors",
        "models/pruned_decoder.py",
        "models/stage.json",
        "models/tokenizer.json",
        "models/tokenizer_config.json",
        "analysis/layer_rates.csv",
        "analysis/layer_rates.json",
        "analysis/layer_rates.png",
        "evaluation/evaluation_results.json",
        "run.json",
        *logs,
    }
    assert not leftovers(tmp_path)
    found = json.loads((folder / "evaluation" / "evaluation_results.json").read_text())
    assert found["reduction"]["structures"] == pytest.approx(0.4, abs=0.01)
    assert found["efficiency"]["ratios"]["macs"] < 0.7 and "zeroshot" not in found["pruned"]
    gone = 1 - found["pruned"]["parameters"]["total"] / found["dense"]["parameters"]["total"]
    assert f"{100 * gone:.1f} % of the whole model's" in result.stdout
    with (folder / "analysis" / "layer_rates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, layer in zip(rows, found["pruned"]["layers"], strict=True):
        assert int(row["groups_after"]) == layer["key_value_heads"] == layer["query_heads"] / 2
        assert int(row["channels_after"]) == layer["intermediate_size"]
    ordered = sorted(rows, key=lambda row: float(row["removal_perplexity"]))
    rates = [float(row["rate"]) for row in ordered]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1], "important layers lose less"
    model, tokenizer = load_language_model(folder / "models")
    ids = windows(tokenize(tokenizer, load_corpus(str(base.parent / "text.txt"), "test")), 32)[:4]
    assert perplexity(model, ids) == pytest.approx(found["pruned"]["perplexity"]["text.txt"], rel=1e-6)


def test_search_on_the_command_line(base, tmp_path):
    """Of a random model, perplexity hardly depends on the ratio: a generous target gives the largest tried."""
    run(base, tmp_path, "--output_name", "found", "--target_perplexity", "1e9", "--run_evaluation", "none")
    trials = json.loads((tmp_path / "found" / "analysis" / "rate_search.json").read_text())
    found = json.loads((tmp_path / "found" / "evaluation" / "evaluation_results.json").read_text())
    assert len(trials) == 3 and found["ratio"] == pytest.approx(0.8 * 7 / 8)
    assert found["reduction"]["structures"] == pytest.approx(0.7, abs=0.01)


def test_killed_run_goes_on_to_the_same_result(base, tmp_path, monkeypatch):
    """Killed before the sixth of eight cuts: what was scored is not scored again."""
    flags = ["--output_name", "one", "--iterative_rounds", "2", "--compensation", "lstsq", "--strategy", "uniform"]
    score, calls = gqa_pruning.compute_gqa_group_importance, []
    monkeypatch.setattr(
        gqa_pruning, "compute_gqa_group_importance", lambda *given, **more: calls.append(1) or score(*given, **more)
    )
    run(base, tmp_path / "whole", *flags, "--resume")
    assert len(calls) == 8
    killed = words_of(base, tmp_path / "killed", *flags, "--resume")
    run_killed(*killed, at="compression.llm.gqa_pruning.compute_gqa_group_importance", call=6)
    assert not (tmp_path / "killed" / "one" / "models").exists()
    (folder,) = (tmp_path / "killed").glob(".one_*.resume")
    assert {"dense", "removal"} < {path.name for path in folder.iterdir()}
    calls.clear()
    run_script(*killed)
    assert len(calls) == 3
    for name in ("models/model.safetensors", "models/config.json", "analysis/layer_rates.csv"):
        assert (tmp_path / "killed" / "one" / name).read_bytes() == (tmp_path / "whole" / "one" / name).read_bytes()
    assert not folder.exists(), "what was kept to resume from is gone"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_name", "a/b"], "--output_name 'a/b': allowed is a plain folder name"),
        (["--base_model", "./nowhere"], "base_model ./nowhere: no such folder"),
        (["--pruning_ratio", "0.9"], "--pruning_ratio 0.9: with --min_rate 0, --max_rate 0.8 and 0 of 4 layers"),
        (["--layers", "9"], "--layers 9: the model has 4 layers; allowed are 0 to 3"),
        (["--protect_first", "4"], "all of them are protected by --protect_first 4"),
        (["--target_perplexity", "2"], "--target_perplexity 2: the dense model has"),
        (["--device_map", "cuda:99"], "--device_map cuda:99: allowed are auto and what this machine has: cpu"),
        (["--device_map", "balanced"], "--device_map balanced: allowed are auto"),
        (["--finetune", "--lora_r", "0", "--dry_run"], "--lora_r 0: allowed is at least 1"),
        (["--run_evaluation", "speed"], "unknown speed; allowed are ppl, zeroshot, efficiency"),
        (["--sequence_length", "100000"], "--sequence_length 100000: allowed is at most 128, the model's positions"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(base, tmp_path, flags, message):
    found = run(base, tmp_path / "results", *flags, expect=2).stderr.strip().splitlines()
    assert len(found) == 1 and found[0].startswith("error: ") and message in found[0]
    assert not (tmp_path / "results").exists()


def test_uniform_sizes_meet_the_budget_in_the_stock_class_and_are_trained_on(base, tmp_path):
    flags = ["--uniform", "--save_bin", "--finetune", "--finetune_samples", "4", "--pruning_ratio", "0.4"]
    run(base, tmp_path, "--output_name", "same", *flags)
    folder = tmp_path / "same"
    assert json.loads((folder / "models" / "config.json").read_text())["model_type"] == "llama"
    model, _ = load_language_model(folder / "models")
    assert len({(parts.groups, parts.channels) for parts in layers_of(model)}) == 1
    weights = torch.load(folder / "models" / "pruned_model.bin", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    found = json.loads((folder / "evaluation" / "evaluation_results.json").read_text())
    one = layers_of(model)[0].structure_parameters(CHANNELS) / layers_of(model)[0].parameters
    assert 0.4 <= found["reduction"]["structures"] < 0.4 + one
    assert "perplexity" in found["finetuned"] and found["environment"]["torch"] == torch.__version__
    assert (folder / "finetuned" / "adapter_model.safetensors").exists()


def test_uniform_rounds_take_the_same_from_every_layer(text):
    model = tiny_decoder()
    before = total(model)
    config = fields(uniform=True, iterative_steps=2, attention_ratio=0.5, round_to=4)
    small = layerwise(model, [0.4] * 4, config, text).prune()
    sizes = {(parts.groups, parts.channels) for parts in layers_of(small)}
    assert len(sizes) == 1 and 0.4 <= 1 - total(small) / before < 0.5


def test_uniform_sizes_that_no_stock_class_takes_are_refused(text):
    """Of six query heads in three groups, four do not divide a hidden size of 30."""
    model = tiny_decoder(hidden_size=30, num_attention_heads=6, num_key_value_heads=3, head_dim=8)
    small = layerwise(model, [0.3] * 4, fields(uniform=True, attention_ratio=1.0), text).prune()
    assert {parts.groups for parts in layers_of(small)} == {3}, "two groups would be nearer"
    with pytest.raises(UserError, match="--uniform: not allowed with --layers 2"):
        fields(uniform=True, layers="2")

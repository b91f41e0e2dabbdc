"""Parts of benchmarks/llm_pruning_methods.py; the whole of it runs in test_benchmarks.py too."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY, letters, save_decoder, tiny_decoder, write_zero_shot
from scripts import ROOT, run_script

from compression.decoder import decoder_of
from compression.llm.global_pruning import masked
from compression.llm.perplexity import perplexity
from compression.llm.text import CalibrationText
from compression.runtime import UserError
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of, spread

sys.path.append(str(ROOT / "benchmarks"))
from llm_pruning_methods import flap, ground, layers, ours, recovery, report, slicegpt, two_stage

LENGTH = 16
PEERS = [layers.by_removal, layers.short_gpt, layers.sleb, flap.flap, slicegpt.slice_gpt, two_stage.two_stage]
SEARCH = dict(search_generations=2, search_population=3, search_levels=3, search_tokens=LENGTH)


def dense():
    return tiny_decoder(num_hidden_layers=6, attention_bias=False, tie_word_embeddings=True)


def some_windows(count, seed=0):
    return torch.randint(4, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base():
    text = CalibrationText(some_windows(2), some_windows(6, 1), some_windows(2, 2))
    return ground.Ground(dense, text, SEARCH)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("make", PEERS)
def test_peers_remove_the_share_and_little_more(make, ratio, base):
    small, whole = make(base, ratio), dense()
    removed = 1 - ground.layer_parameters(small) / ground.layer_parameters(whole)
    # By what is removed at once: a layer, a group, or a column of the hidden state and of the matrices between layers.
    step = {flap.flap: 0.03, slicegpt.slice_gpt: 0.05, two_stage.two_stage: 0.02}.get(make, 1 / 6)
    assert ratio <= removed + 1e-9 < ratio + step
    assert perplexity(small, some_windows(3, 3)) != pytest.approx(perplexity(whole, some_windows(3, 3)))


@pytest.mark.parametrize("method", ["local OBS, uniform", "Tyr's recipe"])
def test_recipes_of_this_pruner_remove_the_share(method, base):
    small = ours.by_fields(base, 0.3, ours.METHODS[method])
    assert 0.3 <= 1 - ground.layer_parameters(small) / ground.layer_parameters(dense()) + 1e-9 < 0.36
    sizes = {(parts.groups, parts.channels) for parts in layers_of(small)}
    assert method == "Tyr's recipe" or len(sizes) == 1


def test_scores_of_the_dense_model_are_computed_once(base, monkeypatch):
    computed = []
    score = ours.GlobalPruning._score
    monkeypatch.setattr(ours.GlobalPruning, "_score", lambda *given: computed.append(1) or score(*given))
    for ratio in (0.2, 0.4):
        ours.by_fields(base, ratio, {})
        ours.by_fields(base, ratio, ours.METHODS["H-GSP, text loss"])
    assert len(computed) == 2, "once for each loss"


def test_sleb_goes_on_from_the_shortened_model(base):
    held_out, chosen = base.text.held_out, []
    for _ in range(2):
        left = [index for index in range(6) if index not in chosen]
        tried = {index: perplexity(ground.without_layers(dense(), [*chosen, index]), held_out) for index in left}
        chosen.append(min(tried, key=tried.get))
    layers.sleb(base, 0.2)
    assert base.known["order of SLEB"] == chosen
    layers.sleb(base, 0.5)
    assert base.known["order of SLEB"][:2] == chosen and len(base.known["order of SLEB"]) == 3


def test_block_influence_is_the_cosine_between_a_layers_ends():
    model, windows = dense(), some_windows(3)
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
    cosine = torch.cosine_similarity(states[1], states[2], dim=-1).mean()
    assert layers.block_influence(model, windows)[1].item() == pytest.approx(1 - cosine.item(), abs=1e-6)


def test_flap_puts_the_mean_in_the_place_of_what_goes(base):
    small, model = flap.flap(base, 0.3), dense()
    moments = flap.moments_of(model, base.windows)
    kept = flap.chosen(model, moments, 0.3)
    assert {bool(stays.all()) for stays in kept[CHANNELS]} == {False}
    for index, parts in enumerate(layers_of(model)):
        for kind in DECODER_KINDS:
            outer, mean = parts.split(kind)[1], moments[kind, index][0]
            gone = ~spread(kept[kind][index], outer.in_features)
            outer.register_forward_pre_hook(
                lambda _, given, gone=gone, mean=mean: torch.where(gone, mean.to(given[0]), given[0])
            )
    ids = some_windows(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        whole = dense()
        with masked(whole, kept):
            without_mean = whole(ids).logits
    assert not torch.allclose(without_mean, small(ids).logits, atol=1e-2)


def test_flap_ranks_by_standardised_weighted_variance():
    model, seen = dense(), []
    decoder_of(model)  # looks at some tokens of its own
    parts = layers_of(model)[0]
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    moments = flap.moments_of(model, some_windows(4))
    inputs = torch.cat([each.flatten(0, 1) for each in seen])
    scores = inputs.var(0, correction=0) * parts.down.weight.square().sum(0)
    expected = (scores - scores.mean()) / scores.std()
    torch.testing.assert_close(
        flap.fluctuation(parts, CHANNELS, moments[CHANNELS, 0][1]), expected, rtol=1e-3, atol=1e-3
    )
    assert len(flap.fluctuation(parts, GROUPS, moments[GROUPS, 0][1])) == parts.groups


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_slicing_nothing_leaves_the_logits(family):
    model, ids = tiny_decoder(family, num_hidden_layers=3), some_windows(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2)
        expected = model(ids).logits
        found = slicegpt.sliced(model, some_windows(4, 1), model.config.hidden_size)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_slicing_keeps_the_principal_components_of_the_states():
    model, ids = dense(), some_windows(4)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] = 0  # one direction of which the text has nothing
        states = model.model.embed_tokens(ids)
        small = slicegpt.sliced(model, ids, 31)
    sliced = small.model.embed_tokens(ids)
    torch.testing.assert_close(sliced @ sliced.mT, states @ states.mT, rtol=1e-3, atol=1e-3)
    width = {tuple(parameter.shape) for name, parameter in small.named_parameters() if "shortcut" in name}
    assert width == {(31, 31)} and small.lm_head.weight is not small.model.embed_tokens.weight
    small.tie_weights()
    assert small.lm_head.weight is not small.model.embed_tokens.weight


def test_slicing_refuses_norms_that_are_elsewhere():
    with pytest.raises(UserError, match="SliceGPT is not written here for model type 'gemma2'"):
        slicegpt.sliced(tiny_decoder("gemma2"), some_windows(1), 16)


def test_two_stages_narrow_all_mlps_alike_and_take_out_attentions(base):
    small = two_stage.two_stage(base, 0.5)
    parts = layers_of(small)
    attentions, channels = two_stage.balance(layers_of(dense()), 0.5)
    assert attentions == round(6 * 0.5 ** (1.5 / 1.5))
    assert [each.channels for each in parts] == [48 - channels] * 6
    assert sum(each.groups == 0 for each in parts) == attentions


def test_two_stages_keep_the_channels_of_largest_activations(base):
    seen, model = [], dense()
    decoder_of(model)  # looks at some tokens of its own
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    norms = two_stage.activation_norms(model, base.windows)
    torch.testing.assert_close(norms[2], torch.cat(seen).norm(dim=1).mean(0))


def test_two_stages_refuse_a_share_that_leaves_no_mlp(base):
    with pytest.raises(UserError, match="2SSP leaves no MLP where a share of 0.99 goes"):
        two_stage.two_stage(base, 0.99)


# The whole of it.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and texts where the benchmark looks for the real ones."""
    world = tmp_path_factory.mktemp("world")
    for name in ("wikitext2/wiki.train.raw", "wikitext2/wiki.valid.raw", "wikitext2/wiki.test.raw", "ptb/ptb.test.txt"):
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_text(letters(1500))
    row = {"query": letters(60), "choices": [letters(5, 1), letters(5, 2)], "gold": 0}
    write_zero_shot(world, "hellaswag", *[row | {"query": letters(60, seed)} for seed in range(5)])
    save_decoder(world / "llm", tiny_decoder(max_position_embeddings=512, num_hidden_layers=6, attention_bias=False))
    return world


def compare(world, out, *flags, expect=0):
    given = f"--base_model {world}/llm --data_dir {world} --dtype float32 --eval_samples 2 --num_samples 2 "
    given += f"--repair_samples 4 --held_out_samples 1 --length 16 --zeroshot_tasks hellaswag --results_dir {out}"
    return run_script("benchmarks/llm_pruning_methods.py", *given.split(), *flags, expect=expect)


def rows_of(out):
    return json.loads((out / "llm_pruning_methods.json").read_text())["rows"]


@pytest.fixture(scope="module", autouse=True)
def answers():
    """What zero-shot tasks find, instead of asking them: tests/test_evaluation.py does."""
    found = {"one": {"acc": 0.4, "acc_standard_error": 0.03}, "two": {"acc": 0.6, "acc_standard_error": 0.04}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compression.llm.zeroshot.zero_shot", lambda *_: found)
        patch.setattr("compression.llm.zeroshot._manager", lambda: SimpleNamespace(all_subtasks=["hellaswag"]))
        patch.setattr("compression.llm.zeroshot._check_file", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def compared(world, answers, tmp_path_factory):
    """Rows of two methods, trained after pruning."""
    out = tmp_path_factory.mktemp("out")
    flags = ["--recover_tokens", 300, "--recover_learning_rate", "1e-2"]
    compare(world, out, "--ratios", 0.3, "--methods", "FLAP", "SliceGPT", *flags)
    return out, flags


def test_rows_say_what_is_left_before_and_after_recovery(compared):
    out, _ = compared
    found = json.loads((out / "llm_pruning_methods.json").read_text())
    assert set(found["dense"]["perplexity"]) == {"wikitext2", "ptb", "hellaswag passages"}
    for row in found["rows"]:
        assert row["removed"] >= 0.3 and row["layers"] == 6
        assert row["pruned"]["perplexity"] != row["recovered"]["perplexity"]
        for stage in ("pruned", "recovered"):
            assert row[stage]["zero_shot"]["mean"] == pytest.approx(0.5)
            assert row[stage]["zero_shot"]["standard_error"] == pytest.approx(0.025), "of 0.03 and 0.04 on two tasks"
    assert sorted(path.name for path in out.iterdir()) == [
        f"llm_pruning_methods.{end}" for end in ("json", "md", "png")
    ]
    table = (out / "llm_pruning_methods.md").read_text()
    assert "then 300 tokens of training. Perplexity on 2 windows of 16 tokens" in table
    assert "| dense |" in table and "| FLAP |" in table and "hellaswag passages, after recovery" in table


def test_goes_on_behind_the_rows_that_are_there(world, compared, monkeypatch):
    out, flags = compared
    before = rows_of(out)
    compare(world, out, "--ratios", 0.3, "--methods", "ShortGPT", "FLAP", "SliceGPT", *flags)
    after = rows_of(out)
    assert after[:2] == before and [row["method"] for row in after] == ["FLAP", "SliceGPT", "ShortGPT"]


def test_rows_of_other_settings_are_not_mixed(world, compared):
    out, flags = compared
    before = (out / "llm_pruning_methods.json").read_bytes()
    refused = compare(world, out, "--ratios", 0.3, "--methods", "ShortGPT", "--seed", 7, *flags, expect=2).stderr
    assert "--seed 7: " in refused and "has rows of 42; name another" in refused
    assert (out / "llm_pruning_methods.json").read_bytes() == before


def test_bad_flags_are_refused(world, tmp_path):
    for flags, message in (
        (["--methods", "nothing"], "--methods 'nothing': unknown; allowed are H-GSP, default; "),
        (["--ratios", 1.0], "--ratios 1.0: allowed is 0.01 to 0.99"),
        (["--report"], "has no rows to report; leave out --report"),
        (["--zeroshot_tasks", "piqa"], "has no zeroshot/piqa/validation.jsonl"),
    ):
        assert message in compare(world, tmp_path, *flags, expect=2).stderr
    assert not list(tmp_path.iterdir())


def test_ratio_that_a_method_cannot_reach_is_said_in_the_report(world, tmp_path):
    compare(world, tmp_path, "--ratios", 0.99, 0.2, "--methods", "2SSP", "--zeroshot_tasks", "none")
    assert "- 2SSP at 0.99: 2SSP leaves no MLP" in (tmp_path / "llm_pruning_methods.md").read_text()
    assert "impossible" in rows_of(tmp_path)[0] and "pruned" in rows_of(tmp_path)[1]


def test_recovery_trains_as_many_tokens_with_all_weights(world):
    settings = recovery.recovery_of(1000, 1e-3, 16, seed=3)
    assert (settings.tokens, settings.finetune_method, settings.training.num_epochs) == (1000, "full", 1)


def test_curves_are_told_apart_and_begin_at_the_dense_model():
    texts = {"wikitext2": 10.0, "ptb": 20.0}

    def row(method, ratio):
        figures = {"perplexity": {name: value * (1 + ratio) for name, value in texts.items()}}
        return {"method": method, "ratio": ratio, "removed": ratio, "pruned": figures, "recovered": figures}

    names = [f"method {number}" for number in range(25)]
    found = {"dense": {"perplexity": texts}, "rows": [row(name, ratio) for name in names for ratio in (0.5, 0.2)]}
    figure = report.draw(found)
    panels = figure.axes
    assert len(panels) == 4 and all(axes.get_yscale() == "log" for axes in panels)
    *curves, dense_line = panels[0].get_lines()
    assert len({(curve.get_color(), curve.get_marker()) for curve in curves}) == 25
    assert list(curves[0].get_xdata()) == [20, 50] and list(dense_line.get_ydata()) == [10, 10]
    one_ratio = report.draw(found | {"rows": found["rows"][::2]})
    assert one_ratio.axes[0].get_xlim() == (45, 55)

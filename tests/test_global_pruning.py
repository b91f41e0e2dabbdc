"""H-GSP: the budget, the correction by removal perplexities, protection, steps, repair, and the command line."""

import csv
import json

import pytest
import torch
from conftest import WORDS, leftovers, pruning_flags, tiny_decoder, write_zero_shot
from scripts import run_killed, run_script
from transformers import AutoModelForCausalLM

from compression.checkpoint import load_language_model
from compression.config import parse, pick
from compression.flops import encoder_macs_formula
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring, masked
from compression.llm.perplexity import perplexity
from compression.llm.removal import removal_perplexities
from compression.llm.score_passes import score_structures
from compression.llm.scoring import SCORES
from compression.llm.text import CalibrationText
from compression.runtime import UserError
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of
from compression.surgery import shrink_decoder, to_stock
from run_global_pruning import GlobalPruningConfig


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(3, 120, (12, 16), generator=torch.Generator().manual_seed(4))
    return CalibrationText(scores=ids[:4], repair=ids, held_out=ids[4:8], batch_size=2)


def config(**fields):
    return GlobalPruningConfig.make(**dict(pruning_ratio=0.4, compensation="none", round_to=1) | fields)


def pruning_of(model, settings, *inputs):
    return GlobalPruning(model, pick(Scoring, settings), pick(Budget, settings), *inputs)


def parameters(model):
    return sum(
        parts.count(kind) * parts.structure_parameters(kind) for parts in layers_of(model) for kind in DECODER_KINDS
    )


def largest(model):
    return max(parts.structure_parameters(kind) for parts in layers_of(model) for kind in DECODER_KINDS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("seed", range(5))
def test_budget_is_met_to_within_one_structure(text, family, seed):
    draw = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    model = tiny_decoder(family)
    total, one = parameters(model), largest(model)
    settings = config(
        pruning_ratio=0.1 + 0.7 * draw[0],
        epsilon=draw[1],
        iterative_steps=1 + int(3 * draw[2]),
        importance_method=("obs", "fisher", "taylor", "wanda", "taylor_2nd")[seed],
        compensation=("none", "lstsq")[seed % 2],
        removal_steps=(0, 1, 0, 5, 0)[seed],
        local_choice=("obs", "product")[seed == 3],
        round_to=(1, 4)[seed % 2],
    )
    small = pruning_of(model, settings, text).prune()
    removed = total - parameters(small)
    assert 0 <= removed - settings.pruning_ratio * total < one
    assert all(parts.query_heads == 2 * parts.groups for parts in layers_of(small))


def test_widths_are_round_or_as_they_were(text):
    model = tiny_decoder(intermediate_size=50)
    block = 16 * layers_of(model)[0].structure_parameters(CHANNELS)
    total = parameters(model)
    small = pruning_of(model, config(pruning_ratio=0.3, round_to=16, iterative_steps=2), text).prune()
    widths = {parts.channels for parts in layers_of(small)}
    assert widths <= {50, 48, 32, 16, 0} and widths != {50}
    assert 0 <= total - parameters(small) - 0.3 * total < max(block, largest(small))


def test_formula_of_the_paper(text):
    model = tiny_decoder()
    removal = removal_perplexities(model, text.held_out)
    scores = score_structures(model, text.scores, "taylor", text.batch_size)
    tau = sorted(removal["layer"])[1]  # one layer of four lies under it
    settings = GlobalPruningConfig.preset("paper")
    settings.tau, settings.temperature = tau, 1.5
    pruning = pruning_of(model, settings, text, removal)
    densities = pruning._densities(scores)
    for layer, parts in enumerate(layers_of(model)):
        for kind, block in ((GROUPS, "attention"), (CHANNELS, "mlp")):
            value = removal["layer"][layer] if removal["layer"][layer] < tau else removal[block][layer]
            expected = scores[kind][layer] / parts.structure_parameters(kind) * torch.tensor(value).log1p() ** 1.5
            torch.testing.assert_close(densities[kind][layer], expected)


def test_the_preset_for_quality_stays_nearer_to_the_dense_model(text):
    expected, errors = tiny_decoder()(text.repair).logits, []
    for settings in (GlobalPruningConfig(), GlobalPruningConfig.preset("quality")):
        settings.pruning_ratio, settings.round_to = 0.4, 8
        small = pruning_of(tiny_decoder(), settings, text).prune()
        errors.append((small(text.repair).logits - expected).square().mean().item())
    assert errors[1] < 0.9 * errors[0]


def test_no_temperature_is_the_plain_score(text):
    model = tiny_decoder()
    scores = score_structures(model, text.scores, "taylor", text.batch_size)
    settings = config(importance_method="taylor", normalize="none")
    densities = pruning_of(model, settings, text)._densities(scores)
    parts = layers_of(model)[2]
    torch.testing.assert_close(densities[GROUPS][2], scores[GROUPS][2] / parts.structure_parameters(GROUPS))


def test_normalized_scores_make_layers_share_the_budget(text):
    sizes = {}
    for normalize in ("none", "layer"):
        model = tiny_decoder()
        with torch.no_grad():
            layers_of(model)[1].down.weight.mul_(0.01)  # by magnitude, all that is cheap is here
        settings = config(importance_method="magnitude", normalize=normalize, pruning_ratio=0.2, epsilon=0.0)
        sizes[normalize] = [parts.channels for parts in layers_of(pruning_of(model, settings, text).prune())]
    assert max(sizes["none"]) - min(sizes["none"]) > max(sizes["layer"]) - min(sizes["layer"])


def test_each_method_has_its_own_normalization():
    configs = {method: GlobalPruningConfig.make(importance_method=method) for method in SCORES}
    resolved = {method: fields.as_dict()["normalize"] for method, fields in configs.items()}
    assert resolved == dict.fromkeys(SCORES, "none") | {"wanda": "layer"}
    assert all(pick(Scoring, fields).normalization == resolved[method] for method, fields in configs.items())
    assert GlobalPruningConfig.make(importance_method="wanda", normalize="none").as_dict()["normalize"] == "none"
    assert pick(Scoring, GlobalPruningConfig.preset("paper")).normalization == "none"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], "none"),
        (["--importance_method", "wanda"], "layer"),
        (["--fast", "--importance_method", "wanda"], "layer"),
        (["--preset", "paper", "--importance_method", "wanda"], "none"),
        (["--importance_method", "wanda", "--normalize", "none"], "none"),
    ],
)
def test_flags_that_name_the_method_settle_the_normalization(flags, wanted):
    assert parse(GlobalPruningConfig, flags).as_dict()["normalize"] == wanted


def test_wanda_does_not_empty_the_layers_whose_scores_are_small(text):
    """Its scores grow with what flows into a layer: as they are, they would take it all from one."""
    model = tiny_decoder()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(0.01)
    settings = config(importance_method="wanda", pruning_ratio=0.2, epsilon=0.0)
    sizes = [parts.channels for parts in layers_of(pruning_of(model, settings, text).prune())]
    assert len(sizes) == 4 and min(sizes) > 24


@pytest.mark.parametrize("compensation", ["none", "lstsq"])
def test_layers_that_are_left_as_their_biases_go_through_all_steps(text, compensation):
    model = tiny_decoder("llama", mlp_bias=True)
    total = parameters(model)
    settings = config(pruning_ratio=0.7, iterative_steps=3, epsilon=0.6, compensation=compensation)
    pruning = pruning_of(model, settings, text)
    small = pruning.prune()
    sizes = [(parts.groups, parts.channels) for parts in layers_of(small)]
    assert len(sizes) == 4 and (0, 0) in sizes and pruning.origin == [0, 1, 2, 3]
    assert 0 <= total - parameters(small) - 0.7 * total < largest(tiny_decoder("llama", mlp_bias=True))
    left = sum(row["removed_in_step"] is None for row in pruning.table.values())
    assert left == sum(map(sum, sizes))
    assert perplexity(small, text.held_out) < 1e4


def test_protected_layers_stay_as_they_are(text):
    model = tiny_decoder()
    small = pruning_of(model, config(protect_first=1, protect_last=1), text).prune()
    sizes = [(parts.groups, parts.channels) for parts in layers_of(small)]
    assert sizes[0] == sizes[-1] == (4, 48) and len(sizes) <= 4
    with pytest.raises(UserError, match="--pruning_ratio 0.6: with 1 and 1 protected layers at most 0.500 can go"):
        pruning_of(tiny_decoder(), config(pruning_ratio=0.6, protect_first=1, protect_last=1), text)


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def with_cheap_parts(family="llama", cheap=ATTENTION, layers=(1, 2), **fields):
    """By magnitude, nothing is cheaper than some parts of some layers."""
    model = tiny_decoder(family, **fields)
    with torch.no_grad():
        for layer in layers:
            for name in cheap:
                model.get_submodule(f"model.layers.{layer}.{name}").weight.mul_(0.01)
    return model


def skipped(model):
    """What layers lack, in any of them."""
    return {part for layer in model.config.per_layer_config for part in layer.skip}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"iterative_steps": 3},
        {"attention_factors": (0.1, 1.0)},
        {"protect_first": 1, "protect_last": 1, "pruning_ratio": 0.3},
        {"epsilon": 0.0},
        {"compensation": "lstsq"},
        {"round_to": 4, "pruning_ratio": 0.6},
    ],
    ids=str,
)
def test_kept_attention_leaves_a_group_in_every_layer_that_stays(text, fields):
    settings = config(importance_method="magnitude", **fields)
    assert "attention" in skipped(pruning_of(with_cheap_parts("qwen2"), settings, text).prune()), "without the flag"
    model = with_cheap_parts("qwen2")
    total, block = parameters(model), max(largest(model), 4 * layers_of(model)[0].structure_parameters(CHANNELS))
    settings.keep_attention = True
    pruning = pruning_of(model, settings, text)
    small = pruning.prune()
    assert "attention" not in skipped(small) and all(parts.groups for parts in layers_of(small))
    assert 0 <= total - parameters(small) - settings.pruning_ratio * total < block
    assert perplexity(small, text.held_out) < 1e4


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_whole_layers_still_go_with_kept_attention_unless_biases_would_stay(text, family):
    cheap = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    model = with_cheap_parts(family, cheap, layers=[2])
    settings = config(importance_method="magnitude", pruning_ratio=0.3, epsilon=0.3, keep_attention=True)
    pruning = pruning_of(model, settings, text)
    small = pruning.prune()
    assert "attention" not in skipped(small)
    if family == "qwen2":
        assert pruning.origin == [0, 1, 3]
    else:
        assert layers_of(small)[2].biased and layers_of(small)[2].groups == 1


def test_kept_attention_that_cannot_be_is_refused(text):
    settings = config(pruning_ratio=0.9, epsilon=0.0, keep_attention=True)
    with pytest.raises(UserError, match="--pruning_ratio 0.9: out of reach with --keep_attention; choose a lower one"):
        pruning_of(tiny_decoder(), settings, text)
    free = pruning_of(with_cheap_parts("qwen2"), config(importance_method="magnitude"), text).prune()
    with pytest.raises(UserError, match="--keep_attention: layer 1 of the model has no attention; give a --base_model"):
        pruning_of(free, config(keep_attention=True), text)


def test_masked_model_is_the_smaller_one(text):
    model = tiny_decoder("qwen3")
    settings = config(pruning_ratio=0.5, attention_factors=(1.0,))
    pruning = pruning_of(model, settings, text)
    kept = pruning._best_choice(pruning._densities(pruning._score(None)), 1, 0.5)
    with masked(model, kept):
        expected = perplexity(model, text.held_out)
    assert expected != pytest.approx(perplexity(model, text.held_out)), "the mask came off"
    assert perplexity(shrink_decoder(model, kept), text.held_out) == pytest.approx(expected, rel=1e-4)


def test_factor_of_least_perplexity_is_taken(text, monkeypatch):
    model = tiny_decoder()
    pruning = pruning_of(model, config(attention_factors=(0.001, 1.0, 1000.0)), text)
    answers = iter([30.0, 20.0, 10.0])
    monkeypatch.setattr("compression.llm.global_pruning.perplexity", lambda *_: next(answers))
    kept = pruning._best_choice(pruning._densities(pruning._score(None)), 1, 0.4)
    assert all(mask.all() for mask in kept[GROUPS]), "with the largest factor no attention goes"


@pytest.mark.parametrize("ranking", ["obs", "product"])
def test_local_choice_keeps_the_sizes_and_not_what_the_scores_keep(text, ranking):
    settings = config(compensation="lstsq", removal_steps=8, local_choice=ranking)
    local, plain = pruning_of(tiny_decoder(), settings, text), pruning_of(tiny_decoder(), config(), text)
    sizes = [[(parts.groups, parts.channels) for parts in layers_of(each.prune())] for each in (local, plain)]
    assert sizes[0] == sizes[1]
    same = [torch.equal(*both) for both in zip(local.places[CHANNELS], plain.places[CHANNELS], strict=True)]
    assert not all(same)


def test_table_says_what_went_when(text):
    model = tiny_decoder()
    total = parameters(model)
    pruning = pruning_of(model, config(iterative_steps=2, pruning_ratio=0.5), text)
    small = pruning.prune()
    rows = list(pruning.table.values())
    assert len(rows) == 4 * (4 + 48)
    gone = sum(row["parameters"] for row in rows if row["removed_in_step"])
    assert total - gone == parameters(small)
    assert {row["removed_in_step"] for row in rows} == {None, 1, 2}
    for index, layer in enumerate(pruning.origin):
        left = [row for row in rows if row["layer"] == layer and row["removed_in_step"] is None]
        parts = layers_of(small)[index]
        assert [sum(row["kind"] == kind for row in left) for kind in DECODER_KINDS] == [parts.groups, parts.channels]


@pytest.mark.parametrize("fields", [{}, {"compensation": "lstsq", "removal_steps": 4}], ids=str)
def test_what_is_kept_is_where_the_table_says(text, fields):
    """Weights of the smaller model are those of the dense one at the places that the table names."""
    dense = tiny_decoder()
    pruning = pruning_of(tiny_decoder(), config(iterative_steps=3, pruning_ratio=0.6, epsilon=0.3, **fields), text)
    small = pruning.prune()
    for index, layer in enumerate(pruning.origin):
        places = pruning.places[CHANNELS][index]
        if len(places):
            up, whole = (layers_of(m)[i].ffn[-1].module.weight for m, i in ((small, index), (dense, layer)))
            assert torch.equal(up, whole[places])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pruning_ratio": 1.2}, "--pruning_ratio 1.2: allowed is 0 to 0.95"),
        ({"epsilon": -0.1}, "--epsilon -0.1: allowed is 0 to 1"),
        ({"temperature": -1}, "--temperature -1: allowed is 0 to 10"),
        ({"tau": -1.0}, "--tau -1.0: allowed is at least 0"),
        ({"iterative_steps": 0}, "--iterative_steps 0: allowed is at least 1"),
        ({"attention_factors": ()}, "allowed are one or more above 0"),
        ({"removal_steps": -1}, "--removal_steps -1: allowed is at least 0"),
        ({"removal_steps": 4}, "--removal_steps 4: allowed with --compensation none is 0"),
        ({"mlp_rounds": 2}, "--mlp_rounds 2: allowed with --compensation none is 0"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)


def test_uniform_model_meets_the_budget_and_is_of_the_stock_class(text):
    model = tiny_decoder()
    total = parameters(model)
    small = to_stock(pruning_of(model, config(uniform=True, pruning_ratio=0.3, round_to=8), text).prune())
    assert type(small).__name__ == "LlamaForCausalLM"
    sizes = {(parts.query_heads, parts.groups, parts.channels) for parts in layers_of(small)}
    (query_heads, groups, channels), *others = sizes
    assert not others and query_heads == 2 * groups and channels % 8 == 0
    rounding = 4 * 8 * layers_of(small)[0].structure_parameters(CHANNELS)
    assert 0 <= total - parameters(small) - 0.3 * total < rounding
    with pytest.raises(UserError, match="--pruning_ratio 0.95: no uniform sizes meet it"):
        pruning_of(tiny_decoder(), config(uniform=True, pruning_ratio=0.95), text).prune()


# The command line.


def words_of(base, output, *flags):
    return ["run_global_pruning.py", *pruning_flags(base, output), "--round_to", "8", *flags]


def run(base, output, *flags, expect=0):
    return run_script(*words_of(base, output, *flags), expect=expect)


@torch.no_grad()
def test_command_writes_an_ordinary_checkpoint_and_its_analysis(base, tmp_path):
    result = run(base, tmp_path, "--output_name", "half", "--pruning_ratio", "0.5", "--save_bin")
    folder = tmp_path / "half"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    logs = [name for name in files if name.startswith("logs/")]
    assert len(logs) == 1 and "Gone:" in (folder / logs[0]).read_text()
    assert files == {
        "models/README.md",
        "models/config.json",
        "models/generation_config.json",
        "models/model.safetensors",
        "models/pruned_decoder.py",
        "models/stage.json",
        "models/tokenizer.json",
        "models/tokenizer_config.json",
        "models/pruned_model.bin",
        "analysis/global_group_table.csv",
        "analysis/groups_to_prune.csv",
        "analysis/layer_removal_ppl.json",
        "analysis/block_removal_ppl.json",
        "analysis/removal_perplexity.png",
        "analysis/retained.png",
        "evaluation/evaluation_results.json",
        "run.json",
        *logs,
    }
    found = json.loads((folder / "evaluation" / "evaluation_results.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "models")
    assert sum(p.numel() for p in model.parameters()) == found["pruned"]["parameters"]["total"]
    assert found["reduction"]["structures"] == pytest.approx(0.5, abs=0.05)
    assert f"{found['pruned']['perplexity']['text.txt']:.2f}" in result.stdout
    plain = torch.load(folder / "models" / "pruned_model.bin", weights_only=True)
    assert torch.equal(plain["model.norm.weight"], model.model.norm.weight)
    with (folder / "analysis" / "groups_to_prune.csv").open(newline="") as file:
        removed = list(csv.DictReader(file))
    gone = found["dense"]["parameters"]["structures"] - found["pruned"]["parameters"]["structures"]
    assert sum(int(row["parameters"]) for row in removed) == gone


def test_the_same_seed_gives_the_same_model(base, tmp_path):
    weights = []
    for name in ("one", "two"):
        run(base, tmp_path, "--output_name", name, "--preset", "paper", "--run_evaluation", "none")
        weights.append((tmp_path / name / "models" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@torch.no_grad()
def test_all_evaluations_on_a_pruned_model(base, tmp_path):
    data = tmp_path / "data"
    rows = [{"goal": f"a {WORDS[place]}", "sol1": "b c", "sol2": "d", "label": place % 2} for place in range(6)]
    write_zero_shot(data, "piqa", *rows)
    run(
        base,
        tmp_path,
        "--output_name",
        "all",
        "--run_evaluation",
        "all",
        "--data_dir",
        data,
        "--eval_zeroshot_tasks",
        "piqa",
        "--eval_zeroshot_limit",
        "5",
        "--pruning_ratio",
        "0.4",
    )
    found = json.loads((tmp_path / "all" / "evaluation" / "evaluation_results.json").read_text())
    model, tokenizer = load_language_model(tmp_path / "all" / "models")
    chosen = []
    for row in rows[:5]:
        sums = []
        for answer in (row["sol1"], row["sol2"]):
            context = tokenizer(f"Question: {row['goal']}\nAnswer:", add_special_tokens=False)["input_ids"]
            whole = torch.tensor([context + tokenizer(answer, add_special_tokens=False)["input_ids"]])
            logs = model(whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])
            sums.append(logs[len(context) - 1 :].sum().item())
        chosen.append(sums.index(max(sums)) == row["label"])
    assert found["pruned"]["zeroshot"]["piqa"]["n"] == 5
    assert found["pruned"]["zeroshot"]["piqa"]["acc"] == pytest.approx(sum(chosen) / 5)

    for name in ("dense", "pruned"):
        speed = found["efficiency"][name]
        assert speed["prefill"]["median_tokens_per_second"] > 0 < speed["decode"]["median_tokens_per_second"]
    macs = encoder_macs_formula(layers_of(model), 32)
    assert found["efficiency"]["pruned"]["macs"]["encoder"] == macs
    assert found["efficiency"]["ratios"]["macs"] < 0.8


def test_killed_run_goes_on_to_the_same_result(base, tmp_path):
    """Killed where the second of two steps begins: what was finished is not done again."""
    flags = ["--pruning_ratio", "0.5", "--iterative_steps", "2", "--attention_factors", "1", "4"]
    run(base, tmp_path / "whole", "--output_name", "one", *flags)
    killed = words_of(base, tmp_path / "killed", "--output_name", "one", *flags, "--resume")
    run_killed(*killed, at="compression.llm.global_pruning.score_structures", call=2)
    assert not (tmp_path / "killed" / "one" / "models").exists()
    saved = {part.name for part in (tmp_path / "killed").glob(".one_*.resume/*")}
    assert {"dense", "removal", "labels", "scores_of_step_1_of_2", "kept_in_step_1_of_2"} <= saved
    result = run_script(*killed)
    assert "Step 1," not in result.stdout and "Step 2," in result.stdout
    names = ("models/model.safetensors", "analysis/global_group_table.csv", "models/config.json")
    for name in names:
        assert (tmp_path / "killed" / "one" / name).read_bytes() == (tmp_path / "whole" / "one" / name).read_bytes()
    assert not leftovers(tmp_path / "killed"), "what was kept to resume from is gone"


def test_finetune_trains_the_pruned_model_and_measures_it_again(base, tmp_path):
    flags = ["--finetune", "--finetune_samples", "24", "--lora_r", "4", "--run_evaluation", "ppl"]
    run(base, tmp_path, "--output_name", "tuned", "--pruning_ratio", "0.4", *flags)
    folder = tmp_path / "tuned"
    found = json.loads((folder / "evaluation" / "evaluation_results.json").read_text())
    stage = json.loads((folder / "finetuned" / "stage.json").read_text())
    assert stage["parent"] == str(folder / "models") and stage["config"]["lora_r"] == 4
    assert stage["metrics"]["before"]["perplexity"] == pytest.approx(found["pruned"]["perplexity"], rel=1e-5)
    assert found["finetuned"] == stage["metrics"]["after"]
    model, _ = load_language_model(folder / "models")
    assert found["finetuned"]["parameters"]["total"] == stage["metrics"]["trained"] + model.num_parameters()
    assert (folder / "finetuned" / "adapter_model.safetensors").exists()


def test_uniform_checkpoint_needs_no_code(base, tmp_path):
    run(base, tmp_path, "--output_name", "same", "--pruning_ratio", "0.3", "--uniform", "--run_evaluation", "none")
    config = json.loads((tmp_path / "same" / "models" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    assert not (tmp_path / "same" / "models" / "pruned_decoder.py").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_name", "a/b"], "--output_name 'a/b': allowed is a plain folder name"),
        (["--base_model", "./nowhere"], "base_model ./nowhere: no such folder"),
        (["--run_evaluation", "ppl,speed"], "unknown speed; allowed are ppl, zeroshot, efficiency"),
        (["--run_evaluation", "zeroshot"], "give a folder with zeroshot/piqa/validation.jsonl: --data_dir"),
        (["--run_evaluation", "all", "--data_dir", "docs"], "--data_dir docs: has no zeroshot/piqa/validation.jsonl"),
        (["--run_evaluation", "zeroshot", "--eval_zeroshot_tasks", "no"], "'no': lm-evaluation-harness has none"),
        (["--dataset", "wiki"], "--dataset wiki: no such file; allowed are text files, files of instructions"),
        (["--finetune", "--lora_r", "0"], "--lora_r 0: allowed is at least 1"),
        (["--finetune", "--lora_r", "0", "--dry_run"], "--lora_r 0: allowed is at least 1"),
        (["--temperature", "1", "--analysis_samples", "0"], "--analysis_samples 0: allowed is at least 1"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(base, tmp_path, flags, message):
    result = run(base, tmp_path / "results", *flags, expect=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()

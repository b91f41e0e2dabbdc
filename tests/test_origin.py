"""Layers of pruned and of dense models: the map between them, what is learned along it, and adapters' ranks."""

import shutil

import pytest
import torch
from conftest import letters, pruning_flags, save_decoder, tiny_decoder
from scripts import run_script
from test_lora import pruned
from test_post_training import settings
from test_training import Killed

from compression.checkpoint import load_language_model, load_tensors
from compression.files import read_json
from compression.llm.lora import add_lora, load_adapter, ranks_by_share, write_adapter
from compression.llm.origin import dense_of, kept_layers, pruned_shares
from compression.llm.recovery import LanguageModelling, recover
from compression.llm.rows import of_windows
from compression.llm.teacher import LiveTeacher
from compression.runtime import UserError
from compression.stage_record import describe_stage, identify, read_stage
from compression.structures import CHANNELS, GROUPS, family_of, layers_of
from compression.surgery import shrink_decoder

STAY = [0, 2, 3]
"""Layers that stay in the shallow model."""


SIZES = {GROUPS: 4, CHANNELS: 48}


def dense_model():
    """Without biases on output projections, which would stay when a layer goes."""
    return tiny_decoder("qwen2", max_position_embeddings=128)


def shallow():
    """The dense model without its second layer; nothing else is gone."""
    kept = {kind: [torch.full([size], layer in STAY) for layer in range(4)] for kind, size in SIZES.items()}
    return shrink_decoder(dense_model(), kept)


def stage_of(parent, **metrics):
    return describe_stage("global_pruning", {}, {"parent": identify(parent)}, metrics, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model, one without its second layer, that one without its first (as recorded), and a text."""
    folder = tmp_path_factory.mktemp("origin")
    save_decoder(folder / "dense", dense_model())
    save_decoder(folder / "shallow", shallow(), stage_of(folder / "dense", kept_layers=STAY))
    kept = {kind: [torch.full([size], layer > 0) for layer in range(3)] for kind, size in SIZES.items()}
    save_decoder(folder / "flat", shrink_decoder(shallow(), kept), stage_of(folder / "shallow", kept_layers=[1, 2]))
    save_decoder(folder / "narrow", pruned("qwen2"), stage_of(folder / "dense"))
    (folder / "text.txt").write_text(letters(6_000))
    return folder


def test_the_map_follows_the_records_through_all_stages(folder):
    assert kept_layers(folder / "shallow", folder / "dense", "--flag") == STAY
    assert kept_layers(folder / "flat", folder / "shallow", "--flag") == [1, 2]
    assert kept_layers(folder / "flat", folder / "dense", "--flag") == [2, 3]
    assert kept_layers(folder / "narrow", folder / "dense", "--flag") == [0, 1, 2, 3]
    assert kept_layers(folder / "dense", folder / "dense", "--flag") == [0, 1, 2, 3]


def test_a_map_that_nothing_says_is_refused(folder, tmp_path):
    save_decoder(tmp_path / "old", shallow(), stage_of(folder / "dense"))
    save_decoder(tmp_path / "other", tiny_decoder("qwen2", seed=1, max_position_embeddings=128))
    for student, teacher in ((tmp_path / "old", folder / "dense"), (folder / "shallow", tmp_path / "other")):
        with pytest.raises(UserError, match=f"--flag: {student} has 3 of the 4 layers of {teacher}, and "):
            kept_layers(student, teacher, "--flag")


def test_pruning_records_which_layers_stay(folder, tmp_path):
    flags = ["--pruning_ratio", "0.5", "--epsilon", "0.6", "--round_to", "8", "--iterative_steps", "2"]
    run_script("run_global_pruning.py", *pruning_flags(folder / "dense", tmp_path), *flags, "--output_name", "deep")
    models = tmp_path / "deep" / "models"
    places = kept_layers(models, folder / "dense", "--flag")
    assert places == read_stage(models)["metrics"]["kept_layers"] and 0 < len(places) < 4
    small, _ = load_language_model(models)
    dense, _ = load_language_model(folder / "dense")
    for layer, place in enumerate(places):
        norms = [model.model.layers[index].input_layernorm.weight for model, index in ((small, layer), (dense, place))]
        assert torch.equal(*norms) or not layers_of(small)[layer].groups


# Hidden states.


@torch.no_grad()
def states_of(model, ids):
    """Behind each layer [layers, rows, length, hidden], the last one before the final norm."""
    found = []
    handles = [layer.register_forward_hook(lambda _, __, state: found.append(state)) for layer in model.model.layers]
    model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_states_are_compared_with_those_behind_the_same_layer_of_the_teacher(folder):
    dense, small = dense_model(), shallow()
    ids = torch.randint(4, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    train = of_windows(ids)
    recipe = LanguageModelling(settings(folder, hidden_weight=0.3), 3, LiveTeacher(dense, 2.0, STAY))
    terms = recipe.loss(recipe.module(small), train.collate([0, 1, 2], 0), 0)
    mine, target = states_of(small, ids)[:, :, :-1], states_of(dense, ids)[STAY][:, :, :-1]
    errors = ((mine - target).square().sum(-1) / target.square().sum(-1)).mean((1, 2))
    assert errors[0] == 0 < min(errors[1:]), "before the layer that is gone both are the same"
    assert terms["hidden_state_loss"].item() == pytest.approx(errors.mean().item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx((terms["cross_entropy"] + 0.3 * errors.mean()).item(), rel=1e-5)
    assert "soft_label_loss" not in terms


def test_all_three_terms_add_up(folder):
    dense, small = dense_model(), shallow()
    train = of_windows(torch.randint(4, 30, (3, 12), generator=torch.Generator().manual_seed(0)))
    recipe = LanguageModelling(settings(folder, hidden_weight=2.0, kd_weight=0.7), 3, LiveTeacher(dense, 2.0, STAY))
    terms = recipe.loss(recipe.module(small), train.collate([0, 1, 2], 0), 0)
    expected = 0.3 * terms["cross_entropy"] + 0.7 * terms["soft_label_loss"] + 2 * terms["hidden_state_loss"]
    torch.testing.assert_close(terms["loss"], expected)
    own = LanguageModelling(settings(folder, hidden_weight=2.0), 3, LiveTeacher(small, 2.0, range(3)))
    assert own.loss(own.module(small), train.collate([0, 1, 2], 0), 0)["hidden_state_loss"] == 0


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}], ids=str)
def test_hidden_states_are_learned(folder, tmp_path, method, options):
    config = settings(folder, hidden_weight=1.0, finetune_method=method, run_evaluation="none", **options)
    recover(config, folder / "flat", tmp_path / "out")
    history = read_json(tmp_path / "out" / "training_history.json")
    assert history[1]["hidden_state_loss"] < 0.99 * history[0]["hidden_state_loss"]
    stage = read_stage(tmp_path / "out")
    assert stage["inputs"]["teacher"]["path"] == str(folder / "dense"), "not the pruned one that it was made from"


def test_killed_and_resumed_with_hidden_states_equals_undisturbed(folder, tmp_path, monkeypatch):
    fields = dict(hidden_weight=1.0, kd_weight=0.5, tokens=300, schedule="cosine", lora_rank_by_share=True)
    config = settings(folder, run_evaluation="none", resume=True, **fields)
    recover(config, folder / "shallow", tmp_path / "whole")

    def kill(self, step):
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LanguageModelling, "after_step", kill)
        recover(config, folder / "shallow", tmp_path / "killed")
    recover(config, folder / "shallow", tmp_path / "killed")
    for name in ("adapter_model.safetensors", "training_history.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Ranks.


def trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def shares_of(model):
    dense = tiny_decoder(model.config.model_type.removeprefix("pruned_"))
    layers = zip(layers_of(model), layers_of(dense), strict=True)
    return [1 - now.parameters / then.parameters for now, then in layers]


def test_shares_are_those_of_the_layers_that_stay(folder):
    model, _ = load_language_model(folder / "narrow")
    assert pruned_shares(model, folder / "narrow", folder / "dense", "--flag") == pytest.approx(shares_of(model))
    flat, _ = load_language_model(folder / "flat")
    assert pruned_shares(flat, folder / "flat", folder / "dense", "--flag") == [0, 0]


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("projections", ["all", "q_proj", "down_proj,o_proj"])
def test_ranks_keep_the_budget_and_follow_the_shares(rank, projections):
    model, uniform, chosen = pruned(), pruned(), pruned()
    names = family_of(model).projections if projections == "all" else projections.split(",")
    shares = shares_of(model)
    ranks = ranks_by_share(model, names, shares, rank)
    add_lora(uniform, rank, 16.0, 0.0, names)
    add_lora(chosen, rank, 16.0, 0.0, names, ranks)
    one = [sum(p.numel() for name, p in layer.named_parameters() if "lora_" in name) for layer in uniform.model.layers]
    assert 0 <= trained(uniform) - trained(chosen) < max(one) / rank, "less than a rank more in one layer"
    order = sorted(range(4), key=lambda layer: shares[layer])
    limits = {"all": [16, 8, 32, 16], "q_proj": [32, 16, 1, 32], "down_proj,o_proj": [24, 8, 32, 32]}[projections]
    free = [ranks[layer] for layer in order if 1 < ranks[layer] < limits[layer]]
    assert free == sorted(free) and min(ranks) >= 1
    assert all(have <= most for have, most in zip(ranks, limits, strict=True))


def test_a_layer_that_kept_everything_has_the_least_rank():
    model = pruned()
    names = family_of(model).projections
    assert ranks_by_share(model, names, [0.0, 0.4, 0.0, 0.4], 4)[::2] == [1, 1]
    assert ranks_by_share(model, names, [0.0] * 4, 4) == [4] * 4, "with nothing to go by all have the same"


@torch.no_grad()
def test_adapters_of_different_ranks_come_back_and_merge(tmp_path):
    ids = torch.randint(1, 120, (2, 11), generator=torch.Generator().manual_seed(3))
    model = pruned()
    adapted = add_lora(model, 4, 8.0, 0.0, family_of(model).projections, [1, 7, 2, 5])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    for layer, rank in enumerate([1, 7, 2, 5]):
        module = next(module for module in model.model.layers[layer].modules() if hasattr(module, "lora_A"))
        assert module.r["default"] == rank and module.scaling["default"] == 2.0
    expected = model(ids).logits
    write_adapter(adapted, tmp_path)
    fresh = pruned()
    handle = load_adapter(fresh, tmp_path, "--lora_dir")
    assert torch.equal(fresh(ids).logits, expected)
    torch.testing.assert_close(handle.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=0)


def test_ranks_by_share_through_the_command(folder, tmp_path):
    config = settings(folder, lora_rank_by_share=True, lora_r=4, run_evaluation="none")
    metrics = recover(config, folder / "narrow", tmp_path / "out")
    ranks = read_json(tmp_path / "out" / "adapter_config.json")["rank_pattern"]
    model, _ = load_language_model(folder / "narrow")
    assert list(ranks.values()) == ranks_by_share(model, family_of(model).projections, shares_of(model), 4)
    weights = load_tensors(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == metrics["trained"]
    assert "teacher" not in read_stage(tmp_path / "out")["inputs"]


# The dense model.


def test_training_that_goes_on_learns_from_the_dense_model(folder, tmp_path):
    config = settings(folder, kd_weight=0.5, finetune_method="full", run_evaluation="none")
    recover(config, folder / "narrow", tmp_path / "once")
    recover(config, tmp_path / "once", tmp_path / "twice")
    assert read_stage(tmp_path / "twice")["parent"] == str(tmp_path / "once")
    assert read_stage(tmp_path / "twice")["inputs"]["teacher"]["path"] == str(folder / "dense")


def test_of_a_model_that_was_trained_and_then_pruned_the_trained_one_is_the_dense_one(folder, tmp_path):
    save_decoder(tmp_path / "trained", dense_model(), stage_of(folder / "dense") | {"stage": "recovery"})
    save_decoder(tmp_path / "pruned", pruned("qwen2"), stage_of(tmp_path / "trained"))
    assert dense_of(tmp_path / "pruned", "--flag") == tmp_path / "trained"
    assert dense_of(tmp_path / "trained", "--flag") == folder / "dense"


def test_without_the_dense_model_the_teacher_is_to_be_named(folder, tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "pruned"
    shutil.copytree(folder / "dense", dense)
    save_decoder(small, pruned("qwen2"), stage_of(dense))
    config = settings(folder, lora_rank_by_share=True)
    needs = f"--lora_rank_by_share: needs the dense model, and {small}"
    shutil.rmtree(dense)
    save_decoder(dense, tiny_decoder("qwen2", seed=1, max_position_embeddings=128))
    with pytest.raises(UserError, match=f"{needs} was made from {dense}, which holds other weights now; name it: --t"):
        recover(config, small, tmp_path / "out")
    shutil.rmtree(dense)
    with pytest.raises(UserError, match=f"{needs} was made from {dense}, which is not there; name it: --teacher"):
        recover(config, small, tmp_path / "out")
    shutil.rmtree(small)
    save_decoder(small, pruned("qwen2"))
    with pytest.raises(UserError, match=f"{needs} does not say what it was made from .*; name it: --teacher"):
        recover(config, small, tmp_path / "out")

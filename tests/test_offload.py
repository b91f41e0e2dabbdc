"""Models whose layers are fetched one at a time: the same figures, choices and weights as in memory."""

import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from conftest import LAYOUTS, letters, pruning_flags, save_decoder, tiny_decoder
from safetensors.torch import load_file, save_file
from scripts import run_killed, run_script

from compression.checkpoint import load_language_model
from compression.files import read_json
from compression.llm.perplexity import perplexity
from compression.llm.removal import removal_perplexities
from compression.llm.repair import repairing
from compression.llm.repair_text import RepairText
from compression.llm.score_passes import score_structures
from compression.llm.scoring import SCORES
from compression.offload import free_ram, pick_offload
from compression.runtime import UserError
from compression.saved_parts import SavedParts
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS
from compression.surgery import write_shrunk_decoder
from compression.weights import Shards

PLACES = ("cpu", "disk")
# Layers with biases, attention to a window, norms of heads, a head of its own and one that is the embeddings; fused
# projections; norms on both sides, embeddings that are scaled.
MODELS = {"llama": ("llama", {}), "untied": ("mistral", {}), "mixed": LAYOUTS["qwen3, biases"]}
MODELS |= {"fused": ("phi3", {}), "gemma2": ("gemma2", {})}


def token_ids(count, length=12, seed=2):
    return torch.randint(3, 120, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=sorted(MODELS))
def folder(request, tmp_path_factory):
    family, fields = MODELS[request.param]
    return save_decoder(tmp_path_factory.mktemp("model") / "model", tiny_decoder(family, **fields))


def load(folder, place="none", dtype=torch.float32):
    return load_language_model(folder, dtype=dtype, offload=place)[0]


@pytest.mark.parametrize("place", PLACES)
def test_an_offloaded_model_holds_no_layer_and_computes_the_same(folder, place):
    model, ids = load(folder, place), token_ids(2)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert torch.equal(model(ids).logits, load(folder)(ids).logits)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_perplexity_and_removal_analysis_are_those_of_the_model_in_memory(folder, place):
    windows, offloaded, whole = token_ids(5), load(folder, place), load(folder)
    assert perplexity(offloaded, windows, 2) == pytest.approx(perplexity(whole, windows, 2), rel=1e-6)
    found, expected = (removal_perplexities(model, windows, 2) for model in (offloaded, whole))
    for part, values in expected.items():
        assert found[part] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("method", sorted(SCORES))
def test_every_score_is_that_of_the_model_in_memory(folder, method):
    windows = token_ids(5)
    found, expected = (score_structures(load(folder, place), windows, method, 2) for place in ("disk", "none"))
    for kind in DECODER_KINDS:
        for mine, other in zip(found[kind], expected[kind], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_a_model_that_is_not_used_any_more_is_gone(folder):
    gc.disable()
    try:
        model = load(folder, "cpu")
        reference = weakref.ref(model.model.layers[0])
        model(token_ids(1))
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_values_that_are_not_finite_are_named(tmp_path):
    model = tiny_decoder()
    folder = save_decoder(tmp_path / "model", model)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)
    (folder / "stage.json").unlink()
    with pytest.raises(UserError, match="layers.2.mlp.up_proj.weight are not finite"):
        perplexity(load(folder, "disk"), token_ids(1))


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = tiny_decoder()
    folder = save_decoder(tmp_path / "model", model)
    weights = load_file(folder / "model.safetensors")
    weights["more"] = weights.pop("model.norm.weight")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "stage.json").unlink()
    for place in PLACES:
        with pytest.raises(
            UserError, match="lacks model.norm.weight and has weights .* no place for, more and .* shape"
        ):
            load(folder, place)


def test_auto_takes_the_device_where_the_model_fits(folder, monkeypatch):
    shards, cpu = Shards(folder), torch.device("cpu")
    assert pick_offload("auto", shards, cpu, torch.float32) == "none"
    monkeypatch.setattr("compression.offload.free_ram", lambda: 10_000)
    assert pick_offload("auto", shards, cpu, torch.float32) == "disk"
    assert pick_offload("cpu", shards, cpu, torch.float32) == "cpu"
    assert free_ram() > 10**8


# Through the command lines.


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A language model of several files, with a text beside it."""
    model = tiny_decoder("llama", tie_word_embeddings=False, max_position_embeddings=128)
    folder = save_decoder(tmp_path_factory.mktemp("sharded") / "model", model, max_shard_size=40_000)
    (folder.parent / "text.txt").write_text(letters(30_000))
    assert len(Shards(folder).files) > 3
    return folder


def prune(script, base, output, name, *flags, expect=0):
    ratio = ["--pruning_ratio", "0.4", "--round_to", "8", "--output_name", name]
    return run_script(script, *pruning_flags(base, output), *ratio, *flags, expect=expect)


def weights_of(folder):
    shards = Shards(folder)
    return shards.tensors(shards.shapes)


SCRIPTS = {
    "run_global_pruning.py": ["--iterative_steps", "2", "--attention_factors", "0.5", "2", "--removal_steps", "3"],
    "gqa_aware_pruning.py": ["--protect_first", "1", "--protect_last", "1", "--iterative_steps", "2"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_streamed_pruning_gives_the_model_that_pruning_in_memory_gives(sharded, tmp_path, script):
    size = ["--max_shard_size", "0.02MB"]
    for place in ("none", *PLACES):
        prune(script, sharded, tmp_path, place, *SCRIPTS[script], *size, "--offload", place)
    whole = tmp_path / "none"
    for place in PLACES:
        streamed = tmp_path / place
        assert len(Shards(streamed / "models").files) > 3
        assert (streamed / "models" / "config.json").read_text() == (whole / "models" / "config.json").read_text()
        expected, found = weights_of(whole / "models"), weights_of(streamed / "models")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
        figures = [read_json(place / "evaluation" / "evaluation_results.json")["pruned"] for place in (streamed, whole)]
        name = next(iter(figures[0]["perplexity"]))
        assert figures[0]["perplexity"][name] == pytest.approx(figures[1]["perplexity"][name], rel=1e-3)
        assert sorted(path.name for path in (streamed / "models").glob("[!m]*")) == sorted(
            path.name for path in (whole / "models").glob("[!m]*")
        )
        model, ids = load(streamed / "models"), token_ids(1)
        assert torch.equal(load(streamed / "models", place)(ids).logits, model(ids).logits)
    assert not list(tmp_path.glob(".*resume"))


def test_a_uniform_model_is_of_the_stock_class(sharded, tmp_path):
    prune("run_global_pruning.py", sharded, tmp_path, "uniform", "--uniform", "--offload", "disk", "--save_bin")
    model = load(tmp_path / "uniform" / "models")
    assert type(model).__name__ == "LlamaForCausalLM"
    states = torch.load(tmp_path / "uniform" / "models" / "pruned_model.bin")
    assert all(torch.equal(states[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_streamed_run_goes_on_to_the_same_files(sharded, tmp_path, script):
    flags = [*SCRIPTS[script], "--offload", "disk"]
    prune(script, sharded, tmp_path, "whole", *flags)
    everything = [*pruning_flags(sharded, tmp_path), "--pruning_ratio", "0.4", "--round_to", "8", *flags]
    for call in (6, 3):  # in the second step's pass, then in what was left of it
        at = "compression.offload.LayerWriter.add"
        run_killed(script, *everything, "--output_name", "killed", "--resume", at=at, call=call)
    prune(script, sharded, tmp_path, "killed", *flags, "--resume")
    for name in Shards(tmp_path / "whole" / "models").files:
        assert (tmp_path / "killed" / "models" / name).read_bytes() == (
            tmp_path / "whole" / "models" / name
        ).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_shard_size", "big"], "--max_shard_size big: allowed is a size above 0 such as 500MB or 5GB"),
        (["--max_shard_size", "-1GB"], "--max_shard_size -1GB: allowed is a size above 0"),
        (
            ["--offload", "disk", "--run_evaluation", "efficiency"],
            "--run_evaluation efficiency: efficiency needs the model in memory, and --offload is disk",
        ),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(sharded, tmp_path, flags, message):
    for script in SCRIPTS:
        ended = prune(script, sharded, tmp_path, "wrong", *flags, expect=2)
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and message in ended.stderr
        assert not list(tmp_path.iterdir())


def test_the_search_finds_the_same_and_keeps_no_model_of_a_trial(sharded, tmp_path, monkeypatch):
    flags = ["--target_perplexity", "300", "--search_steps", "2", "--protect_first", "0", "--protect_last", "0"]
    found, kept, forget = [], [], SavedParts.forget

    def note(self, prefix):
        forget(self, prefix)
        kept.extend(self.folder.glob("*model*"))

    monkeypatch.setattr(SavedParts, "forget", note)
    for place in ("none", "disk"):
        prune("gqa_aware_pruning.py", sharded, tmp_path, place, *flags, "--offload", place)
        found.append(read_json(tmp_path / place / "analysis" / "rate_search.json"))
    for mine, other in zip(*found, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    assert len(found[0]) > 1 and not kept


def test_an_offloaded_layer_that_is_done_with_is_gone(folder, tmp_path):
    """Whatever of it was kept, cut down or taken out; else a large model would be in memory at the end."""
    model, fetched, load_weights = load(folder, "disk"), [], torch.nn.Module.load_state_dict
    kept = {kind: [torch.ones(count).bool() for _ in range(4)] for kind, count in ((GROUPS, 4), (CHANNELS, 48))}
    kept[GROUPS][1][:], kept[CHANNELS][2][:2], kept[CHANNELS][3][:] = False, False, False
    repair_one = repairing(model, kept, RepairText(model, token_ids(4), error_share=0.5))

    def note(module, tensors, **options):
        found = load_weights(module, tensors, **options)
        fetched.append([weakref.ref(parameter) for parameter in module.parameters()])
        return found

    def before(index):
        assert not any(reference() is not None for layer in fetched[:-1] for reference in layer)
        repair_one(index)

    gc.disable()
    try:
        with patch.object(torch.nn.Module, "load_state_dict", note):
            write_shrunk_decoder(model, kept, tmp_path, 10**9, before)
    finally:
        gc.enable()
    assert len(fetched) == 4

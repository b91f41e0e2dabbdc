"""Every family of decoders, and its variants: what is done to a language model, on random weights of its layout.

benchmarks/families.py makes a table of this file: a test is a column, a model type or variant a row.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DECODERS,
    MORE_DECODERS,
    VARIANTS,
    letters,
    letters_tokenizer,
    save_decoder,
    tiny_decoder,
    write_zero_shot,
)
from test_decoder_surgery import difference_elsewhere, save_elsewhere
from transformers import AutoModelForCausalLM

from compression.checkpoint import load_language_model
from compression.config import pick
from compression.decoder import check_layout, decoder_of
from compression.flops import count_macs, encoder_macs_formula
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring, masked
from compression.llm.gqa_pruning import Cuts, LayerwisePruning
from compression.llm.lora import add_lora, draw_adapter
from compression.llm.perplexity import perplexity
from compression.llm.recovery import LanguageModelling
from compression.llm.recovery_settings import Recovery
from compression.llm.rows import of_windows
from compression.llm.text import CalibrationText
from compression.llm.zeroshot import zero_shot
from compression.quantization import FourBit, pack_linears
from compression.sharding import fill
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, family_of, layers_of
from compression.surgery import shrink_decoder, stock_group_counts, to_pruned, to_stock
from compression.timing import measure_generation
from gqa_aware_pruning import GQAAwarePruningConfig
from post_training import PostTrainingConfig
from run_global_pruning import GlobalPruningConfig

ENTRIES = {name: (name, {}) for name in DECODERS | MORE_DECODERS} | VARIANTS
# Layer 0 becomes narrow, layer 1 goes whole, layer 2 loses its MLP, layer 3 its attention.
KEPT = {
    GROUPS: [torch.tensor(row).bool() for row in ([1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0])],
    CHANNELS: [torch.arange(48) % 2 == 0, torch.zeros(48).bool(), torch.zeros(48).bool(), torch.arange(48) < 8],
}


@pytest.fixture(params=ENTRIES)
def entry(request):
    return request.param


@pytest.fixture
def model(entry):
    family, fields = ENTRIES[entry]
    return tiny_decoder(family, **fields)


@pytest.fixture
def small(model):
    return shrink_decoder(model, KEPT)


@pytest.fixture
def ids():
    """Longer than the windows that layers attend to, and than the lengths from which positions are stretched."""
    return torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(3, 120, (8, 20), generator=torch.Generator().manual_seed(4))
    return CalibrationText(scores=ids[:4], repair=ids, held_out=ids[4:], batch_size=2)


@torch.no_grad()
def test_masked_is_smaller(model, ids):
    """The masked model computes what the smaller one does, with every kernel that the family has."""
    dense = model(ids).logits
    with masked(model, KEPT):
        expected = model(ids).logits
    torch.testing.assert_close(model(ids).logits, dense, atol=0, rtol=0)
    small = shrink_decoder(model, KEPT)
    torch.testing.assert_close(small(ids).logits, expected, atol=1e-5, rtol=0)
    assert (dense - expected).abs().max() > 0.1
    implementation = small.config._attn_implementation
    small.set_attn_implementation("eager")
    torch.testing.assert_close(small(ids).logits, expected, atol=1e-5, rtol=0)
    assert implementation == ("eager" if "gemma2" in small.config.model_type else "sdpa"), "no other caps attention"


@torch.no_grad()
def test_loads_inside(small, ids, tmp_path):
    check_layout(decoder_of(small))
    folder = save_decoder(tmp_path / "small", small)
    loaded, _ = load_language_model(folder)
    torch.testing.assert_close(loaded(ids).logits, small(ids).logits, atol=0, rtol=0)
    check_layout(decoder_of(loaded))
    assert layers_of(loaded)[0].groups == 3 and loaded.config.num_hidden_layers == len(layers_of(small))


def test_loads_outside(small, ids, tmp_path):
    save_elsewhere(small, tmp_path)
    assert difference_elsewhere(small, ids, tmp_path) < 1e-6


@torch.no_grad()
def test_is_pruned_again(small, ids):
    parts = layers_of(small)
    again = {kind: [torch.arange(part.count(kind)) % 3 > 0 for part in parts] for kind in DECODER_KINDS}
    with masked(small, again):
        expected = small(ids).logits
    torch.testing.assert_close(shrink_decoder(small, again)(ids).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_uniform_is_stock(model, ids, tmp_path):
    stock, count = type(model), [*stock_group_counts(model), 4][1]
    same = {GROUPS: [torch.arange(4) < count] * 4, CHANNELS: [torch.arange(48) < 40] * 4}
    small = shrink_decoder(model, same)
    expected = small(ids).logits
    to_stock(small).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is stock and layers_of(loaded)[3].groups == count
    torch.testing.assert_close(loaded(ids).logits, expected, atol=0, rtol=0)


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)


def test_generates_with_a_cache_what_it_does_without(entry, small, ids):
    """Also where the original length is reached on the way."""
    if "dynamic" in entry:
        pytest.skip("its frequencies grow with the text, and what is in a cache keeps the old ones")
    for start in (ids[:, :9], ids[:, :13]):
        expected = generate(small, start, use_cache=False)
        for options in ({}, dict(cache_implementation="static")):
            assert torch.equal(generate(small, start, **options), expected), options


@torch.no_grad()
def test_left_padding_changes_nothing(small, ids):
    ids, padding = ids[:1, :6], torch.zeros(1, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)
    options = dict(return_dict_in_generate=True, output_logits=True)
    found = generate(small, padded, attention_mask=mask, **options)
    expected = generate(small, ids, **options)
    assert torch.equal(found.sequences[:, 3:], expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)


@torch.no_grad()
def test_perplexity_is_that_of_its_own_logits(model, ids):
    logits = model(ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-5)


def test_macs_are_those_of_the_formula(model):
    for found in (model, shrink_decoder(copy.deepcopy(model), KEPT)):
        assert count_macs(found, 16).encoder == encoder_macs_formula(layers_of(found), 16)


def test_speed_is_measured(small):
    """With a prompt that is longer than the windows that layers attend to."""
    found = measure_generation({"small": small}, torch.device("cpu"), 8, 2, repeats=1)["small"]
    assert found["prefill"]["median_tokens_per_second"] > 0 and found["decode"]["new_tokens"] == 2


def one_step(model, ids):
    """The recovery training's loss is the model's own; then a step."""
    recovery = pick(Recovery, PostTrainingConfig.make())
    recipe = LanguageModelling(recovery, len(ids), None)
    batch = of_windows(ids).collate([0, 1], 0)
    loss = recipe.loss(recipe.module(model), batch, 0)["loss"]
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert recipe.loss(recipe.module(model), batch, 0)["loss"] < loss


def test_trains_adapters_and_merges_them(small, ids):
    adapted = add_lora(small, 4, 8.0, 0.0, family_of(small).projections)
    fill(small, draw_adapter(small, 0))
    one_step(small, ids)
    places = {name.split(".")[-4] for name, _ in small.named_parameters() if "lora_A" in name}
    assert places == set(family_of(small).projections)
    expected = small(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=0)


def test_trains_all_weights(small, ids):
    one_step(small, ids)


@torch.no_grad()
def test_computes_in_4_bits(small, ids, tmp_path):
    dense = small(ids).logits
    packed = to_pruned(small)
    pack_linears(packed, FourBit(), torch.float32)
    loaded, _ = load_language_model(save_decoder(tmp_path / "packed", packed), dtype=None)
    torch.testing.assert_close(loaded(ids).logits, packed(ids).logits, atol=0, rtol=0)
    assert 1e-3 < (loaded(ids).logits - dense).square().mean() / dense.square().mean() < 0.5


def test_h_gsp(model, text, ids):
    settings = GlobalPruningConfig.make(pruning_ratio=0.4, epsilon=0.3, round_to=1, attention_factors=(0.5, 2.0))
    total = sum(parts.parameters for parts in layers_of(model))
    pruning = GlobalPruning(model, pick(Scoring, settings), pick(Budget, settings), text)
    small = pruning.prune()
    left = sum(parts.parameters for parts in layers_of(small))
    assert 0.39 * total < total - left < 0.45 * total
    check_layout(decoder_of(small))
    assert small(ids).logits.isfinite().all()


def test_gqa_aware(model, text, ids):
    settings = GQAAwarePruningConfig.make(round_to=1, iterative_steps=2, attention_ratio=1.0)
    stock = copy.deepcopy(model)
    pruning = LayerwisePruning(model, [0.0, 0.5, 0.5, 0.0], pick(Cuts, settings), text)
    small = pruning.prune()
    assert [parts.groups for parts in layers_of(small)] == [4, 2, 2, 4]
    assert pruning.removed("1-2") == pytest.approx(0.5, abs=0.02)
    check_layout(decoder_of(small))
    assert not torch.allclose(small(ids).logits, stock(ids).logits, atol=0.1)


def test_zero_shot(small, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # which takes a second
    words = letters(36).split()
    rows = [{"goal": f"{a} {b}", "sol1": c, "sol2": d} for a, b, c, d in zip(*[iter(words)] * 4, strict=True) if c != d]
    tokenizer = letters_tokenizer()
    for row in rows:
        ids = tokenizer(f"Question: {row['goal']}\nAnswer:", return_tensors="pt").input_ids
        words = tokenizer.convert_tokens_to_ids([row["sol1"], row["sol2"]])
        row["label"] = int(small(ids).logits[0, -1, words].argmax())
    write_zero_shot(tmp_path, "piqa", *rows)
    assert zero_shot(small, tokenizer, ["piqa"], str(tmp_path))["piqa"]["acc"] == 1

"""Generation with pruned language models: the key-value cache of layers without attention, with windows and without."""

import pytest
import torch
from conftest import DECODERS, MIXED, tiny_decoder
from transformers import DynamicCache

from compression.structures import CHANNELS, GROUPS
from compression.surgery import shrink_decoder

# What the families' layers have besides; a family that is not named here has its defaults.
FAMILIES = dict.fromkeys(DECODERS, {}) | {
    "llama": dict(mlp_bias=True),
    "mistral": dict(sliding_window=4),
    "qwen2": MIXED,
    "qwen3": MIXED | dict(layer_types=["full_attention", "sliding_attention"] * 2, attention_bias=True),
}


def pruned(family, without=1, seed=0):
    """A model one of whose layers has no attention, another no MLP, and another neither; it may be the first."""
    groups = [torch.tensor(row).bool() for row in ([1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0])]
    channels = [torch.arange(48) < many for many in (48, 8, 0, 0)]
    order = {0: [1, 0, 2, 3], 1: [0, 1, 2, 3], 3: [3, 0, 2, 1]}[without]
    kept = {GROUPS: [groups[place] for place in order], CHANNELS: [channels[place] for place in order]}
    return shrink_decoder(tiny_decoder(family, seed=seed, **FAMILIES[family]), kept)


@pytest.fixture(params=[(family, without) for family in FAMILIES for without in (0, 1, 3)], ids=str)
def model(request):
    return pruned(*request.param)


@pytest.fixture
def ids():
    return torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, **options)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["the model's own", "without the config"])
def test_logits_with_the_cache_are_those_without(model, ids, cache):
    text = ids.repeat(1, 2)
    past = DynamicCache(config=model.config) if cache == "the model's own" else DynamicCache()
    pieces = [model(piece, past_key_values=past, use_cache=True).logits for piece in text.split([7, 1, 3, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(text).logits, atol=1e-5, rtol=0)
    assert past.get_seq_length() == 18


def test_every_cache_generates_what_none_does(model, ids):
    expected = generate(model, ids, use_cache=False)
    assert expected.shape == (2, 21)
    for options in ({}, dict(cache_implementation="static"), dict(past_key_values=DynamicCache())):
        assert torch.equal(generate(model, ids, **options), expected), options


def test_beams_and_left_padding(model, ids):
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    for options in (dict(num_beams=3), dict(attention_mask=padded)):
        expected = generate(model, ids, use_cache=False, **options)
        assert torch.equal(generate(model, ids, **options), expected), options
        assert torch.equal(generate(model, ids, cache_implementation="static", **options), expected), options


@pytest.mark.parametrize("guess", ["prompt lookup", "pruned assistant", "dense assistant"])
def test_guessed_tokens_are_taken_back(model, ids, guess):
    text = ids[:1].repeat(1, 3)
    family = model.config.model_type.removeprefix("pruned_")
    options = {
        "prompt lookup": lambda: dict(prompt_lookup_num_tokens=3),
        "pruned assistant": lambda: dict(assistant_model=pruned(family, without=0, seed=3)),
        "dense assistant": lambda: dict(assistant_model=tiny_decoder(family, seed=3, **FAMILIES[family])),
    }[guess]()
    assert torch.equal(generate(model, text, **options), generate(model, text, use_cache=False))


def test_pruned_model_as_the_assistant_of_a_dense_one(model, ids):
    family = model.config.model_type.removeprefix("pruned_")
    dense = tiny_decoder(family, **FAMILIES[family])
    text = ids[:1].repeat(1, 3)
    assert torch.equal(generate(dense, text, assistant_model=model), generate(dense, text))


@torch.no_grad()
def test_a_layer_without_attention_holds_a_number_for_each_token(ids):
    model = pruned("qwen2", without=0)
    past = model(ids, use_cache=True).past_key_values
    assert past.layers[0].keys.shape == (2, 1, 3, 1), "a window of 4 keeps the last 3"
    assert past.layers[1].keys.shape[1] == 3, "a layer with attention keeps its heads"
    assert [layer.get_seq_length() for layer in past.layers] == [9] * 3

"""Adapters: they leave the model as it was, come back as they were saved, merge exactly, and fit one model only."""

import json
import warnings

import pytest
import torch
from conftest import KEPT, tiny_decoder
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from compression.checkpoint import load_tensors, save_folder
from compression.flops import count_macs
from compression.llm.lora import add_lora, load_adapter, write_adapter
from compression.runtime import UserError
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, HEADS, NEURONS, family_of, layers_of
from compression.surgery import shrink_decoder


def pruned(family="llama"):
    """Four layers: one whole, one narrow, one without attention, one without MLP."""
    groups = [*KEPT[HEADS][:2], torch.zeros(4).bool(), torch.ones(4).bool()]
    channels = [*KEPT[NEURONS][:2], torch.ones(48).bool(), torch.zeros(48).bool()]
    return shrink_decoder(tiny_decoder(family, max_position_embeddings=128), {GROUPS: groups, CHANNELS: channels})


def with_adapter(model, r=4, seed=0):
    """An adapter as a training leaves it: with a B that is not zero."""
    adapted = add_lora(model, r, 8.0, 0.0, family_of(model).projections)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapted


@pytest.fixture
def ids():
    return torch.randint(1, 120, (2, 11), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_new_adapter_changes_nothing_and_sits_where_there_is_a_layer(ids, family):
    model = pruned(family)
    expected = model(ids).logits
    whole = {name for name, _ in model.named_parameters()}
    add_lora(model, 4, 8.0, 0.0, family_of(model).projections)
    assert torch.equal(model(ids).logits, expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not whole & set(trained) and len(trained) == 2 * (2 * 7 + 3 + 4)
    assert type(model) is type(pruned(family))


@torch.no_grad()
def test_saved_and_loaded_adapter_computes_the_same(ids, tmp_path):
    model = pruned()
    adapted = with_adapter(model)
    expected, base = model(ids).logits, pruned()(ids).logits
    assert (expected - base).abs().max() > 0.1
    write_adapter(adapted, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    fresh = pruned()
    fresh.name_or_path = "elsewhere"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapter(fresh, tmp_path, "--lora_dir")
    assert torch.equal(fresh(ids).logits, expected)
    assert not any(parameter.requires_grad for parameter in fresh.parameters())


@torch.no_grad()
def test_merged_model_is_of_its_own_class_and_computes_the_same(ids):
    model = pruned()
    adapted = with_adapter(model)
    expected = model(ids).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is type(pruned()) and merged.state_dict().keys() == pruned().state_dict().keys()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=0)


def test_an_adapters_macs_and_structures_are_counted_right():
    dense = pruned()
    before = count_macs(dense, 16)
    sizes = [layer.parameters for layer in layers_of(dense)]
    with_adapter(dense, r=4)
    after = count_macs(dense, 16)
    linears = [linear for layer in layers_of(dense) for linear in layer.linears()]
    extra = 16 * 4 * sum(linear.in_features + linear.out_features for linear in linears)
    assert after.as_dict()["encoder"] - before.as_dict()["encoder"] == extra
    assert [layer.parameters for layer in layers_of(dense)] == sizes


def test_structures_of_4_bit_layers_are_counted_by_their_sizes(tmp_path):
    model = pruned()
    expected = [[layer.structure_parameters(kind) for kind in DECODER_KINDS] for layer in layers_of(model)]
    model.save_pretrained(tmp_path)
    packed = type(model).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert type(layers_of(packed)[0].attention[0].module).__name__ == "Linear4bit"
    assert [[layer.structure_parameters(kind) for kind in DECODER_KINDS] for layer in layers_of(packed)] == expected


@pytest.fixture
def adapter(tmp_path):
    write_adapter(with_adapter(pruned()), tmp_path)
    return tmp_path


def refused(folder, model=None):
    with pytest.raises(UserError) as caught:
        load_adapter(model or pruned(), folder, "--lora_dir")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_adapter(tmp_path, adapter):
    message = f"--lora_dir {tmp_path / 'none'}: no adapter there (no adapter_config.json); make it with: python post_"
    assert message in refused(tmp_path / "none")
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter there (no adapter_model.safetensors)" in refused(adapter)


@pytest.mark.parametrize("other", [tiny_decoder, lambda: tiny_decoder(num_hidden_layers=2)])
def test_adapter_of_another_model(adapter, other):
    message = refused(adapter, other())
    assert "the adapter does not fit the model (" in message and "name the model it was trained on" in message


def test_adapter_that_lacks_a_layer_is_refused_and_not_filled_up(adapter):
    weights = load_tensors(adapter / "adapter_model.safetensors")
    name = min(weights)
    del weights[name]
    save_file(weights, adapter / "adapter_model.safetensors")
    assert f"({name} is none, the model needs [" in refused(adapter)


def test_unreadable_and_foreign_adapters(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"not weights")
    assert "cannot be read as an adapter" in refused(adapter)
    write_adapter(with_adapter(pruned()), adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "cannot be read as an adapter" in refused(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM"}))
    assert "is an adapter of type PeftType.IA3; allowed is LORA" in refused(adapter)


def change(adapter, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", "8", "r in adapter_config.json is 8; allowed is a whole number from 1"),
        ("r", None, "r in adapter_config.json is None"),
        ("r", True, "r in adapter_config.json is True"),
        ("r", 10**9, "adapter_config.json asks for rank 1000000000, the weights have 4"),
        ("r", 8, "adapter_config.json asks for rank 8, the weights have 4"),
        ("rank_pattern", {"q_proj": 10**9}, "asks for rank 1000000000"),
        ("rank_pattern", [4], "rank_pattern in adapter_config.json is [4]; allowed is whole numbers from 1 by name"),
        ("rank_pattern", None, "cannot be read as an adapter ("),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern in adapter_config.json is"),
        ("lora_alpha", float("inf"), "lora_alpha in adapter_config.json is inf; allowed is a number from 0"),
        ("lora_alpha", [16], "lora_alpha in adapter_config.json is [16]"),
        ("lora_dropout", "a", "lora_dropout in adapter_config.json is a; allowed is a number from 0 to 1"),
        ("target_modules", 7, "target_modules in adapter_config.json is 7; allowed is a list of names"),
        ("target_modules", [1], "target_modules in adapter_config.json is [1]"),
        ("peft_type", ["LORA"], "peft_type in adapter_config.json is ['LORA']; allowed is text"),
        ("peft_type", "LOBA", "cannot be read as an adapter ("),
        ("task_type", 3, "cannot be read as an adapter ("),
        ("layers_to_transform", {"a": "b"}, "the adapter does not fit the model ("),
        ("bias", 3, "cannot be read as an adapter ("),
        ("modules_to_save", 3, "cannot be read as an adapter ("),
        ("megatron_config", {"a": 1}, "megatron_config in adapter_config.json is {'a': 1}; allowed is null"),
    ],
)
def test_fields_of_a_wrong_type_are_named(adapter, field, value, message):
    change(adapter, **{field: value})
    assert message in refused(adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "adapter_config.json holds a list; allowed is an object"),
        (b"null", "adapter_config.json holds a NoneType; allowed is an object"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"{}", "is an adapter of type None; allowed is LORA"),
        (b"", "adapter_config.json: is empty"),
        (b"\xff\xfe{\0}\0", "byte 0 begins as UTF-16"),
    ],
)
def test_settings_that_are_no_object_are_refused(adapter, content, message):
    (adapter / "adapter_config.json").write_bytes(content)
    assert message in refused(adapter)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(adapter, bad):
    weights = load_tensors(adapter / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name][1, 2] = bad
    save_file(weights, adapter / "adapter_model.safetensors")
    assert f"cannot be read as an adapter ({name} has values that are not finite)" in refused(adapter)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_cut_off_are_refused(adapter, name, share):
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: int(share * len(content)) - (share == 0.999)])
    refused(adapter)


def test_a_flipped_byte_of_a_saved_adapter_is_noticed(tmp_path):
    folder = save_folder(
        tmp_path / "adapter", lambda path: write_adapter(with_adapter(pruned()), path), {"stage": "recovery"}
    )
    load_adapter(pruned(), folder, "--lora_dir")
    for name in ("adapter_model.safetensors", "adapter_config.json", "stage.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(UserError, match=f"{folder}/{name}"):
            load_adapter(pruned(), folder, "--lora_dir")
        (folder / name).write_bytes(whole)

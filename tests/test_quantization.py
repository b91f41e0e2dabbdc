"""4-bit weights: bit for bit those of bitsandbytes, in training, in the packed model and in its checkpoint."""

import copy
import inspect
import itertools
import json
import weakref
from typing import get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from conftest import DECODERS, KEPT, MODELS, save_decoder, tiny_decoder, tiny_distilbert
from safetensors.torch import load_file, save_file
from scripts import run_elsewhere, start_program

from compression.checkpoint import load_classifier, load_language_model, save_checkpoint
from compression.fake_quantization import FakeQuantizedLinear, add_fake_quantization, remove_fake_quantization
from compression.flops import count_macs, count_parameters
from compression.formats import TABLE_FORMATS, EightBit, FourBit, dequantized_weight
from compression.modeling import pruned_decoder, pruned_encoder
from compression.quantization import (
    Blocksize,
    Format,
    QuantType,
    Storage,
    bytes_by_part,
    check_exact,
    embedding_tables,
    encoder_linears,
    pack,
    pack_linears,
)
from compression.runtime import UserError
from compression.structures import CHANNELS, GROUPS
from compression.surgery import shrink, shrink_decoder, to_pruned

# Widths that are no multiple of the blocksize, as pruned layers have; a tail of one; less than one block.
SHAPES = [(64, 64), (48, 24), (33, 50), (31, 7), (1, 4096), (5, 258), (3, 65), (1, 63), (128, 384)]
LABELS = torch.tensor([0, 1, 0, 1, 1])


def thresholds(quant_type):
    """Numbers at, right below and right above the points where the nearest value changes, and the values."""
    values = get_4bit_type(quant_type, device="cpu").unique()
    middles = (values[:-1] + values[1:]) / 2
    beside = [middles.nextafter(torch.tensor(side)) for side in (-2.0, 2.0)]
    return torch.cat([middles, *beside, values, torch.linspace(-1, 1, 33)])


def weights(shape, quant_type, generator):
    """Weights of every kind that rounding could get wrong."""
    normal = torch.randn(shape, generator=generator)
    yield 0.05 * normal
    yield 0 * normal
    yield normal * (torch.arange(normal.numel()).view(shape) > 70)  # blocks of zeros
    yield from (normal * scale for scale in (1e-42, 1e-38, 1e-20, 1e20, 1e33))
    yield normal * 10.0 ** torch.randint(-44, 33, shape, generator=generator)
    numbers = thresholds(quant_type)
    exact = numbers[torch.randint(len(numbers), shape, generator=generator)].clone()
    exact.view(-1)[::32] = 1.0  # so that a block's largest magnitude is 1 and its numbers stay as they are
    yield exact


def by_bitsandbytes(weight, storage):
    settings = dict(blocksize=storage.blocksize, quant_type=storage.quant_type)
    codes, state = quantize_4bit(weight.reshape(1, -1), compress_statistics=storage.double_quant, **settings)
    return dequantize_4bit(codes, state).view(weight.shape)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", get_args(Blocksize))
@pytest.mark.parametrize("quant_type", get_args(QuantType))
def test_values_are_those_of_bitsandbytes(quant_type, blocksize, double_quant):
    storage, generator = FourBit(quant_type, blocksize, double_quant), torch.Generator().manual_seed(blocksize)
    for shape in SHAPES:
        for weight in weights(shape, quant_type, generator):
            before = weight.clone()
            assert torch.equal(storage.values(weight), by_bitsandbytes(weight, storage)), shape
            assert torch.equal(weight, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("double_quant", [False, True])
def test_values_on_a_gpu_are_those_of_bitsandbytes(double_quant):
    storage, generator = FourBit(double_quant=double_quant), torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for weight in weights(shape, "nf4", generator):
            assert torch.equal(storage.values(weight.cuda()), by_bitsandbytes(weight.cuda(), storage))


def test_only_fp32_weights_are_taken():
    with pytest.raises(TypeError, match="must be float32, found torch.float16"):
        FourBit().values(torch.zeros(4, 4).half())


# Training.


def test_gradient_passes_straight_through():
    linear = torch.nn.Linear(96, 40)
    layer, input = FakeQuantizedLinear(linear, FourBit()), torch.randn(7, 96)
    layer(input).square().sum().backward()
    outputs = torch.nn.functional.linear(input, FourBit().values(linear.weight.detach()), linear.bias)
    assert torch.equal(layer(input), outputs)
    torch.testing.assert_close(linear.weight.grad, 2 * outputs.detach().T @ input)
    torch.testing.assert_close(linear.bias.grad, 2 * outputs.detach().sum(0))


def test_values_are_made_once_per_optimizer_step(monkeypatch):
    calls, values = [], FourBit.values
    monkeypatch.setattr(FourBit, "values", lambda *inputs: calls.append(1) or values(*inputs))
    layer, input = FakeQuantizedLinear(torch.nn.Linear(96, 40), FourBit()), torch.randn(7, 96)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for step in range(1, 4):
        for _ in range(2):
            layer(input).sum().backward()
        assert len(calls) == step
        optimizer.step()
        layer.refresh()
        assert torch.equal(layer.values, values(FourBit(), layer.weight.detach()))
    layer.load_state_dict({name: tensor + 1 for name, tensor in layer.state_dict().items()})
    assert torch.equal(layer.values, values(FourBit(), layer.weight.detach()))


def test_training_goes_on_after_an_evaluation(batch):
    """Values made in inference mode must not end up in the graph of the next step."""
    model = tiny_distilbert()
    add_fake_quantization(model, Format())
    with torch.inference_mode():
        model(**batch)
    model(**batch, labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_fake_quantization_comes_off_again(tiny_model, batch):
    plain = copy.deepcopy(tiny_model)
    layers = add_fake_quantization(tiny_model, Format())
    assert list(tiny_model.state_dict()) == list(plain.state_dict())
    assert len(layers) == 18 and not any("classifier" in name or "pooler" in name for name in layers)
    with torch.no_grad():
        assert not torch.equal(tiny_model(**batch).logits, plain(**batch).logits)
        remove_fake_quantization(tiny_model)
        assert torch.equal(tiny_model(**batch).logits, plain(**batch).logits)
    assert [type(module) for module in tiny_model.modules()] == [type(module) for module in plain.modules()]


# Packed models.


@pytest.fixture(params=["dense", "pruned"])
def model(request, tiny_model):
    """Each family, dense and with layers of different widths."""
    return tiny_model if request.param == "dense" else shrink(tiny_model, KEPT)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def train_a_little(model, batch, storage):
    """Logits and values of a model after three steps with fake quantization; the model is plain again afterwards."""
    layers = add_fake_quantization(model, storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(3):
        model(**batch, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers.values():
            layer.refresh()
    expected, values = logits(model, batch), {name: layer.values for name, layer in layers.items()}
    remove_fake_quantization(model)
    return expected, values


@pytest.mark.parametrize(("blocksize", "double_quant"), itertools.product([64, 128], [False, True]))
def test_the_trained_model_is_the_exported_one(model, batch, tokenizer, tmp_path, blocksize, double_quant):
    storage = Format(FourBit(blocksize=blocksize, double_quant=double_quant), TABLE_FORMATS[8 if double_quant else 4])
    expected, values = train_a_little(model, batch, storage)
    packed = pack(model, storage, torch.float32)
    check_exact(packed, values)
    folder = save_checkpoint(tmp_path / "packed", packed, tokenizer, {})
    reloaded, _ = load_classifier(folder)
    for name, trained in values.items():
        assert torch.equal(dequantized_weight(reloaded.get_submodule(name)), trained), name
    torch.testing.assert_close(logits(reloaded, batch), expected, atol=1e-6, rtol=0)


ELSEWHERE = """
import sys
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
folder, batch = sys.argv[1], load_file(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
expected = batch.pop("logits")
print((model(**batch).logits - expected).abs().max().item())
"""


@pytest.mark.parametrize("family", sorted(MODELS))
def test_checkpoint_loads_elsewhere_with_the_trained_logits(family, batch, tokenizer, tmp_path):
    model = shrink(MODELS[family](), KEPT)
    expected, _ = train_a_little(model, batch, Format())
    folder = save_checkpoint(tmp_path / "packed", pack(model, Format(), torch.float32), tokenizer, {})
    save_file(batch | {"logits": expected}, tmp_path / "batch.safetensors")
    result = run_elsewhere(ELSEWHERE, tmp_path, folder, tmp_path / "batch.safetensors").check()
    assert float(result.stdout.split()[-1]) < 1e-4


def test_stale_values_are_found_before_anything_is_saved(batch):
    model = tiny_distilbert()
    layers = add_fake_quantization(model, Format())
    model(**batch, labels=LABELS).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    values = {name: layer.values for name, layer in layers.items()}
    remove_fake_quantization(model)
    with pytest.raises(RuntimeError, match="layer.0.attention.q_lin: the packed weight differs"):
        check_exact(pack(model, Format(), torch.float32), values)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_forward_passes_do_not_change_what_is_saved(tiny_model, batch, tokenizer, tmp_path, compute_dtype):
    packed = pack(tiny_model, Format(), compute_dtype)
    first, second = (tmp_path / name for name in ("first", "second"))
    save_checkpoint(first, packed, tokenizer, {})
    expected = logits(packed, batch)
    save_checkpoint(second, packed, tokenizer, {})
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert torch.equal(logits(load_classifier(second)[0], batch), expected)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_embedding_tables_are_stored_in_so_many_bits(tiny_model, batch, tokenizer, tmp_path, bits):
    storage = Format(tables=TABLE_FORMATS[bits])
    expected, _ = train_a_little(tiny_model, batch, storage)
    folder = save_checkpoint(tmp_path / "packed", pack(tiny_model, storage, torch.float32), tokenizer, {})
    torch.testing.assert_close(logits(load_classifier(folder)[0], batch), expected, atol=1e-6, rtol=0)
    (name,) = [
        name
        for name in load_file(folder / "model.safetensors")
        if "word_embeddings" in name and name.endswith(("codes", "weight"))
    ]
    stored = load_file(folder / "model.safetensors")[name]
    assert stored.nbytes == 120 * 32 * bits // 8


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-3), (8, 0.006), (4, 0.16)])
def test_embedding_rows_keep_close_to_their_values(bits, tolerance):
    rows = torch.randn(50, 384, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    stored = TABLE_FORMATS[bits].values(rows)
    largest = rows.unflatten(-1, (-1, 64)).abs().amax(-1, keepdim=True)
    assert ((stored - rows).unflatten(-1, (-1, 64)).abs() <= tolerance * largest).all()
    assert stored[3].abs().max() == 0


def test_odd_width_cannot_be_stored_in_4_bits():
    model = tiny_distilbert()
    model.distilbert.embeddings.word_embeddings = torch.nn.Embedding(10, 33)
    with pytest.raises(UserError, match="--embedding_bits 4: .* 33 wide, an odd number; use 8, 16 or 32"):
        add_fake_quantization(model, Format())


def test_8bit_checkpoint_reloads(tiny_model, batch, tokenizer, tmp_path):
    packed = pack(tiny_model, Format(EightBit(), TABLE_FORMATS[8]), torch.float32)
    folder = save_checkpoint(tmp_path / "packed", packed, tokenizer, {})
    expected = logits(packed, batch)
    assert torch.equal(logits(load_classifier(folder)[0], batch), expected)
    torch.testing.assert_close(expected, logits(tiny_model, batch), atol=0.1, rtol=0)


def test_head_stays_in_full_precision_and_the_config_names_it(tiny_model, tokenizer, tmp_path):
    folder = save_checkpoint(tmp_path / "packed", pack(tiny_model, Format(), torch.float32), tokenizer, {})
    skipped = json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    bert = "bert" in type(tiny_model).__name__.lower() and "distil" not in type(tiny_model).__name__.lower()
    assert skipped == (["bert.pooler.dense", "classifier"] if bert else ["pre_classifier", "classifier"])
    stored = load_file(folder / "model.safetensors")
    for name in skipped:
        assert torch.equal(stored[f"{name}.weight"], tiny_model.get_submodule(name).weight)


@pytest.mark.parametrize("storage", [Format(), Format(FourBit(blocksize=32)), Format(EightBit(), TABLE_FORMATS[8])])
def test_parameters_and_macs_are_those_of_the_dense_model(tiny_model, storage):
    packed = pack(tiny_model, storage, torch.float32)
    assert count_parameters(packed) == count_parameters(tiny_model)
    assert count_macs(packed, 16) == count_macs(tiny_model, 16)


def test_bytes_by_part(tiny_model, tokenizer, tmp_path):
    packed = pack(tiny_model, Format(), torch.float32)
    before, after = bytes_by_part(tiny_model), bytes_by_part(packed)
    assert before == {part: 4 * count for part, count in count_parameters(tiny_model).items()}
    assert after["head"] == before["head"]
    assert after["embeddings"] < 0.2 * before["embeddings"]
    assert after["total"] == sum(after[part] for part in ("embeddings", "encoder", "head"))
    folder = save_checkpoint(tmp_path / "packed", packed, tokenizer, {})
    stored = load_file(folder / "model.safetensors")
    assert after["total"] == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("linears", [FourBit(), FourBit("fp4", 32), FourBit(double_quant=True), EightBit()])
def test_bytes_of_a_format_are_those_of_a_checkpoint(model, linears, bits, tokenizer, tmp_path):
    storage = Format(linears, TABLE_FORMATS[bits])
    expected = {name: linears.nbytes(linear.weight.shape) for name, linear in encoder_linears(model).items()}
    expected |= {name: storage.tables.nbytes(table.weight.shape) for name, table in embedding_tables(model).items()}
    folder = save_checkpoint(tmp_path / "packed", pack(model, storage, torch.float32), tokenizer, {})
    stored = dict.fromkeys(expected, 0)
    for key, tensor in load_file(folder / "model.safetensors").items():
        for name in stored:
            if key.startswith(f"{name}.") and not key.endswith("bias"):
                settings = ".quant_state." in key
                assert not settings or tensor.nbytes < 200
                stored[name] += 0 if settings else tensor.nbytes
    assert len(stored) == 20 and stored == expected


def test_training_with_8_bit_weights_is_refused():
    with pytest.raises(TypeError, match="training needs 4-bit weights, found EightBit"):
        add_fake_quantization(tiny_distilbert(), Format(EightBit()))


def test_flags_name_the_formats():
    fields = Storage(quant_type="fp4", blocksize=128, double_quant=True, embedding_bits=16)
    assert fields.format() == Format(FourBit("fp4", 128, True), TABLE_FORMATS[16])
    assert fields.format(bits=8) == Format(EightBit(), TABLE_FORMATS[16])


# Language models.


def decoder(family, kind, dtype=torch.float32):
    """Stock; or with layers that differ in width, one of them without attention and another without an MLP."""
    model = tiny_decoder(family)
    if kind == "pruned":
        groups = [torch.tensor(row).bool() for row in ([1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1])]
        channels = [torch.arange(48) < many for many in (48, 9, 0, 33)]
        model = shrink_decoder(model, {GROUPS: groups, CHANNELS: channels})
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    return model


IDS = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoder_logits(model):
    return model(IDS).logits


def packed_decoder(model, linears=None):
    packed = to_pruned(model)
    pack_linears(packed, linears or FourBit(), torch.float32)
    return packed


@pytest.mark.parametrize("kind", ["stock", "pruned"])
@pytest.mark.parametrize("family", sorted(DECODERS))
@pytest.mark.parametrize(
    ("linears", "dtype"),
    [
        (FourBit(), torch.float32),
        (FourBit("fp4", 128, double_quant=True), torch.bfloat16),
        (EightBit(), torch.bfloat16),
    ],
    ids=str,
)
def test_a_decoder_keeps_all_but_its_layers_weights(family, kind, linears, dtype, tmp_path):
    model = decoder(family, kind, dtype)
    weights = {name: linear.weight.detach().float() for name, linear in encoder_linears(model).items()}
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(weights))}
    assert len(weights) == (28 if kind == "stock" else 21) and any("norm" in name for name in kept)
    parameters, macs, before = count_parameters(model), count_macs(model, 16), bytes_by_part(model)

    packed = packed_decoder(model, linears)
    folder, expected = save_decoder(tmp_path / "packed", packed), decoder_logits(packed)
    assert expected.dtype == dtype
    stored, reloaded = load_file(folder / "model.safetensors"), load_language_model(folder, dtype=None)[0]
    for name, tensor in kept.items():
        assert name in model.all_tied_weights_keys or torch.equal(stored[name], tensor), name
        assert reloaded.state_dict()[name].dtype == tensor.dtype == dtype
    if isinstance(linears, FourBit):
        for name, weight in weights.items():
            assert torch.equal(dequantized_weight(reloaded.get_submodule(name)), linears.values(weight)), name
    assert torch.equal(decoder_logits(reloaded), expected)
    wide, _ = load_language_model(folder)
    assert decoder_logits(wide).dtype == torch.float32
    torch.testing.assert_close(decoder_logits(wide), expected.float(), atol=0.3, rtol=0)
    assert (count_parameters(reloaded), count_macs(reloaded, 16)) == (parameters, macs)
    after = bytes_by_part(packed)
    assert after["total"] == sum(tensor.nbytes for tensor in stored.values())
    assert (after["embeddings"], after["head"]) == (before["embeddings"], before["head"])


def test_logits_are_those_of_the_values():
    """Also in layers whose rows are no multiple of the blocksize: see `fix_4bit_layers`."""
    model = decoder("llama", "pruned")
    packed = packed_decoder(copy.deepcopy(model))
    for linear in encoder_linears(model).values():
        linear.weight.data = FourBit().values(linear.weight.detach())
    torch.testing.assert_close(decoder_logits(packed), decoder_logits(model), atol=1e-5, rtol=0)


def test_packed_decoders_generate_with_a_cache_what_they_do_without(tmp_path):
    for family in DECODERS:
        model, _ = load_language_model(save_decoder(tmp_path / family, packed_decoder(decoder(family, "pruned"))))
        options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
        assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


DECODERS_ELSEWHERE = """
import sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
inputs = load_file(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print((model(inputs["ids"]).logits - inputs[folder.rsplit("/")[-1]]).abs().max().item())
"""
IN_THE_PROJECT = DECODERS_ELSEWHERE.replace(
    "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)", "load_language_model(folder)[0]"
).replace("transformers import AutoModelForCausalLM", "compression.checkpoint import load_language_model")


def test_packed_decoders_load_in_other_processes_with_the_same_logits(tmp_path):
    folders, inputs = [], {"ids": IDS}
    for family, kind in itertools.product(DECODERS, ("stock", "pruned")):
        packed = packed_decoder(decoder(family, kind))
        folders.append(save_decoder(tmp_path / f"{family}_{kind}", packed))
        inputs[folders[-1].name] = decoder_logits(packed)
    save_file(inputs, tmp_path / "inputs.safetensors")
    arguments = tmp_path / "inputs.safetensors", *folders
    inside = start_program(IN_THE_PROJECT, *arguments)
    outside = run_elsewhere(DECODERS_ELSEWHERE, tmp_path, *arguments)
    for result in (inside.wait(), outside):
        found = [float(line) for line in result.check().stdout.split()]
        assert len(found) == 8 and max(found) < 1e-5


def test_weights_go_as_their_packed_form_comes(monkeypatch):
    model = to_pruned(decoder("llama", "stock"))
    plain = [weakref.ref(linear.weight) for linear in encoder_linears(model).values()]
    left, pack_linear = [], FourBit.pack_linear

    def counted(*inputs):
        left.append(sum(weight() is not None for weight in plain))
        return pack_linear(*inputs)

    monkeypatch.setattr(FourBit, "pack_linear", counted)
    pack_linears(model, FourBit(), torch.float32)
    assert left == list(range(28, 0, -1))


@pytest.mark.parametrize("name", ["fix_4bit_layers", "forward_4bit"])
def test_both_modeling_files_have_the_same_4_bit_layers(name):
    sources = [inspect.getsource(getattr(file, name)) for file in (pruned_decoder, pruned_encoder)]
    assert sources[0] == sources[1]

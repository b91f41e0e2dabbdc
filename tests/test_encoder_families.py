"""Every encoder family: pruned, loaded elsewhere, quantized, trained in 4 bits, counted, exported.

A family is here by its model type, one of its layouts by its model type and what is special about it.
"""

import copy
import re
from operator import attrgetter

import pytest
import torch
from conftest import KEPT, everything, letters_tokenizer
from safetensors.torch import save_file
from scripts import run_elsewhere
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from compression.batching import model_inputs
from compression.checkpoint import check_positions, load_classifier, save_checkpoint
from compression.classifier.data import Encoded
from compression.classifier.embeddings import factorize, table_of
from compression.classifier.hidden_states import HiddenStates, LiveTeacher
from compression.classifier.masks import add_masks, remove_masks
from compression.classifier.qat import LossWeights, QuantizationAwareDistillation
from compression.classifier.structure_scores import Importance, StructureScores
from compression.export.onnx import OnnxClassifier, logit_difference, write_onnx
from compression.fake_quantization import add_fake_quantization
from compression.flops import count_macs, encoder_macs_formula
from compression.formats import TABLE_FORMATS, EightBit, FourBit
from compression.hooks import hooked
from compression.quantization import Format, check_exact, embedding_tables, encoder_linears, pack
from compression.runtime import UserError
from compression.structures import (
    ENCODER_KINDS,
    HEADS,
    NEURONS,
    depths_of,
    family_of,
    layers_of,
    output_projections,
    positions_of,
)
from compression.surgery import remove_part, shrink, shrink_encoder_layer, shrink_layer
from compression.training import Training

SIZES = dict(vocab_size=30, max_position_embeddings=64, num_labels=3, initializer_range=0.2)
SIZES |= dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=3)
ONE_TYPE = dict(type_vocab_size=1)
V3 = dict(relative_attention=True, pos_att_type="p2c|c2p", share_att_key=True, position_buckets=8, type_vocab_size=0)
V3 |= dict(norm_rel_ebd="layer_norm", position_biased_input=False)
OWN_KEYS = V3 | dict(share_att_key=False, position_biased_input=True, type_vocab_size=2, embedding_size=16)
# Windows shorter than the tests' texts.
LOCAL = dict(local_attention=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
BIASES = dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_pooling="mean")
FACTORS = dict(embedding_rank=6)
# Name -> model type and fields; with a rank the table of word embeddings is factorized.
FAMILIES = {
    "bert": ("bert", {}),
    "bert, factorized": ("bert", FACTORS),
    "camembert": ("camembert", ONE_TYPE),
    "deberta-v2": ("deberta-v2", V3),
    "deberta-v2, own position projections": ("deberta-v2", OWN_KEYS),
    "deberta-v2, factorized": ("deberta-v2", OWN_KEYS | FACTORS),
    "deberta-v2, one kind of positions": ("deberta-v2", V3 | dict(pos_att_type=["c2p"], share_att_key=False)),
    "deberta-v2, convolution": ("deberta-v2", V3 | dict(conv_kernel_size=3, conv_act="gelu")),
    "distilbert": ("distilbert", dict(hidden_dim=48)),
    "electra": ("electra", dict(embedding_size=16)),
    "modernbert": ("modernbert", LOCAL),
    "modernbert, biases": ("modernbert", LOCAL | BIASES),
    "modernbert, factorized": ("modernbert", LOCAL | FACTORS),
    "roberta": ("roberta", ONE_TYPE),
    "xlm-roberta": ("xlm-roberta", ONE_TYPE),
}
# Whose graphs differ from those that tests/test_onnx.py exports, and from one another's; each takes five seconds.
EXPORTED = ["deberta-v2", "electra", "modernbert", "roberta"]


def tiny_encoder(name, seed=0, **more):
    torch.manual_seed(seed)
    model_type, fields = FAMILIES[name]
    fields = SIZES | fields | more
    rank = fields.pop("embedding_rank", None)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **fields))
    if rank is not None:
        factorize(model, rank, torch.ones(model.config.vocab_size))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # as a trained model's, not zero
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batch_of(model):
    """Token ids [5, 9] with padding of different lengths."""
    ids = torch.randint(4, 30, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 7, 4, 9, 2])[:, None]).long()
    return {"input_ids": torch.where(mask > 0, ids, model.config.pad_token_id), "attention_mask": mask}


@torch.no_grad()
def logits(model):
    return model(**batch_of(model)).logits


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def small(name):
    return shrink(tiny_encoder(name), KEPT)


@pytest.fixture
def lacking(name):
    return shrink(tiny_encoder(name, num_hidden_layers=4), LACKING["the third is gone"])


def masked_logits(model, kept):
    for kind, layers in add_masks(model).items():
        for index, layer in layers.items():
            layer.keep(kept[kind][index])
    found = logits(model)
    remove_masks(model)
    return found


def test_masked_is_smaller(name):
    model = tiny_encoder(name)
    dense = logits(model)
    small = shrink(model, KEPT)
    assert torch.equal(logits(model), dense), "the dense model was changed"
    masked = masked_logits(model, KEPT)
    assert (masked - dense).abs().max() > 1e-3
    torch.testing.assert_close(logits(small), masked, atol=1e-5, rtol=0)
    assert [(parts.heads, parts.neurons) for parts in layers_of(small)] == [(4, 24), (2, 8), (1, 48)]
    sizes = [sum(weight.numel() for weight in each.parameters()) for each in (model, small)]
    removed = sum(
        parts.structure_parameters(kind) * int((~keep).sum())
        for kind in ENCODER_KINDS
        for parts, keep in zip(layers_of(model), KEPT[kind], strict=True)
    )
    assert sizes[0] - sizes[1] == removed


def test_pruned_again(small):
    again = {
        HEADS: [torch.tensor([1, 0, 1, 1]).bool(), torch.tensor([1, 0]).bool(), torch.tensor([True])],
        NEURONS: [torch.arange(24) < 16, torch.ones(8, dtype=torch.bool), torch.arange(48) >= 8],
    }
    smaller = shrink(small, again)
    torch.testing.assert_close(logits(smaller), masked_logits(small, again), atol=1e-5, rtol=0)


NONE = torch.zeros(48, dtype=torch.bool)
# What stays of four layers: one has no FFN, one no attention, one neither; the others of these are narrower.
LACKING = {
    "the third is gone": {
        HEADS: [torch.tensor(row).bool() for row in ([1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0])],
        NEURONS: [NONE, torch.arange(48) < 8, NONE, torch.arange(48) % 2 == 0],
    },
    "the first is gone": {
        HEADS: [torch.tensor(row).bool() for row in ([0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0])],
        NEURONS: [NONE, NONE, torch.arange(48) < 8, torch.arange(48) % 2 == 0],
    },
}
# Where another layer cannot be the first, an empty one stays.
FIRST_STAYS = ("deberta-v2, convolution", *(name for name in FAMILIES if name.startswith("modernbert")))


def without(model, kept):
    """The logits of a model whose parts of which nothing stays are passed by."""
    layers = attrgetter(family_of(model).layers)(model)
    with hooked(hook for index, layer in enumerate(layers) for hook in passed_by(layer, index, kept)):
        return masked_logits(model, kept)


def passed_by(layer, index, kept):
    """Hooks that let a part's input be its output; what has no residual connection in itself gives nothing."""

    def same(_, given, __):
        return given[0]

    def nothing(_, given, __):
        return torch.zeros_like(given[0])

    if not kept[HEADS][index].any():
        if hasattr(layer, "sa_layer_norm"):  # DistilBERT
            yield layer.sa_layer_norm.register_forward_hook(same)
        inside = hasattr(layer, "intermediate")
        attention = getattr(layer, "attention", None) or layer.attn
        yield attention.register_forward_hook(lambda *given: ((same if inside else nothing)(*given), None))
    if not kept[NEURONS][index].any():
        if hasattr(layer, "output_layer_norm"):
            yield layer.output_layer_norm.register_forward_hook(same)
        if hasattr(layer, "intermediate"):  # BERT and its kin
            yield layer.output.register_forward_hook(lambda _, given, __: given[1])
        else:
            yield (getattr(layer, "ffn", None) or layer.mlp).register_forward_hook(nothing)


def test_parts_are_taken_out(name):
    model = tiny_encoder(name, num_hidden_layers=4)
    dense = logits(model)
    for gone, kept in LACKING.items():
        expected = without(model, kept)
        assert (expected - dense).abs().max() > 1e-3
        small = shrink(model, kept)
        torch.testing.assert_close(logits(small), expected, atol=1e-5, rtol=0)
        left = [(parts.heads, parts.neurons) for parts in layers_of(small)]
        first = [(0, 0)] * (name in FIRST_STAYS and gone == "the first is gone")
        assert left == [*first, (3, 0), (0, 8), (1, 24)]
        assert len(small(**batch_of(small), output_hidden_states=True).hidden_states) == len(left) + 1


def test_pruned_again_without_parts(name, lacking):
    again = {
        HEADS: [torch.tensor([1, 0, 1]).bool(), torch.zeros(0).bool(), torch.tensor([False])],
        NEURONS: [torch.zeros(0).bool(), NONE[:8], torch.arange(24) < 8],
    }
    expected = without(lacking, again)
    smaller = shrink(lacking, again)
    torch.testing.assert_close(logits(smaller), expected, atol=1e-5, rtol=0)
    assert [(parts.heads, parts.neurons) for parts in layers_of(smaller)] == [(2, 0), (0, 8)]


def test_parts_are_taken_out_in_training(name):
    model, gone = tiny_encoder(name, num_hidden_layers=4), [(HEADS, 1), (NEURONS, 0), (HEADS, 2), (NEURONS, 2)]
    model.train().gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for kind, index in gone:
        remove_part(model, kind, index)
        with_gradients(model)
        optimizer.step()
    found = {(kind, index) for kind, index, *_ in output_projections(model)}
    assert found == {(kind, index) for kind in ENCODER_KINDS for index in range(4)} - {*gone}
    states = model.eval()(**batch_of(model), output_hidden_states=True).hidden_states
    assert len(states) == 5 and torch.equal(states[3], states[2]) and not torch.equal(states[2], states[1])
    small = shrink(model, everything(model))
    assert len(layers_of(small)) == 3
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=0)


def test_a_layer_is_cut_in_place(name):
    model = tiny_encoder(name)
    kept = everything(model) | {HEADS: [KEPT[HEADS][0], KEPT[HEADS][1], KEPT[HEADS][0]]}
    expected = masked_logits(model, kept)
    shrink_encoder_layer(model, 1, {HEADS: kept[HEADS][1]})
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    shrink_encoder_layer(model, 1, {NEURONS: NONE})
    assert (layers_of(model)[1].heads, layers_of(model)[1].neurons) == (2, 0)


ELSEWHERE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    expected = load_file(folder / "expected.safetensors")
    logits = expected.pop("logits")
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a b")["input_ids"] == [4, 5]
    print(folder.name, (model(**expected).logits - logits).abs().max().item(), sep="|")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Largest difference of logits in a process that knows nothing of the project, of pruned and of 4-bit models."""
    root, folders = tmp_path_factory.mktemp("elsewhere"), []
    for name in FAMILIES:
        small = shrink(tiny_encoder(name), KEPT)
        lacking = [shrink(tiny_encoder(name, num_hidden_layers=4), kept) for kept in LACKING.values()]
        models = {"pruned": small, "without parts": lacking[0], "without the first layer": lacking[1]}
        for kind, model in (models | {"packed": pack(small, Format(), torch.float32)}).items():
            folders.append(save_checkpoint(root / f"{kind} {name}", model, letters_tokenizer(), {"stage": "pruned"}))
            save_file(batch_of(model) | {"logits": logits(model)}, folders[-1] / "expected.safetensors")
    empty = tmp_path_factory.mktemp("empty")
    said = run_elsewhere(ELSEWHERE, empty, *folders).check().stdout.splitlines()
    return {name: float(difference) for name, difference in (line.split("|") for line in said)}


def test_loads_outside(name, elsewhere):
    assert elsewhere[f"pruned {name}"] < 1e-6


def test_loads_outside_without_parts(name, elsewhere):
    assert max(elsewhere[f"without {what} {name}"] for what in ("parts", "the first layer")) < 1e-6


def test_4_bits_load_outside(name, elsewhere):
    assert elsewhere[f"packed {name}"] < 1e-6


STORAGES = [Format(), Format(FourBit(double_quant=True), TABLE_FORMATS[8]), Format(EightBit())]


def test_quantized_is_loaded(small, tmp_path):
    linears = {name for name, layer in small.named_modules() if isinstance(layer, nn.Linear)}
    for place, storage in enumerate(STORAGES):
        packed = pack(small, storage, torch.float32)
        folder = save_checkpoint(tmp_path / str(place), packed, letters_tokenizer(), {"stage": "pruned_quantized"})
        assert torch.equal(logits(load_classifier(folder)[0]), logits(packed))
        assert not torch.equal(logits(packed), logits(small))
        heads = linears - set(encoder_linears(small))
        assert all(type(packed.get_submodule(head)) is nn.Linear for head in heads), "a head was quantized"
        assert {table.bits for table in embedding_tables(packed).values()} == {storage.tables.bits}
        assert table_of(packed) in embedding_tables(packed).values()


def test_trained_in_4_bits(name, small):
    weights, storage = LossWeights(beta_ce=0.3, beta_logits=0.5, temperature=2.0), Format()
    training = Training(num_epochs=1, batch_size=5, learning_rate=1e-2)
    batch = batch_of(small) | {"labels": torch.tensor([0, 1, 2, 0, 1]), "rows": torch.arange(5)}
    rows = Encoded({"input_ids": batch["input_ids"].tolist()}, batch["labels"])
    states = HiddenStates(small, LiveTeacher(tiny_encoder(name, seed=1), rows, small.config.pad_token_id), 0.2)
    recipe = QuantizationAwareDistillation(small, training, weights, storage, torch.zeros(5, 3), states)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        terms = recipe.loss(small, batch, step)
        terms["loss"].backward()
        optimizer.step()
        recipe.after_step(step)
        losses.append(terms["loss"].item())
    assert losses[-1] < losses[0] and terms["hidden_state_loss"] > 0
    trained = logits(small)
    values = recipe.finish()
    packed = pack(small, storage, torch.float32)
    check_exact(packed, values)
    torch.testing.assert_close(logits(packed), trained, atol=1e-5, rtol=0)


def test_4_bits_without_parts(lacking, tmp_path):
    packed = pack(lacking, Format(), torch.float32)
    folder = save_checkpoint(tmp_path / "packed", packed, letters_tokenizer(), {"stage": "pruned_quantized"})
    assert torch.equal(logits(load_classifier(folder)[0]), logits(packed))
    layers = add_fake_quantization(lacking, Format())
    assert len(layers) == len(encoder_linears(packed)) == sum(len(parts.linears()) for parts in layers_of(packed))
    torch.testing.assert_close(logits(lacking), logits(packed), atol=1e-5, rtol=0)


def test_macs_are_those_of_the_formula(name, small, lacking):
    dense = tiny_encoder(name)
    for length in (1, 7, 16):
        for model in (dense, small, lacking):
            convolution = 3 * 32 * 32 * length if "convolution" in name else 0
            formula = encoder_macs_formula(layers_of(model), length) + convolution
            assert count_macs(model, length).encoder == formula
    assert count_macs(small, 7).classifier == count_macs(dense, 7).classifier


def with_gradients(model):
    model(**batch_of(model), labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad


def sum_over_what_goes(model, values, kind, layer, structure):
    """The mean of values, one for each weight of a model, over the weights and biases that go with a structure.

    Biases are among those that the sum is divided by, not in the sum.
    """
    valued = copy.deepcopy(model)
    for (name, weight), value in zip(valued.named_parameters(), values, strict=True):
        weight.data = value if name.endswith("weight") else torch.zeros_like(value)
    parts = layers_of(valued)[layer]
    before = [(weight.sum(), weight.numel()) for weight in valued.parameters()]
    shrink_layer(parts, {kind: torch.arange(parts.count(kind)) != structure})
    after = [(weight.sum(), weight.numel()) for weight in valued.parameters()]
    total, size = (sum(b[i] - a[i] for b, a in zip(before, after, strict=True)) for i in (0, 1))
    return total / size


VALUES = {
    "l2": lambda weight: weight.detach().square(),
    "kd_grad": lambda weight: (weight * weight.grad).detach().abs(),
}


def test_scores_are_sums_over_what_goes(name):
    for mode, value in VALUES.items():
        model = tiny_encoder(name, num_hidden_layers=2).double()
        scores = StructureScores(layers_of(model), add_masks(model), Importance(mode, 1.0, 1.0, 1, "none"))
        with_gradients(model)
        scores.accumulate(0)
        values = [value(weight) for weight in model.parameters()]
        for kind, structures in ((HEADS, range(4)), (NEURONS, (0, 5, 47))):
            found = scores.densities((kind,))[kind]
            places = [(layer, structure) for layer in (0, 1) for structure in structures]
            ours = torch.stack([found[layer][structure] for layer, structure in places])
            expected = torch.stack([sum_over_what_goes(model, values, kind, *place) for place in places])
            expected = expected.sqrt() if mode == "l2" else expected
            ratios = ours / expected  # all of a kind are on one scale
            torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), atol=0, rtol=1e-5)


def exported(model, folder, precision):
    """Largest difference of an export's logits from the model's."""
    write_onnx(model, folder, precision)
    model.config.save_pretrained(folder)
    found, batch = OnnxClassifier(folder, threads=1), batch_of(model)
    assert {entry.name for entry in found.session.get_inputs()} == set(model_inputs(model, batch | TYPES))
    parts = [{key: value[:rows, :length] for key, value in batch.items()} for rows, length in ((5, 9), (1, 1), (2, 5))]
    return logit_difference(model, found, parts)


TYPES = {"token_type_ids": torch.zeros(5, 9, dtype=torch.long)}


def two_layers(name):
    """Tracing takes a second for each layer."""
    return shrink(tiny_encoder(name, num_hidden_layers=2), {kind: kept[1:] for kind, kept in KEPT.items()})


@pytest.mark.parametrize("name", EXPORTED)
def test_exported(name, tmp_path):
    assert exported(pack(two_layers(name), Format(), torch.float32), tmp_path, "nf4") < 1e-5


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert"])
def test_exported_without_parts(name, tmp_path):
    kept = {HEADS: [KEPT[HEADS][1], NONE[:4]], NEURONS: [NONE, KEPT[NEURONS][1]]}
    assert exported(shrink(tiny_encoder(name, num_hidden_layers=2), kept), tmp_path, "fp32") < 1e-5


@pytest.mark.parametrize("name", ["deberta-v2", "modernbert"])
def test_exported_in_8_bits(name, tmp_path):
    assert 0 < exported(two_layers(name), tmp_path, "int8") < 0.3


# Not of one family.


@pytest.mark.parametrize(("name", "positions"), [("roberta", 62), ("bert", 64), ("modernbert", 64)])
def test_texts_as_long_as_the_positions_are_taken_and_longer_ones_refused(name, positions):
    model = tiny_encoder(name)
    assert positions_of(model.config) == positions
    check_positions(model, "max_length", positions)
    with torch.no_grad():
        assert model(input_ids=torch.full((1, positions), 5)).logits.isfinite().all()
    with pytest.raises(UserError, match=f"--max_length 65: allowed is at most {positions}, the model's positions"):
        check_positions(model, "max_length", 65)
    with pytest.raises(UserError, match=f"sequence length 65: allowed is 1 to {positions} for this model"):
        count_macs(model, 65)


@pytest.mark.parametrize(("name", "types"), [("bert", True), ("roberta", False), ("deberta-v2", False)])
def test_token_types_go_to_models_that_tell_them_apart(name, types):
    batch = {"input_ids": torch.full((1, 3), 5), "token_type_ids": torch.tensor([[0, 1, 1]])}
    model = tiny_encoder(name)
    assert ("token_type_ids" in model_inputs(model, batch)) == types
    assert model(**model_inputs(model, batch)).logits.isfinite().all()


def test_what_stands_between_embeddings_and_layers_is_counted_with_the_head():
    model = tiny_encoder("electra")
    assert count_macs(model, 5).classifier == 5 * 16 * 32 + 32 * 32 + 3 * 32


# What stands in no layer and belongs to neither the embeddings nor, by its name, the head.
BETWEEN = {
    "bert": {"bert.pooler.dense": 0},
    "deberta-v2": {"deberta.encoder.rel_embeddings": 4, "deberta.encoder.LayerNorm": 4, "pooler.dense": 0},
    "deberta-v2, own position projections": {"deberta.embeddings.embed_proj": 4, "deberta.encoder.LayerNorm": 4},
    "deberta-v2, convolution": {"deberta.encoder.conv.conv": 4, "deberta.encoder.conv.LayerNorm": 4},
    "distilbert": {"pre_classifier": 0},
    "electra": {"electra.embeddings_project": 4, "classifier.dense": 0},
    "modernbert": {"model.final_norm": 0, "head.dense": 0},
    "roberta": {"classifier.dense": 0},
}


def test_depths_count_the_layers_behind_a_parameter(name):
    for model in (tiny_encoder(name), shrink(tiny_encoder(name), KEPT)):
        depths = depths_of(model)
        assert depths.keys() == dict(model.named_parameters()).keys()
        for parameter, depth in depths.items():
            if found := re.search(r"\.layers?\.(\d+)\.", parameter):
                assert depth == 3 - int(found[1]), parameter
            elif ".embeddings." in parameter:
                assert depth == 4, parameter
            elif parameter.startswith("classifier."):
                assert depth == 0, parameter
        for module, depth in BETWEEN.get(name, {}).items():
            assert depths[f"{module}.weight"] == depth, module

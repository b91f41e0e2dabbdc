"""Exported classifiers compute in ONNX Runtime what the models compute in PyTorch."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import KEPT, VOCABULARY, tiny_bert, tiny_distilbert
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from scripts import run_elsewhere
from test_quantization import SHAPES

from compression.checkpoint import load_classifier, save_checkpoint
from compression.classifier.data import Encoded
from compression.classifier.metrics import predict
from compression.classifier.tasks import SST2
from compression.export import onnx as onnx_export
from compression.export.onnx import (
    PRECISIONS,
    MatMulBnb4,
    OnnxClassifier,
    Precision,
    logit_difference,
    open_session,
    write_onnx,
)
from compression.formats import TABLE_FORMATS, EightBit, FourBit, dequantized_weight
from compression.quantization import Format, encoder_linears, pack, with_packed_tables
from compression.runtime import UserError
from compression.surgery import shrink
from compression.timing import measure_latency

# Tracing takes a second for each layer.
DENSE = {"bert": tiny_bert(num_hidden_layers=2), "distilbert": tiny_distilbert(n_layers=2)}
for parameters in (model.named_parameters() for model in DENSE.values()):
    for name, parameter in parameters:
        if name.endswith("bias"):  # as a trained model's, not zero
            torch.nn.init.normal_(parameter, std=0.2)
PRUNED = {name: shrink(model, {kind: kept[:2] for kind, kept in KEPT.items()}) for name, model in DENSE.items()}
INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


def some_batches(shapes, seed=0):
    """Random rows of different lengths, padded."""
    generator, found = torch.Generator().manual_seed(seed), []
    for rows, length in shapes:
        ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).long()
        types = torch.randint(2, (rows, length), generator=generator) * mask
        found.append({"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types})
    return found


# Batches of one, of one token, and of as many tokens as the models have positions.
BATCHES = some_batches([(1, 1), (1, 64), (5, 9), (7, 1), (3, 64), (2, 30)])
CALIBRATION = some_batches([(8, 12), (8, 20)], seed=1)


def export(folder, model, precision, calibration=()):
    """An exported model and what its writer says of it; nothing but the file is in the folder."""
    folder.mkdir()
    about = write_onnx(model, folder, precision, calibration)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    assert about["bytes"] == (folder / "model.onnx").stat().st_size
    model.config.save_pretrained(folder)
    return OnnxClassifier(folder, threads=1), about


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Models with their exports in fp32."""
    folder, models = tmp_path_factory.mktemp("exported"), {"bert": DENSE["bert"], "distilbert": PRUNED["distilbert"]}
    return {name: (model, export(folder / name, model, "fp32")[0]) for name, model in models.items()}


@pytest.mark.parametrize(("name", "inputs"), [("bert", INPUTS), ("distilbert", INPUTS[:2])])
def test_logits_are_those_of_pytorch_whatever_batch_length_and_padding(name, inputs, exported):
    model, found = exported[name]
    assert logit_difference(model, found, BATCHES) < 1e-5
    assert [entry.name for entry in found.session.get_inputs()] == inputs


def test_the_model_itself_stays_as_it_was(exported):
    model, _ = exported["distilbert"]
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_file_says_nothing_of_the_machine_that_wrote_it(exported):
    for _, found in exported.values():
        content = (found.folder / "model.onnx").read_bytes()
        assert b"site-packages" not in content and b".py" not in content


def test_additions_and_norms_are_not_fused_into_the_slow_kernel(exported, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(exported["distilbert"][1].folder / "model.onnx", options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("LayerNormalization") == 5


ELSEWHERE = """
import sys, onnxruntime
from safetensors.numpy import load_file
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
batch = load_file(sys.argv[2])
(logits,) = session.run(None, {entry.name: batch[entry.name] for entry in session.get_inputs()})
print(abs(logits - batch["logits"]).max())
"""


@pytest.mark.parametrize("name", sorted(DENSE))
def test_the_file_is_all_that_another_process_needs(name, exported, tmp_path):
    model, found = exported[name]
    names = [entry.name for entry in found.session.get_inputs()]
    with torch.no_grad():
        logits = model(**{key: BATCHES[2][key] for key in names}).logits
    save_file(BATCHES[2] | {"logits": logits}, tmp_path / "batch.safetensors")
    file = found.folder / "model.onnx"
    result = run_elsewhere(ELSEWHERE, tmp_path, file, tmp_path / "batch.safetensors").check()
    assert float(result.stdout) < 1e-5


def test_evaluation_and_timing_take_an_exported_model(exported):
    model, found = exported["bert"]  # it gets no token types here: they are all 0
    encoded = Encoded({"input_ids": [[5, 6, 7], [8], [9] * 30, [10, 11]]}, torch.tensor([0, 1, 0, 1]))
    expected = predict(model, encoded, 0, SST2)
    torch.testing.assert_close(predict(found, encoded, 0, SST2), expected, atol=1e-5, rtol=0)
    timings = measure_latency({"pytorch": model, "onnx": found}, torch.device("cpu"), 8, 2, 2, 3)
    assert timings["onnx"]["latency"]["median_ms"] > 0


# 8 bits.


def test_int8_is_close_and_its_sums_fit_16_bits(tmp_path):
    model = PRUNED["bert"]
    found, _ = export(tmp_path / "int8", model, "int8")
    assert 0 < logit_difference(model, found, BATCHES) < 0.2
    graph = onnx.load(found.folder / "model.onnx").graph
    weights = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2]
    assert len(weights) == len(encoder_linears(model)) == 12  # the head stays in full precision
    assert all(abs(numpy_helper.to_array(weight).astype(int)).max() == 64 for weight in weights)
    tables = [tensor for tensor in graph.initializer if tensor.name.endswith("embeddings.codes")]
    assert len(tables) == 2 and all(tensor.data_type == TensorProto.UINT8 for tensor in tables)


@pytest.fixture(scope="module")
def traced():
    """What the static quantization of a model starts from, for all limits."""
    return onnx_export._trace(with_packed_tables(PRUNED["distilbert"], TABLE_FORMATS[8]))


@pytest.mark.parametrize("limit", [0.02, 0.0])
def test_static_int8_keeps_layers_in_full_precision_until_it_is_close(limit, traced, tmp_path, monkeypatch):
    model = PRUNED["distilbert"]
    monkeypatch.setattr(onnx_export, "LARGEST_CHANGE", limit)
    monkeypatch.setattr(onnx_export, "_trace", lambda _: traced)
    found, about = export(tmp_path / "static", model, "int8_static", CALIBRATION)
    layers, kept = set(encoder_linears(model)), set(about["float_layers"])
    assert set() < kept < layers if limit else kept == layers
    graph = onnx.load(found.folder / "model.onnx").graph
    quantized = {node.name for node in graph.node if node.op_type == "MatMul" and "DequantizeLinear" in node.input[1]}
    assert quantized == layers - kept
    with torch.no_grad():
        logits = [
            [of(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for batch in CALIBRATION]
            for of in (model, found)
        ]
    expected, ours = (torch.cat(rows) for rows in logits)
    assert (ours - expected).abs().mean() < limit * expected.std() + 0.01  # what the tables' 8 bits change


# 4 bits.


def by_onnxruntime(node, initializers):
    """The weight [out, in] that a node computes with: its product with the identity."""
    sizes = {entry.name: entry.i for entry in node.attribute}
    inputs = [helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, [sizes["K"], sizes["K"]])]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [sizes["K"], sizes["N"]])]
    graph = helper.make_graph([node], "one", inputs, outputs, [initializers[name] for name in node.input[1:]])
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {node.input[0]: np.eye(sizes["K"], dtype=np.float32)})
    return torch.from_numpy(product.T.copy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 512, 4096])
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", False), ("nf4", True), ("fp4", True)])
def test_onnxruntime_reads_codes_and_scales_as_bitsandbytes_does(quant_type, double_quant, blocksize, shape):
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer = FourBit(quant_type, blocksize, double_quant).pack_linear(linear, torch.float32)
    stored = MatMulBnb4(layer)
    arrays = {"codes": stored.codes.numpy(), "scales": stored.scales.numpy()}
    initializers = {name: numpy_helper.from_array(array, name) for name, array in arrays.items()}
    node = helper.make_node("MatMulBnb4", ["x", *arrays], ["y"], domain="com.microsoft", **stored.attributes)
    assert torch.equal(by_onnxruntime(node, initializers), dequantized_weight(layer))


@pytest.mark.parametrize(
    ("model", "linears", "bits"),
    [
        (PRUNED["bert"], FourBit(), 4),
        (PRUNED["distilbert"], FourBit(double_quant=True), 8),
        (DENSE["distilbert"], FourBit("fp4", 512), 16),
    ],
    ids=["nf4", "double_quant", "fp4"],
)
def test_4_bit_weights_and_tables_are_those_of_the_checkpoint(model, linears, bits, tokenizer, tmp_path):
    packed = pack(model, Format(linears, TABLE_FORMATS[bits]), torch.float32)
    model, _ = load_classifier(save_checkpoint(tmp_path / "packed", packed, tokenizer, {}))
    found, about = export(tmp_path / "nf4", model, "nf4")
    assert about["bytes"] < (tmp_path / "packed" / "model.safetensors").stat().st_size + 30_000  # the graph
    graph = onnx.load(found.folder / "model.onnx").graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulBnb4"]
    assert len(nodes) == 12
    for node in nodes:
        name = node.input[1].removesuffix(".codes")
        assert torch.equal(by_onnxruntime(node, initializers), dequantized_weight(model.get_submodule(name))), name
    assert logit_difference(model, found, BATCHES) < 1e-5


# Mistakes.

QUANTIZED = {
    bits: pack(PRUNED["bert"], Format(linears), torch.float32)
    for bits, linears in {4: FourBit(), 8: EightBit()}.items()
}
ANOTHER = "name the model it was made from"


@pytest.mark.parametrize(
    ("model", "precision", "line"),
    [
        (DENSE["bert"], "nf4", "python 9_quantize_pruned_model.py --pruned_model_path"),
        (QUANTIZED[4], "fp32", f"is quantized already; {ANOTHER}, or use --precision nf4"),
        (QUANTIZED[4], "int8", f"is quantized already; {ANOTHER}, or use --precision nf4"),
        (QUANTIZED[4], "int8_static", f"is quantized already; {ANOTHER}, or use --precision nf4"),
        (QUANTIZED[8], "nf4", f"LLM.int8 layers, .*; {ANOTHER}"),
        (QUANTIZED[8], "fp32", f"LLM.int8 layers, .*; {ANOTHER}"),
    ],
)
def test_weights_that_do_not_fit_a_precision_are_refused(model, precision, line, tmp_path):
    with pytest.raises(UserError, match=f"^--precision {precision}: .*{line}"):
        write_onnx(model, tmp_path, precision, CALIBRATION)
    assert not list(tmp_path.iterdir())


def test_static_quantization_needs_calibration_data(tmp_path):
    with pytest.raises(ValueError, match="int8_static needs calibration data"):
        write_onnx(DENSE["bert"], tmp_path, "int8_static")


def test_logits_that_are_not_finite_are_refused(exported, tmp_path, monkeypatch):
    model, found = exported["distilbert"]
    broken = onnx.load(found.folder / "model.onnx")
    (bias,) = [tensor for tensor in broken.graph.initializer if tensor.name == "classifier.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.full(2, np.nan, np.float32), bias.name))
    save = Precision("broken", lambda _, path, __: onnx.save(broken, path) or {}, "float32")
    monkeypatch.setitem(PRECISIONS, "fp32", save)
    with pytest.raises(UserError, match="logits are not finite in ONNX Runtime; make the model again"):
        write_onnx(model, tmp_path, "fp32")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="logits are not finite; export the model again"):
        logit_difference(model, OnnxClassifier(tmp_path, threads=1), BATCHES)


def test_a_file_that_cannot_be_read_is_named(exported, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/model.onnx: cannot be loaded by ONNX Runtime .*export the model"):
        open_session(tmp_path / "model.onnx", threads=1)
    content = (exported["bert"][1].folder / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded by ONNX Runtime"):
        open_session(tmp_path / "model.onnx", threads=1)

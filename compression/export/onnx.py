"""Classifiers as ONNX files, and ONNX Runtime to run them.

A file has the inputs `input_ids`, `attention_mask` and, where the model tells token types apart (BERT),
`token_type_ids`, all int64 [batch, length], and the output `logits`, fp32 [batch, labels]; batch and length are free,
up to the model's positions.

fp32 and int8_static are standard operators. int8 and nf4 have some of ONNX Runtime's own (`com.microsoft`).
"""

import ast
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from compression.batching import model_inputs, pad
from compression.export import TEXTS
from compression.formats import TABLE_FORMATS, block_scales
from compression.modeling import PackedEmbedding
from compression.quantization import compute_in_fp32, encoder_linears, with_packed_tables
from compression.runtime import UserError
from compression.structures import positions_of

MODEL_FILE = "model.onnx"
OPSET = 20
"""Of the standard operators; the first one with Gelu."""
LARGEST_BLOCK = 256
"""Weights that share a scale in `MatMulBnb4`, at most."""
QUANT_TYPES = {"fp4": 0, "nf4": 1}
"""Of `MatMulBnb4`."""
LARGEST_CHANGE = 0.02
"""Mean change of the logits that static quantization may bring about, in units of their standard deviation."""
# Weights of 7 bits, symmetric, one scale for each output: 8-bit ones with uint8 inputs overflow the 16-bit sums of
# CPUs that have AVX2 or AVX-512 and no VNNI, without a word; uint8 weights do not, but are slow where VNNI is.
INT8 = dict(per_channel=True, reduce_range=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
SECOND = ".second"
"""Behind a layer's name in that of its second product: DeBERTa's projections may serve its table of positions too."""
CHECKED_TOKENS = 128
"""Of a text that an export is checked on."""
Batch = Mapping[str, Tensor]


# What is written.


def write_onnx(
    model: PreTrainedModel, folder: Path, precision: str, calibration: Sequence[Batch] = ()
) -> dict[str, Any]:
    """Write a classifier as `model.onnx`, one file, into a folder that is there.

    Args:
        model: dense or pruned, as `load_classifier` gives it; it is left as it is.
        precision: a name of `PRECISIONS`.
        calibration: batches of training sentences, as `batching.batches` gives them; int8_static needs them.

    Returns:
        The file's bytes; with int8_static also which layers of the encoder stayed in full precision, as the head
        always does, and the mean change of a logit on the calibration data.

    Raises:
        UserError: the model's weights do not fit the precision, or the file's logits are not finite.
        ValueError: calibration data is missing.
    """
    _check_weights(model, precision)
    path = folder / MODEL_FILE
    with _quiet():
        about = PRECISIONS[precision].write(model, path, calibration)
    logits = _run(open_session(path, torch.get_num_threads()), _sample(model))
    if not logits.isfinite().all():
        raise UserError(f"{_name(model)}: its logits are not finite in ONNX Runtime; make the model again")
    return {"bytes": path.stat().st_size} | about


def _check_weights(model: PreTrainedModel, precision: str) -> None:
    """Raise UserError where a model has no weights of the kind that a precision is made from."""
    name, refused = _name(model), f"--precision {precision}"
    kinds = {type(module) for module in model.modules()}
    if Linear8bitLt in kinds:
        raise UserError(
            f"{refused}: {name} has LLM.int8 layers, which ONNX Runtime does not know; name the model it was made from"
        )
    if precision == "nf4" and Linear4bit not in kinds:
        command = f"python 9_quantize_pruned_model.py --pruned_model_path {name}"
        raise UserError(f"{refused}: {name} has no 4-bit layers; make a model that has them with: {command}")
    if precision != "nf4" and Linear4bit in kinds:
        raise UserError(
            f"{refused}: {name} is quantized already; name the model it was made from, or use --precision nf4"
        )


def _write_fp32(model: PreTrainedModel, path: Path, _: Sequence[Batch]) -> dict[str, Any]:
    onnx.save(_trace(model), path)
    return {}


def _write_int8(model: PreTrainedModel, path: Path, _: Sequence[Batch]) -> dict[str, Any]:
    traced = _trace(with_packed_tables(model, TABLE_FORMATS[8]))
    quantize_dynamic(traced, path, nodes_to_quantize=_nodes(encoder_linears(model)), **INT8)
    return {}


def _write_int8_static(model: PreTrainedModel, path: Path, calibration: Sequence[Batch]) -> dict[str, Any]:
    if not calibration:
        raise ValueError("int8_static needs calibration data")
    traced = _trace(with_packed_tables(model, TABLE_FORMATS[8]))
    layers = list(encoder_linears(model))
    data = [_arrays(batch, _sample(model)) for batch in calibration]
    with TemporaryDirectory(dir=path.parent) as scratch:
        exact, ranges = Path(scratch, "exact.onnx"), Path(scratch, "ranges.json")
        onnx.save(traced, exact)
        expected = _logits(exact, data)

        def change(quantized: Sequence[str]) -> float:
            """Mean change of the logits where these layers are quantized; `path` then holds that model."""
            quantize_static(
                exact,
                path,
                _Calibration(data),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                nodes_to_quantize=_nodes(quantized),
                calibration_cache_path=ranges,
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
                **INT8,
            )
            return float((_logits(path, data) - expected).abs().mean())

        limit = LARGEST_CHANGE * float(expected.std())
        kept, changed = _kept_in_float(layers, change, limit)
        if len(kept) == len(layers):
            onnx.save(traced, path)
    return {"float_layers": kept, "mean_logit_change": changed}


def _kept_in_float(
    layers: Sequence[str], change: Callable[[Sequence[str]], float], limit: float
) -> tuple[list[str], float]:
    """Which layers stay in full precision, and what quantizing the others changes, which is the last that was asked.

    Those that change the most where they alone are quantized come first, as many as it takes.
    """
    worst = sorted(layers, key=lambda layer: change([layer]), reverse=True)
    for count in range(len(worst)):
        changed = change(worst[count:])
        if changed <= limit:
            return worst[:count], changed
    return worst, 0.0


@dataclass(frozen=True)
class Precision:
    """What the numbers of an ONNX file are.

    Attributes:
        help: what a flag's help says of it.
        write: writes a model to a path, given calibration data; gives what is to be reported of it.
        computes_in: what most of the file's products are computed in.
        tolerance: largest difference of logits from the PyTorch model's, absolute and relative to the largest; None:
            the weights are others.
    """

    help: str
    write: Callable[[PreTrainedModel, Path, Sequence[Batch]], dict[str, Any]]
    computes_in: str
    tolerance: float | None = None


PRECISIONS = {
    "fp32": Precision("full precision", _write_fp32, "float32", 1e-4),
    "int8": Precision("8-bit weights and tables, the layers' inputs quantized batch by batch", _write_int8, "int8"),
    "int8_static": Precision(
        "the same, with fixed ranges from training sentences; layers that this hurts stay in full precision",
        _write_int8_static,
        "int8",
    ),
    "nf4": Precision("the weights of a 4-bit checkpoint as they are, computed in fp32", _write_fp32, "float32", 1e-3),
}


class _Calibration(CalibrationDataReader):
    def __init__(self, data: Sequence[dict[str, np.ndarray]]):
        self.data = iter(data)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None after the last one."""
        return next(self.data, None)


# Tracing.


@torch.no_grad()
def _trace(model: PreTrainedModel) -> onnx.ModelProto:
    """The graph of a model, its nodes for Linear layers named as the layers."""
    traced = _traceable(model)
    inputs = _sample(model)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.onnx.export(
        traced,
        kwargs=inputs,
        dynamic_shapes=dict.fromkeys(inputs, axes),
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # it is without `dynamo`
    graph = program.model_proto
    _name_layers(graph)
    _keep_layer_norms_apart(graph)
    _strip(graph)
    return graph


def _traceable(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU whose layers all have a form in ONNX."""
    traced = copy.deepcopy(model).cpu().eval()
    traced.set_attn_implementation("eager")  # a shorter graph than the fused kernel's, and as fast in ONNX Runtime
    for name, module in list(traced.named_modules()):
        if type(module) in _STAND_INS:
            traced.set_submodule(name, _STAND_INS[type(module)](module))
    return traced


class MatMulBnb4(nn.Module):
    """A 4-bit layer as one node of ONNX Runtime's, which takes the layer's own codes and scales.

    Its blocks, too, run over the weight [out, in] in memory order, whether or not they fill the rows. Scales of larger
    blocks than it has are there several times.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: Linear4bit):
        super().__init__()
        state = layer.weight.quant_state  # type: ignore[attr-defined]
        block, weights = min(state.blocksize, LARGEST_BLOCK), layer.in_features * layer.out_features
        scales = block_scales(layer).repeat_interleave(state.blocksize // block)[: math.ceil(weights / block)]
        self.register_buffer("codes", layer.weight.data.flatten())
        self.register_buffer("scales", scales.contiguous())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.float(), requires_grad=False)
        self.out_features = layer.out_features
        self.attributes = {
            "K": layer.in_features,
            "N": layer.out_features,
            "block_size": block,
            "quant_type": QUANT_TYPES[state.quant_type],
        }

    def forward(self, input: Tensor) -> Tensor:
        product = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulBnb4",
            (input, self.codes, self.scales),
            self.attributes,
            dtype=torch.float32,
            shape=(*input.shape[:-1], self.out_features),
            version=1,
        )
        return product if self.bias is None else product + self.bias


class _PackedTable(nn.Module):
    """A packed table in operators of ONNX: `values` [256, values per byte] has the numbers that a byte stands for."""

    codes: Tensor
    scales: Tensor
    values: Tensor

    def __init__(self, table: PackedEmbedding):
        super().__init__()
        self.register_buffer("codes", table.codes)
        self.register_buffer("scales", table.scales)
        byte = torch.arange(256)
        places = torch.stack((byte >> 4, byte & 15), 1) if table.bits == 4 else byte[:, None]
        self.register_buffer("values", table.numbers[places])

    def forward(self, input: Tensor) -> Tensor:
        scales = embedding(input, self.scales).float().unsqueeze(-1)
        values = embedding(embedding(input, self.codes).int(), self.values).flatten(-2)
        return (values.unflatten(-1, (scales.shape[-2], -1)) * scales).flatten(-2)


class _HalfTable(nn.Module):
    """A table in half precision."""

    codes: Tensor

    def __init__(self, table: PackedEmbedding):
        super().__init__()
        self.register_buffer("codes", table.codes)

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.codes).float()


def _table(table: PackedEmbedding) -> nn.Module:
    return _HalfTable(table) if table.bits == 16 else _PackedTable(table)


_STAND_INS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {Linear4bit: MatMulBnb4, PackedEmbedding: _table}


def _sample(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two rows of different length."""
    ids = torch.arange(16).view(2, 8) % model.config.vocab_size
    mask = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    return model_inputs(model, {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)})


def _name_layers(graph: onnx.ModelProto) -> None:
    """Give the products of Linear layers the names that the layers have in PyTorch."""
    named = set()
    for node in graph.graph.node:
        if node.op_type == "MatMul":
            scopes = next(entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes")
            *_, module, operation = ast.literal_eval(scopes)
            if operation.startswith("linear"):
                node.name = f"{module}{SECOND}" if module in named else module
                named.add(module)


def _nodes(layers: Iterable[str]) -> list[str]:
    """The names of the nodes of Linear layers."""
    return [f"{layer}{use}" for layer in layers for use in ("", SECOND)]


def _keep_layer_norms_apart(graph: onnx.ModelProto) -> None:
    """Write the residual additions as Sum: of Add and LayerNormalization ONNX Runtime makes one node, which its CPU
    kernel takes about five times as long for."""
    producers = {output: node for node in graph.graph.node for output in node.output}
    for node in graph.graph.node:
        producer = producers.get(node.input[0])  # there is none where a weight is normalized (DeBERTa)
        if node.op_type == "LayerNormalization" and producer is not None and producer.op_type == "Add":
            producer.op_type = "Sum"


def _strip(graph: onnx.ModelProto) -> None:
    """Remove what the exporter notes of the Python code: it names files of this machine."""
    parts = graph.graph
    for part in (graph, parts, *parts.node, *parts.initializer, *parts.value_info, *parts.input, *parts.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of exporter and quantizer, which nobody here can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# Running.


class OnnxClassifier(nn.Module):
    """An exported classifier, for what takes a PyTorch one in evaluation: same inputs, `logits` on the CPU.

    Args:
        folder: with `model.onnx` and `config.json`.
        threads: of ONNX Runtime, which do not spin while they wait: spinning ones take PyTorch's cores.

    Raises:
        UserError: there is no model, or ONNX Runtime cannot load it.
    """

    def __init__(self, folder: Path, threads: int):
        super().__init__()
        self.config = AutoConfig.from_pretrained(folder)
        self.folder, self.name_or_path = Path(folder), str(folder)
        self.device = torch.device("cpu")
        self.session = open_session(self.folder / MODEL_FILE, threads)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Logits [batch, labels]; all inputs are [batch, length]. Without token types they are all 0."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        return SimpleNamespace(logits=_run(self.session, given))


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A model in ONNX Runtime on the CPU.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has a class for each kind of failure, and no common one
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{path}: cannot be loaded by ONNX Runtime ({reason}); export the model again") from None


def _run(session: onnxruntime.InferenceSession, batch: Batch) -> Tensor:
    names = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(["logits"], _arrays(batch, names))[0])


def _arrays(batch: Batch, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named inputs of a batch; token types that it does not have are all 0."""
    given = {"token_type_ids": torch.zeros_like(batch["input_ids"])} | dict(batch)
    return {name: given[name].cpu().numpy() for name in names}


def _logits(path: Path, data: Sequence[dict[str, np.ndarray]]) -> Tensor:
    """Logits of a file [rows, labels]."""
    session = open_session(path, torch.get_num_threads())
    return torch.from_numpy(np.concatenate([session.run(["logits"], inputs)[0] for inputs in data]))


@torch.inference_mode()
def logit_difference(model: PreTrainedModel, exported: OnnxClassifier, batches: Sequence[Batch]) -> float:
    """The largest difference between the logits of a model and of its export.

    Raises:
        UserError: a logit is not finite.
    """
    largest = 0.0
    for batch in batches:
        inputs = model_inputs(model, dict(batch))
        logits = exported(**inputs).logits
        if not logits.isfinite().all():
            raise UserError(f"{exported.name_or_path}: its logits are not finite; export the model again")
        expected = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits
        largest = max(largest, float((logits - expected.float().cpu()).abs().max()))
    return largest


def check_onnx(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, precision: str
) -> dict[str, float]:
    """Run an export on a few texts and compare its logits with the model's, computed in fp32.

    Args:
        model: its 4-bit layers compute in fp32 from here on.
        folder: with `model.onnx` and `config.json`.

    Returns:
        The largest difference.

    Raises:
        UserError: it is larger than rounding where the weights are the same, or a logit is not finite.
    """
    compute_in_fp32(model)
    longest = min(CHECKED_TOKENS, positions_of(model.config))
    rows = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in TEXTS]
    batches = [pad({"input_ids": rows}, some, tokenizer.pad_token_id) for some in (list(range(len(rows))), [0])]
    exported = OnnxClassifier(folder, torch.get_num_threads())
    difference, allowed = logit_difference(model, exported, batches), PRECISIONS[precision].tolerance
    with torch.inference_mode():
        largest = max(1.0, float(model(**model_inputs(model, batches[0])).logits.abs().max()))
    if allowed is not None and not difference <= allowed * largest:
        raise UserError(
            f"{_name(model)}: its logits differ by {difference:.2g} in ONNX Runtime, allowed with --precision "
            f"{precision} is {allowed * largest:.2g}; nothing is kept of the export"
        )
    return {"logit_difference": difference}


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__

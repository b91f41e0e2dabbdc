"""A language model as a GGUF file, which llama.cpp runs (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

A model whose layers are all alike has its family's architecture there. One whose layers differ has the architecture
`deci`, llama.cpp's for models found by architecture search: it has sizes per layer, and computes as LLaMA does. It has
no place for norms of queries and keys, and no layer without an MLP: such a layer gets one whose weights are zero. So
does a first layer without attention, whose size of a head counts for all, and a part of which a bias is left.

`llama` and `deci` rotate neighbouring values of a head, transformers the halves of it: the rows of q and k are put in
the other order.

Tensors are read, turned and written one by one. Quantized are matrices; vectors are fp32. The last matrix, which
decides most, is in 8 bits where the others are in 4 (llama.cpp's own tool takes its 6-bit type Q6_K there, which the
package gguf cannot write); where it is the embeddings' too, so are they.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor

from compression.checkpoint import load_skeleton, load_tokenizer
from compression.export import TEXTS
from compression.export.gguf_vocabulary import FLAG, Vocabulary, vocabulary_of
from compression.export.llama_cpp import LlamaCpp, is_installed
from compression.inputs import require_language_model
from compression.offload import Placement, put_offloaded
from compression.runtime import UserError, log
from compression.structures import LayerParts, head_dim, layers_of
from compression.weights import Shards, check_finite

STAND_IN_CHANNELS = 32
"""Width of an MLP that stands where there is none: a block of llama.cpp's types."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
MIXED = "deci"
HALVES = ("qwen2", "qwen3")
"""Architectures that rotate halves of a head, as transformers does."""
ROTARY = ("default", "linear", "yarn", "llama3")
"""Types of rotary embeddings; the last one takes a tensor, for which the architectures of HALVES have no place."""
# How far a stored value may be from the weight, in units of the tensor's largest: rounding, also of a block's scale.
ROUNDING = {Type.F32: 0.0, Type.F16: 2**-11, Type.BF16: 2**-8, Type.Q8_0: 0.0045, Type.Q4_0: 0.126, Type.Q4_1: 0.068}
SMALLEST = 2**-24  # of float16's numbers


@dataclass(frozen=True)
class Precision:
    """What the matrices of a file are stored in."""

    help: str
    type: Type
    file_type: LlamaFileType
    tolerance: float
    """Largest difference between llama.cpp's logits and PyTorch's of the same weights, root mean square, in standard
    deviations of the logits. llama.cpp rounds also what a matrix is multiplied with: to 16 bits, or to 8."""
    head: Type | None = None
    """The last matrix, where it is another."""


PRECISIONS = {
    "f32": Precision("32 bits", Type.F32, LlamaFileType.ALL_F32, 1e-3),
    "f16": Precision("16 bits", Type.F16, LlamaFileType.MOSTLY_F16, 1e-2),
    "bf16": Precision("16 bits with float32's range", Type.BF16, LlamaFileType.MOSTLY_BF16, 5e-2),
    "q8_0": Precision("8 bits", Type.Q8_0, LlamaFileType.MOSTLY_Q8_0, 0.15),
    "q4_0": Precision("4 bits, a scale per 32", Type.Q4_0, LlamaFileType.MOSTLY_Q4_0, 0.15, Type.Q8_0),
    "q4_1": Precision("4 bits, scale and offset per 32", Type.Q4_1, LlamaFileType.MOSTLY_Q4_1, 0.15, Type.Q8_0),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    source: str | None = None
    """Its name in the checkpoint; None: `constant` is what it holds."""
    heads: int = 0
    """Whose rows go in the order of neighbouring pairs; 0: they stay."""
    constant: np.ndarray | None = None

    def read(self, shards: Shards) -> np.ndarray:
        """fp32, in the file's order."""
        if self.source is None:
            assert self.constant is not None
            return self.constant
        values = shards.tensors([self.source])[self.source].float()
        check_finite({self.source: values}, str(shards.folder), "make or fetch that folder again")
        return (to_pairs(values, self.heads) if self.heads else values).numpy()

    def type(self, precision: Precision, tied: bool) -> Type:
        """What it is stored in."""
        if len(self.shape) == 1:
            return Type.F32
        head = self.name == "output.weight" or (tied and self.name == "token_embd.weight")
        wanted = precision.head if head and precision.head is not None else precision.type
        return wanted if self.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * size, ...] of rotated halves in the order of rotated neighbours."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """What `to_pairs` was given."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


class Plan:
    """What a checkpoint's GGUF file holds.

    Raises:
        UserError: the model is of another family, or has what llama.cpp does not.
    """

    def __init__(self, folder: Path, flag: str, pre_tokenizer: str | None):
        self.folder, self.flag = Path(folder), flag
        self.model, self.shards = load_skeleton(folder, torch.float32)
        self.config: Any = self.model.config
        if self.family not in ARCHITECTURES:
            raise self._refuse(
                f"model type {self.family!r} is not exported to GGUF; allowed are {', '.join(ARCHITECTURES)}"
            )
        self.layers = layers_of(self.model)
        self.tokenizer = load_tokenizer(folder, self.model)
        self.vocabulary: Vocabulary = vocabulary_of(self.tokenizer, self.config.vocab_size, self.folder, pre_tokenizer)
        self.head_size = head_dim(self.config)
        self._check()

    @property
    def tied(self) -> bool:
        return "lm_head.weight" in self.model.all_tied_weights_keys

    @property
    def family(self) -> str:
        return self.config.model_type.removeprefix("pruned_")

    @cached_property
    def architecture(self) -> str:
        family, first = ARCHITECTURES[self.family], self.layers[0]
        sizes = {(layer.query_heads, layer.groups, layer.channels) for layer in self.layers}
        # Qwen2's takes all heads together to be as wide as the state is.
        fits = family != "qwen2" or first.query_heads * self.head_size == self.config.hidden_size
        return family if fits and len(sizes) == 1 and all(*sizes) else MIXED

    def _refuse(self, what: str) -> UserError:
        return UserError(f"{self.flag} {self.folder}: {what}")

    def _check(self) -> None:
        if self.config.hidden_act != "silu":
            raise self._refuse(f"its activation is {self.config.hidden_act}, llama.cpp's for this family is silu")
        if self.architecture == MIXED and any("q_norm" in name for name in self.shards.shapes):
            raise self._refuse(
                "its layers differ and have norms of queries and keys, which llama.cpp has no architecture for; prune "
                "it with --uniform"
            )
        if self.architecture == "qwen3" and any(name.endswith(".bias") for name in self.shards.shapes):
            raise self._refuse("its projections have biases, llama.cpp's of this family have none")
        kind = self._rope.get("rope_type", "default")
        allowed = ROTARY[:-1] if self.architecture in HALVES else ROTARY
        if kind not in allowed:
            raise self._refuse(
                f"llama.cpp has no rotary embeddings of type {kind!r} for {self.family}; allowed are "
                f"{', '.join(allowed)}"
            )
        if self._rope.get("partial_rotary_factor", 1) != 1:
            raise self._refuse("its rotary embeddings turn a part of each head; allowed are whole heads")

    @property
    def _rope(self) -> dict[str, Any]:
        return self.config.rope_parameters

    @property
    def context_length(self) -> int:
        """Tokens of the longest text that llama.cpp computes as PyTorch does: no longer than a window that layers
        attend to, which llama.cpp does not have here."""
        window: int | None = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        positions: int = self.config.max_position_embeddings
        if window is None or (kinds is not None and "sliding_attention" not in kinds):
            return positions
        return min(positions, window)

    # Header.

    def write_header(self, writer: GGUFWriter, precision: Precision) -> None:
        """Add all fields."""
        writer.add_type("model")
        writer.add_name(self.folder.resolve().name)
        writer.add_file_type(precision.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(self.config.vocab_size)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(self.config.hidden_size)
        writer.add_block_count(len(self.layers))
        writer.add_layer_norm_rms_eps(self.config.rms_norm_eps)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(self._rope["rope_theta"])
        self._write_rope_scaling(writer)
        sizes = [self._sizes(index, layer) for index, layer in enumerate(self.layers)]
        heads, groups, channels = map(list, zip(*sizes, strict=True))
        mixed = self.architecture == MIXED
        writer.add_head_count(heads if mixed else heads[0])
        writer.add_head_count_kv(groups if mixed else groups[0])
        writer.add_feed_forward_length(channels if mixed else channels[0])
        self.vocabulary.write(writer)

    def _write_rope_scaling(self, writer: GGUFWriter) -> None:
        rope = self._rope
        if rope.get("rope_type") not in ("linear", "yarn"):
            return
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
            # llama.cpp multiplies with what YaRN's paper says; the model may say otherwise.
            usual = 0.1 * math.log(rope["factor"]) + 1
            writer.add_rope_scaling_attn_factors(self._rotary.attention_scaling / usual)

    @property
    def _rotary(self) -> Any:
        return self.model.model.rotary_emb

    def _sizes(self, index: int, layer: LayerParts) -> tuple[int, int, int]:
        """Query heads, key-value heads and channels of a layer, stand-ins included."""
        heads, groups = (1, 1) if self._stands_in(index, layer) else (layer.query_heads, layer.groups)
        return heads, groups, layer.channels or STAND_IN_CHANNELS

    def _stands_in(self, index: int, layer: LayerParts) -> bool:
        """Whether a head whose output is zero stands where the attention was removed."""
        return not layer.groups and (index == 0 or f"model.layers.{index}.self_attn.bias" in self.shards.shapes)

    # Tensors.

    def entries(self) -> Iterator[Entry]:
        """All tensors, in the file's order."""
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(kind, len(self.layers))
        for source, shape in self._sources():
            name = names.get_name(source, (".weight", ".bias"))
            if name is None:
                raise self._refuse(f"llama.cpp's {self.architecture} has no place for {source}")
            yield Entry(name, shape, source, self._heads_to_turn(source))
        for index, layer in enumerate(self.layers):
            if not layer.groups:
                yield from self._left_of(index, "self_attn", "attn_output")
                if self._stands_in(index, layer):
                    yield from self._no_attention(index)
            if not layer.channels:
                yield from self._left_of(index, "mlp", "ffn_down")
                yield from self._no_mlp(index)
        if self._rope.get("rope_type") == "llama3":
            exponents = torch.arange(0, self.head_size, 2) / self.head_size
            factors = self._rope["rope_theta"] ** -exponents / self._rotary.inv_freq.float()
            yield _constant("rope_freqs.weight", factors.numpy())

    def _sources(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        tied = self.model.all_tied_weights_keys
        for name, value in self.model.state_dict().items():
            if name not in tied and not name.endswith((".self_attn.bias", ".mlp.bias")):
                yield name, tuple(value.shape)

    def _heads_to_turn(self, source: str) -> int:
        if self.architecture in HALVES or source.split(".")[-2] not in ("q_proj", "k_proj"):
            return 0
        layer = self.layers[int(source.split(".")[2])]
        return layer.query_heads if ".q_proj." in source else layer.groups

    def _left_of(self, index: int, part: str, target: str) -> Iterator[Entry]:
        """The bias that is left of a removed part."""
        source = f"model.layers.{index}.{part}.bias"
        if source in self.shards.shapes:
            yield Entry(f"blk.{index}.{target}.bias", tuple(self.shards.shapes[source]), source)

    def _no_attention(self, index: int) -> Iterator[Entry]:
        hidden = self.config.hidden_size
        yield _constant(f"blk.{index}.attn_norm.weight", np.ones(hidden, np.float32))
        for name in ("attn_q", "attn_k", "attn_v"):
            yield _constant(f"blk.{index}.{name}.weight", np.zeros((self.head_size, hidden), np.float32))
        yield _constant(f"blk.{index}.attn_output.weight", np.zeros((hidden, self.head_size), np.float32))

    def _no_mlp(self, index: int) -> Iterator[Entry]:
        hidden = self.config.hidden_size
        yield _constant(f"blk.{index}.ffn_norm.weight", np.ones(hidden, np.float32))
        for name in ("ffn_gate", "ffn_up"):
            yield _constant(f"blk.{index}.{name}.weight", np.zeros((STAND_IN_CHANNELS, hidden), np.float32))
        yield _constant(f"blk.{index}.ffn_down.weight", np.zeros((hidden, STAND_IN_CHANNELS), np.float32))


def _constant(name: str, values: np.ndarray) -> Entry:
    return Entry(name, values.shape, constant=values)


def check_exportable(folder: Path, pre_tokenizer: str | None = None, flag: str = "--model") -> Plan:
    """Check that a checkpoint can be written to GGUF.

    Args:
        pre_tokenizer: see `vocabulary_of`.
        flag: what named the folder, for the error text.

    Raises:
        UserError: it is an adapter, a classifier or quantized, or the model or its tokenizer has what llama.cpp does
            not.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{flag} {folder}: is a LoRA adapter; merge it first: python merge_and_save_lora.py")
    require_language_model(folder, flag)
    return Plan(folder, flag, pre_tokenizer)


def write_gguf(plan: Plan, target: Path, precision: str) -> dict[str, Any]:
    """Write a checkpoint as a GGUF file.

    Args:
        plan: of `check_exportable`.
        target: the file, which is written anew.
        precision: see PRECISIONS. A matrix whose rows are no multiple of the type's block is in f16.

    Returns:
        Metrics: bytes, architecture, context length, and which tensors are in f16 that were to be in less.

    Raises:
        UserError: a weight is not finite, or too large for f16.
    """
    wanted = PRECISIONS[precision]
    if plan.context_length < plan.config.max_position_embeddings:
        log.info("Context: %d tokens, the window that layers attend to; llama.cpp has none here", plan.context_length)
    entries = [(entry, entry.type(wanted, plan.tied)) for entry in plan.entries()]
    with closing(GGUFWriter(target, plan.architecture)) as writer:
        plan.write_header(writer, wanted)
        for entry, kind in entries:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            stored = math.prod(entry.shape) // block * size
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), stored, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, kind in entries:
            values = entry.read(plan.shards)
            if kind == Type.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
                raise UserError(
                    f"{plan.folder}: {entry.source} has values beyond float16's range; use --precision bf16"
                )
            writer.write_tensor_data(np.ascontiguousarray(gguf.quants.quantize(values, kind)))
    wider = [entry.name for entry, kind in entries if kind == Type.F16 != wanted.type]
    if wider:
        log.info("In f16, as rows are no multiples of 32: %d tensors, the first %s", len(wider), wider[0])
    return {
        "bytes": target.stat().st_size,
        "architecture": plan.architecture,
        "context_length": plan.context_length,
        "in_f16_instead": wider,
    }


# Check.


class ExportedWeights:
    """The values of a file under the names, and in the order, of the checkpoint it was made from; as `Shards` gives
    those."""

    def __init__(self, plan: Plan, target: Path):
        self.folder, self.plan = target, plan
        self._entries = {entry.source: entry for entry in plan.entries() if entry.source is not None}
        self._stored = {tensor.name: tensor for tensor in GGUFReader(target).tensors}

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors by name, fp32."""
        return {name: self._tensor(self._entries[name]) for name in names}

    def _tensor(self, entry: Entry) -> Tensor:
        stored = self._stored[entry.name]
        values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(entry.shape).copy())
        return to_halves(values, entry.heads) if entry.heads else values

    def check(self) -> float:
        """The largest difference from a weight, relative to the largest weight of its tensor.

        Raises:
            UserError: it is more than rounding.
        """
        worst = 0.0
        for source, entry in self._entries.items():
            weights, values = self.plan.shards.tensors([source])[source].float(), self._tensor(entry)
            difference, largest = (weights - values).abs().max().item(), weights.abs().max().item()
            if not difference <= ROUNDING[self._stored[entry.name].tensor_type] * largest + SMALLEST:
                raise UserError(f"{self.plan.folder}: {source} was written with other values; nothing is kept of it")
            worst = max(worst, difference / max(largest, SMALLEST))
        return worst


WINDOWS, LENGTH = 2, 64


def check_gguf(plan: Plan, target: Path, precision: str) -> dict[str, Any]:
    """Read a GGUF file back, run it in llama.cpp, and compare both with the PyTorch model in fp32.

    Its values must be the weights but for rounding. In llama.cpp its tokens of a few texts must be the tokenizer's, and
    its logits those of a PyTorch model that has the file's values (see `Precision.tolerance`): what they differ from
    the model's besides is quantization. Without the package xllamacpp only the values are compared. Layers are read
    one at a time.

    Returns:
        Which engine ran; the largest difference of a weight, relative to the largest of its tensor; the largest
        differences of logits: llama.cpp's from the model's, and from those of the file's values (`same_weights`), and
        the root mean square of the latter relative to the logits' spread.

    Raises:
        UserError: the file does not compute what the model does.
    """
    stored = ExportedWeights(plan, target)
    metrics: dict[str, Any] = {"engine": "none", "weight_difference": stored.check()}
    if not is_installed():
        log.info("xllamacpp is not installed: the file's values were compared, it was not run in llama.cpp")
        return metrics
    ids = _windows(plan)
    with LlamaCpp() as llama:
        _check_tokens(plan, llama, target)
        found = torch.stack([torch.from_numpy(llama.logits(target, window.tolist())) for window in ids])
    original, same = _logits(plan.folder, plan.shards, ids), _logits(plan.folder, stored, ids)
    relative = ((found - same).square().mean().sqrt() / same.std()).item()
    allowed = PRECISIONS[precision].tolerance
    if not relative <= allowed:
        raise UserError(
            f"{plan.folder}: llama.cpp's logits differ from PyTorch's by {relative:.2g} of their spread, allowed is "
            f"{allowed:g} with --precision {precision}; nothing is kept of the file"
        )
    return metrics | {
        "engine": "llama.cpp",
        "logit_difference": (found - original).abs().max().item(),
        "logit_difference_same_weights": (found - same).abs().max().item(),
        "relative_difference_same_weights": relative,
    }


@torch.no_grad()
def _logits(folder: Path, weights: Any, ids: Tensor) -> Tensor:
    """Logits [windows, length, vocabulary] of a checkpoint's model with these weights, as `Shards` gives them."""
    model, _ = load_skeleton(folder, torch.float32)
    put_offloaded(model, weights, Placement("disk", torch.device("cpu"), torch.float32, Path(gettempdir())))
    return model(input_ids=ids, use_cache=False).logits


def _windows(plan: Plan) -> Tensor:
    """Token ids [windows, length] of the texts."""
    texts = (plan.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS)
    ids = torch.tensor([token for text in texts for token in text])
    length = min(LENGTH, plan.context_length, len(ids) // WINDOWS)
    return ids[: WINDOWS * length].view(WINDOWS, length)


def _check_tokens(plan: Plan, llama: LlamaCpp, target: Path) -> None:
    for text, special in itertools.product(TEXTS, (False, True)):
        expected = plan.tokenizer(text, add_special_tokens=special)["input_ids"]
        if llama.tokenize(target, text, add_special=special) != expected:
            raise UserError(
                f"{plan.folder}: llama.cpp splits {text!r} into other tokens than the tokenizer does; say how it "
                f"splits text by llama.cpp's name: {FLAG} NAME"
            )

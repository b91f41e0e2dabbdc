"""Weights in 4 bits: what bitsandbytes computes, bit for bit, for training; and the checkpoints that it loads.

Training keeps fp32 weights and computes with their 4-bit values (fake quantization); the gradient passes straight
through to the fp32 weights. Packing those weights gives a bitsandbytes model that computes with the same values.

NF4: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". The straight-through gradient: Bengio et
al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
"""

import copy
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from compression.config import Settings
from compression.flops import part_of
from compression.runtime import UserError, pick_dtype
from compression.structures import ENCODER_KINDS, layers_of
from compression.surgery import shrink

QuantType = Literal["nf4", "fp4"]
Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]

# bitsandbytes takes no block's largest magnitude as smaller than this (it divides by it).
SMALLEST_ABSMAX = 1e-38
# [-1, 1] is cut into so many intervals, of which none holds more than one threshold between neighbouring values.
INTERVALS = 32
# Rows of an embedding table share a scale in blocks of so many values, or of the largest divisor of that.
EMBEDDING_BLOCK = 64
EMBEDDINGS = re.compile(r"\b(word|position)_embeddings$")


@dataclass(frozen=True)
class Format:
    """How a model's weights are stored: `bits` for the Linear layers of the encoder, `embedding_bits` for the tables.

    `quant_type`, `blocksize` and `double_quant` (the blocks' scales are quantized too) are those of bitsandbytes and
    count with 4 bits only.
    """

    bits: int = 4
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False
    embedding_bits: int = 4


@dataclass
class Storage(Settings):
    """Settings of every script that writes a quantized model."""

    quant_type: QuantType = "nf4"
    """The 16 values of a 4-bit weight: quantiles of a normal distribution, or floating-point numbers."""
    blocksize: Blocksize = 64
    """Number of weights that share one scale."""
    double_quant: bool = False
    """Quantize the scales too."""
    embedding_bits: Literal[32, 16, 8, 4] = 4
    """Bits per value of the word and position tables, which are most of a small 4-bit model."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the 4-bit layers compute in; auto: bfloat16 where the hardware multiplies it, else float32."""

    def format(self, bits: int = 4) -> Format:
        """The format that these settings describe."""
        return Format(bits, self.quant_type, self.blocksize, self.double_quant, self.embedding_bits)


# Values of quantized weights.


def fake_quantize(weight: Tensor, storage: Format) -> Tensor:
    """The values that a weight has after 4-bit quantization and dequantization by bitsandbytes.

    Args:
        weight: fp32, any shape; blocks run over its elements in memory order.

    Returns:
        A tensor of that shape, bit-identical to `dequantize_4bit(*quantize_4bit(weight))`. (On CPUs with AVX-512
        that call of bitsandbytes 0.50 needs the weight as one row, see `fix_4bit_layers`.)

    Raises:
        TypeError: the weight is not fp32.
    """
    if weight.dtype != torch.float32:
        raise TypeError(f"weights to be quantized must be float32, found {weight.dtype}")
    if weight.is_cuda:  # fast there, and exact whatever the kernel's rounding
        return dequantize_4bit(*_quantize(weight, storage))
    flat, size = weight.reshape(-1), storage.blocksize
    values, absmax = torch.empty_like(flat), flat.new_empty(-(-len(flat) // size))
    full = len(flat) // size
    blocks, rest = flat[: full * size].view(full, size), flat[full * size :]
    torch.amax(blocks.abs(), dim=1, out=absmax[:full])
    scale = (1 / absmax[:full].clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)
    _nearest(blocks * scale, storage.quant_type, out=values[: full * size].view(full, size))
    if len(rest):  # bitsandbytes divides here, where it multiplied above
        absmax[-1] = rest.abs().max().clamp(min=SMALLEST_ABSMAX)
        _nearest(rest / absmax[-1], storage.quant_type, out=values[full * size :])
    if storage.double_quant:
        absmax = _requantize(absmax)
    values[: full * size].view(full, size).mul_(absmax[:full].unsqueeze(1))
    values[full * size :].mul_(absmax[full:])
    return values.view_as(weight)


def _quantize(weight: Tensor, storage: Format):
    return quantize_4bit(
        weight.contiguous(),
        blocksize=storage.blocksize,
        compress_statistics=storage.double_quant,
        quant_type=storage.quant_type,
    )


def _requantize(absmax: Tensor) -> Tensor:
    """The blocks' scales after double quantization. They are few, so bitsandbytes itself does it."""
    offset = absmax.mean()
    codes, state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=256)
    return bnb.functional.dequantize_blockwise(codes, state) + offset


@cache
def _intervals(quant_type: str) -> tuple[Tensor, Tensor]:
    """For each interval of [-1, 1] the threshold in it [INTERVALS], and the values below and above it, interleaved.

    An interval without a threshold has the same value twice. No threshold is near an interval's end, so it does not
    matter to which side rounding puts a number at the end of an interval.
    """
    values = get_4bit_type(quant_type, device="cpu").unique()
    thresholds = (values[:-1] + values[1:]) / 2
    ends = torch.bucketize(torch.linspace(-1, 1, INTERVALS + 1), thresholds)
    threshold = torch.cat([thresholds, torch.tensor([float("inf")])])[ends[:-1]]
    return threshold, torch.stack([values[ends[:-1]], values[ends[1:]]], dim=1).flatten()


def _nearest(scaled: Tensor, quant_type: str, out: Tensor) -> None:
    """Write the representable value nearest to each number in [-1, 1], of two equally near ones the lower one."""
    threshold, values = _intervals(quant_type)
    scaled = scaled.view(-1)
    interval = ((scaled + 1) * (INTERVALS / 2)).to(torch.int32).clamp_(0, INTERVALS - 1)
    above = scaled > threshold.index_select(0, interval)
    torch.index_select(values, 0, interval.mul_(2).add_(above), out=out.view(-1))


# Training with quantized weights.


class _StraightThrough(torch.autograd.Function):
    """Computes with `values`, gives the gradient to `weight`."""

    @staticmethod
    def forward(ctx, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class FakeQuantizedLinear(nn.Linear):
    """A Linear layer that computes with the 4-bit values of its fp32 weight.

    It shares the parameters of the layer it replaces, and the state dict is the same. The values are kept until
    `refresh`, which must follow every optimizer step: fused optimizers change weights without a trace.
    """

    def __init__(self, linear: nn.Linear, storage: Format):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.storage = storage
        self._values: Tensor | None = None
        self._made_from: tuple[int, int] | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _StraightThrough.apply(self.weight, self.values), self.bias)

    def refresh(self) -> None:
        """Make the values anew when they are needed next: an optimizer has changed the weight."""
        self._made_from = None

    @property
    def values(self) -> Tensor:
        """[out, in], the 4-bit values of the weight."""
        made_from = (self.weight._version, self.weight.data_ptr())  # tells of loaded states and other devices
        if made_from != self._made_from:
            # Made during an evaluation, the values must still serve the next training step.
            with torch.inference_mode(False), torch.no_grad():
                self._values = fake_quantize(self.weight.detach(), self.storage)
            self._made_from = made_from
        return self._values

    def to_plain(self) -> nn.Linear:
        """A plain Linear layer with the same fp32 parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


class FakeQuantizedEmbedding(nn.Embedding):
    """An embedding table that gives its rows as they will be stored; only the rows looked up are quantized."""

    def __init__(self, embedding: nn.Embedding, bits: int):
        nn.Module.__init__(self)
        # All settings of an Embedding are plain attributes.
        self.__dict__.update({name: getattr(embedding, name) for name in nn.Embedding.__constants__})
        self.weight, self.bits = embedding.weight, bits

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return _StraightThrough.apply(rows, fake_quantize_rows(rows.detach(), self.bits))

    def to_plain(self) -> nn.Embedding:
        """A plain Embedding with the same fp32 table."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=self.weight)


def add_fake_quantization(model: PreTrainedModel, storage: Format) -> dict[str, FakeQuantizedLinear]:
    """Let a classifier compute, in place, with the values that `pack` will store; returns its layers by name.

    Quantized are the Linear layers of the encoder and the embedding tables; the classification head stays as it is.

    Raises:
        UserError: an architecture that is not supported, or tables that cannot be stored with so many bits.
    """
    layers = {name: FakeQuantizedLinear(linear, storage) for name, linear in encoder_linears(model).items()}
    tables = embedding_tables(model) if storage.embedding_bits < 32 else {}
    for table in tables.values():
        check_width(table.embedding_dim, storage.embedding_bits)
    replacements = layers | {
        name: FakeQuantizedEmbedding(table, storage.embedding_bits) for name, table in tables.items()
    }
    for name, module in replacements.items():
        model.set_submodule(name, module)
    return layers


def remove_fake_quantization(model: PreTrainedModel) -> None:
    """Put plain layers with the fp32 weights back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantizedLinear | FakeQuantizedEmbedding):
            model.set_submodule(name, module.to_plain())


def encoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The Linear layers of the encoder by name: what is quantized."""
    linears = {id(linear) for layer in layers_of(model) for linear in layer.linears()}
    return {name: module for name, module in model.named_modules() if id(module) in linears}


def embedding_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """The word and position tables by name."""
    return {name: module for name, module in model.named_modules() if EMBEDDINGS.search(name)}


# Embedding rows.


def check_width(width: int, bits: int) -> None:
    """Raise UserError where rows of this width cannot be stored with so many bits per value."""
    if bits == 4 and width % 2:
        raise UserError(f"--embedding_bits 4: the model's embeddings are {width} wide, an odd number; use 8, 16 or 32")


def fake_quantize_rows(rows: Tensor, bits: int) -> Tensor:
    """The values that embedding rows [..., width] have once they are stored with so many bits."""
    if bits == 16:
        return rows.half().to(rows.dtype)
    codes, scales = _encode_rows(rows, bits)
    blocks = codebook(bits).to(rows.device)[codes.int()].unflatten(-1, (scales.shape[-1], -1))
    return (blocks * scales.to(rows.dtype).unsqueeze(-1)).flatten(-2)


@cache
def codebook(bits: int) -> Tensor:
    """The numbers, in units of the scale, that a code stands for, ascending: NF4's 16, or 256 evenly spaced ones."""
    return get_4bit_type("nf4", device="cpu") if bits == 4 else torch.arange(-128, 128) / 127


def _encode_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., width] and scales bf16 [..., blocks]: the largest magnitude of each block."""
    blocks = rows.unflatten(-1, (-1, math.gcd(rows.shape[-1], EMBEDDING_BLOCK)))
    scales = blocks.abs().amax(-1).to(torch.bfloat16)
    scaled = blocks / scales.to(rows.dtype).clamp(min=SMALLEST_ABSMAX).unsqueeze(-1)
    numbers = codebook(bits).to(rows.device)
    codes = torch.bucketize(scaled, (numbers[:-1] + numbers[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).flatten(-2), scales


# Packing.


def pack(model: PreTrainedModel, storage: Format, compute_dtype: torch.dtype) -> PreTrainedModel:
    """The model that is saved: its weights stored as `storage` says, ready for `save_checkpoint`.

    Args:
        model: a classifier with plain fp32 layers, dense or pruned; it is left as it is.
        compute_dtype: what the 4-bit layers compute in.

    Returns:
        A model in evaluation mode on the same device. It is of the pruned class of its family, also where nothing was
        pruned: stock classes have no packed tables and fall over faults of bitsandbytes, see `fix_4bit_layers`.

    Raises:
        UserError: an architecture that is not supported, or tables that cannot be stored with so many bits.
    """
    packed = _with_packed_tables(model, storage.embedding_bits)
    linears = encoder_linears(packed)
    heads = [n for n, module in packed.named_modules() if isinstance(module, nn.Linear) and n not in linears]
    for name, linear in linears.items():
        layer = _linear_8bit(linear) if storage.bits == 8 else _linear_4bit(linear, storage, compute_dtype)
        packed.set_submodule(name, layer)
    packed.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=storage.bits == 4,
        load_in_8bit=storage.bits == 8,
        llm_int8_skip_modules=heads,
        bnb_4bit_quant_type=storage.quant_type,
        bnb_4bit_use_double_quant=storage.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return packed.eval()


def nf4_base() -> BitsAndBytesConfig:
    """How the weights under an adapter are loaded in 4 bits: NF4, with quantized scales (Dettmers et al. 2023)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=pick_dtype("auto", "Compute dtype"),
    )


def _linear_4bit(linear: nn.Linear, storage: Format, compute_dtype: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype, storage.double_quant,
        storage.quant_type, device="meta",
    )  # fmt: skip
    codes, state = _quantize(linear.weight.detach(), storage)
    layer.weight = bnb.nn.Params4bit(
        codes, quant_state=state, blocksize=storage.blocksize, compress_statistics=storage.double_quant,
        quant_type=storage.quant_type, bnb_quantized=True, module=layer,
    )  # fmt: skip
    layer.quant_state = state
    if linear.bias is not None:
        # bitsandbytes casts the bias in place at the first forward pass: store what is computed with.
        layer.bias = nn.Parameter(linear.bias.detach().to(compute_dtype), requires_grad=False)
    return layer


def _linear_8bit(linear: nn.Linear) -> bnb.nn.Linear8bitLt:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False,
        threshold=BitsAndBytesConfig().llm_int8_threshold, device="meta",
    )  # fmt: skip
    weight = bnb.nn.Int8Params(linear.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias
    return layer


def _with_packed_tables(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy of the model, of the pruned class of its family, whose tables are stored with so many bits."""
    layers, device = layers_of(model), model.device
    everything = {
        kind: [torch.ones(part.count(kind), device=device).bool() for part in layers] for kind in ENCODER_KINDS
    }
    small = shrink(model, everything)
    if bits == 32:
        return small
    weights, config = small.state_dict(), copy.deepcopy(small.config)
    config.embedding_bits = bits
    for name in embedding_tables(small):
        stored = _pack_rows(weights.pop(f"{name}.weight"), bits)
        weights |= {f"{name}.{key}": value for key, value in stored.items()}
    packed = type(small)(config)
    packed.load_state_dict(weights)
    return packed.to(device).eval()


def _pack_rows(rows: Tensor, bits: int) -> dict[str, Tensor]:
    """The buffers of a `PackedEmbedding`."""
    check_width(rows.shape[-1], bits)
    if bits == 16:
        return {"codes": rows.half()}
    codes, scales = _encode_rows(rows, bits)
    if bits == 4:
        codes = codes[:, ::2] << 4 | codes[:, 1::2]
    return {"codes": codes, "scales": scales, "numbers": codebook(bits)}


def dequantized_weight(layer: bnb.nn.Linear4bit) -> Tensor:
    """The values [out, in] that a packed 4-bit layer computes with."""
    state = copy.copy(layer.weight.quant_state)
    state.shape = torch.Size([1, state.shape.numel()])  # see `fix_4bit_layers`
    return dequantize_4bit(layer.weight.data, state).view(layer.out_features, layer.in_features)


def check_exact(packed: PreTrainedModel, trained: dict[str, Tensor]) -> None:
    """Check that every packed layer has exactly the values it was trained with.

    Args:
        trained: the values of `FakeQuantizedLinear` by layer name.

    Raises:
        RuntimeError: names the first layer that differs.
    """
    for name, values in trained.items():
        if not torch.equal(dequantized_weight(packed.get_submodule(name)), values):
            raise RuntimeError(f"{name}: the packed weight differs from the one that was trained; nothing was saved")


def bytes_by_part(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of what a model's checkpoint stores: total, and those of the embeddings, the encoder and the head."""
    sizes = {"total": 0, "embeddings": 0, "encoder": 0, "head": 0}
    for name, tensor in model.state_dict().items():
        sizes["total"] += tensor.nbytes
        sizes[part_of(name)] += tensor.nbytes
    return sizes

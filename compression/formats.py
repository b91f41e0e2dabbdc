"""Formats of stored weights: what bitsandbytes stores and computes with, bit for bit, and packed embedding tables.

NF4: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from compression.runtime import UserError

# bitsandbytes takes no block's largest magnitude as smaller than this (it divides by it).
SMALLEST_ABSMAX = 1e-38
# Scales that share one scale of their own, where scales are quantized too.
NESTED_BLOCKSIZE = 256
# Intervals that [-1, 1] is cut into; none holds more than one threshold between neighbouring values.
INTERVALS = 32
# Values of an embedding table's row that share a scale; of narrower rows the largest divisor of this.
EMBEDDING_BLOCK = 64


# Formats of Linear weights.


@dataclass(frozen=True)
class FourBit:
    """Weights in 4 bits, one scale for each block of them."""

    quant_type: str = "nf4"
    """Which 16 values a weight can have, in units of the scale."""
    blocksize: int = 64
    """Weights that share a scale; blocks run over the elements in memory order."""
    double_quant: bool = False
    """Whether the scales are quantized too, to 8 bits."""

    def values(self, weight: Tensor) -> Tensor:
        """The values that a weight has after 4-bit quantization and dequantization by bitsandbytes.

        Args:
            weight: fp32, any shape.

        Returns:
            A tensor of that shape, bit-identical to `dequantize_4bit(*quantize_4bit(weight))`. (On CPUs with AVX-512
            that call of bitsandbytes 0.50 needs the weight as one row, see `fix_4bit_layers`.)

        Raises:
            TypeError: the weight is not fp32.
        """
        if weight.dtype != torch.float32:
            raise TypeError(f"weights to be quantized must be float32, found {weight.dtype}")
        if weight.is_cuda:  # fast there, and exact whatever the kernel's rounding
            return dequantize_4bit(*self._quantize(weight))
        flat, size = weight.reshape(-1), self.blocksize
        values, absmax = torch.empty_like(flat), flat.new_empty(-(-len(flat) // size))
        full = len(flat) // size
        blocks, rest = flat[: full * size].view(full, size), flat[full * size :]
        torch.amax(blocks.abs(), dim=1, out=absmax[:full])
        scale = (1 / absmax[:full].clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)
        _nearest(blocks * scale, self.quant_type, out=values[: full * size].view(full, size))
        if len(rest):  # bitsandbytes divides here, where it multiplied above
            absmax[-1] = rest.abs().max().clamp(min=SMALLEST_ABSMAX)
            _nearest(rest / absmax[-1], self.quant_type, out=values[full * size :])
        if self.double_quant:
            absmax = _requantize(absmax)
        values[: full * size].view(full, size).mul_(absmax[:full].unsqueeze(1))
        values[full * size :].mul_(absmax[full:])
        return values.view_as(weight)

    def pack_linear(self, linear: nn.Linear, compute_dtype: torch.dtype) -> bnb.nn.Linear4bit:
        """The layer of bitsandbytes that computes with the `values` of a plain layer's weight, taken as fp32."""
        biased, settings = linear.bias is not None, (self.double_quant, self.quant_type)
        sizes = linear.in_features, linear.out_features
        layer = bnb.nn.Linear4bit(*sizes, biased, compute_dtype, *settings, device="meta")
        codes, layer.quant_state = self._quantize(linear.weight.detach().float())
        layer.weight = bnb.nn.Params4bit(
            codes,
            quant_state=layer.quant_state,
            blocksize=self.blocksize,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            bnb_quantized=True,
            module=layer,
        )
        if biased:
            # bitsandbytes casts the bias in place at the first forward pass: store what is computed with.
            layer.bias = nn.Parameter(linear.bias.detach().to(compute_dtype), requires_grad=False)
        return layer

    def _quantize(self, weight: Tensor) -> tuple[Tensor, QuantState]:
        return quantize_4bit(
            weight.contiguous(),
            blocksize=self.blocksize,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )

    def quantization_config(
        self, compute_dtype: torch.dtype, unquantized: list[str] | None = None
    ) -> BitsAndBytesConfig:
        """What a model's config says of it; `unquantized` names the Linear layers that stay in full precision."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=unquantized,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a stored weight: codes, scales, and the numbers that the codes stand for.

        The settings, which bitsandbytes stores as JSON beside every weight, are left out: about 100 bytes.
        """
        weights = math.prod(shape)
        scales = math.ceil(weights / self.blocksize)
        if self.double_quant:
            scale_bytes = scales + 4 * math.ceil(scales / NESTED_BLOCKSIZE) + 4 * 2**8
        else:
            scale_bytes = 4 * scales
        return math.ceil(weights / 2) + scale_bytes + 4 * 2**4


@dataclass(frozen=True)
class EightBit:
    """Weights in 8 bits, one scale for each row (LLM.int8, Dettmers et al. 2022)."""

    def pack_linear(self, linear: nn.Linear, compute_dtype: torch.dtype) -> bnb.nn.Linear8bitLt:
        """The layer of bitsandbytes that takes a plain layer's place; it computes in its input's type."""
        threshold = BitsAndBytesConfig().llm_int8_threshold
        settings = dict(has_fp16_weights=False, threshold=threshold, device="meta")
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, **settings)
        weight = bnb.nn.Int8Params(linear.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = weight.to(linear.weight.device)  # type: ignore[misc]
        layer.bias = linear.bias
        return layer

    def quantization_config(
        self, compute_dtype: torch.dtype, unquantized: list[str] | None = None
    ) -> BitsAndBytesConfig:
        """See `FourBit.quantization_config`; what it says of 4-bit layers is not read."""
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_skip_modules=unquantized,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute_dtype,
        )

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a stored weight [out, in]: codes, scales, and one that says how the codes are laid out."""
        return math.prod(shape) + 4 * shape[0] + 1


def _requantize(absmax: Tensor) -> Tensor:
    """The blocks' scales after double quantization. They are few, so bitsandbytes itself does it."""
    offset = absmax.mean()
    codes, state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
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


def dequantized_weight(layer: bnb.nn.Linear4bit) -> Tensor:
    """The values [out, in] that a packed 4-bit layer computes with."""
    state = copy.copy(layer.weight.quant_state)  # type: ignore[attr-defined]
    state.shape = torch.Size([1, state.shape.numel()])  # see `fix_4bit_layers`
    return dequantize_4bit(layer.weight.data, state).view(layer.out_features, layer.in_features)


def block_scales(layer: bnb.nn.Linear4bit) -> Tensor:
    """The scales of a packed 4-bit layer's blocks in memory order, fp32 [blocks], also where they are quantized too."""
    state = layer.weight.quant_state  # type: ignore[attr-defined]
    if not state.nested:
        return state.absmax
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


# Formats of embedding tables: what a modeling file's `PackedEmbedding` reads.


class TableFormat(ABC):
    """How the rows of an embedding table are stored."""

    bits: int
    """Bits of a code; `embedding_bits` of a model's config."""

    def check_width(self, width: int) -> None:
        """Raise UserError where rows of this width do not fill whole bytes."""
        if width * self.bits % 8:
            raise UserError(
                f"--embedding_bits {self.bits}: the model's embeddings are {width} wide, an odd number; use 8, 16 or 32"
            )

    @abstractmethod
    def values(self, rows: Tensor) -> Tensor:
        """The values that rows [..., width] have once they are stored."""

    @abstractmethod
    def pack(self, rows: Tensor) -> dict[str, Tensor]:
        """What a state dict holds of a table [rows, width], by name."""

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a stored table [rows, width]."""
        return math.prod(shape) * self.bits // 8


class Float32Rows(TableFormat):
    """A plain table."""

    bits = 32

    def values(self, rows: Tensor) -> Tensor:
        return rows

    def pack(self, rows: Tensor) -> dict[str, Tensor]:
        return {"weight": rows}


class Float16Rows(TableFormat):
    """A table in half precision."""

    bits = 16

    def values(self, rows: Tensor) -> Tensor:
        return rows.half().to(rows.dtype)

    def pack(self, rows: Tensor) -> dict[str, Tensor]:
        return {"codes": rows.half()}


class Int8Rows(TableFormat):
    """A table of codes: one scale for each block of a row, and 256 evenly spaced numbers in units of the scale."""

    bits = 8
    numbers = torch.arange(-128, 128) / 127
    """fp32 [2**bits], ascending: what each code stands for."""

    def values(self, rows: Tensor) -> Tensor:
        codes, scales = self._encode(rows)
        blocks = self.numbers.to(rows.device)[codes.int()].unflatten(-1, (scales.shape[-1], -1))
        return (blocks * scales.to(rows.dtype).unsqueeze(-1)).flatten(-2)

    def pack(self, rows: Tensor) -> dict[str, Tensor]:
        codes, scales = self._encode(rows)
        return {"codes": codes, "scales": scales, "numbers": self.numbers}

    def nbytes(self, shape: Sequence[int]) -> int:
        scales = math.prod(shape) // _embedding_block(shape[-1])
        return super().nbytes(shape) + 2 * scales + 4 * 2**self.bits

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [..., width] and scales bf16 [..., blocks]: the largest magnitude of each block."""
        blocks = rows.unflatten(-1, (-1, _embedding_block(rows.shape[-1])))
        scales = blocks.abs().amax(-1).to(torch.bfloat16)
        scaled = blocks / scales.to(rows.dtype).clamp(min=SMALLEST_ABSMAX).unsqueeze(-1)
        numbers = self.numbers.to(rows.device)
        codes = torch.bucketize(scaled, (numbers[:-1] + numbers[1:]) / 2, out_int32=True)
        return codes.to(torch.uint8).flatten(-2), scales


class NF4Rows(Int8Rows):
    """A table as `Int8Rows`, but with NF4's 16 numbers and two codes in a byte."""

    bits = 4
    numbers = get_4bit_type("nf4", device="cpu")

    def pack(self, rows: Tensor) -> dict[str, Tensor]:
        packed = super().pack(rows)
        return packed | {"codes": packed["codes"][:, ::2] << 4 | packed["codes"][:, 1::2]}


def _embedding_block(width: int) -> int:
    """Values of a row that share a scale."""
    return math.gcd(width, EMBEDDING_BLOCK)


TABLE_FORMATS: dict[int, TableFormat] = {
    format.bits: format for format in (Float32Rows(), Float16Rows(), Int8Rows(), NF4Rows())
}

"""Quantized models: what of a model is stored in which format, and the checkpoints that bitsandbytes loads."""

import copy
import re
from dataclasses import dataclass
from typing import Literal

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from compression.config import Settings
from compression.flops import part_of
from compression.formats import TABLE_FORMATS, EightBit, FourBit, TableFormat, dequantized_weight
from compression.modeling import FactorizedEmbedding, fix_4bit_layers
from compression.runtime import pick_dtype
from compression.structures import ENCODER_KINDS, layers_of
from compression.surgery import shrink

QuantType = Literal["nf4", "fp4"]
Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]

DEFAULT_EMBEDDING_BITS = 4
EMBEDDINGS = re.compile(r"\b(word|position|tok)_embeddings(\.table)?$")


@dataclass(frozen=True)
class Format:
    """How a model is stored: the Linear layers of its encoder or decoder, and a classifier's embedding tables."""

    linears: FourBit | EightBit = FourBit()
    tables: TableFormat = TABLE_FORMATS[4]


@dataclass
class Storage(Settings):
    """Settings of every script that writes a quantized model."""

    quant_type: QuantType = "nf4"
    """The 16 values of a 4-bit weight: quantiles of a normal distribution, or floating-point numbers."""
    blocksize: Blocksize = 64
    """Number of weights that share one scale."""
    double_quant: bool = False
    """Quantize the scales too."""
    embedding_bits: Literal[32, 16, 8, 4] | None = None
    """Bits per value of a classifier's word and position tables, which are most of a small 4-bit model; None: 4."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the 4-bit layers compute in; auto: bfloat16 where the hardware multiplies it, else float32."""

    def format(self, bits: int = 4) -> Format:
        """The format that these fields describe."""
        linears = FourBit(self.quant_type, self.blocksize, self.double_quant) if bits == 4 else EightBit()
        return Format(linears, TABLE_FORMATS[self.embedding_bits or DEFAULT_EMBEDDING_BITS])


def encoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The Linear layers of the encoder or decoder by name: what is quantized."""
    linears = {id(linear) for layer in layers_of(model) for linear in layer.linears()}
    return {name: module for name, module in model.named_modules() if id(module) in linears}


def embedding_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """The word and position tables by name; DeBERTa's relative positions are multiplied with, not looked up.

    Of a factorized table it is the narrow factor; the other one is a Linear layer outside the encoder.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if EMBEDDINGS.search(name) and not isinstance(module, FactorizedEmbedding)
    }


def pack(model: PreTrainedModel, storage: Format, compute_dtype: torch.dtype) -> PreTrainedModel:
    """The classifier that is saved: its weights stored as `storage` says, ready for `save_checkpoint`.

    Args:
        model: a classifier with plain fp32 layers, dense or pruned; it is left as it is.
        compute_dtype: what the 4-bit layers compute in.

    Returns:
        A model in evaluation mode on the same device. It is of the pruned class of its family, also where nothing was
        pruned: stock classes have no packed tables and fall over faults of bitsandbytes, see `fix_4bit_layers`.

    Raises:
        UserError: an architecture that is not supported, or tables that cannot be stored with so many bits.
    """
    packed = with_packed_tables(model, storage.tables)
    pack_linears(packed, storage.linears, compute_dtype)
    return packed


def pack_linears(model: PreTrainedModel, linears: FourBit | EightBit, compute_dtype: torch.dtype) -> None:
    """Quantize the Linear layers of the encoder or decoder in place, one after the other; all else stays as it is.

    Only one layer's weights are there twice, and none but that one in fp32.

    Args:
        model: of a pruned class, see `pack`.
        compute_dtype: what the 4-bit layers compute in.
    """
    names = list(encoder_linears(model))
    heads = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in names]
    for name in names:
        model.set_submodule(name, linears.pack_linear(model.get_submodule(name), compute_dtype))  # type: ignore[arg-type]
    model.config.quantization_config = linears.quantization_config(compute_dtype, heads)
    fix_4bit_layers(model.eval())


def with_packed_tables(model: PreTrainedModel, tables: TableFormat) -> PreTrainedModel:
    """A copy of the model, of the pruned class of its family, with its tables in this format."""
    layers, device = layers_of(model), model.device
    everything = {
        kind: [torch.ones(part.count(kind), device=device).bool() for part in layers] for kind in ENCODER_KINDS
    }
    small = shrink(model, everything)
    weights, config = small.state_dict(), copy.deepcopy(small.config)
    config.embedding_bits = tables.bits
    for name, table in embedding_tables(small).items():
        tables.check_width(table.embedding_dim)
        stored = tables.pack(weights.pop(f"{name}.weight"))
        weights |= {f"{name}.{key}": value for key, value in stored.items()}
    packed = type(small)(config)
    packed.load_state_dict(weights)
    return packed.to(device).eval()  # type: ignore[arg-type]


def compute_in_fp32(model: nn.Module) -> None:
    """Let a model's 4-bit layers compute in fp32, whatever its config says, in place."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = torch.float32


def nf4_base() -> BitsAndBytesConfig:
    """How the weights under an adapter are loaded in 4 bits: NF4, with quantized scales (Dettmers et al. 2023)."""
    return FourBit(double_quant=True).quantization_config(pick_dtype("auto", "Compute dtype"))


def check_exact(packed: PreTrainedModel, trained: dict[str, Tensor]) -> None:
    """Check that every packed layer has exactly the values it was trained with.

    Args:
        trained: the values of `FakeQuantizedLinear` by layer name.

    Raises:
        RuntimeError: names the first layer that differs.
    """
    for name, values in trained.items():
        layer = packed.get_submodule(name)
        if not (isinstance(layer, Linear4bit) and torch.equal(dequantized_weight(layer), values)):
            raise RuntimeError(f"{name}: the packed weight differs from the one that was trained; nothing was saved")


def compute_type(model: PreTrainedModel) -> str:
    """The data type that a model's encoder computes in, whatever its weights are stored in."""
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            return "int8"
        if isinstance(module, Linear4bit) and module.compute_dtype is not None:
            return str(module.compute_dtype).removeprefix("torch.")
    return str(model.dtype).removeprefix("torch.")


def bytes_by_part(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of what a model's checkpoint stores: total, and those of embeddings, layers and head (the rest).

    A head that shares the embeddings' table is not stored.
    """
    sizes = {"total": 0, "embeddings": 0, "encoder": 0, "head": 0}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            sizes["total"] += tensor.nbytes
            sizes[part_of(name)] += tensor.nbytes
    return sizes

"""Multiply-accumulates (MACs) and parameters, counted on the model as it is.

1 MAC = 2 FLOPs, and every figure states its sequence length: attention grows with the square of it. Counted are the
matrix products, which are nearly all of a transformer's arithmetic: Linear layers, QK^T and AV, and where a model has
them the products with a table of relative positions and a convolution (DeBERTa). LayerNorm, softmax, activations and
biases are not counted. Attention to a window of the text (ModernBERT) counts as attention to all of it: that is what
eager attention computes.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from compression.hooks import evaluation_mode, hooked
from compression.modeling import PackedEmbedding
from compression.runtime import UserError
from compression.structures import LayerParts, positions_of


@dataclass(frozen=True)
class MacCount:
    """MACs of one forward pass over a batch of full-length sequences."""

    sequence_length: int
    batch_size: int
    linear: int
    """Linear layers of the encoder (DeBERTa: and its convolution)."""
    attention: int
    """QK^T and AV (DeBERTa: and the products with relative positions)."""
    classifier: int
    """Linear layers outside the encoder: pooler, classification head, and where embeddings are of another width than
    the encoder (ELECTRA, DeBERTa, a factorized table) what projects them."""

    @property
    def encoder(self) -> int:
        return self.linear + self.attention

    @property
    def total(self) -> int:
        return self.encoder + self.classifier

    @property
    def gflops(self) -> float:
        """10^9 floating-point operations: twice the MACs."""
        return 2 * self.total / 1e9

    def as_dict(self) -> dict[str, int | float]:
        """Everything as plain JSON values."""
        return {
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "total": self.total,
            "encoder": self.encoder,
            "linear": self.linear,
            "attention": self.attention,
            "classifier": self.classifier,
            "gflops": self.gflops,
        }


def count_macs(model: PreTrainedModel, sequence_length: int, batch_size: int = 1) -> MacCount:
    """Run the model once and count the matrix products it does.

    Args:
        sequence_length: tokens per sequence, none of them padding.
        batch_size: sequences in the batch that is counted.

    Raises:
        UserError: the model has no positions for sequences that long, or is of an unknown architecture.
    """
    positions = positions_of(model.config)
    if not 1 <= sequence_length <= positions:
        raise UserError(f"sequence length {sequence_length}: allowed is 1 to {positions} for this model")
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=model.device)
    macs: Counter[nn.Module] = Counter()
    counter = FlopCounterMode(display=False)
    with _eager_attention(model), evaluation_mode(model), _count_layers(model, macs), torch.no_grad(), counter as seen:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    flops = {name: sum(by_operator.values()) for name, by_operator in seen.get_flop_counts().items()}
    named = {name: module for name, module in model.named_modules() if module in macs}
    # Some versions of transformers make the angles of rotary positions by a matrix product. What is outside those and
    # every layer of these is attention's.
    angles = [name for name, module in model.named_modules() if type(module).__name__.endswith("RotaryEmbedding")]
    elsewhere = sum(flops.get(f"{type(model).__name__}.{name}", 0) for name in [*named, *angles])
    attention = (flops["Global"] - elsewhere) // 2
    linear = sum(macs[module] for name, module in named.items() if part_of(f"{name}.weight") == "encoder")
    return MacCount(sequence_length, batch_size, linear, attention, macs.total() - linear)


@contextmanager
def _count_layers(model: nn.Module, macs: Counter[nn.Module]) -> Iterator[None]:
    """Count Linear layers and convolutions by what goes through them: FlopCounterMode knows no operator of a quantized
    layer."""

    def count(layer: nn.Linear | nn.Conv1d, _: tuple[Tensor, ...], outputs: Tensor) -> None:
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        macs[layer] += outputs.numel() * inputs

    layers = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d))
    with hooked(layer.register_forward_hook(count) for layer in layers):
        yield


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention, whose two products FlopCounterMode sees (SDPA on a CPU counts as zero)."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise RuntimeError(f"{type(model).__name__} cannot switch to eager attention: its MACs cannot be counted")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def encoder_macs_formula(layers: Sequence[LayerParts], sequence_length: int) -> int:
    """MACs of the layers for one sequence, from the shapes of their Linear modules.

    S * weights + 2 * S^2 * heads * head_size per layer: each weight is used once per token, and QK^T and AV take
    S * S * head_size MACs each per head. With a table of P relative positions (DeBERTa; He et al. 2021) there are P *
    weights of the projections that serve it, and S * P * head_size for each head and kind of product with it.
    """
    return sum(_layer_macs(layer, sequence_length) for layer in layers)


def _layer_macs(layer: LayerParts, length: int) -> int:
    def weights(linears: Iterable[nn.Linear]) -> int:
        return sum(linear.in_features * linear.out_features for linear in linears)

    attended = layer.query_heads * layer.head_size
    products = 2 * length**2 * attended
    positions = layer.positions
    if positions is None:
        return length * weights(layer.linears()) + products
    of_positions = [rows.module for rows in (layer.attention[:2] if positions.shared else layer.attention[3:])]
    of_tokens = [linear for linear in layer.linears() if positions.shared or linear not in of_positions]
    products += length * positions.rows * positions.products * attended
    return length * weights(of_tokens) + positions.rows * weights(of_positions) + products


def count_thop(model: PreTrainedModel, sequence_length: int) -> dict[str, Any]:
    """MACs and parameters by `thop` (https://github.com/Lyken17/pytorch-OpCounter), to compare with its figures alone.

    It counts what it knows of a model's modules: here Linear layers, quantized ones by their shape. Functions it does
    not see, so that attention's QK^T and AV are missing: `macs` is `MacCount.total` less `MacCount.attention` (and less
    a convolution, which some DeBERTa have).
    Parameters are those of Linear layers and LayerNorms; embedding tables are missing.

    Returns:
        macs and params for one sequence of `sequence_length` tokens, and what they do not count.
    """
    from thop import profile
    from thop.profile import register_hooks
    from thop.vision.basic_hooks import zero_ops

    # It leaves buffers behind: a copy of the modules, with the same weights.
    counted = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for name, module in list(counted.named_modules()):
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            counted.set_submodule(name, dense.to(model.device))
    ids = torch.zeros(1, sequence_length, dtype=torch.long, device=model.device)
    others = {kind: zero_ops for kind in register_hooks if kind is not nn.Linear}
    macs, params = profile(counted, (ids,), others, verbose=False)
    return {
        "sequence_length": sequence_length,
        "macs": int(macs),
        "params": int(params),
        "not_counted": ["QK^T and AV of attention (macs)", "embedding tables (params)"],
    }


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of a model: total, embeddings (tables, what projects them, their norm), encoder (all layers), head
    (the rest).

    Counted are the weights that the model computes with, however many bits each is stored in.
    """
    counts = {"total": 0, "embeddings": 0, "encoder": 0, "head": 0}
    counted = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:  # tied weights are stored once
                continue
            counted.add(id(parameter))
            packed = isinstance(module, nn.Linear) and name == "weight"
            # 4-bit Linear layers store two weights in an element, so count by the layer's shape.
            size = module.in_features * module.out_features if packed else parameter.numel()
            counts["total"] += size
            counts[part_of(f"{module_name}.{name}")] += size
        if isinstance(module, PackedEmbedding):
            counts["total"] += module.num_embeddings * module.embedding_dim
            counts["embeddings"] += module.num_embeddings * module.embedding_dim
    return counts


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to: embeddings, encoder or head."""
    # What is no layer in DeBERTa's encoder: a convolution, and the norm of its table of positions.
    if re.search(r"\blayers?\.\d+\.|\bencoder\.(conv|LayerNorm)\.", parameter_name):
        return "encoder"
    return "embeddings" if "embed" in parameter_name else "head"

"""Multiply-accumulates (MACs) and parameters, counted on the model as it is.

1 MAC = 2 FLOPs, and every figure states its sequence length: attention grows with the square of it. Counted are the
matrix products, which are nearly all of a transformer's arithmetic: Linear layers, QK^T and AV. LayerNorm, softmax,
activations and biases are not counted.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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
from compression.structures import LayerParts, layers_of


@dataclass(frozen=True)
class MacCount:
    """MACs of one forward pass over a batch of full-length sequences."""

    sequence_length: int
    batch_size: int
    linear: int
    """Linear layers of the encoder."""
    attention: int
    """QK^T and AV."""
    classifier: int
    """Linear layers outside the encoder: pooler and classification head."""

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
    positions = getattr(model.config, "max_position_embeddings", sequence_length)
    if not 1 <= sequence_length <= positions:
        raise UserError(f"sequence length {sequence_length}: allowed is 1 to {positions} for this model")
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=model.device)
    macs: Counter[nn.Module] = Counter()
    counter = FlopCounterMode(display=False)
    with _eager_attention(model), evaluation_mode(model), _count_linears(model, macs), torch.no_grad(), counter as seen:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    flops = {name: sum(by_operator.values()) for name, by_operator in seen.get_flop_counts().items()}
    in_linears = sum(flops.get(f"{type(model).__name__}.{name}", 0) for name, m in model.named_modules() if m in macs)
    # A matrix product outside every Linear layer is attention's: QK^T or AV.
    attention = (flops["Global"] - in_linears) // 2
    # An adapter's matrices are inside the layer that it adapts.
    linears = (linear for layer in layers_of(model) for linear in layer.linears())
    linear = sum(macs[module] for linear in linears for module in linear.modules())
    return MacCount(sequence_length, batch_size, linear, attention, macs.total() - linear)


@contextmanager
def _count_linears(model: nn.Module, macs: Counter[nn.Module]) -> Iterator[None]:
    """Count Linear layers by what goes through them: FlopCounterMode knows no operator of a quantized layer."""

    def count(linear: nn.Linear, inputs: tuple[Tensor, ...], _: Any) -> None:
        macs[linear] += inputs[0].numel() * linear.out_features

    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    with hooked(linear.register_forward_hook(count) for linear in linears):
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
    """MACs of the encoder for one sequence, from the shapes of its Linear layers.

    S * weights + 2 * S^2 * heads * head_size per layer: each weight is used once per token, and QK^T and AV take
    S * S * head_size MACs each per head.
    """
    weights = sum(linear.in_features * linear.out_features for layer in layers for linear in layer.linears())
    attended = sum(layer.query_heads * layer.head_size for layer in layers)
    return sequence_length * weights + 2 * sequence_length**2 * attended


def count_thop(model: PreTrainedModel, sequence_length: int) -> dict[str, Any]:
    """MACs and parameters by `thop` (https://github.com/Lyken17/pytorch-OpCounter), to compare with its figures alone.

    It counts what it knows of a model's modules: here Linear layers, quantized ones by their shape. Functions it does
    not see, so that attention's QK^T and AV are missing: `macs` is `MacCount.total` less `MacCount.attention`.
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
    """Parameters of a model: total, embeddings (tables and their LayerNorm), encoder (all layers), head (the rest).

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
    if re.search(r"\blayers?\.\d+\.", parameter_name):
        return "encoder"
    return "embeddings" if "embed" in parameter_name else "head"

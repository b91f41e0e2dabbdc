"""A budget for an encoder: MACs, parameters or measured time, as a share of what another model takes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.classifier.latency import LATENCY_TABLE, LatencyTable, latency_table
from compression.flops import count_parameters, encoder_macs_formula
from compression.runtime import UserError
from compression.structures import ENCODER_KINDS, HEADS, LayerParts, layers_of

Quantity = Literal["mac", "parameters", "latency"]


Costs = Callable[[LayerParts, str], Tensor]
"""Of a layer and a kind: what its attention or FFN takes at each number of structures, [structures + 1], 0 without."""


@dataclass(frozen=True)
class Budget:
    """What the parts of a model may take together.

    Attributes:
        quantity, share: what is counted, and the share of `whole` that may stay in the end.
        costs: what a part takes.
        start: what all parts of the model take before it is pruned. base: what it takes besides them.
        whole: what the teacher takes.
        files: what belongs beside a result, JSON by file name.
    """

    quantity: str
    share: float
    costs: Costs
    start: float
    whole: float
    base: float = 0.0
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> float:
        """What all parts may take together in the end."""
        return self.share * self.whole - self.base

    def allowed(self, progress: float) -> float:
        """What they may take after a share of the way."""
        return self.start - progress * max(self.start - self.final, 0)

    def reached(self, layers: list[LayerParts], kept: dict[str, list[Tensor]]) -> float:
        """The share of the teacher's that a model takes of which these structures stay, bool [structures] per layer."""
        parts = sum(
            float(self.costs(layers[index], kind)[int(stays.sum())])
            for kind, masks in kept.items()
            for index, stays in enumerate(masks)
        )
        return (self.base + parts) / self.whole


def make_budget(
    quantity: Quantity, share: float, model: PreTrainedModel, teacher: PreTrainedModel, length: int, cache: Path
) -> Budget:
    """What the parts of a model may take, as a share of what its teacher takes.

    Args:
        length: tokens at which MACs are counted and times measured.
        cache: the folder that a table of times is kept in.

    Raises:
        UserError: see `latency_budget`.
    """
    if quantity == "mac":
        return macs_budget(share, model, teacher, length)
    if quantity == "parameters":
        return parameters_budget(share, model, teacher)
    return latency_budget(share, model, latency_table(model, teacher, length, cache))


def taken(layers: list[LayerParts], costs: Costs) -> float:
    """What all parts take as they are."""
    return sum(float(costs(parts, kind)[-1]) for parts in layers for kind in ENCODER_KINDS)


def macs_budget(share: float, model: PreTrainedModel, teacher: PreTrainedModel, sequence_length: int) -> Budget:
    """MACs of the encoder at a sequence length, as a share of the teacher's encoder's."""

    def costs(parts: LayerParts, kind: str) -> Tensor:
        return _evenly(encoder_macs_formula([_only(parts, kind)], sequence_length), parts.count(kind))

    whole = encoder_macs_formula(layers_of(teacher), sequence_length)
    return Budget("mac", share, costs, taken(layers_of(model), costs), whole)


def parameters_budget(share: float, model: PreTrainedModel, teacher: PreTrainedModel) -> Budget:
    """Parameters of the encoder, as a share of the teacher's encoder's; norms and biases are counted with the parts."""
    layers = layers_of(model)
    others = count_parameters(model)["encoder"] - sum(parts.parameters for parts in layers)
    of_each = others / sum(parts.count(kind) > 0 for parts in layers for kind in ENCODER_KINDS)

    def costs(parts: LayerParts, kind: str) -> Tensor:
        cost = _evenly(parts.count(kind) * parts.structure_parameters(kind), parts.count(kind))
        cost[1:] += of_each
        return cost

    return Budget("parameters", share, costs, taken(layers, costs), count_parameters(teacher)["encoder"])


def latency_budget(share: float, model: PreTrainedModel, table: LatencyTable) -> Budget:
    """Measured time of a forward pass of the whole model, as a share of the teacher's.

    Raises:
        UserError: what lies outside the layers takes longer than that alone.
    """
    if share * table.teacher <= table.rest:
        raise UserError(
            f"--target latency {share}: allowed is more than {table.rest / table.teacher:.3f}, which embeddings and "
            "head alone take of the teacher's time here"
        )

    def costs(parts: LayerParts, kind: str) -> Tensor:
        return table.costs(kind, parts.count(kind))

    files = {LATENCY_TABLE: table.as_dict()}
    return Budget("latency", share, costs, taken(layers_of(model), costs), table.teacher, table.rest, files)


def _evenly(whole: float, count: int) -> Tensor:
    """Costs that grow evenly with the number of structures, from what all of them take."""
    return torch.linspace(0, whole, count + 1, dtype=torch.double)


def _only(parts: LayerParts, kind: str) -> LayerParts:
    """A layer's attention or FFN alone."""
    gone: dict[str, Any] = dict(ffn=(), down=None) if kind == HEADS else dict(attention=(), o=None)
    return replace(parts, **gone)

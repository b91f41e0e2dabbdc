"""A budget for an encoder: MACs, parameters or measured time, as a share of what another model takes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.classifier.latency import LATENCY_TABLE, LatencyTable
from compression.flops import count_parameters, encoder_macs_formula
from compression.runtime import UserError
from compression.structures import ENCODER_KINDS, HEADS, LayerParts, layers_of

Quantity = Literal["mac", "parameters", "latency"]


@dataclass(frozen=True)
class Budget:
    """What the parts of a model may take together.

    Attributes:
        quantity, share: what is counted, and the share of `whole` that may stay in the end.
        costs: by kind and layer what the part takes at each number of structures, [structures + 1], 0 where it is gone.
        whole: what the teacher takes. base: what the model takes besides its parts.
        files: what belongs beside a result, JSON by file name.
    """

    quantity: Quantity
    share: float
    costs: dict[str, dict[int, Tensor]]
    whole: float
    base: float = 0.0
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> float:
        """What all parts may take together in the end."""
        return self.share * self.whole - self.base

    @property
    def start(self) -> float:
        """What all parts take as they are."""
        return sum(float(cost[-1]) for layers in self.costs.values() for cost in layers.values())

    def allowed(self, progress: float) -> float:
        """What they may take after a share of the way."""
        return self.start - progress * max(self.start - self.final, 0)

    def reached(self, kept: dict[str, list[Tensor]]) -> float:
        """The share of the teacher's that a model takes of which these structures stay: see `GradualPruning.kept`."""
        parts = sum(
            float(cost[int(kept[kind][index].sum())])
            for kind, layers in self.costs.items()
            for index, cost in layers.items()
        )
        return (self.base + parts) / self.whole


def macs_budget(share: float, model: PreTrainedModel, teacher: PreTrainedModel, sequence_length: int) -> Budget:
    """MACs of the encoder at a sequence length, as a share of the teacher's encoder's."""

    def macs(parts: LayerParts, kind: str) -> float:
        return encoder_macs_formula([_only(parts, kind)], sequence_length)

    return Budget("mac", share, _linear_costs(model, macs), encoder_macs_formula(layers_of(teacher), sequence_length))


def parameters_budget(share: float, model: PreTrainedModel, teacher: PreTrainedModel) -> Budget:
    """Parameters of the encoder, as a share of the teacher's encoder's; norms and biases are counted with the parts."""
    layers = layers_of(model)
    shared = count_parameters(model)["encoder"] - sum(parts.parameters for parts in layers)
    parts_left = sum(parts.count(kind) > 0 for parts in layers for kind in ENCODER_KINDS)
    costs = _linear_costs(model, lambda parts, kind: parts.count(kind) * parts.structure_parameters(kind))
    for cost in (cost for of_kind in costs.values() for cost in of_kind.values()):
        cost[1:] += shared / parts_left
    return Budget("parameters", share, costs, count_parameters(teacher)["encoder"])


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
    costs = {
        kind: {i: table.costs(kind, parts.count(kind)) for i, parts in enumerate(layers_of(model)) if parts.count(kind)}
        for kind in ENCODER_KINDS
    }
    return Budget("latency", share, costs, table.teacher, table.rest, {LATENCY_TABLE: table.as_dict()})


def _linear_costs(model: PreTrainedModel, whole: Callable[[LayerParts, str], float]) -> dict[str, dict[int, Tensor]]:
    """Costs that grow with the number of structures, from what each part takes whole."""
    return {
        kind: {
            index: torch.linspace(0, whole(parts, kind), parts.count(kind) + 1, dtype=torch.double)
            for index, parts in enumerate(layers_of(model))
            if parts.count(kind)
        }
        for kind in ENCODER_KINDS
    }


def _only(parts: LayerParts, kind: str) -> LayerParts:
    """A layer's attention or FFN alone."""
    gone: dict[str, Any] = dict(ffn=(), down=None) if kind == HEADS else dict(attention=(), o=None)
    return replace(parts, **gone)

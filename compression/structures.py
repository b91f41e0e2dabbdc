"""The prunable structures of a model: attention heads and FFN neurons, where their weights are, how many there are.

A head is its rows of q/k/v and its columns of the output projection; a neuron is a row of the first FFN layer and a
column of the second. Per-structure values (scores, masks) are kept as one tensor per layer, by kind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from compression.runtime import UserError

HEADS = "heads"
NEURONS = "neurons"
KINDS = (HEADS, NEURONS)


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its layers and their Linear modules (dotted paths)."""

    layers: str
    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    head_size: str


BERT = Family(
    layers="base_model.encoder.layer",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    head_size="attention.self.attention_head_size",
)
DISTILBERT = Family(
    layers="base_model.transformer.layer",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    head_size="attention.attention_head_size",
)
FAMILIES = {"bert": BERT, "pruned_bert": BERT, "distilbert": DISTILBERT, "pruned_distilbert": DISTILBERT}


@dataclass(frozen=True)
class LayerParts:
    """The Linear modules of one encoder layer.

    q, k, v: [heads * head_size, hidden]; o: [hidden, heads * head_size];
    up: [neurons, hidden]; down: [hidden, neurons].
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    up: nn.Linear
    down: nn.Linear
    head_size: int

    @property
    def heads(self) -> int:
        return self.q.out_features // self.head_size

    @property
    def neurons(self) -> int:
        return self.up.out_features

    def count(self, kind: str) -> int:
        """Number of structures of a kind."""
        return self.heads if kind == HEADS else self.neurons

    def structure_size(self, kind: str) -> int:
        """How many rows (columns) of its matrices one structure takes."""
        return self.head_size if kind == HEADS else 1

    def structure_parameters(self, kind: str) -> int:
        """Parameters of one structure, biases of its rows included."""
        inner, outer = self.split(kind)
        rows = sum(linear.in_features + (linear.bias is not None) for linear in inner)
        return self.structure_size(kind) * (rows + outer.out_features)

    def split(self, kind: str) -> tuple[tuple[nn.Linear, ...], nn.Linear]:
        """The layers that hold a kind's rows, and the one that holds its columns."""
        return ((self.q, self.k, self.v), self.o) if kind == HEADS else ((self.up,), self.down)


def family_of(model: nn.Module) -> Family:
    """The architecture's layout.

    Raises:
        UserError: an architecture that is not supported.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise UserError(f"model type '{model_type}' is not supported here; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def encoder_layers(model: nn.Module) -> list[LayerParts]:
    """The prunable Linear modules of every encoder layer, dense or already pruned.

    Raises:
        UserError: an architecture that is not supported.
    """
    family = family_of(model)
    names = ("q", "k", "v", "o", "up", "down", "head_size")
    getters = {name: attrgetter(getattr(family, name)) for name in names}
    return [
        LayerParts(**{name: get(layer) for name, get in getters.items()}) for layer in attrgetter(family.layers)(model)
    ]


def output_projections(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    """(kind, parent module, attribute name, structure size) of each layer's output projections, layer by layer."""
    family = family_of(model)
    for layer in attrgetter(family.layers)(model):
        for kind, path in ((HEADS, family.o), (NEURONS, family.down)):
            parent, _, name = path.rpartition(".")
            size = attrgetter(family.head_size)(layer) if kind == HEADS else 1
            yield kind, attrgetter(parent)(layer), name, size

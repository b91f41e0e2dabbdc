"""The prunable structures of a model: their kinds, where their weights are, how many there are.

An encoder has heads and neurons. A head is its rows of q/k/v and its columns of the output projection; a neuron is a
row of the first FFN layer and a column of the second. A decoder has groups and channels. A group is a key-value head
with all the query heads that share it (grouped-query attention, GQA), so that their ratio survives any choice; a
channel is a row of the gated MLP's gate and up and a column of its down. Per-structure values (scores, masks) are kept
as one tensor per layer, by kind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from compression.runtime import UserError

HEADS, NEURONS = ENCODER_KINDS = ("heads", "neurons")
GROUPS, CHANNELS = DECODER_KINDS = ("groups", "channels")


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its layers and their Linear modules (dotted paths)."""

    kinds: tuple[str, str]
    """Of structures: the attention's and the FFN's."""
    layers: str
    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    head_size: str | None = None
    """None: the config says it (`head_dim`)."""
    gate: str | None = None


BERT = Family(
    kinds=ENCODER_KINDS,
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
    kinds=ENCODER_KINDS,
    layers="base_model.transformer.layer",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    head_size="attention.attention_head_size",
)
DECODER = Family(
    kinds=DECODER_KINDS,
    layers="base_model.layers",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
ENCODERS = {"bert": BERT, "pruned_bert": BERT, "distilbert": DISTILBERT, "pruned_distilbert": DISTILBERT}
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
DECODERS = {f"{prefix}{name}": DECODER for name in _LLAMA_LIKE for prefix in ("", "pruned_")}
FAMILIES = ENCODERS | DECODERS


@dataclass(frozen=True)
class LayerParts:
    """The Linear modules of one layer; None where the layer's attention or FFN was removed.

    q: [query heads * head_size, hidden]; k, v: [heads or groups * head_size, hidden];
    o: [hidden, query heads * head_size]; gate, up: [neurons or channels, hidden]; down: [hidden, neurons or channels].
    """

    kinds: tuple[str, str]
    q: nn.Linear | None
    k: nn.Linear | None
    v: nn.Linear | None
    o: nn.Linear | None
    up: nn.Linear | None
    down: nn.Linear | None
    head_size: int
    gate: nn.Linear | None = None
    biased: bool = False
    """Whether an output projection has a bias, which stays also where the attention or FFN was removed."""

    @property
    def query_heads(self) -> int:
        return 0 if self.q is None else self.q.out_features // self.head_size

    @property
    def heads(self) -> int:
        return self.count(HEADS)

    @property
    def neurons(self) -> int:
        return self.count(NEURONS)

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.count(GROUPS)

    @property
    def channels(self) -> int:
        return self.count(CHANNELS)

    def count(self, kind: str) -> int:
        """Number of structures of a kind.

        Raises:
            ValueError: a kind that the layer's family does not have.
        """
        rows, size = (self.k, self.head_size) if self.is_attention(kind) else (self.up, 1)
        return 0 if rows is None else rows.out_features // size

    def is_attention(self, kind: str) -> bool:
        """Whether a kind is the attention's, not the FFN's.

        Raises:
            ValueError: a kind that the layer's family does not have.
        """
        if kind not in self.kinds:
            raise ValueError(f"this layer has {' and '.join(self.kinds)}, no {kind}")
        return kind == self.kinds[0]

    def structure_parameters(self, kind: str) -> int:
        """Parameters of one structure, biases of its rows included; 0 where the layer has none of the kind."""
        if not self.count(kind):
            return 0
        inner, outer = self.split(kind)
        rows = sum(linear.out_features * (linear.in_features + (linear.bias is not None)) for linear in inner)
        # By the layers' sizes: 4-bit weights are two to an element.
        return (rows + outer.in_features * outer.out_features) // self.count(kind)

    @property
    def parameters(self) -> int:
        """Parameters of all structures of the layer (norms are not counted: they belong to none)."""
        return sum(self.count(kind) * self.structure_parameters(kind) for kind in self.kinds)

    @property
    def empty(self) -> bool:
        """Whether nothing is left that the layer could add to the residual stream."""
        return not (any(map(self.count, self.kinds)) or self.biased)

    def split(self, kind: str) -> tuple[tuple[nn.Linear, ...], nn.Linear]:
        """The Linear modules that hold a kind's rows, and the one that holds its columns.

        Raises:
            ValueError: the layer has none of the kind, or its family does not.
        """
        attention = self.is_attention(kind)
        inner, outer = ((self.q, self.k, self.v), self.o) if attention else ((self.gate, self.up), self.down)
        if outer is None:
            raise ValueError(f"this layer's {kind} were removed")
        return tuple(linear for linear in inner if linear is not None), outer

    def linears(self) -> list[nn.Linear]:
        """All Linear modules that the layer has."""
        parts = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        return [linear for linear in parts if linear is not None]


def family_of(model: nn.Module, families: dict[str, Family] = FAMILIES) -> Family:
    """The architecture's layout.

    Raises:
        UserError: an architecture that is not supported.
    """
    config: Any = model.config
    model_type: str = config.model_type
    if model_type not in families:
        raise UserError(f"model type '{model_type}' is not supported here; supported: {', '.join(sorted(families))}")
    return families[model_type]


def layers_of(model: nn.Module) -> list[LayerParts]:
    """The prunable Linear modules of every layer, dense or already pruned.

    Raises:
        UserError: an architecture that is not supported.
    """
    family = family_of(model)
    return [_parts(family, layer, model) for layer in attrgetter(family.layers)(model)]


def _parts(family: Family, layer: nn.Module, model: nn.Module) -> LayerParts:
    paths = {name: getattr(family, name) for name in ("q", "k", "v", "o", "up", "down", "gate")}
    linears = {name: path and _find(layer, path) for name, path in paths.items()}
    head_size = attrgetter(family.head_size)(layer) if family.head_size else head_dim(model.config)
    biased = any(_bias(layer, path) is not None for path in (family.o, family.down))
    return LayerParts(family.kinds, **linears, head_size=head_size, biased=biased)


def _find(layer: nn.Module, path: str) -> nn.Linear | None:
    parent, _, name = path.rpartition(".")
    return getattr(attrgetter(parent)(layer), name, None)


def _bias(layer: nn.Module, path: str) -> nn.Parameter | None:
    """The bias of an output projection, also where it is all that is left of its part."""
    projection = _find(layer, path)
    return (attrgetter(path.rpartition(".")[0])(layer) if projection is None else projection).bias


def output_bias(layer: nn.Module, kind: str) -> Tensor | float:
    """What a decoder layer's attention or MLP adds to the residual stream when all its structures are gone."""
    bias = _bias(layer, DECODER.o if kind == GROUPS else DECODER.down)
    return 0.0 if bias is None else bias


def spread(kept: Tensor, width: int) -> Tensor:
    """Which rows or columns stay, bool [width], from which structures do: each structure has an equal share of them.

    Args:
        kept: bool [structures].
    """
    return kept.repeat_interleave(width // len(kept))


def head_dim(config: Any) -> int:
    """Width of one attention head of a decoder."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def output_projections(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    """(kind, parent module, attribute name, structures) of each layer's output projections, layer by layer."""
    family = family_of(model)
    for layer in attrgetter(family.layers)(model):
        parts = _parts(family, layer, model)
        for kind, path in zip(family.kinds, (family.o, family.down), strict=True):
            parent, _, name = path.rpartition(".")
            if parts.count(kind):
                yield kind, attrgetter(parent)(layer), name, parts.count(kind)

"""The prunable structures of a model: their kinds, where their weights are, how many there are.

An encoder has heads and neurons. A head is its rows of q/k/v and its columns of the output projection; a neuron is a
row of the first FFN layer and a column of the second. A decoder has groups and channels. A group is a key-value head
with all the query heads that share it (grouped-query attention, GQA), so that their ratio survives any choice; a
channel is a row of the gated MLP's gate and up and a column of its down. Per-structure values (scores, masks) are kept
as one tensor per layer, by kind.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from compression.modeling.pruned_decoder import BEFORE, BEHIND, BOTH, DROPOUT, Around
from compression.modeling.pruned_encoder import LAYOUTS
from compression.runtime import UserError

HEADS, NEURONS = ENCODER_KINDS = ("heads", "neurons")
GROUPS, CHANNELS = DECODER_KINDS = ("groups", "channels")


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its layers and the modules of their structures (dotted paths)."""

    kinds: tuple[str, str]
    """Of structures: the attention's and the FFN's."""
    layers: str
    attention: tuple[str, ...]
    """Linear modules whose rows are the attention's structures': of queries, keys and values, and of whatever else a
    head has its share of; or one alone, in which queries, keys and values are fused in this order."""
    o: str
    """The attention's output projection."""
    ffn: tuple[str, ...]
    """Linear modules whose rows are the FFN's structures'; where gate and up are fused, one with two rows of each."""
    down: str
    """The FFN's output projection."""
    norms: tuple[str, ...] = ()
    """Norms over the queries or the keys of all heads together: a structure has its share of their weights."""
    behind_padding: bool = False
    """Whether positions are counted from behind the padding token's id."""
    around: Around = field(default_factory=dict)
    """Of a decoder's attention and MLP: what the state passes before it and what it gives passes behind it."""
    removed: dict[str, dict[str, type[nn.Module]]] = field(default_factory=dict)
    """Of an encoder's attention and FFN: the modules that go with it, and what is in their place then."""
    multiplier: str | None = None
    """A decoder layer's attribute: what attention and MLP give is multiplied with it."""
    divisor: str | None = None
    """A field of a decoder's config: logits are divided by it."""
    cap: str | None = None
    """A field of a decoder's config: what no logit exceeds, by tanh; None there: they are not capped."""

    def path(self, kind: str) -> str:
        """Where a layer has the output projection of a kind's structures."""
        return self.o if kind == self.kinds[0] else self.down

    def part(self, kind: str) -> str:
        """The module of a decoder layer that has a kind's structures: its attention or its MLP."""
        return self.path(kind).partition(".")[0]

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all Linear modules with structures."""
        return tuple(path.rpartition(".")[2] for path in (*self.attention, self.o, *self.ffn, self.down))


DECODER = Family(
    kinds=DECODER_KINDS,
    layers="base_model.layers",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    ffn=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    around=BEFORE,
)
GRANITE = replace(DECODER, multiplier="residual_multiplier", divisor="logits_scaling")
GEMMA = replace(DECODER, around=BOTH, cap="final_logit_softcapping")
OLMO2 = replace(DECODER, around=BEHIND, norms=("self_attn.q_norm", "self_attn.k_norm"))
PHI3 = replace(DECODER, attention=("self_attn.qkv_proj",), ffn=("mlp.gate_up_proj",), around=DROPOUT)
# Their paths stand where the pruned models are built: in a file that travels alone.
ENCODERS = {
    f"{prefix}{name}": Family(kinds=ENCODER_KINDS, **vars(layout))
    for name, layout in LAYOUTS.items()
    for prefix in ("", "pruned_")
}
_DENSE_DECODERS = {
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER,
    "smollm3": DECODER,
    "granite": GRANITE,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": PHI3,
    "olmo2": OLMO2,
}
DECODERS = {f"{prefix}{name}": family for name, family in _DENSE_DECODERS.items() for prefix in ("", "pruned_")}
FAMILIES = ENCODERS | DECODERS
_MIXTURES = (
    *("afmoe", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe"),
    *("gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "jamba", "jetmoe", "lfm2_moe"),
    *("llama4", "llama4_text", "longcat_flash", "minimax", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe"),
    *("qwen3_5_moe", "qwen3_moe", "qwen3_next"),
)
# Why not, where there is more to say than that a model type is not among the supported ones.
REFUSED = {
    "albert": "its layers share their weights, so none of them could have sizes of its own",
    "deberta": "its layout is another than that of DeBERTa v2 and v3 (deberta-v2)",
    "mpnet": "all its layers share a table of positions by heads, so they could not have different ones",
    "t5": "it is an encoder with a decoder",
    "gemma3": "it takes pictures too; save its text part, whose model type is gemma3_text, and name that",
} | dict.fromkeys(_MIXTURES, "it is a mixture of experts, and these are not supported")


@dataclass(frozen=True)
class Rows:
    """A Linear module, or a norm, whose rows belong to structures.

    Args:
        module: with a weight [rows, ...].
        shares: how many rows belong to each of the things that the module computes (queries, keys and values where
            they are fused, else one thing). Within a share each structure has an equal number of rows, next to one
            another.
    """

    module: Any
    shares: tuple[int, ...]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values [rows, ...] of the module by share."""
        return values.split(self.shares)

    def spread(self, kept: Tensor) -> Tensor:
        """Which rows stay, bool [rows], from which structures do."""
        return torch.cat([spread(kept, share) for share in self.shares])


@dataclass(frozen=True)
class RelativePositions:
    """The table of relative positions that DeBERTa's attention computes with beside the tokens."""

    rows: int
    products: int
    """Of each head, with queries (content to position), with keys (position to content)."""
    shared: bool
    """Whether the projections of queries and keys serve the table too; else it has its own behind those of values."""

    @classmethod
    def of(cls, config: Any) -> "RelativePositions | None":
        """What a config says of it; None: the architecture has no such table, or this model does not use it."""
        if not getattr(config, "relative_attention", False):
            return None
        longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
        buckets = getattr(config, "position_buckets", -1)
        products = len({"c2p", "p2c"}.intersection(config.pos_att_type or ()))
        return cls(2 * (buckets if buckets > 0 else longest), products, getattr(config, "share_att_key", False))


@dataclass(frozen=True)
class LayerParts:
    """The modules of one layer's structures; where the layer's attention or FFN was removed, none of it.

    attention: [rows of queries, keys, values..., hidden]; o: [hidden, query heads * head_size];
    ffn: [rows, hidden]; down: [hidden, neurons or channels].
    """

    kinds: tuple[str, str]
    attention: tuple[Rows, ...]
    o: nn.Linear | None
    ffn: tuple[Rows, ...]
    down: nn.Linear | None
    head_size: int
    norms: tuple[Rows, ...] = ()
    biased: bool = False
    """Whether an output projection has a bias, which stays also where a decoder's attention or FFN was removed."""
    positions: RelativePositions | None = None

    @property
    def query_heads(self) -> int:
        return 0 if self.o is None else self.o.in_features // self.head_size

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
        if not self.is_attention(kind):
            return 0 if self.down is None else self.down.in_features
        # The last share is never the queries', of which a structure may have more.
        return self.attention[-1].shares[-1] // self.head_size if self.attention else 0

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
        linears = [rows.module for rows in inner]
        weights = sum(linear.out_features * (linear.in_features + (linear.bias is not None)) for linear in linears)
        norms = sum(sum(rows.shares) for rows in self.norms) if self.is_attention(kind) else 0
        # By the layers' sizes: 4-bit weights are two to an element.
        return (weights + norms + outer.in_features * outer.out_features) // self.count(kind)

    @property
    def parameters(self) -> int:
        """Parameters of all structures of the layer (norms of the hidden states belong to none)."""
        return sum(self.count(kind) * self.structure_parameters(kind) for kind in self.kinds)

    @property
    def empty(self) -> bool:
        """Whether nothing is left that the layer could add to the residual stream."""
        return not (any(map(self.count, self.kinds)) or self.biased)

    def split(self, kind: str) -> tuple[tuple[Rows, ...], nn.Linear]:
        """The Linear modules that hold a kind's rows, and the one that holds its columns.

        Raises:
            ValueError: the layer has none of the kind, or its family does not.
        """
        inner, outer = (self.attention, self.o) if self.is_attention(kind) else (self.ffn, self.down)
        if outer is None:
            raise ValueError(f"this layer's {kind} were removed")
        return inner, outer

    def linears(self) -> list[nn.Linear]:
        """All Linear modules that the layer has."""
        parts: list[Any] = [*(r.module for r in self.attention), self.o, *(r.module for r in self.ffn), self.down]
        return [linear for linear in parts if linear is not None]


def unsupported(model_type: Any, families: Collection[str] = FAMILIES) -> str:
    """What to say of a model type that is none of these: why, and which are.

    Args:
        families: the supported types; the pruned forms among them go without saying.
    """
    why = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
    dense = sorted(name for name in families if not name.startswith("pruned_"))
    return f"model type {model_type!r} is not supported here{why}; supported: {', '.join(dense)}"


def family_of(model: nn.Module, families: dict[str, Family] = FAMILIES) -> Family:
    """The architecture's layout.

    Raises:
        UserError: an architecture that is not supported.
    """
    config: Any = model.config
    model_type: str = config.model_type
    if model_type not in families:
        raise UserError(unsupported(model_type, families))
    return families[model_type]


def positions_of(config: Any) -> int:
    """How many tokens of a text a model has positions for."""
    family = FAMILIES.get(config.model_type)
    taken = config.pad_token_id + 1 if family and family.behind_padding else 0
    return config.max_position_embeddings - taken


def depths_of(model: nn.Module) -> dict[str, int]:
    """For each parameter how many layers lie behind it: 0 for the head, 1 for the last layer, L + 1 for embeddings.

    A pooler or norm behind the layers belongs to the head, relative positions that all layers share to the embeddings.
    """
    layers: Any = attrgetter(family_of(model).layers)(model)
    places = {parameter: len(layers) - place for place, layer in enumerate(layers) for parameter in layer.parameters()}
    base: Any = model.base_model
    children = list(base.children())
    stack = next(place for place, child in enumerate(children) if layers in child.modules())
    upstream = {parameter for child in children[: stack + 1] for parameter in child.parameters()}
    return {
        name: places.get(parameter, len(layers) + 1 if parameter in upstream else 0)
        for name, parameter in model.named_parameters()
    }


def layers_of(model: nn.Module) -> list[LayerParts]:
    """The prunable Linear modules of every layer, dense or already pruned.

    Raises:
        UserError: an architecture that is not supported.
    """
    family = family_of(model)
    return [_parts(family, layer, model) for layer in attrgetter(family.layers)(model)]


def _parts(family: Family, layer: nn.Module, model: nn.Module) -> LayerParts:
    o, down = _find(layer, family.o), _find(layer, family.down)
    biased = any(_bias(layer, path) is not None for path in (family.o, family.down))
    attention = tuple(_attention_rows(layer, family, o))
    norms = tuple(Rows(norm, (len(norm.weight),)) for norm in _found(layer, family.norms))
    ffn = tuple(_ffn_rows(layer, family, down))
    positions = RelativePositions.of(model.config)
    return LayerParts(family.kinds, attention, o, ffn, down, head_dim(model.config), norms, biased, positions)


def _attention_rows(layer: nn.Module, family: Family, o: nn.Linear | None) -> Iterator[Rows]:
    for linear in _found(layer, family.attention):
        rows = linear.out_features
        if o is None:
            continue
        queries, others = o.in_features, (rows - o.in_features) // 2
        yield Rows(linear, (queries, others, others) if len(family.attention) == 1 else (rows,))


def _ffn_rows(layer: nn.Module, family: Family, down: nn.Linear | None) -> Iterator[Rows]:
    for linear in _found(layer, family.ffn):
        if down is not None:
            yield Rows(linear, (down.in_features,) * (linear.out_features // down.in_features))


def _found(layer: nn.Module, paths: tuple[str, ...]) -> Iterator[Any]:
    """The modules of a layer that are there, of these paths."""
    return (module for module in (_find(layer, path) for path in paths) if module is not None)


def _find(layer: nn.Module, path: str) -> Any:
    """A module of a layer; None: it is not there."""
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _bias(layer: nn.Module, path: str) -> nn.Parameter | None:
    """The bias of an output projection, also where it is all that is left of its part."""
    return getattr(_find(layer, path) or _find(layer, path.rpartition(".")[0]), "bias", None)


def output_bias(layer: nn.Module, family: Family, kind: str) -> nn.Parameter | None:
    """The bias of the output projection of a layer's attention or FFN, also where its structures are gone."""
    return _bias(layer, family.path(kind))


def spread(kept: Tensor, width: int) -> Tensor:
    """Which rows or columns stay, bool [width], from which structures do: each structure has an equal share of them.

    Args:
        kept: bool [structures].
    """
    return kept.repeat_interleave(width // len(kept))


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    for name in ("head_size", "head_dim", "attention_head_size"):  # of pruned encoders, of decoders, of DeBERTa
        if size := getattr(config, name, None):
            return size
    return config.hidden_size // config.num_attention_heads


def output_projections(model: nn.Module) -> Iterator[tuple[str, int, nn.Module, str, int]]:
    """(kind, layer, parent module, attribute name, structures) of each output projection, layer by layer."""
    family = family_of(model)
    for index, layer in enumerate(attrgetter(family.layers)(model)):
        parts = _parts(family, layer, model)
        for kind, path in zip(family.kinds, (family.o, family.down), strict=True):
            parent, _, name = path.rpartition(".")
            if parts.count(kind):
                yield kind, index, attrgetter(parent)(layer), name, parts.count(kind)

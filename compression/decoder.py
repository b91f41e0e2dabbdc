"""One interface to the parts of a language model, so that nothing else knows what an architecture calls them.

`decoder_of` gives it for a loaded model, and refuses a model that computes anything else than what the interface says:
such a model would be scored, repaired and analysed wrongly.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compression.hooks import evaluation_mode, hooked
from compression.offload import States, offload_of
from compression.runtime import UserError
from compression.structures import DECODERS, GROUPS, family_of, output_bias

CHECKED_TOKENS = 8
# Models whose layout was checked.
_checked: WeakSet[nn.Module] = WeakSet()


class Decoder:
    """A language model, dense or pruned.

    Each layer adds two branches to the state [windows, length, hidden], one after the other: state + attention, then
    state + mlp. Each branch may have a norm before and one behind its attention or MLP, and be multiplied with a
    number. Behind the last layer come a norm and the head, whose logits may be divided and capped.
    `structures.Family` says what of this a model has.

    Args:
        model: its layout is taken for granted here; `decoder_of` checks it.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.family = model, family_of(model, DECODERS)
        self.body: Any = model.model
        self.offload = offload_of(model)

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.layers

    @layers.setter
    def layers(self, layers: nn.ModuleList) -> None:
        self.body.layers = layers

    @contextmanager
    def present(self, index: int) -> Iterator[nn.Module]:
        """A layer, whose weights are on the device meanwhile.

        Else they are elsewhere where the model is offloaded, or in parts where it is spread over processes.
        """
        layer = self.layers[index]
        if self.offload is not None:
            with self.offload.present(layer):
                yield layer
        elif isinstance(layer, FSDPModule):
            layer.unshard()
            yield layer
            layer.reshard()
        else:
            yield layer

    def states(self) -> States:
        """A place for states of texts between layers."""
        return States(self.offload)

    @property
    def embeddings(self) -> nn.Module:
        return self.body.embed_tokens

    @property
    def layer_parts(self) -> set[str]:
        """Names of the modules of a layer."""
        return {name for part, around in self.family.around.items() for name in (part, *around) if name is not None}

    def attention_branch(self, layer: Any, state: Tensor, options: dict[str, Any]) -> Tensor:
        """What a layer's attention adds to the state that enters the layer.

        Args:
            options: the layer's own, see `first_input`.
        """
        before, _ = self.family.around["self_attn"]
        return self._added(
            layer, "self_attn", layer.self_attn(hidden_states=_passed(layer, before, state), **options)[0]
        )

    def mlp_branch(self, layer: Any, state: Tensor) -> Tensor:
        """What a layer's MLP adds to the state behind its attention."""
        before, _ = self.family.around["mlp"]
        return self._added(layer, "mlp", layer.mlp(_passed(layer, before, state)))

    def branch(self, layer: Any, kind: str, state: Tensor, options: dict[str, Any]) -> Tensor:
        """What a layer's attention or MLP, the one with structures of a kind, adds to the state before it."""
        return self.attention_branch(layer, state, options) if kind == GROUPS else self.mlp_branch(layer, state)

    def before_added(self, layer: Any, kind: str, added: Tensor) -> Tensor | float:
        """What the output projection of an attention or MLP has to give more for that to add so much more to the state.

        Behind a norm that is no fixed amount, and nothing is given.
        """
        _, behind = self.family.around[self.family.part(kind)]
        if behind is not None and not isinstance(getattr(layer, behind), nn.Dropout):
            return 0.0
        return added if self.family.multiplier is None else added / getattr(layer, self.family.multiplier)

    def constant(self, layer: Any, kind: str) -> Tensor | float:
        """What a layer's attention or MLP adds to the state when all its structures are gone: [hidden], or nothing."""
        bias = output_bias(layer, self.family, kind)
        return 0.0 if bias is None else self._added(layer, self.family.part(kind), bias)

    def _added(self, layer: Any, part: str, given: Tensor) -> Tensor:
        """What is added to the state of what an attention or MLP gives."""
        _, behind = self.family.around[part]
        passed = _passed(layer, behind, given)
        return passed if self.family.multiplier is None else passed * getattr(layer, self.family.multiplier)

    def norm(self, state: Tensor) -> Tensor:
        """The final norm."""
        return self.body.norm(state)

    def logits(self, states: Tensor, *, head: nn.Module | None = None) -> Tensor:
        """The head, [..., hidden] behind the final norm -> [..., vocabulary].

        Args:
            head: the Linear module of another model of the family; None: the model's own.
        """
        logits = (self.model.lm_head if head is None else head)(states)
        if (divisor := self._field(self.family.divisor)) is not None:
            logits = logits / divisor
        if (cap := self._field(self.family.cap)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _field(self, name: str | None) -> Any:
        """A field of the config; None where the family has none of the kind."""
        return None if name is None else getattr(self.model.config, name)

    def final_states(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """The model's own states [windows, length, hidden] behind the final norm.

        Args:
            ids: token ids [windows, length].
            positions: of each token [windows, length]; where they begin anew, the tokens before are not seen. None:
                each window is one text.
        """
        return self.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state

    @contextmanager
    def recorded(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """What these layers give, [windows, length, hidden] by index, in the forward pass that is run meanwhile."""
        found: dict[int, Tensor] = {}

        def record(index: int) -> RemovableHandle:
            return self.layers[index].register_forward_hook(lambda _, __, state: found.update({index: state}))

        with hooked(record(index) for index in layers):
            yield found

    def first_input(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The state [windows, length, hidden] that enters the first layer, and each layer's options; no layer is run.

        Layers differ in their options where some attend to a sliding window and others to all.

        Args:
            ids: token ids [windows, length].
        """
        recorders = [_InputRecorder() for _ in self.layers]
        with self.in_place_of_layers(recorders):
            self.final_states(ids)
        return recorders[0].state, [recorder.options for recorder in recorders]

    @contextmanager
    def in_place_of_layers(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """The model has these layers for a while."""
        layers = self.layers
        self.layers = nn.ModuleList(modules)
        try:
            yield
        finally:
            self.layers = layers

    def logits_without_layers(self, ids: Tensor) -> Tensor:
        """The model's own logits [windows, length, vocabulary] where every layer lets its input through."""
        with self.in_place_of_layers([_InputRecorder() for _ in self.layers]):
            return self.model(input_ids=ids, use_cache=False).logits

    def share_tables(self, other: "Decoder") -> None:
        """Take over what is in no state dict from another model of the same weights: rotary tables, and what
        embeddings are multiplied with."""
        self.body.rotary_emb, self.body.embed_tokens = other.body.rotary_emb, other.body.embed_tokens


def _passed(layer: Any, name: str | None, values: Tensor) -> Tensor:
    """Values behind a module of a layer, if there is one."""
    return values if name is None else getattr(layer, name)(values)


class _InputRecorder(nn.Module):
    """In a layer's place: records what the layer is given, and runs nothing."""

    state: Tensor
    options: dict[str, Any]

    def forward(self, state: Tensor, **options: Any) -> Tensor:
        self.state, self.options = state, options
        return state


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The interface to a model's parts; its layout is checked once for each loaded model.

    Raises:
        UserError: an architecture that is not supported, or a model that does not have the layout its type stands for.
    """
    decoder = Decoder(model)
    if model not in _checked:
        check_layout(decoder)
        _checked.add(model)
    return decoder


@torch.no_grad()
def check_layout(decoder: Decoder) -> None:
    """Check that a model's layers, final norm and head compute what the interface says, on a few tokens.

    Raises:
        UserError: names what differs.
    """
    model = decoder.model
    if getattr(model.config, "use_bidirectional_attention", None):
        _refuse(model, "it looks at the tokens behind too (use_bidirectional_attention), so it predicts none")
    for index, layer in enumerate(decoder.layers):
        own = (layer.named_children(), layer.named_parameters(recurse=False), layer.named_buffers(recurse=False))
        parts = {name for named in own for name, _ in named}
        if parts != decoder.layer_parts:
            more, less = sorted(parts - decoder.layer_parts), sorted(decoder.layer_parts - parts)
            differences = [f"has {', '.join(more)}"] * bool(more) + [f"lacks {', '.join(less)}"] * bool(less)
            _refuse(model, f"layer {index} {' and '.join(differences)}")
    numbers = torch.randint(model.config.vocab_size, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = numbers.to(model.device)
    with evaluation_mode(model):
        first, options = decoder.first_input(ids)
        state = first
        for index, option in enumerate(options):
            with decoder.present(index) as layer:
                middle = state + decoder.attention_branch(layer, state, option)
                expected, state = middle + decoder.mlp_branch(layer, middle), layer(state, **option)
            if not _same(state, expected):
                _refuse(model, f"layer {index} computes something else than state + attention, then state + MLP")
        if not _same(decoder.final_states(ids), decoder.norm(state)):
            _refuse(model, "its final states are not its layers, one after the other, and the final norm")
        if not _same(decoder.logits_without_layers(ids), decoder.logits(decoder.norm(first))):
            _refuse(model, "its logits are not those of the head (are they capped or scaled otherwise?)")


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for rounding. What is not finite is for other checks to name."""
    largest = found.abs().max() * max(torch.finfo(found.dtype).eps, 1e-5)
    return not bool((found - expected).abs().max() > largest)


def _refuse(model: PreTrainedModel, what: str) -> NoReturn:
    name = getattr(model, "name_or_path", "") or type(model).__name__
    raise UserError(
        f"{name} (model type '{model.config.model_type}') cannot be pruned or analysed here: {what}; allowed are "
        f"models that compute as their type does, of {', '.join(sorted(DECODERS))}"
    )

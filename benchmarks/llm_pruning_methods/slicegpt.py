"""SliceGPT: Ashkboos et al. 2024, "Compress Large Language Models by Deleting Rows and Columns", arXiv:2401.15024.

The weights of the norms are absorbed into what reads behind them; the state before each attention and each MLP, and
behind the last, is turned to its principal components over the calibration text, on the way through the layers that are
sliced already, and cut to the first `width` of them; the matrices that read or write it are turned and cut with it.
Neighbours differ in their basis, so that each residual connection passes a matrix [width, width] on its way. These
count as parameters here: 2 width^2 per layer, so that more of the hidden size goes than the share that is asked for.
All states are cut to one width. Embeddings and head become narrower too, but separate, where they were one table.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.decoder import Decoder, decoder_of
from compression.llm.layerwise import LayerStream
from compression.modeling.pruned_decoder import BEFORE
from compression.runtime import UserError
from compression.structures import LayerParts, layers_of
from llm_pruning_methods.ground import Ground


def slice_gpt(ground: Ground, ratio: float) -> PreTrainedModel:
    """Slice to the largest width at which the share is gone.

    Raises:
        UserError: there is no such width, or the family's norms are elsewhere than before attention and MLP.
    """
    model = ground.load()
    layers, hidden = layers_of(model), model.config.hidden_size
    most = (1 - ratio) * parameters_at(layers, hidden, hidden, matrices=0) * (1 + 1e-9)
    width = next((width for width in range(hidden, 0, -1) if parameters_at(layers, hidden, width) <= most), None)
    if width is None:
        raise UserError(f"SliceGPT has no width at which a share of {ratio:g} is gone")
    return sliced(model, ground.windows, width)


def parameters_at(layers: list[LayerParts], hidden: int, width: int, matrices: int = 2) -> int:
    """Parameters of layers whose states are cut to a width.

    Args:
        hidden: width of the dense states.
        matrices: of the residual connections, per layer.
    """
    total = matrices * len(layers) * width**2
    for parts in layers:
        for linear in parts.linears():
            writes = linear is parts.o or linear is parts.down
            bias = 0 if linear.bias is None else width if writes else linear.out_features
            total += linear.weight.numel() // hidden * width + bias
    return total


@torch.no_grad()
def sliced(model: PreTrainedModel, windows: Tensor, width: int) -> PreTrainedModel:
    """The model, which is used up, with states cut to their first principal components over a text.

    Args:
        windows: token ids [count, length].
    """
    decoder, stream = decoder_of(model), LayerStream(model, windows)
    if decoder.family.around != BEFORE or decoder.family.multiplier is not None:
        raise UserError(f"SliceGPT is not written here for model type {model.config.model_type!r}")
    basis = project(stream, width)
    embeddings = decoder.embeddings.weight.double() @ basis
    for index, layer in enumerate(decoder.layers):
        for number, (_, state, options) in enumerate(stream):
            stream.states.put(number, state + decoder.attention_branch(layer, state, options[index]))
        middle = project(stream, width, basis)
        for number, (_, state, _) in enumerate(stream):
            stream.states.put(number, state + decoder.mlp_branch(layer, state))
        behind = project(stream, width, middle)
        slice_layer(layer, layers_of(model)[index], basis, middle, behind)
        basis = behind
    head = (decoder.model.lm_head.weight.double() * decoder.body.norm.weight.double()) @ basis
    return rebuilt(decoder, embeddings, head)


def project(stream: LayerStream, width: int, before: Tensor | None = None) -> Tensor:
    """The first principal components of a text's states, [hidden, width] in fp64; the states lose the others.

    Args:
        before: those of the place before, with which the signs agree, which are free: so the states turn less.
    """
    gram: Any = 0
    for _, state, _ in stream:
        rows = state.flatten(0, 1).double()
        gram = gram + rows.T @ rows
    basis = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :width]
    if before is not None:
        basis = basis * torch.where((basis * before).sum(0) < 0, -1, 1)
    single = basis.float()
    for number, (_, state, _) in enumerate(stream):
        stream.states.put(number, (state.float() @ single @ single.T).to(state))
    return basis


def slice_layer(layer: Any, parts: LayerParts, before: Tensor, middle: Tensor, behind: Tensor) -> None:
    """Turn and cut a layer in place.

    Args:
        before, middle, behind: bases [hidden, width] of the states before its attention, before and behind its MLP.
    """
    hidden = len(before)
    for rows in parts.attention:
        read(rows.module, layer.input_layernorm, before)
    for rows in parts.ffn:
        read(rows.module, layer.post_attention_layernorm, middle)
    write(parts.o, middle)
    write(parts.down, behind)
    for name, norm, block, bases in (
        ("self_attn", "input_layernorm", SlicedAttention, (before, middle)),
        ("mlp", "post_attention_layernorm", SlicedMLP, (middle, behind)),
    ):
        plain = RootMeanSquare(hidden, getattr(layer, norm).variance_epsilon)
        setattr(layer, name, block(plain, getattr(layer, name), turn(*bases).to(parts.o.weight)))
        setattr(layer, norm, nn.Identity())


def read(linear: nn.Linear, norm: Any, basis: Tensor) -> None:
    """A Linear module takes states in a basis, the norm's weight absorbed."""
    weight = (linear.weight.double() * norm.weight.double()) @ basis
    linear.weight, linear.in_features = nn.Parameter(weight.to(linear.weight.dtype)), weight.shape[1]


def write(linear: Any, basis: Tensor) -> None:
    """A Linear module gives states in a basis."""
    weight = basis.T @ linear.weight.double()
    linear.weight, linear.out_features = nn.Parameter(weight.to(linear.weight.dtype)), len(weight)
    if linear.bias is not None:
        linear.bias = nn.Parameter((basis.T @ linear.bias.double()).to(linear.bias.dtype))


def turn(start: Tensor, end: Tensor) -> Tensor:
    """Weight [width, width] of what is added to a state to turn it from one basis to another."""
    return end.T @ start - torch.eye(start.shape[1], dtype=start.dtype, device=start.device)


class RootMeanSquare(nn.Module):
    """An RMS norm without weights of states that were cut, whose mean is over the width before."""

    def __init__(self, hidden: int, epsilon: float):
        super().__init__()
        self.hidden, self.epsilon = hidden, epsilon

    def forward(self, state: Tensor) -> Tensor:
        """Scale states [..., width]."""
        wide = state.float()
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.hidden + self.epsilon)).to(state.dtype)


class SlicedBlock(nn.Module):
    """In the place of an attention or MLP: what it gives, and what turns the state that passes by it.

    Args:
        norm: before the attention or MLP. turn: see `turn`.
    """

    def __init__(self, norm: nn.Module, block: nn.Module, turn: Tensor):
        super().__init__()
        self.norm, self.block = norm, block
        self.shortcut = nn.Linear(*turn.shape, bias=False, device=turn.device, dtype=turn.dtype)
        self.shortcut.weight = nn.Parameter(turn)


class SlicedAttention(SlicedBlock):
    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, ...]:
        given, *others = self.block(hidden_states=self.norm(hidden_states), **options)
        return given + self.shortcut(hidden_states), *others


class SlicedMLP(SlicedBlock):
    def forward(self, state: Tensor) -> Tensor:
        return self.block(self.norm(state)) + self.shortcut(state)


def rebuilt(decoder: Decoder, embeddings: Tensor, head: Tensor) -> PreTrainedModel:
    """A model of the same class around the sliced layers, whose head is a table of its own.

    Args:
        embeddings, head: [vocabulary, width].
    """
    model, body, width = decoder.model, decoder.body, head.shape[1]
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        small: Any = type(model)(config)
    body.norm = RootMeanSquare(body.embed_tokens.embedding_dim, body.norm.variance_epsilon)
    body.embed_tokens.weight, body.embed_tokens.embedding_dim = nn.Parameter(embeddings.to(model.dtype)), width
    small.model, small.lm_head = body, nn.Linear(width, len(head), bias=False, device="meta")
    small.lm_head.weight = nn.Parameter(head.to(model.dtype))
    small.config.hidden_size = body.config.hidden_size = width
    return small.eval()

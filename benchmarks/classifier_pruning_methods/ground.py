"""What every method gets, and what models of a number of MACs look like."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.batching import batches, model_inputs
from compression.classifier.data import Encoded
from compression.flops import encoder_macs_formula
from compression.runtime import UserError
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, LayerParts, layers_of
from compression.surgery import shrink

# What MACs are counted at.
SEQUENCE_LENGTH = 128
BATCH_SIZE = 32


@dataclass(frozen=True)
class Ground:
    """The one ground that all methods start from.

    Attributes:
        load: gives a fresh copy of the teacher, dense, in evaluation mode.
        rows: training data that scores are computed on.
        pad_token_id: of the teacher's tokenizer.
        seed: of weights that are drawn.
    """

    load: Callable[[], PreTrainedModel]
    rows: Encoded
    pad_token_id: int
    seed: int

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The dense teacher, to look at: a method that changes a model loads its own."""
        return self.load()

    def batches(self, model: PreTrainedModel) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """(what the model takes, labels [rows]) of the rows, on the model's device, always in the same order."""
        for batch in batches(self.rows, BATCH_SIZE, self.pad_token_id):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            yield model_inputs(model, batch), batch["labels"]


def macs_of(model: PreTrainedModel) -> int:
    """MACs of the encoder for one sequence of `SEQUENCE_LENGTH` tokens."""
    return encoder_macs_formula(layers_of(model), SEQUENCE_LENGTH)


def structure_macs(parts: LayerParts, kind: str) -> int:
    """MACs of one head or neuron of a layer."""
    inner, outer = parts.split(kind)
    weights = sum(rows.module.weight.numel() for rows in inner) + outer.weight.numel()
    products = 2 * SEQUENCE_LENGTH**2 * parts.head_size if kind == HEADS else 0
    return SEQUENCE_LENGTH * weights // parts.count(kind) + products


def sizes_within(parts: LayerParts, macs: float) -> dict[str, int]:
    """Heads and neurons of a layer of at most so many MACs, an equal share of both as far as heads can be divided.

    Args:
        parts: the dense layer.

    Raises:
        UserError: not even one of each.
    """
    head, neuron = (structure_macs(parts, kind) for kind in (HEADS, NEURONS))
    check_enough(macs, head + neuron, 1)
    share = macs / (parts.heads * head + parts.neurons * neuron)
    # At least one; one less where the nearest number would leave no neuron.
    heads = max(1, min(round(share * parts.heads), int((macs - neuron) // head)))
    return {HEADS: heads, NEURONS: min(parts.neurons, int((macs - heads * head) // neuron))}


def check_enough(macs: float, least: int, layers: int) -> None:
    """Raise UserError where MACs are too few for one head and one neuron in each of some layers."""
    if macs < least:
        raise UserError(f"{macs:,.0f} MACs are too few for a head and a neuron in {layers} layer(s), {least:,}")


def keep_largest(model: PreTrainedModel, scores: dict[str, list[Tensor]], sizes: dict[str, int]) -> PreTrainedModel:
    """The model with so many structures in every layer, those of the highest scores.

    Args:
        scores: for each kind and layer [structures].
    """
    kept = {kind: [top(score, sizes[kind]) for score in scores[kind]] for kind in ENCODER_KINDS}
    return shrink(model, kept)


def top(scores: Tensor, count: int) -> Tensor:
    """Which of the scores are the highest ones, bool like them."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.view(-1)[scores.flatten().topk(count).indices] = True
    return kept


def as_pruned(model: PreTrainedModel) -> PreTrainedModel:
    """The project's pruned model of one whose layers a library has cut down in place."""
    return shrink(
        model,
        {
            kind: [torch.ones(parts.count(kind), dtype=torch.bool) for parts in layers_of(model)]
            for kind in ENCODER_KINDS
        },
    )

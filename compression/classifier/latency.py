"""How long each part of an encoder takes at each width, measured on this machine (Kurtic et al. 2023, "ZipLM")."""

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.hooks import evaluation_mode
from compression.part_times import Times, kept_table, measured_widths, milliseconds, plain_times, times_of, with_layers
from compression.runtime import hardware_name, log
from compression.structures import ENCODER_KINDS, HEADS, family_of, layers_of
from compression.surgery import remove_part, shrink_encoder_layer
from compression.timing import forwards, interleaved_times, random_ids

LATENCY_TABLE = "latency_table.json"
BATCH_SIZE = 32
FFN_WIDTHS = 24
ROUNDS = 15


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a forward pass over a batch, by what the model has.

    Attributes:
        teacher: of the whole teacher. rest: of what lies outside the layers.
        parts: by kind and number of structures, what a part adds.
    """

    batch_size: int
    sequence_length: int
    device: str
    threads: int
    teacher: float
    rest: float
    parts: Times

    def costs(self, kind: str, count: int) -> Tensor:
        """What a part takes at 0 to `count` structures, [count + 1]: between measured widths that of the next wider."""
        widths = sorted(self.parts[kind])
        times = np.array([0.0, *(self.parts[kind][width] for width in widths)])
        places = np.searchsorted([0, *widths], np.arange(count + 1)).clip(max=len(widths))
        return torch.from_numpy(times[places])

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, as it is saved beside a result."""
        return vars(self) | {"parts": plain_times(self.parts), "unit": "ms"}

    @classmethod
    def of(cls, values: dict[str, Any]) -> "LatencyTable":
        """What `as_dict` gave."""
        fields = {name: value for name, value in values.items() if name != "unit"}
        return cls(**fields | {"parts": times_of(values["parts"])})


def latency_table(model: PreTrainedModel, teacher: PreTrainedModel, sequence_length: int, cache: Path) -> LatencyTable:
    """The table for a model, measured once and kept.

    Args:
        cache: the folder that it is kept in, by the shapes of both models and by what it is measured on.
    """
    device = hardware_name(model.device)
    key = [device, torch.get_num_threads(), BATCH_SIZE, sequence_length]

    def measure() -> dict[str, Any]:
        return measure_table(model, teacher, BATCH_SIZE, sequence_length, device).as_dict()

    return LatencyTable.of(kept_table(cache, LATENCY_TABLE, key, [model, teacher], measure))


def measure_table(
    model: PreTrainedModel, teacher: PreTrainedModel, batch_size: int, sequence_length: int, device: str
) -> LatencyTable:
    """Time a model's attention and FFN at many widths, and the teacher, all interleaved.

    Each part is timed as the only one of a model; what embeddings and head take is timed as the model without layers.
    Layers of a kind are alike but for their width, so one table does for all of them.

    Args:
        model: dense or already pruned; the widest part of each kind is measured.
        device: its name.
    """
    log.info("Measuring the time of each part at each width (batches of %d x %d tokens)", batch_size, sequence_length)
    models = {"teacher": teacher, "rest": with_layers(model, [])}
    for kind in ENCODER_KINDS:
        for width in _measured_widths(kind, max(parts.count(kind) for parts in layers_of(model))):
            models[f"{kind} {width}"] = with_layers(model, [_one_part(model, kind, width)])
    ids = random_ids(models, (batch_size, sequence_length), seed=0).to(model.device)
    with ExitStack() as stack, torch.inference_mode():
        for each in models.values():
            stack.enter_context(evaluation_mode(each))
        times = interleaved_times(forwards(models, ids), ROUNDS, model.device)
    least = milliseconds(times)
    whole, rest = least.pop("teacher"), least.pop("rest")
    parts: Times = {kind: {} for kind in ENCODER_KINDS}
    for name, time in least.items():
        kind, number = name.split()
        parts[kind][int(number)] = max(time - rest, 0.0)
    return LatencyTable(batch_size, sequence_length, device, torch.get_num_threads(), whole, rest, parts)


def _measured_widths(kind: str, count: int) -> list[int]:
    """All numbers of heads; of neurons about FFN_WIDTHS."""
    return list(range(1, count + 1)) if kind == HEADS else measured_widths(count, FFN_WIDTHS, 8)


def _one_part(model: PreTrainedModel, kind: str, width: int) -> nn.Module:
    """A layer that has nothing but an attention or an FFN of this width."""
    path, layers = family_of(model).layers, layers_of(model)
    index = max(range(len(layers)), key=lambda place: layers[place].count(kind))
    one = with_layers(model, [copy.deepcopy(attrgetter(path)(model)[index])])
    (parts,) = layers_of(one)
    other = next(each for each in ENCODER_KINDS if each != kind)
    if parts.count(other):
        remove_part(one, other, 0)
    shrink_encoder_layer(one, 0, {kind: torch.arange(parts.count(kind)) < width})
    return attrgetter(path)(one)[0]

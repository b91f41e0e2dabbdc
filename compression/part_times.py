"""How long parts of a model take, measured: what the tables of both tracks have in common.

A part is timed inside models that have little else, all of them taking turns, so that what it takes is a difference of
two of their times (Kurtic et al. 2023, "ZipLM").
"""

import copy
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compression.files import read_object, write_json
from compression.integrity import digest_of
from compression.outputs import KEPT_TIMES, kept_folder
from compression.structures import family_of

Times = dict[str, dict[int, float]]
"""Milliseconds, by part and number of structures."""


def kept_table(
    cache: Path, file: str, key: Any, models: list[PreTrainedModel], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A table as plain JSON, measured once and kept, so that a run that is resumed or repeated has the same one.

    Args:
        cache: the folder that it is kept in.
        file: the table's name there.
        key: what it is measured on, and how, as plain JSON.
        models: those whose shapes it depends on.
    """
    shapes = [[(name, list(p.shape)) for name, p in model.named_parameters()] for model in models]
    types = [model.config.model_type for model in models]

    def write(folder: Path) -> None:
        write_json(folder / file, measure())

    place = Path(cache) / f"{KEPT_TIMES}{digest_of([file, key, types, shapes], 16)}"
    return read_object(kept_folder(place, Path(file).stem, write) / file)


def measured_widths(count: int, about: int, multiple: int) -> list[int]:
    """Evenly spaced numbers of structures up to all of them, multiples of a number where there are enough."""
    step = -(-count // about)
    step = -(-step // multiple) * multiple if count >= about * multiple else step
    return sorted({*range(step, count, step), count})


def with_layers(model: PreTrainedModel, layers: list[nn.Module]) -> PreTrainedModel:
    """A copy of a model that has these layers and no others; it shares all else with the model."""
    path, _, name = family_of(model).layers.rpartition(".")
    whole = attrgetter(family_of(model).layers)(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} | {id(whole): None}
    small = copy.deepcopy(model, shared)
    setattr(attrgetter(path)(small), name, nn.ModuleList(layers))
    return small


def milliseconds(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The least of each model's times: whatever else a machine does only adds to them."""
    return {name: 1e3 * min(times) for name, times in seconds.items()}


def plain_times(parts: Times) -> dict[str, dict[str, float]]:
    """Times as plain JSON."""
    return {part: {str(count): time for count, time in times.items()} for part, times in parts.items()}


def times_of(values: dict[str, dict[str, float]]) -> Times:
    """What `plain_times` gave."""
    return {part: {int(count): time for count, time in times.items()} for part, times in values.items()}

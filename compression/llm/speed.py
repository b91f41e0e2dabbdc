"""How long each part of a decoder's layers takes at each size, so that a time can be the budget (Kurtic et al. 2023,
"ZipLM").

Two phases are measured: prefill, a pass over a prompt, and decode, one more token behind it with its key-value cache.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from compression.allocation import Cost
from compression.checkpoint import check_positions
from compression.config import AtLeast, Settings
from compression.decoder import Decoder
from compression.files import read_object
from compression.integrity import sha256_of
from compression.offload import offload_of
from compression.part_times import Times, kept_table, measured_widths, milliseconds, plain_times, times_of, with_layers
from compression.runtime import UserError, from_main_process, hardware_name, log, relative_path
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, head_dim, layers_of
from compression.surgery import cut_layer, to_pruned
from compression.timing import decode_times, prefill_times, random_ids

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Target = tuple[Phase, float]
"""A phase, and the share of the dense layers' time in it that may stay."""
SPEED_TABLE = "speed_table.json"
MEASURE = "python benchmarks/layer_times.py --base_model MODEL"
"""The command that measures a table."""
LAYERS = 4
"""Layers of each model that is timed, all alike: what the caches hold of them is gone when their turn comes again."""
MLP_WIDTHS = 8
ROUNDS = {"prefill": 15, "decode": 45}
MLP = "mlp"


@dataclass
class Hardware(Settings):
    """What times are measured on."""

    hardware: Path | None = None
    """Table of times for --target, from a machine where benchmarks/layer_times.py has written it; none: measured here,
    where that was not done before."""
    hardware_batch: Annotated[int, AtLeast(1)] = 1
    """Texts at once in what is measured. A table that is given has its own."""
    hardware_length: Annotated[int, AtLeast(1)] = 1024
    """Tokens of the prompt in what is measured. A table that is given has its own."""


def check_target(target: Target | None, pruning_ratio: float | None, hardware: Path | None, uniform: bool) -> None:
    """Refuse flags that do not go together.

    Raises:
        UserError: names them.
    """
    if target is None:
        if hardware is not None:
            raise UserError(f"--hardware {hardware}: is for --target; name one, such as --target prefill 0.5")
        return
    flag = "--target {} {:g}".format(*target)
    if not 0 < target[1] <= 1:
        raise UserError(f"{flag}: allowed is a share of the dense layers' time, above 0 and at most 1")
    if pruning_ratio is not None:
        raise UserError(f"--pruning_ratio {pruning_ratio:g}: not allowed with {flag}; give one of the two")
    if uniform:
        raise UserError(f"{flag}: not allowed with --uniform, whose sizes go by parameters; give one of the two")


@dataclass(frozen=True)
class SpeedTable:
    """Milliseconds of the parts of a model's layers, by how many structures they have.

    Attributes:
        hardware, threads, engine, dtype: what was measured on, and with.
        batch_size, length: texts, and tokens of the prompt of each.
        model: what a model must have in common with the one that was measured.
        rest: by phase, of what lies outside the layers.
        parts: by phase, what a part adds: an attention, by its layer's type, of groups; the MLP, of channels.
    """

    hardware: str
    threads: int
    engine: str
    dtype: str
    batch_size: int
    length: int
    model: dict[str, Any]
    rest: dict[str, float]
    parts: dict[str, Times]

    def cost(self, phase: Phase, part: str, count: int) -> Cost:
        """Nanoseconds of a part, up to a number of structures; whole numbers, so that sums are exact.

        Between measured sizes they are interpolated, below the least one they are that one's; a smaller part never
        costs more than a larger one.
        """
        if not count:
            return Cost(1)
        sizes = sorted(self.parts[phase][part])
        times = np.interp(np.arange(count + 1), sizes, [self.parts[phase][part][size] for size in sizes])
        times[0] = 0
        together = torch.from_numpy((1e6 * np.maximum.accumulate(times)).round()).long()
        return Cost(max(int(together[-1]) / count, 1), together)

    def costs(self, model: PreTrainedModel, phase: Phase) -> dict[str, list[Cost]]:
        """By kind what each layer's structures cost."""
        cost = cache(self.cost)
        return {
            kind: [
                cost(phase, named[kind], parts.count(kind))
                for named, parts in zip(part_names(model), layers_of(model), strict=True)
            ]
            for kind in DECODER_KINDS
        }

    def layers_time(self, model: PreTrainedModel, phase: Phase) -> float:
        """Milliseconds of a model's layers as the table predicts them."""
        costs, layers = self.costs(model, phase), layers_of(model)
        return sum(
            cost.of(parts.count(kind)) / 1e6
            for kind in DECODER_KINDS
            for cost, parts in zip(costs[kind], layers, strict=True)
        )

    def check_fits(self, model: PreTrainedModel, flag: str) -> Self:
        """The table, if it is one for a model.

        Raises:
            UserError: names the flag, what differs, and what to do.
        """
        another = f"measure one for this model: {MEASURE}"
        for name, value in described(model).items():
            if self.model.get(name) != value:
                raise UserError(f"{flag}: is for a {name} of {self.model.get(name)}, the model has {value}; {another}")
        for named, parts in zip(part_names(model), layers_of(model), strict=True):
            for kind in DECODER_KINDS:
                most = min(max(self.parts[phase].get(named[kind], {}), default=0) for phase in PHASES)
                if parts.count(kind) > most:
                    raise UserError(
                        f"{flag}: has times of {named[kind]} for {most} {kind} at most, the model has "
                        f"{parts.count(kind)}; {another}"
                    )
        return self

    def is_of(self, model: PreTrainedModel) -> bool:
        """Whether a model is where, and what, the table was measured with."""
        return all(getattr(self, name) == value for name, value in setting(model).items())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return vars(self) | {"parts": {phase: plain_times(parts) for phase, parts in self.parts.items()}, "unit": "ms"}

    @classmethod
    def of(cls, values: dict[str, Any], flag: str) -> "SpeedTable":
        """What `as_dict` gave.

        Raises:
            UserError: it is something else.
        """
        try:
            fields = {name: value for name, value in values.items() if name != "unit"}
            parts = {phase: times_of(values["parts"][phase]) for phase in PHASES}
            table = cls(**fields | {"parts": parts})
            times = [time for phase in PHASES for part in parts[phase].values() for time in part.values()]
            numbers = [*times, *(table.rest[phase] for phase in PHASES)]
            sizes = [min(part) for phase in PHASES for part in parts[phase].values()]
            sound = min(numbers) >= 0 and min(sizes) > 0 and any(times) and isinstance(table.model, dict)
        except (AttributeError, KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise UserError(f"{flag}: is no table of layers' times; measure one: {MEASURE}")
        return table


def setting(model: PreTrainedModel) -> dict[str, Any]:
    """What times depend on besides the sizes."""
    return {
        "hardware": hardware_name(model.device),
        "threads": torch.get_num_threads(),
        "engine": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{model.config._attn_implementation} attention",
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def described(model: PreTrainedModel) -> dict[str, Any]:
    """What a model must have in common with the one that a table is of."""
    with_attention = next((parts for parts in layers_of(model) if parts.groups), None)
    return {
        "model_type": model.config.model_type.removeprefix("pruned_"),
        "hidden_size": model.config.hidden_size,
        "head_size": head_dim(model.config),
        "queries_per_group": with_attention and with_attention.query_heads // with_attention.groups,
    }


def part_names(model: PreTrainedModel) -> list[dict[str, str]]:
    """Of each layer what a table calls its attention and its MLP, by kind of structures."""
    types = getattr(model.config, "layer_types", None) or ["attention"] * len(layers_of(model))
    return [{GROUPS: layer_type, CHANNELS: MLP} for layer_type in types]


# Measuring.


def speed_table(model: PreTrainedModel, settings: Hardware, kept_in: Path) -> SpeedTable:
    """The table that is given, or one that is measured here, once.

    Args:
        model: dense, as it is pruned.
        kept_in: the folder that a measured table is kept in, by all that it depends on.

    Raises:
        UserError: the table is none, or does not fit the model; or a model that is offloaded would be measured.
    """
    if settings.hardware is not None:
        flag = f"--hardware {settings.hardware}"
        table = SpeedTable.of(read_object(settings.hardware), flag).check_fits(model, flag)
        log.info("Times: measured on %s, %d threads, %s", table.hardware, table.threads, table.dtype)
        return table
    if offload_of(model) is not None:
        raise UserError(
            "--target: times are measured with the model in memory, and it is offloaded (--offload); give a table "
            f"that was measured where it fits: --hardware TABLE, from: {MEASURE}"
        )
    batch_size, length = settings.hardware_batch, settings.hardware_length
    key = setting(model) | {"batch_size": batch_size, "length": length}

    def measure() -> dict[str, Any]:
        return measure_table(model, batch_size, length).as_dict()

    return SpeedTable.of(kept_table(kept_in, SPEED_TABLE, key, [model], measure), f"{kept_in}")


def measure_table(model: PreTrainedModel, batch_size: int, length: int) -> SpeedTable:
    """Time a model's attentions and MLPs at many sizes, all interleaved.

    An MLP is timed in layers without attention, an attention in layers that have an MLP too, whose time is taken off:
    so both add up to a layer's time, whatever a layer does besides. Layers are alike but for their type and sizes; the
    widest one of each type is measured.

    Args:
        batch_size, length: texts, and tokens of the prompt of each.

    Raises:
        UserError: the model has no positions for one token more.
    """
    check_positions(model, "hardware_length", length + 1)
    log.info("Measuring the times of layers at each size (%d x %d tokens)", batch_size, length)
    models = {"rest": with_layers(model, [])} | dict(_sized_models(model))
    measured = phase_times(models, batch_size, length)
    return SpeedTable(
        **setting(model),
        batch_size=batch_size,
        length=length,
        model=described(model),
        rest={phase: times["rest"] for phase, times in measured.items()},
        parts={phase: _parts(times) for phase, times in measured.items()},
    )


def phase_times(models: dict[str, PreTrainedModel], batch_size: int, length: int) -> dict[Phase, dict[str, float]]:
    """Milliseconds of each model's prefill and of one decoded token, by phase; all of them take turns."""
    device = next(iter(models.values())).device
    ids = random_ids(models, (batch_size, length), seed=0).to(device)
    return {
        "prefill": milliseconds(prefill_times(models, ids, ROUNDS["prefill"])),
        "decode": milliseconds(decode_times(models, ids, 1, ROUNDS["decode"])),
    }


def _sized_models(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Models of a few layers that are alike, by the part and its size, 0 for what an attention is compared with."""
    layers, names = layers_of(model), part_names(model)

    def widest(kind: str, name: str) -> int:
        return max((i for i in range(len(layers)) if names[i][kind] == name), key=lambda i: layers[i].count(kind))

    index = widest(CHANNELS, MLP)
    copies = _copies(model, index)
    for width in measured_widths(layers[index].channels, MLP_WIDTHS, 32) if layers[index].channels else ():
        yield f"{MLP} {width}", _with_sizes(model, index, copies, {GROUPS: 0, CHANNELS: width})
    for name in dict.fromkeys(named[GROUPS] for named in names):
        index = widest(GROUPS, name)
        copies = _copies(model, index)
        for count in range(layers[index].groups + 1) if layers[index].groups else ():
            yield f"{name} {count}", _with_sizes(model, index, copies, {GROUPS: count})


def _copies(model: PreTrainedModel, index: int) -> list[nn.Module]:
    """Copies of one layer, each with weights of its own."""
    return [copy.deepcopy(Decoder(model).layers[index], {id(model.config): model.config}) for _ in range(LAYERS)]


def _with_sizes(model: PreTrainedModel, index: int, copies: list[nn.Module], sizes: dict[str, int]) -> PreTrainedModel:
    """A model that has these layers, cut down, and no others; what is not cut is shared.

    Args:
        index: the layer that they are copies of.
        sizes: how many structures stay, by kind.
    """
    shared = {id(part): part for each in copies for part in chain(each.parameters(), each.buffers())}
    small = with_layers(model, copy.deepcopy(copies, shared | {id(model.config): model.config}))
    parts = layers_of(small)[0]
    kept = {kind: torch.arange(parts.count(kind)) < size for kind, size in sizes.items()}
    decoder = Decoder(small)
    for place in range(len(copies)):
        cut_layer(decoder, place, kept)
    return to_pruned(small, [index] * len(copies))


def _parts(times: dict[str, float]) -> Times:
    """What each part adds at each size, from the times of `_sized_models`."""
    parts: Times = {}
    for name, time in times.items():
        part, _, size = name.rpartition(" ")
        if part and int(size):
            without = times["rest" if part == MLP else f"{part} 0"]
            parts.setdefault(part, {})[int(size)] = max(time - without, 0.0) / LAYERS
    return parts


# A run that has a time for its budget.


def table_files(settings: Hardware) -> dict[str, dict[str, str]]:
    """The table that is given as an input of a run: its path and sha256; nothing where none is.

    Raises:
        UserError: there is no such file.
    """
    path = settings.hardware
    if path is None:
        return {}
    if not path.is_file():
        raise UserError(f"--hardware {path}: no such file; measure one: {MEASURE}")
    return {"hardware": {"path": relative_path(path.resolve()), "sha256": sha256_of(path)}}


class Speed:
    """What a run knows of its model's times.

    Args:
        model: dense, as it is pruned.
        phase: the one whose time is the budget.
        kept_in: see `speed_table`.

    Attributes:
        table: see `speed_table`.
        costs: by kind and layer, in that phase.
        dense: by phase, milliseconds of the dense layers as the table predicts them.
    """

    def __init__(self, model: PreTrainedModel, phase: Phase, settings: Hardware, kept_in: Path):
        self.table = speed_table(model, settings, kept_in)
        self.costs = self.table.costs(model, phase)
        self.dense = {phase: self.table.layers_time(model, phase) for phase in PHASES}

    def compare(self, pruned: PreTrainedModel, load_dense: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        """What the table predicts of the dense and the pruned model, and what is measured.

        Returns:
            What the table was measured on, and by phase: `dense` and `pruned`, milliseconds of a call, `predicted` and
            `measured`; `share`, of the dense layers' time that the pruned ones take, by both. Measured is nothing where
            the table is another machine's.
        """
        table = self.table
        layers = {"dense": self.dense, "pruned": {phase: table.layers_time(pruned, phase) for phase in PHASES}}
        found: dict[str, Any] = {
            name: value for name, value in table.as_dict().items() if name not in ("model", "parts", "rest")
        }
        for phase in PHASES:
            found[phase] = {name: {"predicted": table.rest[phase] + times[phase]} for name, times in layers.items()}
            found[phase]["share"] = {"predicted": layers["pruned"][phase] / max(self.dense[phase], 1e-6)}
        if table.is_of(pruned) and offload_of(pruned) is None:
            for phase, times in from_main_process(lambda: self._measured(load_dense(), pruned)).items():
                for name in layers:
                    found[phase][name]["measured"] = times[name]
                share = (times["pruned"] - times["rest"]) / max(times["dense"] - times["rest"], 1e-6)
                found[phase]["share"]["measured"] = share
        for phase in PHASES:
            shares = ", ".join(f"{share:.3f} {how}" for how, share in found[phase]["share"].items())
            log.info("Time of the layers in %s, as a share of the dense model's: %s", phase, shares)
        return found

    def _measured(self, dense: PreTrainedModel, pruned: PreTrainedModel) -> dict[Phase, dict[str, float]]:
        models = {"dense": dense, "pruned": pruned, "rest": with_layers(dense, [])}
        return phase_times(models, self.table.batch_size, self.table.length)

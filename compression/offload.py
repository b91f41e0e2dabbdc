"""Language models of which no more than the layer that computes is on the device; the others are in files or in RAM.

Such a model is a skeleton: its layers' weights are on the meta device, and its embeddings, final norm and head are
where it computes. A layer is fetched for as long as `Offload.present` lasts, or for one forward pass of its own. Code
that keeps a layer there while a whole text goes through it (see `llm.layerwise`) fetches each layer once.
"""

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.runtime import log
from compression.structures import DECODERS, family_of
from compression.weights import Shards, ShardWriter, check_finite

Place = Literal["cpu", "disk"]
OffloadName = Literal["none", "cpu", "disk", "auto"]
# Of an ordinary model's weights: what a run takes besides, for activations, scores and repairs.
IN_MEMORY = 1.5
# Share of the free memory that a choice counts on.
SHARE = 0.9


class Source(Protocol):
    """Where tensors are fetched from."""

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]: ...


class _Ram:
    """Tensors in RAM, already of the type that they are computed in."""

    def __init__(self, shards: Shards, names: Iterable[str], dtype: torch.dtype):
        self.held = {name: shards.tensors([name])[name].to(dtype, copy=True) for name in names}

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.held[name] for name in names}


@dataclass(frozen=True)
class Placement:
    """Where a model's layers are, and where they compute.

    Attributes:
        place: where the layers are: in the checkpoint's files (disk) or in RAM.
        device, dtype: of a layer that computes.
        scratch: folder for states of texts between layers, where `place` is disk.
    """

    place: Place
    device: torch.device
    dtype: torch.dtype
    scratch: Path


class Offload:
    """The way of one model's layers to its device and back.

    Args:
        model: its skeleton.
        shards: the checkpoint's weights.
    """

    def __init__(self, model: PreTrainedModel, shards: Shards, placement: Placement):
        self.shards, self.placement = shards, placement
        name, layers = _layers(model)
        # By layer; weak, so that nothing but the model keeps its layers.
        self._prefix = WeakKeyDictionary({layer: f"{name}.{index}." for index, layer in enumerate(layers)})
        self._users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary({layer: 0 for layer in layers})
        self._checked: set[str] = set()
        in_layers = [name for name in model.state_dict() if name.startswith(tuple(self._prefix.values()))]
        self._source: Source = shards if placement.place == "disk" else _Ram(shards, in_layers, placement.dtype)
        self._fetch_rest(model, set(in_layers))
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, _: self._enter(layer))
            layer.register_forward_hook(lambda layer, _, __: self._leave(layer), always_call=True)

    @contextmanager
    def present(self, layer: nn.Module) -> Iterator[None]:
        """The layer's weights are on the device for a while.

        Raises:
            UserError: they are not finite.
        """
        self._enter(layer)
        try:
            yield
        finally:
            self._leave(layer)

    def _enter(self, layer: nn.Module) -> None:
        if self._users[layer] == 0:
            self._put(layer, self._prefix[layer], list(layer.state_dict()), self._source)
        self._users[layer] += 1

    def _leave(self, layer: nn.Module) -> None:
        self._users[layer] -= 1
        if self._users[layer] == 0:
            layer.to("meta")

    def _fetch_rest(self, model: PreTrainedModel, in_layers: set[str]) -> None:
        """What is in no layer comes to stay."""
        tied = model.all_tied_weights_keys
        self._put(model, "", [name for name in model.state_dict() if name not in in_layers | set(tied)], self.shards)
        model.tie_weights()
        for name, buffer in list(model.named_buffers()):
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = buffer.to(self.placement.device)

    def _put(self, module: nn.Module, prefix: str, names: list[str], source: Source) -> None:
        wanted = [prefix + name for name in names]
        if prefix not in self._checked:
            # Tensors of their own, which are let go of: so that of the embeddings no more is read in than is used.
            check_finite(source.tensors(wanted), str(self.shards.folder), "make or fetch that folder again")
            self._checked.add(prefix)
        found = source.tensors(wanted)
        placed = {name: found[prefix + name].to(self.placement.device, self.placement.dtype) for name in names}
        module.load_state_dict(placed, strict=False, assign=True)


_offloads: WeakKeyDictionary[nn.Module, Offload] = WeakKeyDictionary()


def offload_of(model: nn.Module) -> Offload | None:
    """How a model's layers come to its device; None where they are there."""
    return _offloads.get(model)


def put_offloaded(model: PreTrainedModel, shards: Shards, placement: Placement) -> None:
    """Let a skeleton compute with the weights of a checkpoint: see `Offload`. None of them takes a gradient.

    Raises:
        UserError: weights outside its layers are not finite.
    """
    _offloads[model] = Offload(model, shards, placement)
    model.requires_grad_(False)


def all_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's weights by name, mapped into memory where it is offloaded."""
    offloaded = offload_of(model)
    return model.state_dict() if offloaded is None else offloaded.shards.tensors(offloaded.shards.shapes)


class States:
    """Tensors that are needed again later: where they are for an ordinary model, else where the model's layers are."""

    def __init__(self, offload: Offload | None):
        self._placement = None if offload is None else offload.placement
        self._held: dict[Hashable, Tensor | Path] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor by a key, in the place of what was kept by it."""
        self.drop(key)  # a file that is mapped into memory must not change
        if self._placement is None:
            self._held[key] = tensor
        elif self._placement.place == "cpu":
            self._held[key] = tensor.to("cpu")
        else:
            self._held[key] = self._write(key, tensor, self._placement)

    def _write(self, key: Hashable, tensor: Tensor, placement: Placement) -> Path:
        if self._folder is None:
            placement.scratch.mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryDirectory(dir=placement.scratch, prefix="states_")
        path = Path(self._folder.name, f"{key}.safetensors")
        save_file({"state": tensor.detach().contiguous()}, path)
        return path

    def get(self, key: Hashable) -> Tensor:
        """A tensor that was kept, on the device.

        Raises:
            KeyError: nothing was kept by that key.
        """
        held = self._held[key]
        if isinstance(held, Path):
            with safe_open(held, framework="pt") as file:
                held = file.get_tensor("state")
        return held if self._placement is None else held.to(self._placement.device)

    def drop(self, key: Hashable) -> None:
        """Keep a tensor no longer, if it was kept."""
        held = self._held.pop(key, None)
        if isinstance(held, Path):
            held.unlink()

    def take(self, key: Hashable) -> Tensor:
        """A tensor that was kept, which is kept no longer."""
        found = self.get(key)
        self.drop(key)
        return found


class LayerWriter:
    """Writes an offloaded model's weights to shards, each layer as soon as it is done.

    Args:
        model: its weights outside the layers are written first.
        folder: an existing one, without weights; None: nothing is written, as another process does it.
        max_shard_size: bytes of weights per file.
    """

    def __init__(self, model: PreTrainedModel, folder: Path | None, max_shard_size: int):
        self.prefix, self.count = f"{_layers(model)[0]}.", 0
        weights = model.state_dict()
        self._writer = folder and ShardWriter(folder, max_shard_size, len(weights))
        for name, tensor in weights.items():
            if self._writer and name not in model.all_tied_weights_keys and not name.startswith(self.prefix):
                self._writer.add(name, tensor)

    def add(self, layer: nn.Module) -> None:
        """Write the next layer, whose weights are there.

        Raises:
            UserError: a weight is not finite.
        """
        weights = layer.state_dict()
        check_finite(weights, f"layer {self.count} of the smaller model", "nothing was saved")
        for name, tensor in weights.items():
            if self._writer:
                self._writer.add(f"{self.prefix}{self.count}.{name}", tensor)
        self.count += 1

    def close(self) -> None:
        """All layers were written."""
        if self._writer:
            self._writer.close()


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """A model's layers, and the name that they have in it."""
    layers = attrgetter(family_of(model, DECODERS).layers)(model)
    return next(name for name, module in model.named_modules() if module is layers), layers


class Store(Protocol):
    """Where the smaller forms of an offloaded model go.

    Called with a name, the model, and a function that writes a checkpoint but for its tokenizer into the folder it gets
    (None: another process does), in files of at most so many bytes; gives the model that computes with what is there.
    """

    def __call__(
        self, name: str, model: PreTrainedModel, write: Callable[[Path | None, int], None]
    ) -> PreTrainedModel: ...


def no_store(name: str, model: PreTrainedModel, write: Callable[[Path | None, int], None]) -> PreTrainedModel:
    """For models in memory, whose smaller forms need no place.

    Raises:
        ValueError: always.
    """
    raise ValueError("a model whose layers are offloaded needs a place for its smaller form")


def pick_offload(
    name: OffloadName, shards: Shards, device: torch.device, dtype: torch.dtype
) -> Literal["none"] | Place:
    """Where the layers of a checkpoint's model are to be; what `auto` takes instead of the device is logged with its
    reason.

    Args:
        device, dtype: of the weights where they compute.
    """
    if name != "auto":
        return name
    size, ram = sum(map(math.prod, shards.shapes.values())) * dtype.itemsize, free_ram()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else ram
    if IN_MEMORY * size <= SHARE * free:
        return "none"
    chosen: Place = "cpu" if device.type == "cuda" and size <= SHARE * ram else "disk"
    sizes = f"weights of {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}"
    log.info("Offload: %s, one layer at a time (%s)", chosen, sizes)
    return chosen


def free_ram() -> int:
    """Bytes of RAM that this process may still take; a container's limit counts, and that others run beside it."""
    free = psutil.virtual_memory().available
    limit, used = (_cgroup_bytes(name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _cgroup_bytes(name: str) -> int | None:
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):  # there is none, or it says max
        return None

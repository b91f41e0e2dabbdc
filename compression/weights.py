"""The weights of a checkpoint, tensor by tensor: read when they are asked for, written as they are made.

Neither needs the memory of a model. Reading maps the files into memory, so that only what is used is read, and the
system takes it back with the tensor. Writing appends to a shard whose header was left space for: safetensors files
begin with a JSON header, which may end in spaces (https://huggingface.co/docs/safetensors, "Format").
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compression.files import read_object, write_json
from compression.runtime import UserError

MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of weights per file where nothing else is asked for."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Space in the header for a tensor: its name, data type, shape and offsets take about 150.
ENTRY_BYTES = 256
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Shards:
    """The tensors of a checkpoint folder, in one file or several.

    Attributes:
        shapes: of each tensor, by name.

    Raises:
        UserError: a file is missing or cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.shapes: dict[str, list[int]] = {}
        self._file: dict[str, str] = {}
        for file in self._files():
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a dict)
                        self.shapes[name], self._file[name] = opened.get_slice(name).get_shape(), file
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / file}: cannot be read ({error}); make or fetch it again") from None

    def _files(self) -> list[str]:
        if (self.folder / WEIGHTS).is_file():
            return [WEIGHTS]
        if not (self.folder / INDEX).is_file():
            raise UserError(f"{self.folder}: no checkpoint there (no {WEIGHTS} or {INDEX})")
        index = read_object(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise UserError(f"{self.folder / INDEX}: weight_map is no object of file names; make or fetch it again")
        return sorted(set(index.values()))

    @property
    def files(self) -> list[str]:
        """The names of all files, the index included."""
        files = sorted(set(self._file.values()))
        return files if files == [WEIGHTS] else [*files, INDEX]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors by name, mapped into memory; what is written to them stays in memory.

        Raises:
            KeyError: there is no tensor of a name.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, held in by_file.items():
            with safe_open(self.folder / file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in held}
        return found


class ShardWriter:
    """Writes the weights of a checkpoint in the usual layout, each tensor to the disk as it is given.

    Args:
        folder: an existing one, without weights.
        max_shard_size: bytes of weights per file; a larger tensor has a file of its own.
        tensors: how many will be given at most.
    """

    def __init__(self, folder: Path, max_shard_size: int, tensors: int):
        self.folder, self.limit, self.tensors = Path(folder), max_shard_size, tensors
        self._shard: _Shard | None = None
        self._shards: list[_Shard] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor.

        Raises:
            OSError: the disk takes no more.
        """
        size, shard = tensor.numel() * tensor.element_size(), self._shard
        # One data type to a file: then every tensor begins at a multiple of its elements' size.
        if shard is None or shard.size + size > self.limit or shard.dtype != tensor.dtype:
            self._finish_shard()
            path = self.folder / f"model-{len(self._shards) + 1:05}.safetensors"
            shard = self._shard = _Shard(path, self.tensors, tensor.dtype)
            self._shards.append(shard)
        shard.append(name, tensor)

    def close(self) -> None:
        """Finish the last file, give all their final names and write the index, where there are several."""
        self._finish_shard()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            file = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            shard.path.rename(self.folder / file)
            weight_map |= dict.fromkeys(shard.entries, file)
        if count > 1:
            size = sum(shard.size for shard in self._shards)
            write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shard.finish()
            self._shard = None


class _Shard:
    """A file that tensors of one data type are appended to."""

    def __init__(self, path: Path, tensors: int, dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        self.entries: dict[str, dict[str, Any]] = {}
        self.size = 0
        self._space = 8 * (tensors * ENTRY_BYTES // 8 + 32)
        self._file: BinaryIO = path.open("wb")
        self._file.write(b" " * (8 + self._space))

    def append(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        end = self.size + data.nbytes
        self.entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, end],
        }
        self.size = end

    def finish(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}} | self.entries, separators=(",", ":")).encode()
        assert len(header) <= self._space, "more tensors than were announced"
        self._file.seek(0)
        self._file.write(self._space.to_bytes(8, "little") + header.ljust(self._space))
        self._file.close()


def check_finite(tensors: dict[str, Tensor], what: str, then: str) -> None:
    """Raise UserError where a tensor holds NaN or infinity.

    Args:
        what: whose tensors they are. then: what follows from it, for the error text.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and tensor.numel():
            if not all(value.isfinite() for value in tensor.aminmax()):  # both are NaN where one value is
                count = int((~tensor.isfinite()).sum())
                raise UserError(f"{what}: {count} of {tensor.numel()} values of {name} are not finite; {then}")

"""A model spread over processes: each holds a part of every weight, its gradient and its moments (FSDP2).

A layer's weights are gathered where it is computed, and let go of behind it. What does not belong to a layer (the
embeddings, the head) is gathered for the whole of a forward pass.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from compression.runtime import processes


def shard(root: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Spread a module's parameters over all processes, in place; its weights may be there or on the meta device.

    Args:
        root: in whose forward pass the parameters are used.
        layers: parts of it that are gathered on their own.
    """
    state = processes()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)


def fill(module: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give parameters their values by name; of those that are spread over processes, this process's part is read."""
    for name, whole in weights:
        parameter = module.get_parameter(name)
        if isinstance(parameter, DTensor):
            owner, _, leaf = name.rpartition(".")
            part = {leaf: _part(whole, parameter)}
            module.get_submodule(owner).load_state_dict(part, strict=False, assign=True)
        else:
            with torch.no_grad():
                parameter.copy_(whole)


def _part(whole: Tensor, parameter: DTensor) -> DTensor:
    """The part of a tensor that this process has of a parameter, as a parameter of that type and on that device."""
    mesh = parameter.device_mesh
    parts = whole.chunk(mesh.size())
    mine = parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else whole[:0]
    mine = mine.to(mesh.device_type, parameter.dtype, copy=True)
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(mine, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def is_spread(module: nn.Module) -> bool:
    """Whether parameters of a module are spread over processes."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def within(module: nn.Module, compute: Callable[[], Any]) -> Any:
    """What is computed with a module's parameters, without gradients, be they spread over processes or not."""
    if not isinstance(module, FSDPModule):
        return compute()
    with torch.no_grad():
        found = module(lambda _: compute())
    module.reshard()
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values in this process; all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_parts(folder: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what is trained, each process its part; it can be read on another number of processes.

    Args:
        folder: an existing one; None in all processes but the first.
    """
    (path,) = broadcast_object_list([None if folder is None else str(folder)])
    writer = HuggingFaceStorageWriter(path, save_distributed=True)
    try:
        dcp.save(_trained(model, optimizer), storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def load_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take back what `save_parts` wrote."""
    reader = HuggingFaceStorageReader(str(folder))
    dcp.load(_trained(model, optimizer), storage_reader=reader, no_dist=not dist.is_initialized())


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained weights and their moments, of which a new optimizer has none yet: to be written or overwritten.

    By the parameters' names: torch's own `get_state_dict` takes a tied weight for two.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"weight.{name}"] = parameter.detach()
            for kind, value in _moments(optimizer, parameter).items():
                found[f"{kind}.{name}"] = value.view(1) if value.dim() == 0 else value  # no reader takes a bare number
    return found


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter; zeros, as it begins with, where it has not made a step."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state

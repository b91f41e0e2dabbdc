"""LoRA adapters of language models: small trained matrices beside frozen weights, in the ordinary PEFT format.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": a layer computes W x + alpha / r * B A x with
A [r, in] and B [out, r], of which only A and B are trained. PEFT puts them into the model's layers in place, so the
model itself stays of its class, dense or pruned, and computes with its adapter.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.allocation import spread_rates
from compression.checkpoint import load_tensors
from compression.decoder import Decoder
from compression.files import restore_replaced
from compression.integrity import verify
from compression.runtime import UserError
from compression.sharding import whole
from compression.text_files import parse_json, read_text
from compression.weights import check_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT and safetensors raise on damaged files, and on fields of a type that they did not expect.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError)


def add_lora(
    model: PreTrainedModel,
    r: int,
    alpha: float,
    dropout: float,
    projections: Iterable[str],
    ranks: Sequence[int] | None = None,
) -> PeftModel:
    """Freeze a language model and give its projections new adapters, in place; a layer may lack some of them.

    Args:
        projections: names of Linear modules, some or all of its family's.
        ranks: of each layer's adapters, scaled by alpha / r as they all are; None: r.

    Returns:
        The handle that saves and merges the adapters; the model is used as before.
    """
    names = list(projections)
    there = [bool(widths) for widths in _widths(model, names)]  # PEFT warns of a pattern that nothing matches
    by_layer = {rf"layers\.{layer}\..*": rank for layer, rank in enumerate(ranks or ()) if there[layer]}
    largest = max(by_layer.values(), default=r)
    config = LoraConfig(
        r=largest,
        lora_alpha=alpha * (largest / r),  # type: ignore[arg-type]
        rank_pattern=by_layer,
        alpha_pattern={name: alpha * (rank / r) for name, rank in by_layer.items()},
        lora_dropout=dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def ranks_by_share(model: PreTrainedModel, projections: Iterable[str], shares: Sequence[float], rank: int) -> list[int]:
    """A rank for each layer's adapters, in proportion to what was pruned of the layer, for as many weights in all.

    At least 1, which layers have that kept everything, and at most the smallest width of the layer's projections,
    beyond which an adapter gains nothing. Rounding leaves the weights under those of `rank` everywhere by less than
    what one rank more costs in one layer, unless all layers are at their most.

    Args:
        shares: of each layer the share that is gone.
        rank: that all layers would have with the same number of weights.
    """
    gone = torch.tensor(shares).clamp_min(0)
    if not gone.any():
        return [rank] * len(shares)
    widths = _widths(model, projections)
    costs = torch.tensor([sum(map(sum, own)) for own in widths], dtype=torch.double)
    most = torch.tensor([min(map(min, own), default=1) for own in widths], dtype=torch.double)
    budget = min(rank * costs.sum().item(), (most * costs).sum().item())
    # A rate needs a preference above 0: that of layers which kept everything is one that the least rank outdoes.
    preference = gone.clamp_min(1e-9 * gone.max().item())
    wanted = spread_rates(preference, costs, budget / costs.sum().item(), torch.ones_like(most), most)
    ranks = wanted.floor()
    for layer in (wanted - ranks).argsort(descending=True, stable=True):  # what rounding down has left
        if ranks[layer] < most[layer] and (ranks * costs).sum() + costs[layer] <= budget:
            ranks[layer] += 1
    return ranks.int().tolist()


def _widths(model: PreTrainedModel, projections: Iterable[str]) -> list[list[tuple[int, int]]]:
    """Inputs and outputs of each layer's Linear modules of these names."""
    wanted = set(projections)
    return [
        [
            (module.in_features, module.out_features)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
        ]
        for layer in Decoder(model).layers
    ]


def draw_adapter(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """What a model's new adapters, if any, begin with, by name: random A as `nn.Linear` has it, B zero.

    It depends on the seed alone, and not on how the model was loaded: PEFT's own draws are lost where weights are
    on the meta device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            values = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(values, math.sqrt(5), generator=generator)
            yield name, values
        elif "lora_B" in name:
            yield name, torch.zeros(parameter.shape)


def adapter_weights(adapted: PeftModel) -> dict[str, Tensor]:
    """The adapters' weights by name; gathered where they are spread over processes, which then must all ask."""
    return {name: whole(tensor) for name, tensor in adapted.state_dict().items() if "lora_" in name}


def write_adapter(adapted: PeftModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapters alone into a folder that is there: adapter_config.json and adapter_model.safetensors.

    Args:
        weights: see `adapter_weights`; None where they are all in this process.
    """
    weights = weights or adapter_weights(adapted)
    check_finite(weights, "the adapter", "nothing was saved")
    adapted.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink()  # a form with nothing filled in


def load_adapter(model: PreTrainedModel, folder: Path, flag: str) -> PeftModel:
    """Put saved adapters into the model they were made for, in place, in evaluation mode.

    Args:
        flag: what named the folder, for error texts.

    Returns:
        The handle that merges the adapters.

    Raises:
        UserError: there is no LoRA adapter in the folder, or it is damaged, not finite, or of another model.
    """
    require_adapter(folder, flag)
    try:
        _check_settings(parse_json(read_text(Path(folder) / CONFIG, flag)))
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_tensors(Path(folder) / WEIGHTS)
    except UNREADABLE as error:
        raise _unreadable(flag, folder, error) from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{flag} {folder}: is an adapter of type {config.peft_type}; allowed is LORA")
    for name in sorted(weights):
        if not weights[name].isfinite().all():
            raise _unreadable(flag, folder, f"{name} has values that are not finite")
    ranks = [tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name]
    if (wanted := max([config.r, *(config.rank_pattern or {}).values()])) > max(ranks, default=0):
        raise _misfit(flag, folder, f"{CONFIG} asks for rank {wanted}, the weights have {max(ranks, default=0)}")
    config.base_model_name_or_path = model.name_or_path  # PEFT warns of another path, which says nothing of the weights
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise _misfit(flag, folder, str(error).splitlines()[0]) from None
    except UNREADABLE as error:
        raise _unreadable(flag, folder, error) from None
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name: list(tensor.shape) for name, tensor in wanted.items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if shapes.get(name) != wanted.get(name):
            found, needed = (value.get(name) or "none" for value in (shapes, wanted))
            raise _misfit(flag, folder, f"{name} is {found}, the model needs {needed}")
    set_peft_model_state_dict(adapted, weights)
    model.requires_grad_(False)
    model.eval()
    return adapted


def require_adapter(folder: Path, flag: str) -> None:
    """Raise UserError unless an adapter is there, its files as they were written."""
    restore_replaced(Path(folder))
    for name in (CONFIG, WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise UserError(f"{flag} {folder}: no adapter there (no {name}); make it with: python post_training.py")
    verify(Path(folder))


def _check_settings(settings: Any) -> None:
    """Raise ValueError unless adapter_config.json is an object whose fields are of their types; some may be missing."""
    if not isinstance(settings, dict):
        raise ValueError(f"{CONFIG} holds a {type(settings).__name__}; allowed is an object")
    for name, (allowed, what) in SETTINGS.items():
        if name in settings and not allowed(settings[name]):
            raise ValueError(f"{name} in {CONFIG} is {str(settings[name])[:40]}; allowed is {what}")


def _is_number(value: Any, low: float, high: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_projections(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _maps(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: isinstance(value, str), "text"),
    "r": (_is_rank, "a whole number from 1"),
    "lora_alpha": (lambda value: _is_number(value, 0), "a number from 0"),
    "lora_dropout": (lambda value: _is_number(value, 0, 1), "a number from 0 to 1"),
    "target_modules": (_is_projections, "a list of names"),
    "rank_pattern": (_maps(_is_rank), "whole numbers from 1 by name"),
    "alpha_pattern": (_maps(lambda value: _is_number(value, 0)), "numbers from 0 by name"),
    # PEFT imports the module that it names.
    "megatron_config": (lambda value: value is None, "null"),
}


def _unreadable(flag: str, folder: Path, what: object) -> UserError:
    return UserError(
        f"{flag} {folder}: cannot be read as an adapter ({(str(what) or type(what).__name__).splitlines()[0]}); "
        "make it again with: python post_training.py"
    )


def _misfit(flag: str, folder: Path, what: str) -> UserError:
    return UserError(
        f"{flag} {folder}: the adapter does not fit the model ({what}); name the model it was trained on, "
        "the parent in its stage.json: --pruned_model"
    )

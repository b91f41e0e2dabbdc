"""LoRA adapters of language models: small trained matrices beside frozen weights, in the ordinary PEFT format.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": a layer computes W x + alpha / r * B A x with
A [r, in] and B [out, r], of which only A and B are trained. PEFT puts them into the model's layers in place, so the
model itself stays of its class, dense or pruned, and computes with its adapter.
"""

from pathlib import Path

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from transformers import PreTrainedModel

from compression.checkpoint import check_finite, load_tensors
from compression.files import settle
from compression.runtime import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: PreTrainedModel, r: int, alpha: float, dropout: float, projections: list[str]) -> PeftModel:
    """Freeze a language model and give its projections new adapters, in place; a layer may lack some of them.

    Returns:
        The handle that saves and merges the adapters; the model is used as before.
    """
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(projections), bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def write_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write the adapters alone into a folder that is there: adapter_config.json and adapter_model.safetensors."""
    check_finite(get_peft_model_state_dict(adapted), "the adapter", "nothing was saved")
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # a form with nothing filled in


def load_adapter(model: PreTrainedModel, folder: Path, flag: str) -> PeftModel:
    """Put saved adapters into the model they were made for, in place, in evaluation mode.

    Args:
        flag: what named the folder, for error texts.

    Returns:
        The handle that merges the adapters.

    Raises:
        UserError: there is no LoRA adapter in the folder, or it is of another model.
    """
    require_adapter(folder, flag)
    try:
        config = PeftConfig.from_pretrained(folder)
        weights = load_tensors(Path(folder) / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{flag} {folder}: cannot be read as an adapter ({str(error).splitlines()[0]}); make it again with: "
            "python post_training.py"
        ) from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{flag} {folder}: is an adapter of type {config.peft_type}; allowed is LORA")
    config.base_model_name_or_path = model.name_or_path  # PEFT warns of another path, which says nothing of the weights
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise _misfit(flag, folder, str(error).splitlines()[0]) from None
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
    """Raise UserError unless an adapter is there."""
    settle(Path(folder))
    for name in (CONFIG, WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise UserError(f"{flag} {folder}: no adapter there (no {name}); make it with: python post_training.py")


def _misfit(flag: str, folder: Path, what: str) -> UserError:
    return UserError(
        f"{flag} {folder}: the adapter does not fit the model ({what}); name the model it was trained on, "
        "the parent in its stage.json: --pruned_model"
    )

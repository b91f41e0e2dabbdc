"""Peak memory of one step of distillation, with the logits in blocks of tokens against whole logits.

    python benchmarks/distillation_memory.py [--windows 8] [--length 512] [--layers 30]

Student and teacher have random weights and the shape of SmolLM2-135M (49,152 words), the student is trained whole or by
adapters. Each way runs in a process of its own; its figure is the peak of the process's resident memory (Linux; on a
GPU of allocated memory) less what it was with both models loaded: gradients, the optimizer's moments and activations.
Writes results/distillation_memory.json.
"""

import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common.memory import in_own_process, peak_bytes, start_peak
from transformers import LlamaConfig, LlamaForCausalLM

from compression.config import AtLeast, Config, pick, run_script
from compression.decoder import decoder_of
from compression.distillation import distillation_loss
from compression.files import write_json
from compression.llm.head import before_predicted
from compression.llm.lora import add_lora
from compression.llm.recovery import LanguageModelling
from compression.llm.recovery_settings import Recovery
from compression.llm.rows import of_windows
from compression.llm.teacher import LiveTeacher
from compression.runtime import RESULTS, fingerprint, log, pick_device
from compression.structures import family_of
from compression.training import recompute_activations
from post_training import PostTrainingConfig

WHOLE, BLOCKS = "whole logits", "blocks"
TEMPERATURE, KD_WEIGHT = 2.0, 0.5


@dataclass
class DistillationMemoryConfig(Config):
    windows: Annotated[int, AtLeast(1)] = 8
    """Windows of the step."""
    length: Annotated[int, AtLeast(2)] = 512
    """Tokens per window."""
    layers: Annotated[int, AtLeast(1)] = 30
    """Of both models."""
    ways: tuple[str, ...] = (WHOLE, BLOCKS)
    """Which ways, by these names."""

    presets: ClassVar = {"fast": dict(windows=2, length=64, layers=2)}


def make_model(layers: int, device: torch.device) -> LlamaForCausalLM:
    """The shape of SmolLM2-135M."""
    heads = dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(device)


def whole_loss(model: LlamaForCausalLM, teacher: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The plain way: both models' logits of all tokens at once."""

    def logits(of: LlamaForCausalLM) -> torch.Tensor:
        return before_predicted(of(input_ids=batch["input_ids"], use_cache=False).logits, batch["targets"])

    with torch.no_grad():
        target = logits(teacher)
    labels = batch["input_ids"][batch["targets"]]
    return distillation_loss(logits(model), target, labels, TEMPERATURE, KD_WEIGHT)["loss"]


def block_loss(model: LlamaForCausalLM, teacher: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The way of the recovery training."""
    recovery = pick(Recovery, PostTrainingConfig.make(kd_weight=KD_WEIGHT, kd_temperature=TEMPERATURE))
    recipe = LanguageModelling(recovery, len(batch["input_ids"]), LiveTeacher(teacher, TEMPERATURE))
    return recipe.loss(recipe.module(model), batch, 0)["loss"]


def measure(way: str, method: str, checkpointing: bool, config: DistillationMemoryConfig) -> tuple[int, float]:
    """Most memory above the models in bytes, and the seconds of the step."""
    device = pick_device()
    model, teacher = (make_model(config.layers, device) for _ in range(2))
    teacher.requires_grad_(False)
    decoder_of(model), decoder_of(teacher)  # kernels and their buffers are there
    loaded = start_peak(device)
    if method == "lora":
        add_lora(model, 8, 16.0, 0.0, family_of(model).projections)
    if checkpointing:
        recompute_activations(model, True)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # from the second step on, its moments are there while a loss is computed
    optimizer.zero_grad()
    batch = of_windows(torch.randint(49152, (config.windows, config.length))).collate(list(range(config.windows)), 0)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    start = time.perf_counter()
    loss = {WHOLE: whole_loss, BLOCKS: block_loss}[way](model, teacher, batch)
    loss.backward()
    optimizer.step()
    return peak_bytes(device) - loaded, time.perf_counter() - start


def main(config: DistillationMemoryConfig) -> None:
    found = []
    for method, checkpointing, way in product(("full", "lora"), (False, True), config.ways):
        extra, seconds = in_own_process(measure, way, method, checkpointing, config)
        entry = {"method": method, "gradient_checkpointing": checkpointing, "way": way}
        found.append(entry | {"bytes_above_the_models": extra, "seconds": seconds})
        recomputed = "recomputed" if checkpointing else "kept"
        log.info("%-4s  activations %-10s  %-12s  %6.2f GB  %4.0f s", method, recomputed, way, extra / 1e9, seconds)
    path = RESULTS / "distillation_memory.json"
    write_json(path, {"config": config.as_dict(), "environment": fingerprint(), "steps": found})
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(DistillationMemoryConfig, main)

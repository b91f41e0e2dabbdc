"""Peak memory of scoring a language model, against the way that keeps all gradients.

    python benchmarks/importance_memory.py [--base_model DIR] [--length 1024]

Each way runs in a process of its own: on the CPU its figure is the peak of the process's resident memory (Linux) less
what it was with the model loaded, on a GPU the peak of allocated memory less the same. Writes
results/importance_memory.json.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common.memory import in_own_process, peak_bytes, start_peak

from compression.assets import ensure_llm
from compression.checkpoint import load_language_model
from compression.config import Config, run_script
from compression.decoder import decoder_of
from compression.files import write_json
from compression.llm.perplexity import perplexity, token_losses
from compression.llm.score_passes import score_structures
from compression.llm.scoring import SCORES
from compression.runtime import RESULTS, fingerprint, log, pick_device, pick_dtype
from compression.sources import LLM, LLM_FOLDER

FORWARD, KEPT = "forward pass only", "Taylor, all gradients kept"
CHECKPOINTING = " with gradient checkpointing"


@dataclass
class MemoryConfig(Config):
    base_model: str = LLM
    """Model to score: a folder, or a name on the hub."""
    length: int = 1024
    """Tokens per window; two windows are scored, one at a time."""
    ways: tuple[str, ...] = ()
    """Which ways, by the names that are logged; none: all."""
    dtype: str = "auto"
    """Of the weights: auto, float32 or bfloat16."""

    presets: ClassVar = {"fast": dict(length=128)}


def keep_all_gradients(model, ids) -> None:
    """The plain way: one backward pass, then |weight * gradient| of every matrix from the gradients that it left."""
    for window in ids.split(1):
        hidden = model.model(input_ids=window, use_cache=False).last_hidden_state
        token_losses(decoder_of(model).logits, hidden, window).mean().backward()
    scores = [(weight * weight.grad).abs().sum() for weight in model.parameters() if weight.dim() > 1]
    assert all(score.isfinite() for score in scores)


def ways() -> dict:
    """Name -> function of a model and token ids."""
    found = {FORWARD: perplexity, KEPT: keep_all_gradients}
    for method in SCORES:
        score = partial(score_structures, method=method)
        found[method] = score
        if SCORES[method].loss:
            found[method + CHECKPOINTING] = partial(score, gradient_checkpointing=True)
    return found


def measure(name: str, config: MemoryConfig, base: Path) -> tuple[int, int]:
    """Most memory above the loaded model, and the memory of that, in bytes."""
    device = pick_device()
    model, _ = load_language_model(base, device, pick_dtype(config.dtype, "Weights"))
    ids = torch.randint(model.config.vocab_size, (2, config.length), device=device)
    perplexity(model, ids[:1, :16])  # kernels and their buffers are there
    loaded = start_peak(device)
    ways()[name](model, ids)
    return peak_bytes(device) - loaded, sum(weight.nbytes for weight in model.parameters())


def main(config: MemoryConfig) -> None:
    base = ensure_llm(config.base_model, LLM_FOLDER)
    found = {}
    for name in config.ways or ways():
        extra, weights = in_own_process(measure, name, config, base)
        found[name] = {"bytes_above_the_loaded_model": extra, "in_units_of_the_weights": extra / weights}
        log.info("%s: %.2f GB above the model's %.2f GB", name, extra / 1e9, weights / 1e9)
    path = RESULTS / "importance_memory.json"
    write_json(path, {"config": config.as_dict(), "environment": fingerprint(), "ways": found})
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(MemoryConfig, main)

"""Time the removal analysis against the plain way, and compare their values.

    python benchmarks/removal_analysis.py [--base_model DIR] [--data_dir TEXTS]

The plain way runs the whole model once for each layer, attention and MLP that is left out. Both are timed in one
process, part by part in turn. Writes results/removal_analysis.json.
"""

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn

from compression.assets import ensure_llm
from compression.checkpoint import load_language_model
from compression.config import Config, run_script
from compression.files import write_json
from compression.llm.perplexity import perplexity
from compression.llm.removal import removal_perplexities
from compression.llm.text import load_corpus, sample_windows, tokenize
from compression.modeling.pruned_decoder import NoAttention, NoMLP
from compression.runtime import RESULTS, fingerprint, log, pick_device
from compression.sources import LLM, LLM_FOLDER


@dataclass
class RemovalConfig(Config):
    base_model: str = LLM
    """Model to analyse: a folder, or a name on the hub."""
    data_dir: str | None = None
    """Folder with wikitext2/."""
    samples: int = 1
    """Windows of text."""
    length: int = 512
    """Tokens per window."""
    rounds: int = 2
    """Times that each way is timed."""
    seed: int = 42
    """Fixes which windows are taken."""

    presets: ClassVar = {"fast": dict(rounds=1, length=128)}


@contextmanager
def without(model, part: str, index: int):
    """The model with one part left out."""
    layers = model.model.layers
    layer = layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    if part == "layer":
        model.model.layers = nn.ModuleList([other for other in layers if other is not layer])
        model.config.num_hidden_layers -= 1
    elif part == "attention":
        layer.self_attn = NoAttention(attention)
    else:
        layer.mlp = NoMLP(mlp)
    try:
        yield
    finally:
        model.config.num_hidden_layers = len(layers)
        model.model.layers, layer.self_attn, layer.mlp = layers, attention, mlp


def plain(model, ids) -> dict:
    """The same values by running the whole model each time."""
    found = {"dense": perplexity(model, ids)}
    for part in ("layer", "attention", "mlp"):
        found[part] = []
        for index in range(len(model.model.layers)):
            with without(model, part, index):
                found[part].append(perplexity(model, ids))
    return found


def timed(call) -> tuple[dict, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def main(config: RemovalConfig) -> None:
    model, tokenizer = load_language_model(ensure_llm(config.base_model, LLM_FOLDER), pick_device())
    text = tokenize(tokenizer, load_corpus("wikitext2", "validation", config.data_dir))
    ids = sample_windows(text, config.length, config.samples, config.seed)
    rounds = []
    for _ in range(config.rounds):
        (fast, fast_seconds), (slow, slow_seconds) = (
            timed(lambda way=way: way(model, ids)) for way in (removal_perplexities, plain)
        )
        rounds.append({"reused_seconds": fast_seconds, "plain_seconds": slow_seconds})
        log.info("plain / reused: %.2f", slow_seconds / fast_seconds)
    differences = [
        abs(one / other - 1)
        for part in ("layer", "attention", "mlp")
        for one, other in zip(fast[part], slow[part], strict=True)
    ]
    figures = {
        "ratios": [one["plain_seconds"] / one["reused_seconds"] for one in rounds],
        "largest_relative_difference": max(differences),
        "rounds": rounds,
    }
    log.info("Values differ by at most %.1e", max(differences))
    path = RESULTS / "removal_analysis.json"
    write_json(path, {"config": config.as_dict(), "environment": fingerprint()} | figures)
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(RemovalConfig, main)

"""What a step in one size is worth: estimated to second order, as a search by exchange does, against running the model.

    python benchmarks/search_steps.py --base_model models/llm-local --data_dir TEXTS [--pruning_ratio 0.5] [--steps 36]

Every layer keeps the same share of its channels and groups, those of largest Fisher score, and is repaired. Then steps
are drawn: one attention a group smaller or larger, or one MLP an eighth. What each adds to the divergence from the
dense model is estimated and measured on the same text. `ratio` is the time that measuring takes by that of estimating.

Writes results/search_steps.json.
"""

import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common.texts import wikitext2
from torch import Tensor
from transformers import PreTrainedModel

from compression.allocation import all_but_least
from compression.assets import ensure_llm
from compression.checkpoint import load_language_model
from compression.config import AtLeast, Between, Config, run_script
from compression.files import write_json
from compression.llm.agreement import divergence, last_states
from compression.llm.expansion import Expansion
from compression.llm.repair_text import RepairText
from compression.llm.score_passes import score_structures
from compression.llm.scoring import Scores
from compression.llm.stitching import Counts, Solutions, choices_of, layer_of, solutions_of, stitched
from compression.runtime import RESULTS, Dtype, fingerprint, log, pick_device, pick_dtype
from compression.sources import LLM, LLM_FOLDER
from compression.structures import DECODER_KINDS, GROUPS

# A step in an MLP is its width by this.
LEVELS = 8

# A layer, a kind of structure, and how many of them stay instead.
Step = tuple[int, str, int]


@dataclass
class StepsConfig(Config):
    base_model: str = LLM
    """The dense model: a folder, or a name on the hub."""
    data_dir: str | None = None
    """Folder with wikitext2/."""
    pruning_ratio: Annotated[float, Between(0.1, 0.9)] = 0.5
    """Share of each layer's channels and groups that is gone."""
    steps: Annotated[int, AtLeast(2)] = 36
    """How many steps are compared."""
    num_samples: Annotated[int, AtLeast(1)] = 8
    """Windows that scores are computed on."""
    repair_samples: Annotated[int, AtLeast(1)] = 16
    """Windows that repairs are fitted to."""
    held_out_samples: Annotated[int, AtLeast(1)] = 2
    """Windows that steps are judged on."""
    length: Annotated[int, AtLeast(2)] = 1024
    """Tokens per window."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    seed: int = 42
    """Fixes windows and steps."""

    presets: ClassVar = {"fast": dict(steps=6, num_samples=2, repair_samples=4, held_out_samples=1)}


def draw_steps(scores: Scores, path: Counts, config: StepsConfig) -> list[Step]:
    """Different steps from the sizes of a path, at random."""
    every = []
    for layer, sizes in enumerate(path):
        for kind, count in sizes.items():
            whole = len(scores[kind][layer])
            step = 1 if kind == GROUPS else max(whole // LEVELS, 1)
            every += [(layer, kind, count + by) for by in (-step, step) if 0 <= count + by <= whole]
    return sorted(random.Random(config.seed).sample(every, min(config.steps, len(every))))


def solve(model: PreTrainedModel, scores: Scores, path: Counts, steps: list[Step], windows: Tensor) -> list[Solutions]:
    """Each layer, pruned and repaired at its size on the path and at those of the steps."""
    counts = [{kind: {count} for kind, count in sizes.items()} for sizes in path]
    for layer, kind, count in steps:
        counts[layer][kind].add(count)

    def stays(layer: int, kind: str, count: int) -> Tensor:
        mine = scores[kind][layer].cpu()
        return all_but_least(mine, len(mine) - count)

    text = partial(RepairText, model, windows)
    return solutions_of(text, choices_of(counts, stays), path, None, lambda _, make: make())


def main(config: StepsConfig) -> None:
    base = ensure_llm(config.base_model, LLM_FOLDER)
    model, tokenizer = load_language_model(base, pick_device(), pick_dtype(config.dtype, "Weights"))
    train, validation = wikitext2(tokenizer, config.data_dir, config.length)
    held_out = validation(config.held_out_samples, config.seed)
    scores = score_structures(model, train(config.num_samples, config.seed), "fisher")
    left = 1 - config.pruning_ratio
    path = [
        {kind: max(round(left * len(scores[kind][layer])), 1) for kind in DECODER_KINDS}
        for layer in range(len(scores[GROUPS]))
    ]
    steps = draw_steps(scores, path, config)
    solutions = solve(model, scores, path, steps, train(config.repair_samples, config.seed + 1))
    states = last_states(model, held_out)

    def sizes_with(layer: int, kind: str, count: int) -> dict[str, int]:
        return path[layer] | {kind: count}

    started = time.perf_counter()
    with stitched(model, path, solutions):
        expansion = Expansion(model, held_out, states, seed=config.seed)
    estimated = [
        expansion.change(step[0], layer_of(model, step[0], sizes_with(*step), solutions[step[0]])) for step in steps
    ]
    between = time.perf_counter()
    with stitched(model, path, solutions):
        start = divergence(model, held_out, states)
    measured = []
    for step in steps:
        counts = [sizes_with(*step) if layer == step[0] else sizes for layer, sizes in enumerate(path)]
        with stitched(model, counts, solutions):
            measured.append(divergence(model, held_out, states) - start)
    seconds = {"estimated": between - started, "measured": time.perf_counter() - between}

    rows = []
    for (layer, kind, count), one, other in zip(steps, estimated, measured, strict=True):
        row = {"layer": layer, "kind": kind, "by": count - path[layer][kind], "estimated": one, "measured": other}
        log.info("layer %(layer)d, %(by)+d %(kind)s: estimated %(estimated)+.5f, measured %(measured)+.5f", row)
        rows.append(row)
    found = {
        "divergence": start,
        "correlation": torch.tensor([estimated, measured]).corrcoef()[0, 1].item(),
        "seconds": seconds,
        "ratio": seconds["measured"] / seconds["estimated"],
    }
    log.info("Correlation %.3f; measuring takes %.1f times as long", found["correlation"], found["ratio"])
    output = RESULTS / "search_steps.json"
    write_json(output, {"config": config.as_dict(), "environment": fingerprint(), "rows": rows} | found)
    log.info("-> %s", output)


if __name__ == "__main__":
    run_script(StepsConfig, main)

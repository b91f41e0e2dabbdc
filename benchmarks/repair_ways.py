"""What a repair takes and what it brings: each layer for itself, earlier errors, gates and ups.

    python benchmarks/repair_ways.py --base_model models/llm-local --data_dir TEXTS [--pruning_ratio 0.5] [--rounds 3]

Every layer loses the same share of its groups and channels, those of least Fisher score, and each way repairs that in a
process of its own, the ways taking turns. Of each: the least time of the rounds relative to the first way's, the most
memory above the dense model's, and the perplexity on held-out text relative to the dense model's.

Writes results/repair_ways.json.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common.memory import in_own_process, peak_bytes, start_peak
from common.texts import wikitext2
from torch import Tensor
from transformers import PreTrainedModel

from compression.allocation import all_but_least
from compression.assets import ensure_llm
from compression.checkpoint import load_language_model
from compression.config import AtLeast, Between, Config, run_script
from compression.files import write_json
from compression.llm.perplexity import perplexity
from compression.llm.repair import Repair, repairing
from compression.llm.repair_text import RepairText
from compression.llm.score_passes import score_structures
from compression.llm.scoring import Scores
from compression.llm.search import Kept
from compression.runtime import RESULTS, Dtype, fingerprint, log, pick_device, pick_dtype
from compression.sources import LLM, LLM_FOLDER
from compression.structures import DECODER_KINDS
from compression.surgery import shrink_decoder

WAYS = {
    "each layer for itself": Repair(error_share=0.0),
    "earlier errors": Repair(),
    "the same, close to the text": Repair(ridge=0.01),
    "gates and ups, one round": Repair(mlp_rounds=1),
    "gates and ups, two rounds": Repair(mlp_rounds=2),
}


@dataclass
class WaysConfig(Config):
    base_model: str = LLM
    """The dense model: a folder, or a name on the hub."""
    data_dir: str | None = None
    """Folder with wikitext2/."""
    pruning_ratio: Annotated[float, Between(0.01, 0.99)] = 0.5
    """Share of each layer's groups and channels that goes."""
    rounds: Annotated[int, AtLeast(1)] = 2
    """How often each way is run."""
    num_samples: Annotated[int, AtLeast(1)] = 8
    """Windows that scores are computed on."""
    repair_samples: Annotated[int, AtLeast(1)] = 16
    """Windows that repairs are fitted to."""
    held_out_samples: Annotated[int, AtLeast(1)] = 8
    """Windows that perplexity is measured on."""
    length: Annotated[int, AtLeast(2)] = 1024
    """Tokens per window."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    seed: int = 42
    """Fixes which windows are taken."""

    presets: ClassVar = {"fast": dict(rounds=1, num_samples=2, repair_samples=4, held_out_samples=2)}

    def load(self) -> tuple[PreTrainedModel, Any]:
        """The dense model and its tokenizer."""
        base = ensure_llm(self.base_model, LLM_FOLDER)
        return load_language_model(base, pick_device(), pick_dtype(self.dtype, "Weights"))


def keep_evenly(scores: Scores, ratio: float) -> Kept:
    """Of each layer the structures of largest score, at least one."""

    def stays(score: Tensor) -> Tensor:
        return all_but_least(score.cpu(), min(round(ratio * len(score)), len(score) - 1))

    return {kind: [stays(score) for score in scores[kind]] for kind in DECODER_KINDS}


def measure(repair: Repair, kept: Kept, windows: Tensor, held_out: Tensor, config: WaysConfig) -> dict[str, float]:
    """Seconds, bytes above the loaded model, and perplexity of one way."""
    model, _ = config.load()
    device = model.device
    perplexity(model, held_out[:1, :16])  # kernels and their buffers are there
    loaded, started = start_peak(device), time.perf_counter()
    text = RepairText(model, windows, error_share=repair.share, ridge=repair.ridge)
    small = shrink_decoder(model, kept, repairing(model, kept, text, mlp_rounds=repair.mlp_rounds))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, extra = time.perf_counter() - started, peak_bytes(device) - loaded
    return {"seconds": seconds, "bytes_above_the_model": extra, "perplexity": perplexity(small, held_out)}


def main(config: WaysConfig) -> None:
    model, tokenizer = config.load()
    train, validation = wikitext2(tokenizer, config.data_dir, config.length)
    held_out, windows = validation(config.held_out_samples, config.seed), train(config.repair_samples, config.seed + 1)
    kept = keep_evenly(score_structures(model, train(config.num_samples, config.seed), "fisher"), config.pruning_ratio)
    dense = perplexity(model, held_out)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(config.rounds):
        for name, repair in WAYS.items():
            runs[name].append(in_own_process(measure, repair, kept, windows, held_out, config))
    found = {name: {key: min(run[key] for run in same) for key in same[0]} for name, same in runs.items()}
    first = next(iter(found.values()))["seconds"]
    for name, way in found.items():
        way |= {"time_by_the_first": way["seconds"] / first, "perplexity_by_dense": way["perplexity"] / dense}
        log.info(
            "%-26s %.2f times the time, %.2f GB, %.3f times the dense perplexity",
            name,
            way["time_by_the_first"],
            way["bytes_above_the_model"] / 1e9,
            way["perplexity_by_dense"],
        )
    path = RESULTS / "repair_ways.json"
    write_json(path, {"config": config.as_dict(), "environment": fingerprint(), "dense": dense, "ways": found})
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(WaysConfig, main)

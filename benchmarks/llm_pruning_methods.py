"""Compare ways of pruning a language model: one run, one model, one text, the same budgets, no recovery training.

    python benchmarks/llm_pruning_methods.py --data_dir TEXTS [--ratios 0.2 0.3 0.5] [--methods fisher paper]

Every method gets the same calibration windows; perplexities are on the test part of WikiText-2 and PTB. Writes
results/llm_pruning_methods.json after each method, and goes on where it was with --resume.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from compression.assets import LLM, LLM_FOLDER, ensure_llm
from compression.calibration import removal_perplexities
from compression.checkpoint import load_language_model, read_json, write_json
from compression.config import StageConfig, run_script
from compression.corpus import load_corpus, sample_windows, tokenize, windows
from compression.evaluation.perplexity import perplexity
from compression.global_pruning import CalibrationText, GlobalPruning, PruningFields
from compression.runtime import RESULTS, UserError, fingerprint, log, pick_device
from compression.structures import KINDS, layers_of
from compression.surgery import shrink_decoder

ALONE = dict(protect_first=0, protect_last=0, attention_factors=(1.0,))
# Name -> the fields in which the method differs from the defaults.
METHODS: dict[str, dict[str, Any]] = {
    "H-GSP, default": {},
    "H-GSP, paper": PruningFields.presets["paper"],
    "H-GSP, paper, T = 0": PruningFields.presets["paper"] | {"temperature": 0.0},
    "uniform Taylor, ends protected": dict(
        importance_method="taylor", normalize="layer", attention_factors=(1e9,), epsilon=0.0
    ),
    "fisher, one global ranking": dict(importance_method="fisher", epsilon=0.0) | ALONE,
    "magnitude, per layer": dict(importance_method="magnitude", normalize="layer", epsilon=0.0) | ALONE,
    "Wanda-sp, per layer": dict(importance_method="wanda", normalize="layer", epsilon=0.0) | ALONE,
    "five steps": dict(iterative_steps=5),
    "least-squares repair": dict(compensation="lstsq"),
    "five steps, least-squares repair": dict(iterative_steps=5, compensation="lstsq"),
}
WHOLE_LAYERS = "whole layers, by removal perplexity"


@dataclass
class MethodsConfig(StageConfig):
    base_model: str = LLM
    """Model to prune: a folder, or a name on the hub."""
    ratios: tuple[float, ...] = (0.2, 0.3, 0.5)
    """Shares of the decoder layers' parameters to remove."""
    methods: tuple[str, ...] = (*METHODS, WHOLE_LAYERS)
    """Which methods, by name."""
    data_dir: str | None = None
    """Folder with wikitext2/ and ptb/."""
    num_samples: int = 8
    """Windows that scores are computed on."""
    repair_samples: int = 96
    """Windows that repairs are fitted to."""
    held_out_samples: int = 4
    """Windows that choices are made by, and that layers are ranked on."""
    length: int = 1024
    """Tokens per window, also of the test text."""
    eval_samples: int = 40
    """Windows of each test text; 0: all of it."""
    seed: int = 42
    """Fixes which windows calibration takes."""
    resume: bool = False
    """Keep what an earlier run with the same settings has measured."""

    presets: ClassVar = {"fast": dict(num_samples=2, repair_samples=8, held_out_samples=1, eval_samples=4)}

    def check(self) -> None:
        for name in self.methods:
            if name not in (*METHODS, WHOLE_LAYERS):
                raise UserError(f"--methods {name!r}: unknown; allowed are {', '.join((*METHODS, WHOLE_LAYERS))}")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise UserError(f"--ratios {ratio}: allowed is above 0 and below 1")


def whole_layers(model, ratio: float, removal: dict[str, Any]):
    """Take out the layers whose removal costs least, one at a time's cost, until the budget is met."""
    sizes = [parts.parameters for parts in layers_of(model)]
    order = torch.tensor(removal["layer"]).argsort().tolist()
    gone, removed = set(), 0
    while removed < ratio * sum(sizes):
        gone.add(order[len(gone)])
        removed = sum(sizes[index] for index in gone)
    kept = {
        kind: [torch.full((parts.count(kind),), index not in gone) for index, parts in enumerate(layers_of(model))]
        for kind in KINDS
    }
    return shrink_decoder(model, kept)


def main(config: MethodsConfig) -> None:
    base, device = ensure_llm(config.base_model, LLM_FOLDER), pick_device()
    model, tokenizer = load_language_model(base, device)
    train, validation = (
        tokenize(tokenizer, load_corpus("wikitext2", p, config.data_dir)) for p in ("train", "validation")
    )
    text = CalibrationText(
        sample_windows(train, config.length, config.num_samples, config.seed),
        sample_windows(train, config.length, config.repair_samples, config.seed + 1),
        sample_windows(validation, config.length, config.held_out_samples, config.seed),
    )
    tests = {
        name: windows(tokenize(tokenizer, load_corpus(name, "test", config.data_dir)), config.length)[
            : config.eval_samples or None
        ]
        for name in ("wikitext2", "ptb")
    }
    path = RESULTS / "llm_pruning_methods.json"
    settings = {name: value for name, value in config.as_dict().items() if name not in ("resume", "methods", "ratios")}
    found = {"config": settings, "environment": fingerprint(), "dense": None, "methods": {}}
    if config.resume and path.is_file() and read_json(path)["config"] == settings:
        found = read_json(path)

    def measure(which) -> dict[str, float]:
        return {name: perplexity(which, ids) for name, ids in tests.items()}

    if not found["dense"]:
        found["dense"] = measure(model)
    log.info("dense: %s", found["dense"])
    removal = None
    for name in config.methods:
        fields = METHODS.get(name, {})
        if removal is None and (name == WHOLE_LAYERS or fields.get("temperature")):
            removal = removal_perplexities(model, text.held_out[:2, :512])
        for ratio in config.ratios:
            results = found["methods"].setdefault(name, {})
            if str(ratio) in results:
                continue
            model, _ = load_language_model(base, device)
            started = time.perf_counter()
            try:
                if name == WHOLE_LAYERS:
                    small = whole_layers(model, ratio, removal)
                else:
                    small = GlobalPruning(model, PruningFields(pruning_ratio=ratio, **fields), text, removal).prune()
            except UserError as error:
                log.info("%s, %g: not possible (%s)", name, ratio, error)
                results[str(ratio)] = {"impossible": str(error)}
                continue
            seconds = time.perf_counter() - started
            results[str(ratio)] = {"perplexity": measure(small), "seconds": seconds, "layers": len(layers_of(small))}
            log.info("%s, %g: %s", name, ratio, results[str(ratio)])
            write_json(path, found)
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(MethodsConfig, main)

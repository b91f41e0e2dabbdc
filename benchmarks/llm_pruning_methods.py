"""Compare ways of pruning a language model: one run, one model, one text, the same budgets, no recovery training.

    python benchmarks/llm_pruning_methods.py --data_dir TEXTS [--ratios 0.2 0.3 0.5] [--methods fisher paper]

Every method gets the same calibration windows; perplexities are on the test part of WikiText-2 and PTB. `seconds`
leaves out the scores of the dense model where another method or ratio has computed them. Writes
results/llm_pruning_methods.json after each measurement, and goes on where it was with --resume.

Torch-Pruning is no part of the environment: pip install --no-deps torch-pruning==1.6.1. It is driven as in its own
examples/LLMs/prune_llm.py: norms of coupled channels, every layer alike, the hidden size is pruned too. It takes one
ratio for hidden size, heads and channels; here the least one that reaches the budget. Two things are other than there:
attention is the eager one, and while the graph is traced there are no rotary embeddings. They move no channel, but with
them the search for coupled channels never ends (known upstream: github.com/VainF/Torch-Pruning/issues/527).
"""

import importlib.util
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import PreTrainedModel

from compression.assets import ensure_llm
from compression.checkpoint import load_language_model
from compression.config import Config, pick, run_script
from compression.files import read_json, write_json
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring
from compression.llm.perplexity import perplexity
from compression.llm.removal import removal_perplexities
from compression.llm.scoring import SCORES
from compression.llm.text import CalibrationText, load_corpus, sample_windows, tokenize, windows
from compression.runtime import RESULTS, Dtype, UserError, fingerprint, log, pick_device, pick_dtype
from compression.sources import LLM, LLM_FOLDER
from compression.structures import DECODER_KINDS, layers_of
from compression.surgery import shrink_decoder
from run_global_pruning import GlobalPruningConfig

DEFAULT_SCORE = GlobalPruningConfig().importance_method
PLAIN = dict(compensation="none", epsilon=0.0, round_to=1)
# Name -> the fields in which the method differs from the defaults.
METHODS: dict[str, dict[str, Any]] = {
    "H-GSP, default": {},
    "H-GSP, two steps": dict(iterative_steps=2),
    "H-GSP, no repair": dict(compensation="none"),
    **{f"H-GSP, {score} scores": dict(importance_method=score) for score in SCORES if score != DEFAULT_SCORE},
    "H-GSP, obs scores, no repair": dict(importance_method="obs", compensation="none"),
    "H-GSP, paper": GlobalPruningConfig.presets["paper"],
    "H-GSP, paper, T = 0": GlobalPruningConfig.presets["paper"] | {"temperature": 0.0},
    "uniform Taylor on MLP, ends protected": PLAIN
    | dict(importance_method="taylor", normalize="layer", attention_factors=(1e9,), protect_first=2, protect_last=2),
    "magnitude, per layer": PLAIN | dict(importance_method="magnitude", normalize="layer"),
    "Wanda-sp, per layer": PLAIN | dict(importance_method="wanda", normalize="layer"),
}
WHOLE_LAYERS = "whole layers, by removal perplexity"
TORCH_PRUNING = "Torch-Pruning"
ALL_METHODS = (*METHODS, WHOLE_LAYERS, TORCH_PRUNING)


@dataclass
class MethodsConfig(Config):
    base_model: str = LLM
    """Model to prune: a folder, or a name on the hub."""
    ratios: tuple[float, ...] = (0.2, 0.3, 0.5)
    """Shares of the decoder layers' parameters to remove."""
    methods: tuple[str, ...] = ALL_METHODS
    """Which methods, by name."""
    data_dir: str | None = None
    """Folder with wikitext2/ and ptb/."""
    num_samples: int = 32
    """Windows that scores are computed on."""
    repair_samples: int = 64
    """Windows that repairs are fitted to."""
    held_out_samples: int = 4
    """Windows that choices are made by, and that layers are ranked on."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    length: int = 1024
    """Tokens per window, also of the test text."""
    eval_samples: int = 30
    """Windows of each test text; 0: all of it."""
    seed: int = 42
    """Fixes which windows calibration takes."""
    resume: bool = False
    """Keep what an earlier run with the same settings has measured."""

    presets: ClassVar = {"fast": dict(num_samples=4, repair_samples=16, held_out_samples=1, eval_samples=4)}

    def check(self) -> None:
        for name in self.methods:
            if name not in ALL_METHODS:
                raise UserError(f"--methods {name!r}: unknown; allowed are {'; '.join(ALL_METHODS)}")
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
        for kind in DECODER_KINDS
    }
    return shrink_decoder(model, kept)


def torch_pruning(load: Callable[[], PreTrainedModel], ratio: float) -> PreTrainedModel:
    """Torch-Pruning's recipe at the least of its own ratios, to a thousandth, that removes the share `ratio`."""
    budget = (1 - ratio) * layer_parameters(load())
    low, high, small = 0, 1000, None
    while high - low > 1:
        middle = (low + high) // 2
        tried = pruned_by_recipe(load(), middle / 1000)
        if layer_parameters(tried) <= budget:
            high, small = middle, tried
        else:
            low = middle
    return small


def pruned_by_recipe(model: PreTrainedModel, ratio: float) -> PreTrainedModel:
    """One call of Torch-Pruning, as its script for language models makes it."""
    import torch_pruning as tp

    model.config.use_cache = False
    model.set_attn_implementation("eager")
    config, heads = model.config, {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    with patch(f"{type(model).__module__}.apply_rotary_pos_emb", lambda query, key, *_, **__: (query, key)):
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=torch.ones(1, 4, dtype=torch.long, device=model.device),
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=[model.lm_head],
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio,
            round_to=4,
            output_transform=lambda output: output.logits,
        )
        for group in pruner.step(interactive=True):
            group.prune()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    return model


def layer_parameters(model: PreTrainedModel) -> int:
    """Weights of the decoder layers' projections."""
    return sum(parts.parameters for parts in layers_of(model))


def by_fields(model, ratio: float, fields: dict[str, Any], text: CalibrationText, removal, known: dict):
    """Prune by this project's own machinery; scores of the dense model are computed once for each importance method."""
    config = GlobalPruningConfig.make(pruning_ratio=ratio, **fields)

    def cached(name: str, make):
        key = config.importance_method if name.startswith("scores_of_step_1_") else name
        if key not in (config.importance_method, "labels"):
            return make()
        if key not in known:
            known[key] = make()
        return known[key]

    scoring, budget = pick(Scoring, config), pick(Budget, config)
    return GlobalPruning(model, scoring, budget, text, removal, cached).prune()


def main(config: MethodsConfig) -> None:
    if TORCH_PRUNING in config.methods and importlib.util.find_spec("torch_pruning") is None:
        raise UserError("Torch-Pruning is not installed; install it with: pip install --no-deps torch-pruning==1.6.1")
    base, device = ensure_llm(config.base_model, LLM_FOLDER), pick_device()
    load = partial(load_language_model, base, device, pick_dtype(config.dtype, "Weights"))
    model, tokenizer = load()
    train, validation = (
        tokenize(tokenizer, load_corpus("wikitext2", part, config.data_dir)) for part in ("train", "validation")
    )
    text = CalibrationText(
        sample_windows(train, config.length, config.num_samples, config.seed),
        sample_windows(train, config.length, config.repair_samples, config.seed + 1),
        sample_windows(validation, config.length, config.held_out_samples, config.seed),
        seed=config.seed,
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

    found["dense"] = found["dense"] or measure(model)
    log.info("dense: %s", found["dense"])
    removal, known = None, {}
    for name, ratio in itertools.product(config.methods, config.ratios):
        results, fields = found["methods"].setdefault(name, {}), METHODS.get(name, {})
        if str(ratio) in results:
            continue
        model, _ = load()
        total = layer_parameters(model)
        if removal is None and (name == WHOLE_LAYERS or fields.get("temperature")):
            removal = removal_perplexities(model, text.held_out[:2, :512])
        started = time.perf_counter()
        try:
            if name == WHOLE_LAYERS:
                small = whole_layers(model, ratio, removal)
            elif name == TORCH_PRUNING:
                small = torch_pruning(lambda: load()[0], ratio)
            else:
                small = by_fields(model, ratio, fields, text, removal, known)
        except UserError as error:
            results[str(ratio)] = {"impossible": str(error)}
        else:
            seconds = time.perf_counter() - started
            results[str(ratio)] = {
                "perplexity": measure(small),
                "seconds": seconds,
                "layers": len(layers_of(small)),
                "removed": 1 - layer_parameters(small) / total,
            }
        log.info("%s, %g: %s", name, ratio, results[str(ratio)])
        write_json(path, found)
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(MethodsConfig, main)

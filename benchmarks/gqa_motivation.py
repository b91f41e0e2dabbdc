"""Why pruning has to know about grouped-query attention: channels without heads, against groups by their gradients.

    python benchmarks/gqa_motivation.py --data_dir TEXTS [--base_model DIR] [--pruning_ratio 0.2]
    python benchmarks/gqa_motivation.py --base_model meta-llama/Meta-Llama-3-8B --dtype bfloat16      # on a GPU

Same model, same budget of parameters, same calibration text, same recovery training (LoRA) afterwards:

- generic: Torch-Pruning takes the channels of least norm from q, k and v, each on its own; what is left fits no
  number of heads, so it is truncated to the next whole groups. MLP channels by magnitude make up the budget.
- magnitude: MLP channels of least magnitude go, as many from every layer; attention stays whole.
- GQA-aware: gqa_aware_pruning.py's flow, whole groups and MLP channels by Taylor importance, rates by removal.
- the same with least-squares repair, as the script does by default.

Torch-Pruning is no part of the environment: pip install torch-pruning==1.6.1. Writes results/gqa_motivation.json.
"""

import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from compression.assets import ensure_llm
from compression.checkpoint import load_language_model, save_checkpoint
from compression.config import AtLeast, Between, Config, Flat, group, pick, run_script
from compression.files import write_json
from compression.importance import l2
from compression.llm.evaluate import Evaluation, evaluation_windows
from compression.llm.gqa_pruning import Cuts, LayerwisePruning, layer_rates, select_gqa_groups_to_prune
from compression.llm.perplexity import perplexity
from compression.llm.recovery import recover
from compression.llm.recovery_settings import Recovery
from compression.llm.removal import removal_perplexities
from compression.llm.run import calibration_text
from compression.llm.run_settings import FAST, Calibration, RunSettings
from compression.runtime import RESULTS, UserError, fingerprint, log, pick_device, pick_dtype
from compression.sources import LLM_FOLDER
from compression.stage_record import describe_stage, identify
from compression.structures import CHANNELS, LayerParts, layers_of
from compression.surgery import shrink_layer, to_pruned
from gqa_aware_pruning import GQAAwarePruningConfig
from post_training import PostTrainingConfig

GENERIC = "generic channels, truncated to whole groups"
# Name -> the fields in which the flow differs from gqa_aware_pruning.py's defaults.
FLOWS = {
    "MLP channels by magnitude": dict(
        importance_method="magnitude",
        strategy="uniform",
        attention_ratio=0.0,
        compensation="none",
        protect_first=0,
        protect_last=0,
    ),
    "GQA-aware, Taylor, no repair": dict(compensation="none"),
    "GQA-aware, Taylor, repaired": {},
}


@dataclass
class MotivationConfig(Config):
    pruning_ratio: Annotated[float, Between(0, 0.9)] = 0.2
    """Share of the decoder layers' parameters to remove."""
    finetune_samples: Annotated[int, AtLeast(1)] = 200
    """Windows of 512 tokens that recovery trains on."""
    finetune_epochs: Annotated[int, AtLeast(1)] = 1
    """Passes over them."""
    finetune_learning_rate: float = 5e-4
    """Of the adapters."""
    methods: tuple[str, ...] = (GENERIC, *FLOWS)
    """Which of the ways."""
    data_dir: str | None = None
    """Folder with wikitext2/ and ptb/."""
    run: Flat[RunSettings] = group(RunSettings, output_name="gqa_motivation")
    calibration: Flat[Calibration] = group(Calibration, num_samples=8)
    evaluation: Flat[Evaluation] = group(Evaluation, eval_ppl_datasets="wikitext2", eval_samples=30)

    presets: ClassVar = {"fast": {**FAST, "finetune_samples": 16}}

    def check(self) -> None:
        for name in self.methods:
            if name not in (GENERIC, *FLOWS):
                raise UserError(f"--methods {name!r}: unknown; allowed are {'; '.join((GENERIC, *FLOWS))}")


def generic(model, ratio: float):
    """Prune every layer alike by channel norms, with no notion of a head."""
    for parts in layers_of(model):
        budget = (1 - ratio) * parts.parameters
        prune_attention_channels(parts, ratio)
    for layer, parts in zip(model.model.layers, layers_of(model), strict=True):
        layer.self_attn.num_key_value_groups = parts.query_heads // parts.groups
        attention = parts.parameters - parts.channels * parts.structure_parameters(CHANNELS)
        left = int((budget - attention) / parts.structure_parameters(CHANNELS))
        inner = [rows.module.weight.detach() for rows in parts.ffn]
        scores = l2(inner, parts.down.weight.detach(), parts.channels)
        gone = select_gqa_groups_to_prune(scores, max(parts.channels - left, 0))
        shrink_layer(parts, {CHANNELS: ~gone})
    return to_pruned(model)


def prune_attention_channels(parts: LayerParts, ratio: float) -> None:
    """Channels of least norm go from q, k and v; then as many as do not fill a whole group."""
    from torch_pruning import prune_linear_in_channels, prune_linear_out_channels

    left = int((1 - ratio) * parts.groups * parts.head_size)
    groups, per_group = left // parts.head_size, parts.query_heads // parts.groups
    kept = (groups * per_group, groups, groups)
    for linear, heads in zip((rows.module for rows in parts.attention), kept, strict=True):
        weakest = linear.weight.detach().norm(dim=1).argsort()
        prune_linear_out_channels(linear, weakest[: int(ratio * linear.out_features)].tolist())
        prune_linear_out_channels(linear, list(range(heads * parts.head_size, linear.out_features)))
    columns = groups * per_group * parts.head_size
    prune_linear_in_channels(parts.o, list(range(columns, parts.o.in_features)))


def main(config: MotivationConfig) -> None:
    if GENERIC in config.methods and importlib.util.find_spec("torch_pruning") is None:
        raise UserError("Torch-Pruning is not installed; install it with: pip install torch-pruning==1.6.1")
    base = ensure_llm(config.run.base_model, config.run.models_dir / LLM_FOLDER.name)
    device = pick_device(config.run.device_map)
    load = partial(load_language_model, base, device, pick_dtype(config.run.dtype, "Weights"))
    model, tokenizer = load()
    _, text, analysis = calibration_text(config.calibration, config.data_dir, config.run.seed, tokenizer, model)
    tests = evaluation_windows(config.evaluation, config.data_dir, tokenizer, model)
    removal = removal_perplexities(model, analysis, config.calibration.gradient_batch_size, ("layer",))
    found = {"dense": {name: perplexity(model, ids) for name, ids in tests.items()}}
    log.info("dense: %s", found["dense"])
    total = sum(parts.parameters for parts in layers_of(model))
    inputs = {"parent": identify(base)}

    for name in config.methods:
        model, _ = load()
        if name == GENERIC:
            model = generic(model, config.pruning_ratio)
        else:
            flow = GQAAwarePruningConfig.make(pruning_ratio=config.pruning_ratio, **FLOWS[name])
            rates = layer_rates(flow.rates, layers_of(model), config.pruning_ratio, removal, config.run.seed)
            model = LayerwisePruning(model, rates, pick(Cuts, flow), text).prune()
        removed = 1 - sum(parts.parameters for parts in layers_of(model)) / total
        log.info("%s: %.4f of the layers' parameters removed", name, removed)
        folder = config.run.folder / name.replace(", ", "_").replace(" ", "_")
        stage = describe_stage("gqa_motivation", config.as_dict(), inputs, {}, {})
        save_checkpoint(folder / "models", model, tokenizer, stage)
        training = PostTrainingConfig.make(
            dataset=config.calibration.dataset,
            finetune_samples=config.finetune_samples,
            dtype=config.run.dtype,
            num_epochs=config.finetune_epochs,
            learning_rate=config.finetune_learning_rate,
            seed=config.run.seed,
            agreement_text="none",
            **config.evaluation.as_dict(),
        )
        recovery = pick(Recovery, training)
        metrics = recover(recovery, folder / "models", folder / "recovered", data_dir=config.data_dir)
        found[name] = {"removed": removed} | {when: metrics[when]["perplexity"] for when in ("before", "after")}
        log.info("%s: %s", name, found[name])
        path = RESULTS / "gqa_motivation.json"
        write_json(path, {"config": config.as_dict(), "environment": fingerprint(), "perplexity": found})
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(MotivationConfig, main)

"""A model, the same with its LoRA adapter, and the two merged, side by side.

    python evaluate_lora_model.py --pruned_model results/NAME/models --lora_dir results/NAME_lora [--merged_model DIR]
        [--dense_model models/llm-local]

Measures perplexity, zero-shot accuracy and efficiency; writes results/lora_evaluation.json (--output_file) and prints a
table. Without --merged_model the adapter is merged in memory; with --dense_model that model is in the table too.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from compression.checkpoint import identify, load_language_model, require_language_model
from compression.config import Config, Flat, group, run_script
from compression.files import write_json
from compression.llm.evaluate import (
    FAST_EVALUATION,
    Evaluation,
    efficiency_ratios,
    evaluation_windows,
    measure,
    measure_efficiency,
)
from compression.llm.lora import load_adapter, require_adapter
from compression.outputs import check_files, new_files
from compression.quantization import nf4_base
from compression.runtime import RESULTS, Dtype, fingerprint, log, pick_device, pick_dtype, shown

DENSE, BASE, ADAPTED, MERGED = "dense", "base", "base+adapter", "merged"


@dataclass
class LoraEvaluationConfig(Config):
    pruned_model: Path = RESULTS / "hgsp" / "models"
    """The model that the adapter was trained on."""
    lora_dir: Path = RESULTS / "recovered"
    """The adapter."""
    merged_model: Path | None = None
    """The merged model; by default it is made in memory."""
    dense_model: Path | None = None
    """What it was pruned from, or any other model, to be measured beside them."""
    load_in_4bit: bool = False
    """Base and base+adapter have their frozen weights in 4 bits."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    output_file: Path = RESULTS / "lora_evaluation.json"
    """Where the figures go."""
    data_dir: str | None = None
    """Folder with text files (wikitext2/, ptb/); without it the hub, then the embedded default."""
    evaluation: Flat[Evaluation] = group(Evaluation, run_evaluation="all", eval_ppl_datasets="wikitext2")

    presets: ClassVar = {"fast": FAST_EVALUATION}


def main(config: LoraEvaluationConfig) -> None:
    require_language_model(config.pruned_model, "--pruned_model")
    require_adapter(config.lora_dir, "--lora_dir")
    if config.merged_model is not None:
        require_language_model(config.merged_model, "--merged_model", "python merge_and_save_lora.py")
    if config.dense_model is not None:
        require_language_model(config.dense_model, "--dense_model", "python download_model.py --only llm")
    folder, name = config.output_file.parent, config.output_file.name
    check_files(folder, [name], "--output_file")
    config.evaluation.check_zero_shot(config.data_dir)
    models, tokenizer = load_models(config)
    tests = evaluation_windows(config.evaluation, config.data_dir, tokenizer, models[BASE])

    figures = {}
    for role, model in models.items():
        log.info("%s:", role)
        figures[role] = measure(model, tokenizer, tests, config.evaluation, config.data_dir)
    if config.evaluation.evaluates("efficiency"):
        costs = measure_efficiency(models, next(iter(models.values())).device, config.evaluation)
        for role in models:
            figures[role]["efficiency"] = costs[role] | {"ratios": efficiency_ratios(costs[role], costs[BASE])}

    inputs = {"base": identify(config.pruned_model), "adapter": identify(config.lora_dir)}
    for role, path in (("merged", config.merged_model), ("dense", config.dense_model)):
        if path is not None:
            inputs[role] = identify(path)
    result = {"models": figures, "inputs": inputs, "config": config.as_dict(), "environment": fingerprint()}
    with new_files(folder, [name], "--output_file") as temporary:
        write_json(temporary / name, result)
    log.info("\n%s\n-> %s", table(figures), shown(config.output_file))


def load_models(config: LoraEvaluationConfig) -> tuple[dict[str, PreTrainedModel], Any]:
    """The models, each with weights of its own, and their tokenizer."""
    device = pick_device()
    dtype = pick_dtype(config.dtype, "Weights")
    four_bit = nf4_base() if config.load_in_4bit else None
    base, tokenizer = load_language_model(config.pruned_model, device, dtype, four_bit)
    adapted, _ = load_language_model(config.pruned_model, device, dtype, four_bit)
    load_adapter(adapted, config.lora_dir, "--lora_dir")
    if config.merged_model is not None:
        merged, _ = load_language_model(config.merged_model, device, dtype)
    else:
        merged, _ = load_language_model(config.pruned_model, device)
        merged = load_adapter(merged, config.lora_dir, "--lora_dir").merge_and_unload().to(dtype)
    models = {BASE: base, ADAPTED: adapted, MERGED: merged}
    if config.dense_model is not None:
        models = {DENSE: load_language_model(config.dense_model, device, dtype)[0]} | models
    return models, tokenizer


def table(figures: dict[str, dict[str, Any]]) -> str:
    """One line per figure, one column per model."""
    columns = [rows(found) for found in figures.values()]
    lines = [["", *figures], *([label, *(column[label] for column in columns)] for label in columns[0])]
    return "\n".join(f"{line[0]:32s}" + "".join(f"{value:>16s}" for value in line[1:]) for line in lines)


def rows(found: dict[str, Any]) -> dict[str, str]:
    """The figures of one model as text, by label."""
    texts = {"parameters, million": f"{found['parameters']['total'] / 1e6:.2f}"}
    texts |= {f"perplexity, {name}": f"{value:.2f}" for name, value in found["perplexity"].items()}
    for task, values in found.get("zeroshot", {}).items():
        texts[f"{task}, %"] = f"{100 * values['acc']:.1f} ± {100 * values['acc_standard_error']:.1f}"
    if "efficiency" in found:
        costs = found["efficiency"]
        texts["GMACs of the layers"] = f"{costs['macs']['encoder'] / 1e9:.3f}"
        for phase in ("prefill", "decode"):
            texts[f"{phase}, tokens/s"] = f"{costs[phase]['median_tokens_per_second']:.1f}"
    return texts


if __name__ == "__main__":
    run_script(LoraEvaluationConfig, main)

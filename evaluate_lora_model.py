"""A model, the same with its LoRA adapter, the two merged, and one in 4 bits, side by side.

    python evaluate_lora_model.py --pruned_model results/NAME/models --lora_dir results/NAME_lora [--merged_model DIR]
        [--dense_model models/llm-local] [--quantized_model results/NAME_nf4]
    python evaluate_lora_model.py --pruned_model results/NAME/models --lora_dir None

Measures perplexity, zero-shot accuracy and efficiency, and with --dense_model how far the others' predictions are from
that model's; writes results/lora_evaluation.json (--output_file) and prints a table. Without --merged_model the adapter
is merged in memory; the models of --dense_model and --quantized_model are in the table where they are given.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from compression.checkpoint import load_language_model
from compression.config import Config, Flat, group, run_script
from compression.files import write_json
from compression.inputs import require_language_model
from compression.lineage import texts_behind
from compression.llm.agreement import FAST_AGREEMENT, Agreement, Reference, last_states, unseen_text
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
from compression.page import update_page
from compression.quantization import nf4_base
from compression.runtime import MODELS, RESULTS, Dtype, fingerprint, log, pick_device, pick_dtype, shown
from compression.stage_record import identify, read_stage
from compression.tables import Column, at, text_table

DENSE, BASE, ADAPTED, MERGED, QUANTIZED = "dense", "base", "base+adapter", "merged", "quantized"


@dataclass
class LoraEvaluationConfig(Config):
    pruned_model: Path = RESULTS / "hgsp" / "models"
    """The model that the adapter was trained on; without an adapter any, also a quantized one."""
    lora_dir: Path | None = RESULTS / "recovered"
    """The adapter; None: the model alone."""
    merged_model: Path | None = None
    """The merged model; by default it is made in memory."""
    dense_model: Path | None = None
    """What it was pruned from, or any other model, to be measured beside them."""
    quantized_model: Path | None = None
    """The same in 4 or 8 bits, from 9_quantize_pruned_model.py, to be measured beside them."""
    load_in_4bit: bool = False
    """Base and base+adapter have their frozen weights in 4 bits."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    output_file: Path = RESULTS / "lora_evaluation.json"
    """Where the figures go."""
    data_dir: str | None = None
    """Folder with text files (wikitext2/, ptb/); without it the hub, then the embedded default."""
    evaluation: Flat[Evaluation] = group(Evaluation, run_evaluation="all", eval_ppl_datasets="wikitext2")
    agreement: Flat[Agreement] = group(Agreement, agreement_text="auto")

    presets: ClassVar = {"fast": FAST_EVALUATION | FAST_AGREEMENT}


def main(config: LoraEvaluationConfig) -> None:
    check_models(config)
    folder, name = config.output_file.parent, config.output_file.name
    check_files(folder, [name], "--output_file")
    config.evaluation.check_zero_shot(config.data_dir)
    models, tokenizer = load_models(config)
    tests = evaluation_windows(config.evaluation, config.data_dir, tokenizer, models[BASE])

    figures = {}
    for role, model in models.items():
        log.info("%s:", role)
        figures[role] = measure(model, tokenizer, tests, config.evaluation, config.data_dir)
    if config.dense_model is not None:
        add_agreement(config, models, tokenizer, figures)
    if config.evaluation.evaluates("efficiency"):
        costs = measure_efficiency(models, next(iter(models.values())).device, config.evaluation)
        for role in models:
            figures[role]["efficiency"] = costs[role] | {"ratios": efficiency_ratios(costs[role], costs[BASE])}

    paths = {
        "base": config.pruned_model,
        "adapter": config.lora_dir,
        "merged": config.merged_model,
        "dense": config.dense_model,
        "quantized": config.quantized_model,
    }
    inputs = {role: identify(path) for role, path in paths.items() if path is not None}
    result = {"models": figures, "inputs": inputs, "config": config.as_dict(), "environment": fingerprint()}
    with new_files(folder, [name], "--output_file") as temporary:
        write_json(temporary / name, result)
    log.info("\n%s\n-> %s", table(figures), shown(config.output_file))
    if folder.resolve() == RESULTS:
        update_page(MODELS, RESULTS)


def check_models(config: LoraEvaluationConfig) -> None:
    """Raise UserError where a model or the adapter is not there, or is quantized and must not be."""
    plain = config.lora_dir is None and not config.load_in_4bit
    require_language_model(config.pruned_model, "--pruned_model", quantized=plain)
    if config.lora_dir is not None:
        require_adapter(config.lora_dir, "--lora_dir")
    makers = {
        "merged_model": "python merge_and_save_lora.py",
        "dense_model": "python download_model.py --only llm",
        "quantized_model": "python 9_quantize_pruned_model.py",
    }
    for name, command in makers.items():
        if (path := getattr(config, name)) is not None:
            require_language_model(path, f"--{name}", command, quantized=name == "quantized_model")


def load_models(config: LoraEvaluationConfig) -> tuple[dict[str, PreTrainedModel], Any]:
    """The models, each with weights of its own, and their tokenizer."""
    device = pick_device()
    dtype = pick_dtype(config.dtype, "Weights")
    four_bit = nf4_base() if config.load_in_4bit else None
    base, tokenizer = load_language_model(config.pruned_model, device, dtype, four_bit)
    models = {BASE: base}
    if config.lora_dir is not None:
        adapted, _ = load_language_model(config.pruned_model, device, dtype, four_bit)
        load_adapter(adapted, config.lora_dir, "--lora_dir")
        models[ADAPTED] = adapted
    if config.merged_model is not None:
        models[MERGED], _ = load_language_model(config.merged_model, device, dtype)
    elif config.lora_dir is not None:
        merged, _ = load_language_model(config.pruned_model, device)
        models[MERGED] = load_adapter(merged, config.lora_dir, "--lora_dir").merge_and_unload().to(dtype)
    if config.quantized_model is not None:
        models[QUANTIZED], _ = load_language_model(config.quantized_model, device, dtype)
    if config.dense_model is not None:
        models = {DENSE: load_language_model(config.dense_model, device, dtype)[0]} | models
    return models, tokenizer


def add_agreement(
    config: LoraEvaluationConfig, models: dict[str, PreTrainedModel], tokenizer: Any, figures: dict[str, dict[str, Any]]
) -> None:
    """Compare the predictions of all models with the dense one's, on text that pruning was not calibrated on."""
    seen, dense = texts_behind(read_stage(config.pruned_model) or {}), models[DENSE]
    unseen = unseen_text(config.agreement, seen, config.data_dir, 0, tokenizer, dense)
    if unseen is None:
        return
    reference = Reference(unseen, last_states(dense, unseen.windows), dense.lm_head)
    for role, model in models.items():
        if model.config.vocab_size != dense.config.vocab_size:
            log.info("%s: predicts other tokens than the dense model, so their agreement is left out", role)
            continue
        figures[role]["agreement"] = reference.compare(model)


def table(figures: dict[str, dict[str, Any]]) -> str:
    """One line per figure, one column per model."""
    rows = [{"model": role} | found for role, found in figures.items()]
    return text_table(columns(rows[0]), rows, transposed=True)


def columns(found: dict[str, Any]) -> list[Column]:
    """What the table shows of each model, given what was measured of one."""
    shown = [
        Column("", at("model")),
        Column("parameters, million", at("parameters", "total", per=1e6), "{:.2f}"),
        *(Column(f"perplexity, {name}", at("perplexity", name), "{:.2f}") for name in found["perplexity"]),
        *(Column(f"{task}, %", zero_shot_accuracy(task), "{:.1f} ± {:.1f}") for task in found.get("zeroshot", {})),
    ]
    if "agreement" in found:
        name = found["agreement"]["text"]["name"]
        shown.append(Column(f"KL to the dense model, {name}", agreed("kl"), "{:.3f}", missing=""))
        shown.append(Column(f"first choice as the dense model's, {name}, %", agreed("top1", 100), "{:.1f}", missing=""))
    if "efficiency" in found:
        shown.append(Column("GMACs of the layers", at("efficiency", "macs", "encoder", per=1e9), "{:.3f}"))
        for phase in ("prefill", "decode"):
            speed = at("efficiency", phase, "median_tokens_per_second")
            shown.append(Column(f"{phase}, tokens/s", speed, "{:.1f}"))
    return shown


def agreed(what: str, times: float = 1) -> Callable[[dict[str, Any]], float | None]:
    """The getter of a figure of `agreement`; None where a model was not compared."""
    return lambda found: times * found["agreement"][what] if "agreement" in found else None


def zero_shot_accuracy(task: str) -> Callable[[dict[str, Any]], tuple[float, float]]:
    """The getter of a task's accuracy and its standard error, in percent."""
    return lambda found: tuple(100 * found["zeroshot"][task][name] for name in ("acc", "acc_standard_error"))


if __name__ == "__main__":
    run_script(LoraEvaluationConfig, main)

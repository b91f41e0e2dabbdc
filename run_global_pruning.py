"""H-GSP: prune a LLaMA-class language model in depth and width under one parameter budget.

    python run_global_pruning.py --base_model models/llm-local --output_name NAME [--pruning_ratio 0.2] [--fast]

Reads the model (fetched if it is not there) and calibration text; writes results/NAME: models/ (the smaller model, an
ordinary checkpoint), analysis/ (what removing each part costs, every structure's score and fate), evaluation/, plots.
The method's fields are documented in compression/global_pruning.py; `--preset paper` is the formula as published.
"""

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from compression.assets import LLM, LLM_FOLDER, describe_source, ensure_llm
from compression.calibration import removal_perplexities
from compression.checkpoint import (
    SavedParts,
    contents,
    describe_stage,
    identify,
    load_language_model,
    new_file,
    read_json,
    save_checkpoint,
    short_hash,
    write_json,
)
from compression.config import run_script
from compression.corpus import Corpus, load_corpus, sample_windows, tokenize
from compression.evaluation.language_model import (
    EvaluationFields,
    efficiency_ratios,
    evaluation_windows,
    measure,
    measure_efficiency,
)
from compression.global_pruning import CalibrationText, GlobalPruning, PruningFields
from compression.plots import plot_removal, plot_retained, save_figure
from compression.recovery import RecoveryFields, recover
from compression.runtime import RESULTS, Dtype, UserError, log, pick_device, pick_dtype, seed_everything
from compression.structures import DECODERS, family_of
from compression.surgery import to_stock

FINETUNE = ("finetune", "finetune_method", "finetune_samples", "lora_r")
NOT_RESULT = ("resume", "output_name", "results_dir", "models_dir", "base_model", "save_bin", *FINETUNE)


@dataclass
class GlobalPruningConfig(PruningFields, EvaluationFields):
    base_model: str = LLM
    """Model to prune: a folder, or a name on the hub."""
    output_name: str = "hgsp"
    """Results go to results/NAME."""
    results_dir: Path = RESULTS
    """Where results go."""
    models_dir: Path = Path("models")
    """Where a fetched model goes."""
    dataset: str = "wikitext2"
    """Calibration text: wikitext2, c4, ptb, or a text file."""
    num_samples: int = 8
    """Windows of calibration text that scores are computed on."""
    sequence_length: int = 1024
    """Tokens per window."""
    repair_samples: int = 96
    """Windows that least-squares repairs are fitted to."""
    held_out_samples: int = 4
    """Windows of the validation part that choices are made by."""
    analysis_samples: int = 2
    """Windows of the validation part that the removal analysis is done on; 0 leaves it out where it is not needed."""
    analysis_length: int = 512
    """Tokens per window there."""
    gradient_batch_size: int = 1
    """Windows per forward and backward pass."""
    use_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 on CUDA, float32 on the CPU. Scores are float32 always."""
    save_bin: bool = False
    """Also write pruned_model.bin, a plain state dict."""
    finetune: bool = False
    """Train the pruned model on, as post_training.py does, and measure it again."""
    finetune_method: Literal["lora", "full"] = "lora"
    """Train adapters beside the frozen weights, or all weights."""
    finetune_samples: int = 500
    """Windows of the train part of --dataset that are trained on."""
    lora_r: int = 8
    """Rank of the adapters."""
    resume: bool = False
    """Go on behind what a killed run with the same settings had finished."""
    seed: int = 42
    """Fixes which windows calibration takes."""

    presets: ClassVar = PruningFields.presets | {
        "fast": dict(
            num_samples=2,
            repair_samples=8,
            held_out_samples=1,
            analysis_samples=1,
            finetune_samples=64,
        )
        | EvaluationFields.fast_evaluation,
    }

    def check(self) -> None:
        super().check()
        for name in ("num_samples", "repair_samples", "held_out_samples", "gradient_batch_size"):
            self.check_range(name, 1)
        for name in ("sequence_length", "analysis_length"):
            self.check_range(name, 2)
        self.check_range("analysis_samples", 0)
        if self.temperature and not self.analysis_samples:
            raise UserError("--analysis_samples 0: allowed is at least 1 where --temperature is above 0")
        if not self.output_name or Path(self.output_name).name != self.output_name:
            raise UserError(f"--output_name {self.output_name!r}: allowed is a plain folder name")
        if self.finetune:
            self.recovery()

    def recovery(self) -> RecoveryFields:
        """How the pruned model is trained on."""
        evaluations = [what for what in RecoveryFields.evaluations if self.evaluates(what)]
        shared = ("finetune_method", "finetune_samples", "lora_r", "dataset", "data_dir", "resume", "seed")
        evaluation = [field.name for field in fields(EvaluationFields) if field.name != "run_evaluation"]
        return RecoveryFields(
            **{name: getattr(self, name) for name in {*shared, *evaluation}},
            run_evaluation=",".join(evaluations) or "none",
            max_length=min(RecoveryFields.max_length, self.sequence_length),
            dtype=self.dtype if self.finetune_method == "lora" else "auto",
        )


def main(config: GlobalPruningConfig) -> None:
    base = ensure_llm(config.base_model, config.models_dir / LLM_FOLDER.name)
    config.check_zero_shot()
    inputs = {"parent": identify(base)}
    seed_everything(config.seed)
    device = pick_device()
    model, tokenizer = load_language_model(base, device, pick_dtype(config.dtype, device))
    family_of(model, DECODERS)  # refuses an unsupported architecture at once
    corpora, text, analysis_windows = calibration_text(config, tokenizer)
    tests = evaluation_windows(config, tokenizer)
    saved = SavedParts(
        config.results_dir / f".{config.output_name}_{fingerprint_of(config, inputs)}.resume", config.resume
    )

    # What the dense model is: perplexities, and what removing each part of it would cost.
    dense = saved.json("dense", lambda: measure(model, tokenizer, tests, config, config.gradient_batch_size))
    removal = None
    if len(analysis_windows):
        removal = saved.json(
            "removal", lambda: removal_perplexities(model, analysis_windows, config.gradient_batch_size)
        )

    # The budget, over all layers at once.
    pruning = GlobalPruning(model, config, text, removal, saved.tensors)
    small = pruning.prune()
    if config.uniform:
        small = to_stock(small)
    pruned = measure(small, tokenizer, tests, config, config.gradient_batch_size)
    results = {"dense": dense, "pruned": pruned, "reduction": reduction(dense, pruned)}
    if config.evaluates("efficiency"):
        again, _ = load_language_model(base, device, small.dtype)
        found = measure_efficiency({"dense": again, "pruned": small}, device, config)
        ratios = efficiency_ratios(found["pruned"], found["dense"])
        log.info("MACs of the layers x %.3f; prefill x %.2f, decode x %.2f as fast", *ratios.values())
        results["efficiency"] = found | {"ratios": ratios}
    say(results)

    write(config, base, inputs, small, tokenizer, pruning, removal, corpora, results)
    if config.finetune:
        finetune(config)
    saved.remove()


def fingerprint_of(config: GlobalPruningConfig, inputs: dict[str, Any]) -> str:
    """A hash of what the result depends on."""
    settings = {name: value for name, value in config.as_dict().items() if name not in NOT_RESULT}
    return short_hash(settings, contents(inputs))


def calibration_text(config: GlobalPruningConfig, tokenizer) -> tuple[list[Corpus], CalibrationText, torch.Tensor]:
    """Windows for scores and repair (of the train part), for choices and for the analysis (of the validation part)."""
    train, held_out = (load_corpus(config.dataset, part, config.data_dir) for part in ("train", "validation"))
    length, seed = config.sequence_length, config.seed
    ids = tokenize(tokenizer, train)
    scores = sample_windows(ids, length, config.num_samples, seed)
    repair = sample_windows(ids, length, config.repair_samples, seed + 1)
    validation = tokenize(tokenizer, held_out)
    choices = sample_windows(validation, length, config.held_out_samples, seed)
    analysis = sample_windows(validation, config.analysis_length, config.analysis_samples, seed + 1)
    log.info("Calibration: %s (%s), %d windows of %d tokens", train.name, train.source, len(scores), length)
    text = CalibrationText(scores, repair, choices, config.gradient_batch_size, config.use_gradient_checkpointing)
    return [train, held_out], text, analysis


def reduction(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, float]:
    """Shares of parameters that are gone: of the decoder layers' structures, and of the whole model."""
    return {part: 1 - pruned["parameters"][part] / dense["parameters"][part] for part in ("structures", "total")}


def say(results: dict[str, Any]) -> None:
    """How much smaller the model is."""
    gone, models = results["reduction"], (results["dense"], results["pruned"])
    log.info(
        "Gone: %.1f %% of the layers' parameters, %.1f %% of the whole model's (%.1f -> %.1f million); %d -> %d layers",
        100 * gone["structures"], 100 * gone["total"], *(model["parameters"]["total"] / 1e6 for model in models),
        *(len(model["layers"]) for model in models),
    )  # fmt: skip


def write(config, base, inputs, model, tokenizer, pruning, removal, corpora, results) -> None:
    """Checkpoint, analysis, evaluation and plots; each file is replaced whole."""
    folder = config.results_dir / config.output_name
    data = {"calibration": [corpus.describe() for corpus in corpora]}
    log.info("Base model: %s (%s)", base, describe_source(base))
    stage = describe_stage("global_pruning", config.as_dict(), inputs, results, data)
    save_checkpoint(folder / "models", model, tokenizer, stage)
    if config.save_bin:
        with new_file(folder / "models" / "pruned_model.bin") as temporary:
            torch.save(model.state_dict(), temporary)

    rows = list(pruning.table.values())
    write_table(folder / "analysis" / "global_group_table.csv", rows)
    removed = [row for row in rows if row["removed_in_step"] is not None]
    write_table(folder / "analysis" / "groups_to_prune.csv", removed)
    if removal:
        blocks = {"attention": removal["attention"], "mlp": removal["mlp"]}
        write_json(
            folder / "analysis" / "layer_removal_ppl.json", {"dense": removal["dense"], "layer": removal["layer"]}
        )
        write_json(folder / "analysis" / "block_removal_ppl.json", {"dense": removal["dense"]} | blocks)
        save_figure(plot_removal(removal), folder / "analysis" / "removal_perplexity.png")
    save_figure(plot_retained(rows), folder / "analysis" / "retained.png")
    write_json(
        folder / "evaluation" / "evaluation_results.json", results | {"data": data, "stage": stage["environment"]}
    )
    log.info("-> %s", folder)


def finetune(config: GlobalPruningConfig) -> None:
    """Train the written model on, into a folder beside it, and add what it is then to the evaluation."""
    folder = config.results_dir / config.output_name
    found = recover(config.recovery(), folder / "models", folder / "finetuned")
    path = folder / "evaluation" / "evaluation_results.json"
    write_json(path, read_json(path) | {"finetuned": found["after"]})


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV."""
    with new_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["layer"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run_script(GlobalPruningConfig, main)

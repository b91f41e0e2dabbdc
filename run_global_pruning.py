"""H-GSP: prune a LLaMA-class language model in depth and width under one parameter budget.

    python run_global_pruning.py --base_model models/llm-local --output_name NAME [--pruning_ratio 0.2] [--fast]

Reads the model (fetched if it is not there) and calibration text; writes results/NAME: models/ (the smaller model, an
ordinary checkpoint), analysis/ (what removing each part costs, every structure's score and fate), evaluation/, plots.
The method's fields are documented in compression/llm/global_pruning.py; `--preset paper` is the formula as published.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
import shutil
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar, Literal

import torch

from compression.assets import ensure_llm
from compression.checkpoint import SavedParts, describe_stage, identify, load_language_model, save_checkpoint
from compression.config import run_script
from compression.files import link_or_copy, read_json, write_json
from compression.integrity import RUN_FILE
from compression.llm.evaluate import EvaluationFields, evaluation_windows, measure
from compression.llm.global_pruning import GlobalPruning, PruningFields
from compression.llm.plots import plot_removal, plot_retained
from compression.llm.recovery import RecoveryFields, recover
from compression.llm.removal import removal_perplexities
from compression.llm.run import FAST, Results, RunFields, calibration_text, compare
from compression.plots import save_figure
from compression.runtime import UserError, log, pick_device, pick_dtype, processes, seed_everything, shown
from compression.sources import LLM_FOLDER, describe_source
from compression.structures import DECODERS, family_of
from compression.surgery import to_stock
from compression.tables import columns_of, write_csv


@dataclass
class GlobalPruningConfig(PruningFields, RunFields):
    output_name: str = "hgsp"
    """Results go to results/NAME."""
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

    presets: ClassVar = PruningFields.presets | {"fast": FAST | dict(finetune_samples=64)}

    def check(self) -> None:
        super().check()
        if self.temperature and not self.analysis_samples:
            raise UserError("--analysis_samples 0: allowed is at least 1 where --temperature is above 0")
        if self.finetune:
            self.recovery()

    def recovery(self) -> RecoveryFields:
        """How the pruned model is trained on."""
        evaluations = [what for what in RecoveryFields.evaluations if self.evaluates(what)]
        shared = ("finetune_method", "finetune_samples", "lora_r", "dataset", "data_dir", "resume", "overwrite", "seed")
        evaluation = [field.name for field in fields(EvaluationFields) if field.name != "run_evaluation"]
        return RecoveryFields(
            **{name: getattr(self, name) for name in {*shared, *evaluation}},
            run_evaluation=",".join(evaluations) or "none",
            skip_existing=self.resume,
            max_length=min(RecoveryFields.max_length, self.sequence_length),
            dtype=self.dtype if self.finetune_method == "lora" else "auto",
        )


def main(config: GlobalPruningConfig) -> None:
    base = ensure_llm(config.base_model, config.models_dir / LLM_FOLDER.name)
    config.check_zero_shot()
    inputs = {"parent": identify(base)}
    output = Results(config, "global_pruning", base, inputs)
    seed_everything(config.seed)
    device = pick_device(config.device_map)
    model, tokenizer = load_language_model(base, device, pick_dtype(config.dtype, "Weights"))
    family_of(model, DECODERS)  # refuses an unsupported architecture at once
    corpora, text, analysis_windows = calibration_text(config, tokenizer, model)
    tests = evaluation_windows(config, tokenizer, model)

    with output.running() as saved:
        # What the dense model is: perplexities, and what removing each part of it would cost.
        dense = saved.json("dense", lambda: measure(model, tokenizer, tests, config, config.gradient_batch_size))
        removal = None
        if len(analysis_windows):
            analyse = partial(removal_perplexities, model, analysis_windows, config.gradient_batch_size)
            removal = saved.json("removal", analyse)

        # The budget, over all layers at once.
        pruning = GlobalPruning(model, config, text, removal, saved.tensors)
        small = pruning.prune()
        if config.uniform:
            small = to_stock(small)
        results = saved.json("results", lambda: compare(base, dense, small, tokenizer, tests, config))

        log.info("Base model: %s (%s)", shown(base), describe_source(base))
        data = {"calibration": [corpus.describe() for corpus in corpora]}
        stage = describe_stage("global_pruning", config.as_dict(), inputs, results, data)
        if processes().is_main_process:
            with output.written(saved) as folder:
                write(folder, config, small, tokenizer, pruning, removal, results, stage)
        processes().wait_for_everyone()
        if config.finetune:
            finetune(config, output, saved)


def write(folder, config, model, tokenizer, pruning, removal, results, stage) -> None:
    """Checkpoint, analysis, evaluation and plots."""
    save_checkpoint(folder / "models", model, tokenizer, stage)
    if config.save_bin:
        torch.save(model.state_dict(), folder / "models" / "pruned_model.bin")

    rows = list(pruning.table.values())
    columns = columns_of(rows)
    write_csv(folder / "analysis" / "global_group_table.csv", columns, rows)
    removed = [row for row in rows if row["removed_in_step"] is not None]
    write_csv(folder / "analysis" / "groups_to_prune.csv", columns, removed)
    if removal:
        blocks = {"attention": removal["attention"], "mlp": removal["mlp"]}
        write_json(
            folder / "analysis" / "layer_removal_ppl.json", {"dense": removal["dense"], "layer": removal["layer"]}
        )
        write_json(folder / "analysis" / "block_removal_ppl.json", {"dense": removal["dense"]} | blocks)
        save_figure(plot_removal(removal), folder / "analysis" / "removal_perplexity.png")
    save_figure(plot_retained(rows), folder / "analysis" / "retained.png")
    evaluation = results | {"data": stage["data"], "stage": stage["environment"]}
    write_json(folder / "evaluation" / "evaluation_results.json", evaluation)


def finetune(config: GlobalPruningConfig, output: Results, saved: SavedParts) -> None:
    """Train the written model on; then it lies beside it, and what it is stands in the evaluation."""
    trained = saved.folder / "finetuned"
    found = recover(config.recovery(), config.folder / "models", trained, "--output_name")
    if processes().is_main_process:
        with output.written(saved) as folder:
            anew = shutil.ignore_patterns("logs", RUN_FILE)
            shutil.copytree(config.folder, folder, ignore=anew, copy_function=link_or_copy, dirs_exist_ok=True)
            shutil.copytree(trained, folder / "finetuned", copy_function=link_or_copy)
            path = folder / "evaluation" / "evaluation_results.json"
            write_json(path, read_json(path) | {"finetuned": found["after"]})
    processes().wait_for_everyone()


if __name__ == "__main__":
    run_script(GlobalPruningConfig, main)

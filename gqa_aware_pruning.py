"""GQA-aware pruning: prune a LLaMA-class language model layer by layer, each at a rate of its own.

    python gqa_aware_pruning.py --base_model models/llm-local --output_name NAME [--pruning_ratio 0.2] [--fast]
    python gqa_aware_pruning.py --output_name middle --layers 10-14 --pruning_ratio 0.25
    python gqa_aware_pruning.py --output_name search --target_perplexity 25

Reads the model (fetched if it is not there) and calibration text; writes results/NAME: models/ (the smaller model, an
ordinary checkpoint), analysis/ (rates of the layers, perplexity without each, the search's trials), evaluation/.
The three steps for a layer can be imported from here: compute_gqa_group_importance, select_gqa_groups_to_prune,
prune_attention_by_gqa_groups. The method's fields are documented in compression/llm/gqa_pruning.py.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from compression.assets import ensure_llm
from compression.checkpoint import (
    SavedParts,
    describe_stage,
    identify,
    load_language_model,
    save_checkpoint,
)
from compression.config import run_script
from compression.files import write_json
from compression.llm.evaluate import evaluation_windows, measure
from compression.llm.gqa_pruning import (
    GQAPruningFields,
    LayerwisePruning,
    check_ratio,
    compute_gqa_group_importance,
    layer_rates,
    prune_attention_by_gqa_groups,
    ratio_range,
    search_ratio,
    select_gqa_groups_to_prune,
)
from compression.llm.perplexity import perplexity
from compression.llm.plots import plot_rates
from compression.llm.removal import removal_perplexities
from compression.llm.run import FAST, Results, RunFields, calibration_text, compare
from compression.llm.text import CalibrationText
from compression.plots import save_figure
from compression.runtime import UserError, log, pick_device, pick_dtype, processes, seed_everything, shown
from compression.sources import LLM_FOLDER, describe_source
from compression.structures import DECODERS, family_of, layers_of
from compression.tables import columns_of, write_csv

__all__ = ["compute_gqa_group_importance", "prune_attention_by_gqa_groups", "select_gqa_groups_to_prune"]


@dataclass
class GQAAwarePruningConfig(GQAPruningFields, RunFields):
    output_name: str = "gqa"
    """Results go to results/NAME."""
    num_samples: int = 8
    """Windows of calibration text that scores are computed on: each layer has a backward pass of its own."""

    presets: ClassVar = {"fast": FAST | dict(search_steps=3)}

    def check(self) -> None:
        super().check()
        if self.strategy == "inverse" and not self.analysis_samples:
            raise UserError("--analysis_samples 0: allowed is at least 1 with --strategy inverse; or choose uniform")


def main(config: GQAAwarePruningConfig) -> None:
    base = ensure_llm(config.base_model, config.models_dir / LLM_FOLDER.name)
    config.check_zero_shot()
    inputs = {"parent": identify(base)}
    output = Results(config, "gqa_pruning", base, inputs)
    seed_everything(config.seed)
    device = pick_device(config.device_map)
    load = partial(load_language_model, base, device, pick_dtype(config.dtype, "Weights"))
    model, tokenizer = load()
    family_of(model, DECODERS)  # refuses an unsupported architecture at once
    corpora, text, analysis_windows = calibration_text(config, tokenizer, model)
    tests = evaluation_windows(config, tokenizer, model)
    limits = ratio_range(config, layers_of(model))
    if config.target_perplexity is None:
        check_ratio(config, layers_of(model), config.pruning_ratio)
    else:
        check_target(config.target_perplexity, perplexity(model, text.held_out, text.batch_size))

    with output.running() as saved:
        # What the dense model is, and what removing each layer of it would cost.
        dense = saved.json("dense", lambda: measure(model, tokenizer, tests, config, config.gradient_batch_size))
        removal = None
        if len(analysis_windows):
            analyse = partial(removal_perplexities, model, analysis_windows, config.gradient_batch_size, ("layer",))
            removal = saved.json("removal", analyse)

        # Layer by layer; where a perplexity is wanted, at the largest ratio that stays under it.
        trials = Trials(config, lambda: load()[0], text, removal, saved)
        ratio = config.pruning_ratio
        if config.target_perplexity is not None:
            try:
                ratio = search_ratio(trials.perplexity, config.target_perplexity, *limits, config.search_steps)
            except UserError:
                saved.remove()
                raise
        pruning = trials.prune(ratio)
        results = compare(base, dense, pruning.model, tokenizer, tests, config) | {"ratio": ratio}
        selected = results["reduction"]["selected_layers"] = pruning.removed()
        log.info("Of the parameters of --layers %s %.2f %% are gone", config.layers, 100 * selected)

        log.info("Base model: %s (%s)", shown(base), describe_source(base))
        data = {"calibration": [corpus.describe() for corpus in corpora]}
        stage = describe_stage("gqa_pruning", config.as_dict(), inputs, results, data)
        if processes().is_main_process:
            with output.written(saved) as folder:
                save_checkpoint(folder / "models", pruning.model, tokenizer, stage)
                write_analysis(folder / "analysis", pruning, removal, trials.perplexities)
                evaluation = results | {"data": data, "stage": stage["environment"]}
                write_json(folder / "evaluation" / "evaluation_results.json", evaluation)
        processes().wait_for_everyone()


class Trials:
    """Models pruned from the dense one, each from its beginning.

    Args:
        load: gives a dense model.
        saved: keeps the scores of each layer and the perplexity of each trial, in case the run is killed.
    """

    def __init__(
        self,
        config: GQAAwarePruningConfig,
        load: Callable[[], PreTrainedModel],
        text: CalibrationText,
        removal: dict[str, Any] | None,
        saved: SavedParts,
    ):
        self.config, self.load, self.text, self.removal, self.saved = config, load, text, removal, saved
        self.perplexities: dict[float, float] = {}

    def prune(self, ratio: float) -> LayerwisePruning:
        """Prune by a ratio."""
        model = self.load()
        rates = layer_rates(self.config, layers_of(model), ratio, self.removal, self.config.seed)
        pruning = LayerwisePruning(
            model, rates, self.config, self.text, lambda name, make: self.saved.tensors(f"{ratio!r}_{name}", make)
        )
        pruning.prune()
        return pruning

    def perplexity(self, ratio: float) -> float:
        """Perplexity on held-out text when pruned by a ratio."""
        text = self.text
        self.perplexities[ratio] = self.saved.json(
            f"{ratio!r}_perplexity", lambda: perplexity(self.prune(ratio).model, text.held_out, text.batch_size)
        )
        return self.perplexities[ratio]


def check_target(target: float, dense: float) -> None:
    """Raise UserError where the dense model is not under the wanted perplexity on held-out text."""
    if dense >= target:
        raise UserError(
            f"--target_perplexity {target:g}: the dense model has {dense:.2f} on held-out text; allowed is more"
        )


def write_analysis(folder: Path, pruning: LayerwisePruning, removal: dict[str, Any] | None, trials: dict) -> None:
    """Rates and sizes of the layers with the perplexity without each of them, a plot of both, the search's trials."""
    without = removal["layer"] if removal else [None] * len(pruning.rates)
    rows = [row | {"removal_perplexity": value} for row, value in zip(pruning.table(), without, strict=True)]
    write_csv(folder / "layer_rates.csv", columns_of(rows), rows)
    write_json(folder / "layer_rates.json", {"dense_perplexity": removal and removal["dense"], "layers": rows})
    save_figure(plot_rates(rows), folder / "layer_rates.png")
    if trials:
        found = [{"ratio": ratio, "held_out_perplexity": value} for ratio, value in trials.items()]
        write_json(folder / "rate_search.json", found)


if __name__ == "__main__":
    run_script(GQAAwarePruningConfig, main)

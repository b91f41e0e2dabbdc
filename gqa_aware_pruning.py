"""GQA-aware pruning: prune a LLaMA-class language model layer by layer, each at a rate of its own.

    python gqa_aware_pruning.py --base_model models/llm-local --output_name NAME [--pruning_ratio 0.2] [--fast]
    python gqa_aware_pruning.py --output_name middle --layers 10-14 --pruning_ratio 0.25
    python gqa_aware_pruning.py --output_name search --target_perplexity 25

`--preset authors` and `--preset headline` are the recipe of the method's authors, at 25 % and at 84.64 %.
Reads the model (fetched if it is not there) and calibration text; writes results/NAME: models/ (the smaller model, an
ordinary checkpoint), analysis/ (rates of the layers, perplexity without each, the search's trials), evaluation/.
The three steps for a layer can be imported from here: compute_gqa_group_importance, select_gqa_groups_to_prune,
prune_attention_by_gqa_groups.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from compression.config import AtLeast, Between, Config, Flat, Originally, formerly, group, pick, run_script
from compression.files import write_json
from compression.hub import Publishing
from compression.llm.agreement import FAST_AGREEMENT, Agreement
from compression.llm.evaluate import Evaluation
from compression.llm.gqa_pruning import (
    SWEEP,
    Cuts,
    LayerwisePruning,
    Rates,
    check_ratio,
    compute_gqa_group_importance,
    layer_rates,
    prune_attention_by_gqa_groups,
    ratio_range,
    search_ratio,
    select_gqa_groups_to_prune,
    selected_layers,
)
from compression.llm.perplexity import perplexity
from compression.llm.plots import plot_rates
from compression.llm.repair import Repair
from compression.llm.run import Run
from compression.llm.run_settings import FAST, Calibration, Finetuning, RunSettings, recovery_after
from compression.llm.scoring import LossName, ScoreName, loss_of
from compression.page import update_page
from compression.plots import save_figure
from compression.runtime import UserError, log
from compression.structures import layers_of
from compression.surgery import to_stock
from compression.tables import columns_of, write_csv

__all__ = ["compute_gqa_group_importance", "prune_attention_by_gqa_groups", "select_gqa_groups_to_prune"]


# What the script of the method's authors is run with, and that at the share of parameters that they name
# (docs/llm.md says why these are two).
AUTHORS = dict(
    pruning_ratio=0.25,
    strategy="inverse",
    min_rate=0.15,
    max_rate=0.5,
    protect_first=0,
    protect_last=0,
    importance_method="taylor",
    attention_ratio=1.0,
    compensation="none",
    num_samples=10,
    gradient_batch_size=10,
    sequence_length=64,
)
HEADLINE = AUTHORS | dict(pruning_ratio=0.8464, max_rate=0.95)


@dataclass
class GQAAwarePruningConfig(Config):
    # How much goes.
    pruning_ratio: Annotated[float, Between(0, 0.95)] = 0.2
    """Share of the parameters of the decoder layers (those of --layers) to remove."""
    target_perplexity: Annotated[float | None, AtLeast(1)] = None
    """Perplexity on held-out text to stay under; the largest ratio that does is searched, --pruning_ratio not used."""
    search_steps: Annotated[int, AtLeast(1)] = 6
    """Trials of that search; each halves what is left of the range up to --max_rate."""
    layers: str = "all"
    """Which layers: all, one such as 12, or a range such as 10-14. Layers count from 0."""
    protect_first: Annotated[int, AtLeast(0)] = 2
    """Number of leading layers never pruned."""
    protect_last: Annotated[int, AtLeast(0)] = 2
    """Number of trailing layers never pruned."""
    strategy: Literal["inverse", "uniform", "random"] = "inverse"
    """Rates of layers: in inverse proportion to what removing the layer adds to the loss, all the same, or random."""
    min_rate: Annotated[float, Between(0, 0.95)] = 0.0
    """Least share of its parameters that a pruned layer loses."""
    max_rate: Annotated[float, Between(0, 0.95)] = 0.8
    """Largest share of its parameters that a layer loses."""
    uniform: bool = False
    """The same sizes in every layer, so that the stock model class loads the result: uniform rates, none protected."""

    # What goes of a layer: groups (key-value head with its query heads) and channels of least score.
    importance_method: ScoreName = "taylor"
    """Score of a structure: one of those in compression/llm/scoring.py, which --help lists."""
    score_loss: Annotated[LossName, Originally("text")] = "auto"
    """The loss behind scores. text: of the text's next tokens; kl: KL to the dense model's predictions, by tokens drawn
    from them; auto: kl for fisher, else text."""
    attention_ratio: Annotated[float, Between(0, 10)] = 0.5
    """Attention's rate relative to its layer's, rounded to whole groups; the MLP makes up the rest of the budget."""
    round_to: Annotated[int, AtLeast(1)] = 32
    """Number of which MLP widths are multiples, unless nothing is removed: matrix units are slow at odd widths."""
    iterative_steps: Annotated[int, AtLeast(1), *formerly("iterative_rounds")] = 1
    """Number of sweeps over all layers in which the rates are reached."""

    # What becomes of the rest.
    repair: Flat[Repair] = group(Repair)

    data_dir: str | None = None
    """Folder with text files (wikitext2/, ptb/); without it the hub, then the embedded default."""
    run: Flat[RunSettings] = group(RunSettings, output_name="gqa")
    # Few windows for scores: each layer has a backward pass of its own.
    calibration: Flat[Calibration] = group(
        Calibration, dataset="wikitext2", num_samples=8, repair_samples=64, sequence_length=1024
    )
    evaluation: Flat[Evaluation] = group(Evaluation, run_evaluation="ppl")
    agreement: Flat[Agreement] = group(Agreement, agreement_text="auto")
    finetuning: Flat[Finetuning] = group(Finetuning, finetune=False)
    publishing: Flat[Publishing] = group(Publishing)

    presets: ClassVar = {"fast": FAST | FAST_AGREEMENT | dict(search_steps=3), "authors": AUTHORS, "headline": HEADLINE}

    def check(self) -> None:
        Between(self.min_rate, 0.95).check("max_rate", self.max_rate)
        selected_layers(self.layers, None)
        loss_of(self.score_loss, self.importance_method)
        if self.uniform and self.layers != "all":
            raise UserError(f"--uniform: not allowed with --layers {self.layers}; leave one of them out")
        if self.rates.strategy == "inverse" and not self.calibration.analysis_samples:
            raise UserError("--analysis_samples 0: allowed is at least 1 with --strategy inverse; or choose uniform")
        if self.finetuning.finetune:
            recovery_after(self)

    def as_dict(self) -> dict[str, Any]:
        score_loss = loss_of(self.score_loss, self.importance_method)
        return super().as_dict() | {"score_loss": score_loss, "error_share": self.repair.share}

    @property
    def rates(self) -> Rates:
        """Which layers lose how much."""
        if self.uniform:
            return pick(Rates, self, strategy="uniform", protect_first=0, protect_last=0)
        return pick(Rates, self)


def main(config: GQAAwarePruningConfig) -> None:
    run = Run("gqa_pruning", config)
    limits = ratio_range(config.rates, layers_of(run.model))
    if config.target_perplexity is None:
        check_ratio(config.rates, layers_of(run.model), config.pruning_ratio)
    else:
        check_target(config.target_perplexity, perplexity(run.model, run.text.held_out, run.text.batch_size))

    with run.running():
        # What removing each layer of the dense model would cost; then layer by layer.
        trials = Trials(config, run, run.removal_perplexities(("layer",)))
        ratio = config.pruning_ratio
        if config.target_perplexity is not None:
            try:
                ratio = search_ratio(trials.perplexity, config.target_perplexity, *limits, config.search_steps)
            except UserError:
                run.saved.remove()
                raise
        pruning = trials.prune(ratio)
        removed = pruning.removed(config.layers)
        log.info("Of the parameters of --layers %s %.2f %% are gone", config.layers, 100 * removed)
        small = to_stock(pruning.model) if config.uniform else pruning.model
        run.finish(
            small,
            partial(write_analysis, pruning, trials.removal, trials.perplexities),
            lambda results: {"ratio": ratio, "reduction": results["reduction"] | {"selected_layers": removed}},
        )
    update_page(config.run.models_dir, config.run.results_dir)


class Trials:
    """Models pruned from the dense one, each from its beginning.

    Args:
        removal: what removing each layer costs.
    """

    def __init__(self, config: GQAAwarePruningConfig, run: Run, removal: dict[str, Any] | None):
        self.config, self.run, self.removal = config, run, removal
        self.perplexities: dict[float, float] = {}

    def prune(self, ratio: float) -> LayerwisePruning:
        """Prune by a ratio."""
        model, text, config = self.run.load(), self.run.text, self.config
        rates = layer_rates(config.rates, layers_of(model), ratio, self.removal, config.run.seed)
        cached, store = (self._named(keep, ratio) for keep in (self.run.saved.tensors, self.run.store))
        pruning = LayerwisePruning(model, rates, pick(Cuts, config), text, cached, store)
        pruning.prune()
        return pruning

    @staticmethod
    def _named(keep: Callable[..., Any], ratio: float) -> Callable[..., Any]:
        """Keeps the parts of each trial by names of their own."""
        return lambda name, *rest: keep(f"{ratio!r}_{name}", *rest)

    def perplexity(self, ratio: float) -> float:
        """Perplexity on held-out text when pruned by a ratio; kept, in case the run is killed."""
        self.perplexities[ratio] = self.run.saved.json(f"{ratio!r}_perplexity", lambda: self._measure(ratio))
        return self.perplexities[ratio]

    def _measure(self, ratio: float) -> float:
        text = self.run.text
        found = perplexity(self.prune(ratio).model, text.held_out, text.batch_size)
        self.run.saved.forget(f"{ratio!r}_{SWEEP}")  # of each trial a whole model may lie on the disk
        return found


def check_target(target: float, dense: float) -> None:
    """Raise UserError where the dense model is not under the wanted perplexity on held-out text."""
    if dense >= target:
        raise UserError(
            f"--target_perplexity {target:g}: the dense model has {dense:.2f} on held-out text; allowed is more"
        )


def write_analysis(
    pruning: LayerwisePruning, removal: dict[str, Any] | None, trials: dict[float, float], folder: Path
) -> None:
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

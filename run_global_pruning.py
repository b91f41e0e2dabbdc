"""H-GSP: prune a LLaMA-class language model in depth and width under one budget, of parameters or of measured time.

    python run_global_pruning.py --base_model models/llm-local --output_name NAME [--pruning_ratio 0.2] [--fast]
    python run_global_pruning.py --base_model models/llm-local --output_name NAME --target decode 0.7

Reads the model (fetched if it is not there) and calibration text; writes results/NAME: models/ (the smaller model, an
ordinary checkpoint), analysis/ (what removing each part costs, every structure's score and fate), evaluation/, plots.
`--preset paper` is the formula as published.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from compression.config import AtLeast, Between, Config, Flat, Originally, group, pick, run_script
from compression.files import write_json
from compression.hub import Publishing
from compression.llm.agreement import FAST_AGREEMENT, Agreement
from compression.llm.evaluate import Evaluation
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring
from compression.llm.iterate import TrainingBetween, recovery_between
from compression.llm.levels import Search
from compression.llm.origin import KEPT_LAYERS
from compression.llm.plots import plot_allocations, plot_removal, plot_retained, plot_search
from compression.llm.recovery_settings import LEARNING_RATE, Recovery
from compression.llm.repair import LocalRanking, Repair
from compression.llm.run import Run
from compression.llm.run_settings import FAST, Calibration, Finetuning, RunSettings, recovery_after
from compression.llm.scoring import LossName, ScoreName, loss_of
from compression.llm.speed import SPEED_TABLE, Hardware, Speed, Target, check_target, table_files
from compression.page import update_page
from compression.plots import save_figure
from compression.runtime import UserError
from compression.surgery import to_stock
from compression.tables import columns_of, write_csv


@dataclass
class GlobalPruningConfig(Config):
    # How much goes.
    pruning_ratio: Annotated[float | None, Between(0, 0.95)] = None
    """Share of the decoder layers' parameters to remove; none: 0.5, or what --target says."""
    target: Target | None = None
    """Time instead of parameters: prefill or decode, and the share of the dense layers' time in it that may stay, by a
    table of times measured on the hardware: prefill 0.5."""
    times: Flat[Hardware] = group(Hardware)
    epsilon: Annotated[float, Between(0, 1)] = 0.15
    """Share of its parameters, or its time, that a layer must keep; one that would keep less is removed whole."""
    protect_first: Annotated[int, AtLeast(0)] = 0
    """Number of leading layers never pruned."""
    protect_last: Annotated[int, AtLeast(0)] = 0
    """Number of trailing layers never pruned."""
    keep_attention: bool = False
    """At least one group (key-value head) stays in every layer that is not removed whole, for engines that refuse
    layers without attention."""
    uniform: bool = False
    """The same sizes in every layer, so that the stock model class loads the result; no layer is protected then."""
    round_to: Annotated[int, AtLeast(1)] = 32
    """Number of which MLP widths are multiples, unless nothing is removed: matrix units are slow at odd widths."""
    iterative_steps: Annotated[int, AtLeast(1)] = 1
    """Number of steps to the budget, with new scores at each."""
    recover_tokens: Annotated[int, AtLeast(0)] = 0
    """Tokens of the calibration text to predict in training all weights after each step; 0: it is not trained."""
    recover_learning_rate: Annotated[float, Between(0, 1)] = LEARNING_RATE
    """Highest learning rate there."""
    recover_kd_weight: Annotated[float, Between(0, 1), Originally(0.0)] = 0.0
    """Share of the loss there that the dense model's predictions are, at temperature 1; the rest is the text's."""

    # What goes: the groups (key-value head with its query heads) and channels of least score per parameter.
    importance_method: ScoreName = "fisher"
    """Score of a structure: one of those in compression/llm/scoring.py, which --help lists."""
    score_loss: Annotated[LossName, Originally("text")] = "auto"
    """The loss behind scores. text: of the text's next tokens; kl: KL to the dense model's predictions, by tokens drawn
    from these; auto: kl for fisher, else text."""
    temperature: Annotated[float, Between(0, 10)] = 0.0
    """Exponent T of the correction by removal perplexities, score * ln(1 + ppl)^T; 0 leaves it out."""
    tau: Annotated[float | None, AtLeast(0)] = None
    """Removal perplexity under which the layer's value corrects, above it the block's own; none: 25th percentile."""
    normalize: Literal["auto", "none", "layer"] = "auto"
    """Scale of the scores. layer: relative to their mean in each layer and kind, so that layers share the budget
    evenly; auto: that for the methods whose scores do not compare across layers as they are."""
    attention_factors: tuple[float, ...] = (1.0,)
    """Factors on the scores of groups; of several the one with the least perplexity on held-out text is taken."""

    # Whether the sizes of layers are searched for.
    allocation_search: Flat[Search] = group(Search)

    # What becomes of the rest.
    repair: Flat[Repair] = group(Repair)
    removal_steps: Annotated[int, AtLeast(0)] = 0
    """Rounds in which a layer's structures go, once it is known how many; those left are fitted anew after each. 0: the
    scores choose them."""
    local_choice: LocalRanking = "product"
    """What goes first there. obs: what the others make up for best, on what the pruned layers before give; product: the
    score times the share that they cannot make up for."""

    data_dir: str | None = None
    """Folder with text files (wikitext2/, ptb/); without it the hub, then the embedded default."""
    run: Flat[RunSettings] = group(RunSettings, output_name="hgsp")
    calibration: Flat[Calibration] = group(
        Calibration, dataset="wikitext2", num_samples=32, repair_samples=64, sequence_length=1024
    )
    evaluation: Flat[Evaluation] = group(Evaluation, run_evaluation="ppl")
    agreement: Flat[Agreement] = group(Agreement, agreement_text="auto")
    finetuning: Flat[Finetuning] = group(Finetuning, finetune=False)
    publishing: Flat[Publishing] = group(Publishing)

    presets: ClassVar = {
        "fast": FAST | FAST_AGREEMENT,
        # The best model without training that is known, for ten times the time (docs/results.md).
        "quality": dict(iterative_steps=2, mlp_rounds=1, repair_samples=256),
        "paper": dict(importance_method="taylor", normalize="none", temperature=1.0, compensation="none", round_to=1),
    }

    def check(self) -> None:
        check_target(self.target, self.pruning_ratio, self.times.hardware, self.uniform)
        if not self.attention_factors or min(self.attention_factors) <= 0:
            raise UserError(f"--attention_factors {self.attention_factors}: allowed are one or more above 0")
        loss_of(self.score_loss, self.importance_method)
        if self.temperature and not self.calibration.analysis_samples:
            raise UserError("--analysis_samples 0: allowed is at least 1 where --temperature is above 0")
        search = self.allocation_search.search
        if search != "none" and self.uniform:
            raise UserError(f"--search {search}: allowed with --uniform is none, for all layers have the same sizes")
        if search != "none" and self.repair.compensation == "none":
            raise UserError(f"--search {search}: allowed with --compensation none is none")
        if self.removal_steps and self.repair.compensation == "none":
            raise UserError(f"--removal_steps {self.removal_steps}: allowed with --compensation none is 0")
        if self.recover_tokens:
            self.between_steps()
        elif self.recover_kd_weight:
            flag = f"--recover_kd_weight {self.recover_kd_weight}"
            raise UserError(f"{flag}: is used with --recover_tokens above 0 alone; give that too")
        if self.finetuning.finetune:
            recovery_after(self)

    def between_steps(self) -> Recovery:
        """How the model is trained after each step."""
        return recovery_between(self, self.recover_tokens, self.recover_learning_rate, self.recover_kd_weight)

    def as_dict(self) -> dict[str, Any]:
        scoring = pick(Scoring, self)
        ratio = None if self.target is not None else pick(Budget, self).share
        resolved = {"pruning_ratio": ratio, "normalize": scoring.normalization, "score_loss": scoring.loss}
        return super().as_dict() | resolved | {"error_share": self.repair.share}


def main(config: GlobalPruningConfig) -> None:
    run = Run("global_pruning", config, table_files(config.times))
    speed = None if config.target is None else Speed(run.model, config.target[0], config.times, config.run.models_dir)
    training = TrainingBetween(run, config.between_steps()) if config.recover_tokens else None
    with run.running():
        # What removing each part of the dense model would cost; then the budget, over all layers at once.
        removal = run.removal_perplexities()
        scoring, budget = pick(Scoring, config), pick(Budget, config)
        search = config.allocation_search
        costs = None if speed is None else speed.costs
        pruning = GlobalPruning(
            run.model, scoring, budget, run.text, removal, run.saved.tensors, run.store, search, training, costs
        )
        small = pruning.prune()
        if config.uniform:
            small = to_stock(small)
        found: dict[str, Any] = {KEPT_LAYERS: pruning.origin}
        if training is not None:
            found["recovery"] = training.histories
        if speed is not None:
            found["speed"] = run.saved.json("speed", lambda: speed.compare(small, run.load))
        run.finish(small, partial(write_analysis, pruning, removal, speed), lambda _: found)
    update_page(config.run.models_dir, config.run.results_dir)


def write_analysis(pruning: GlobalPruning, removal: dict[str, Any] | None, speed: Speed | None, folder: Path) -> None:
    """Every structure's score and fate, what removing each part costs or takes, what a search found; plots of all."""
    rows = list(pruning.table.values())
    removed = [row for row in rows if row["removed_in_step"] is not None]
    write_csv(folder / "global_group_table.csv", columns_of(rows), rows)
    write_csv(folder / "groups_to_prune.csv", columns_of(rows), removed)
    if removal:
        layer, block = (
            {"dense": removal["dense"]} | {part: removal[part] for part in parts}
            for parts in (["layer"], ["attention", "mlp"])
        )
        write_json(folder / "layer_removal_ppl.json", layer)
        write_json(folder / "block_removal_ppl.json", block)
        save_figure(plot_removal(removal), folder / "removal_perplexity.png")
    save_figure(plot_retained(rows), folder / "retained.png")
    if speed is not None:
        write_json(folder / SPEED_TABLE, speed.table.as_dict())
    for searched in pruning.searches:
        name = f"search_of_step_{searched['step']}"
        write_json(folder / f"{name}.json", searched)
        save_figure(plot_search(searched), folder / f"{name}.png")
        save_figure(plot_allocations(searched, rows), folder / f"{name}_allocation.png")


if __name__ == "__main__":
    run_script(GlobalPruningConfig, main)

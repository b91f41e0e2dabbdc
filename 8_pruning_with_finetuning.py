"""Stage 8: gradual structured pruning of the student while it learns from its teacher (KGSP + MSP).

    python 8_pruning_with_finetuning.py [--fast] [--preset conservative|aggressive]
    python 8_pruning_with_finetuning.py [--fast] --preset half|fifth|tenth|twentieth
    python 8_pruning_with_finetuning.py [--fast] --start teacher --target latency 0.25

Reads models/student_model, models/teacher_model and the data; writes
models/pruning_with_finetuning_<timestamp>, a physically smaller model.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from compression.checkpoint import load_classifier
from compression.classifier.augment import Augmentation
from compression.classifier.budget import Budget, Quantity, make_budget
from compression.classifier.embeddings import EmbeddingSettings
from compression.classifier.gradual_pruning import (
    DistillationSchedule,
    Finetuning,
    GradualPruning,
    Lesson,
    PruningSchedule,
    extent,
    sections,
)
from compression.classifier.hidden_states import HiddenStates
from compression.classifier.stage import DataSettings, Stage, TokenizedTask, require_classifier
from compression.classifier.structure_scores import MODES, Importance, ModeName, RepairName
from compression.classifier.targets import Floors, OneBudget, SeparateTargets, Target
from compression.config import NO_EFFECT, AtLeast, Between, Config, Flat, group, pick, run_script
from compression.hub import Publishing
from compression.runtime import MODELS, UserError, log
from compression.schedule import EarlyStopping
from compression.structures import ENCODER_KINDS, layers_of
from compression.training import Training

# Masked and smaller model compute the same sums in another order; more than this is a mistake in the surgery.
LOGIT_TOLERANCE = 1e-4
# What the presets of deep compression share.
DEEP = dict(start="teacher", pruning_start_epoch=1, pruning_end_epoch=1, num_epochs=3, pruning_frequency=100) | dict(
    importance_mode="fisher", neuron_multiple=32, finetuning_learning_rate=1e-4, augment=2, augment_join=0.3
)


@dataclass
class GradualPruningWithFinetuningConfig(Config):
    start: Literal["student", "teacher"] = "student"
    """What is pruned: the student of stage 2, or the teacher's own weights, which deep compression makes more of."""
    student_path: Annotated[Path | None, NO_EFFECT] = None
    """The model to prune with --start student; by default student_model in models_dir."""
    teacher_path: Annotated[Path | None, NO_EFFECT] = None
    """The fine-tuned teacher; by default teacher_model in models_dir."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that checkpoints are read from and written to."""

    # When: epochs count from 1, all phases together.
    pruning_start_epoch: Annotated[int, AtLeast(1)] = 2
    """First epoch of the Pruning phase; before it is Warmup."""
    pruning_end_epoch: Annotated[int, AtLeast(1)] = 8
    """Last epoch of the Pruning phase; after it comes Finetuning."""
    pruning_frequency: Annotated[int, AtLeast(1)] = 20
    """Steps between pruning events (fewer where the phase is too short for ten events)."""
    finetuning_learning_rate: Annotated[float, AtLeast(0)] = 1e-5
    """Learning rate at the start of Finetuning; it falls linearly to zero."""
    patience: Annotated[int, AtLeast(1)] = 5
    """Epochs of Finetuning without a better accuracy (or the task's own metric) on held-out training sentences, after
    which it stops."""
    min_delta: Annotated[float, AtLeast(0)] = 0.001
    """Least rise of it that counts as better."""

    # What the student learns: alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy.
    temperature_start: Annotated[float, Between(0.1, 100)] = 10.0
    """Softening of the logits at the first step."""
    temperature_end: Annotated[float, Between(0.1, 100)] = 2.0
    """Softening of the logits at the last step."""
    alpha_start: Annotated[float, Between(0, 1)] = 0.9
    """Weight of the soft-label loss at the first step; cross-entropy has the rest."""
    alpha_end: Annotated[float, Between(0, 1)] = 0.2
    """Weight of the soft-label loss at the last step."""
    beta_hidden: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the hidden-state loss: each layer that is left learns, token by token, what a layer of the teacher
    gives."""

    # Which structures go (KGSP): the least important ones.
    importance_mode: ModeName = "l2+kd_grad"
    """Score of a structure: one of MODES in compression/classifier/structure_scores.py, which --help lists."""
    lambda_mag: Annotated[float, AtLeast(0)] = 0.5
    """Weight of the norm in l2+kd_grad."""
    lambda_grad: Annotated[float, AtLeast(0)] = 0.5
    """Weight of the gradient term in l2+kd_grad."""
    pruning_window_steps: Annotated[int, AtLeast(1)] = 50
    """Steps up to a pruning event whose gradients count at it: a sliding window, which may reach behind the event
    before."""

    # What stays makes up for what goes.
    repair: RepairName = "none"
    """The output projections of what stays are fitted, by least squares, to what was there before structures were
    masked: events, at every pruning event, and what is gone does not come back; end, at the last event alone."""

    # How much goes: one budget for heads, neurons, whole parts and layers; or (MSP) heads and neurons apart.
    target: tuple[Quantity, float] | None = None
    """One budget instead of the sparsities below: mac or parameters (of the encoder) or latency (of the whole model, by
    a table of times measured on this machine), and the share of the teacher's that may stay: mac 0.1. Attention or FFN
    of a layer go as a whole where that costs least."""
    min_part_share: Annotated[float, Between(0, 1)] = 0.05
    """Least share of its heads or neurons that a part keeps with --target, if it stays at all."""
    drop_parts: bool = True
    """With --target a layer's attention or FFN may go whole."""
    enable_multi_granularity: bool = True
    """MSP: rank heads and neurons apart, each to its own target; off: one ranking by score per parameter."""
    head_final_sparsity: Annotated[float, Between(0, 0.99)] = 0.30
    """Share of the heads to remove (with MSP)."""
    ffn_final_sparsity: Annotated[float, Between(0, 0.99)] = 0.20
    """Share of the FFN neurons to remove (with MSP)."""
    target_sparsity: Annotated[float, Between(0, 0.99)] = 0.20
    """Share of the parameters of all heads and neurons to remove (without MSP)."""
    min_heads: Annotated[int, AtLeast(1)] = 1
    """Least number of heads that stay in every layer."""
    neuron_multiple: Annotated[int, AtLeast(1)] = 8
    """Number of which the neurons that stay in every layer are a multiple."""

    embeddings: Flat[EmbeddingSettings] = group(EmbeddingSettings)
    data: Flat[DataSettings] = group(DataSettings, max_length=128, train_fraction=1.0)
    augmentation: Flat[Augmentation] = group(Augmentation)
    training: Flat[Training] = group(Training, num_epochs=15, batch_size=32, learning_rate=5e-5)
    publishing: Flat[Publishing] = group(Publishing)

    presets: ClassVar = {
        "fast": dict(num_epochs=4, pruning_start_epoch=1, pruning_end_epoch=2, patience=2)
        | dict(batch_size=64, train_fraction=0.3, max_length=64, amp="auto")
        | dict(pruning_frequency=100, pruning_window_steps=20),
        "conservative": dict(lambda_mag=0.6, lambda_grad=0.4, pruning_window_steps=100)
        | dict(head_final_sparsity=0.20, ffn_final_sparsity=0.15),
        "aggressive": dict(head_final_sparsity=0.40, ffn_final_sparsity=0.35),
        "half": dict(target=("mac", 0.5)) | DEEP,
        "fifth": dict(target=("mac", 0.2)) | DEEP,
        "tenth": dict(target=("mac", 0.1)) | DEEP,
        "twentieth": dict(target=("mac", 0.05)) | DEEP,
    }

    @classmethod
    def conservative(cls):
        """Remove less, and trust the weights' norm more."""
        return cls.preset("conservative")

    @classmethod
    def aggressive(cls):
        """Remove more."""
        return cls.preset("aggressive")

    def check(self) -> None:
        if self.pruning_end_epoch > self.training.num_epochs:
            raise UserError(
                f"--num_epochs {self.training.num_epochs}: allowed is at least --pruning_end_epoch "
                f"{self.pruning_end_epoch}; set both"
            )
        Between(1, self.pruning_end_epoch).check("pruning_start_epoch", self.pruning_start_epoch)
        if self.start == "teacher" and self.student_path is not None:
            raise UserError(
                f"--student_path {self.student_path}: --start teacher prunes the teacher; give one of the two"
            )
        if self.target is not None and not 0 < self.target[1] <= 1:
            quantity, share = self.target
            raise UserError(f"--target {quantity} {share}: allowed is a share of the teacher's, above 0 and at most 1")
        if not any(MODES[self.importance_mode].weights(pick(Importance, self))):
            raise UserError(
                "--lambda_mag 0 --lambda_grad 0: one of them must be above 0 with --importance_mode l2+kd_grad"
            )


def make_target(model: Any, config: GradualPruningWithFinetuningConfig, budget: Budget | None = None) -> Target:
    """How much goes: by the budget, if there is one."""
    floors, layers = pick(Floors, config), layers_of(model)
    if budget is None:
        return pick(SeparateTargets, config, floors=floors).check(layers)
    widest = {kind: max(parts.count(kind) for parts in layers) for kind in ENCODER_KINDS}
    return OneBudget(floors, config.min_part_share, config.drop_parts, widest, budget).check(layers)


def make_lesson(teacher_logits: Any, config: GradualPruningWithFinetuningConfig) -> Lesson:
    """What all phases learn, and when."""
    schedules = pick(PruningSchedule, config), pick(DistillationSchedule, config)
    return Lesson(teacher_logits, config.training, *schedules)


def make_recipe(
    model: Any,
    teacher_logits: Any,
    config: GradualPruningWithFinetuningConfig,
    target: Target,
    hidden_states: HiddenStates,
    whole: dict[str, int] | None = None,
    epochs: tuple[int, int] | None = None,
) -> GradualPruning:
    """Phases Warmup and Pruning, or some epochs of them: the masks go in with the recipe."""
    lesson = make_lesson(teacher_logits, config)
    whole, epochs = whole or extent(layers_of(model)), epochs or (1, config.pruning_end_epoch)
    return GradualPruning(model, lesson, hidden_states, pick(Importance, config), target, whole, epochs)


def make_finetuning(
    model: Any,
    teacher_logits: Any,
    config: GradualPruningWithFinetuningConfig,
    sparsity: dict[str, float],
    hidden_states: HiddenStates,
    metric: str = "accuracy",
) -> Finetuning:
    """Phase Finetuning, of the smaller model: `metric` chooses the best epoch."""
    lesson, stopping = make_lesson(teacher_logits, config), EarlyStopping(config.patience, config.min_delta)
    return Finetuning(model, lesson, hidden_states, stopping, f"selection_{metric}", sparsity)


@dataclass(frozen=True)
class Pruned:
    """What Warmup and Pruning give: the smaller model, what its hidden states learn, and what is said of it."""

    model: Any
    hidden_states: HiddenStates
    history: list[dict[str, Any]]
    sparsity: dict[str, float]
    logit_difference: float
    files: dict[str, Any]


def prune(
    stage: Stage, model: Any, task: TokenizedTask, teacher_logits: Any, config: GradualPruningWithFinetuningConfig
) -> Pruned:
    """Train and prune; what is masked becomes smaller layers, which are what is trained on.

    Raises:
        UserError: masked and smaller model differ by more than rounding.
    """
    budget = None
    if config.target is not None:
        beside, _ = load_classifier(stage.teacher, model.device)
        budget = make_budget(*config.target, model, beside, config.data.max_length, config.models_dir)
    target, whole = make_target(model, config, budget), extent(layers_of(model))
    hidden_states = stage.hidden_states(model, task, config.beta_hidden)
    history, sparsity, largest = [], {}, 0.0
    for number, epochs in enumerate(sections(pick(PruningSchedule, config), target.cuts)):
        recipe = make_recipe(model, teacher_logits, config, target, hidden_states, whole, epochs)
        history += stage.train(model, task, recipe, f"section_{number}" if number else "")
        masked_logits, sparsity = task.predict(model, task.validation), recipe.sparsity()
        model, hidden_states = recipe.finish()
        difference = (task.predict(model, task.validation) - masked_logits).abs().max().item()
        if not difference <= LOGIT_TOLERANCE:
            raise UserError(f"smaller and masked model differ by {difference:.2e} in logits; nothing was saved")
        log.info("Masked and smaller model agree to %.1e in logits", difference)
        largest = max(largest, difference)
    return Pruned(model, hidden_states, history, sparsity, largest, target.files)


def main(config: GradualPruningWithFinetuningConfig) -> None:
    student = config.student_path or config.models_dir / "student_model"
    teacher = config.teacher_path or config.models_dir / "teacher_model"
    require_classifier(teacher, "--teacher_path", "python 1_finetune_teacher.py")
    if config.start == "teacher":
        student = teacher
    require_classifier(student, "--student_path", "python 2_distill_student.py")
    stage = Stage("pruned", config, student, "pruning_with_finetuning_*", teacher, augmentation=config.augmentation)
    if stage.is_done():
        return

    with stage.running():
        model, task = stage.load_model(embeddings=config.embeddings)
        metric = stage.task.primary
        before = task.evaluate(model)[metric]
        teacher_logits = stage.teacher_logits()
        pruned = prune(stage, model, task, teacher_logits, config)
        small = pruned.model
        finetuning = make_finetuning(small, teacher_logits, config, pruned.sparsity, pruned.hidden_states, metric)
        history = pruned.history + stage.train(small, task, finetuning, "finetuning")
        finetuning.finish()

        log.info("%s before pruning %.4f", stage.task.title, before)
        metrics = pruned.sparsity | {f"{metric}_before": before, "logit_difference": pruned.logit_difference}
        stage.save(small, task, history, pruned.files, **metrics)


if __name__ == "__main__":
    run_script(GradualPruningWithFinetuningConfig, main)

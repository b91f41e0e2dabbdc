"""Stage 8: gradual structured pruning of the student while it learns from its teacher (KGSP + MSP).

    python 8_pruning_with_finetuning.py [--fast] [--preset conservative|aggressive]

Reads models/student_model, models/teacher_model and the sentiment data; writes
models/pruning_with_finetuning_<timestamp>, a physically smaller model. The schedule's fields and presets are documented
in compression/classifier/gradual_pruning.py, those of any training in compression/training.py.
"""

from dataclasses import dataclass
from pathlib import Path

from compression.classifier.gradual_pruning import GradualPruning, GradualPruningConfig
from compression.classifier.stage import Stage, require_classifier
from compression.config import run_script
from compression.runtime import UserError, log

# Masked and smaller model compute the same sums in another order; more than this is a mistake in the surgery.
LOGIT_TOLERANCE = 1e-4


@dataclass
class GradualPruningWithFinetuningConfig(GradualPruningConfig):
    student_path: Path | None = None
    """The model to prune; by default student_model in models_dir."""
    teacher_path: Path | None = None
    """The fine-tuned teacher; by default teacher_model in models_dir."""


def main(config: GradualPruningWithFinetuningConfig) -> None:
    student = config.student_path or config.models_dir / "student_model"
    teacher = config.teacher_path or config.models_dir / "teacher_model"
    require_classifier(teacher, "--teacher_path", "python 1_finetune_teacher.py")
    require_classifier(student, "--student_path", "python 2_distill_student.py")
    stage = Stage("pruned", config, parent=student, output="pruning_with_finetuning_*", teacher=teacher)
    if stage.is_done():
        return

    with stage.running():
        # Warmup, Pruning, Finetuning: the masks go in with the recipe.
        model, task = stage.load_model()
        before = task.evaluate(model)
        recipe = GradualPruning(model, stage.teacher_logits(), config)
        history = stage.train(model, task, recipe)

        # From masks to smaller layers, which must compute the same.
        recipe.load_best()
        masked_logits = task.predict(model, task.validation)
        small = recipe.finish()
        difference = (task.predict(small, task.validation) - masked_logits).abs().max().item()
        if not difference <= LOGIT_TOLERANCE:
            raise UserError(f"smaller and masked model differ by {difference:.2e} in logits; nothing was saved")
        log.info("Masked and smaller model agree to %.1e in logits", difference)

        log.info("Accuracy before pruning %.4f", before["accuracy"])
        metrics = recipe.sparsity() | {"accuracy_before": before["accuracy"], "logit_difference": difference}
        stage.save(small, task, history, **metrics)


if __name__ == "__main__":
    run_script(GradualPruningWithFinetuningConfig, main)

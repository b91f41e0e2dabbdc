"""Stage 2: distil the teacher into the student.

    python 2_distill_student.py [--fast]
    python 2_distill_student.py --variant soft_labels [--fast]

Reads the student's start (models/distilbert-local, fetched if it is not there), models/teacher_model and the sentiment
data; writes models/student_model, or with soft labels alone models/student_softlabel_model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from compression.assets import ensure_student
from compression.batching import model_inputs
from compression.classifier.stage import Stage, require_classifier
from compression.config import run_script
from compression.distillation import distillation_loss
from compression.sources import STUDENT
from compression.training import Recipe, TrainingConfig

# Variant -> what stage.json calls the result, and its folder.
VARIANTS = {
    "labels_and_teacher": ("student", "student_model"),
    "soft_labels": ("student_softlabel", "student_softlabel_model"),
}


@dataclass
class DistillationConfig(TrainingConfig):
    student: str = STUDENT
    """DistilBERT or BERT to start from: a folder, or a name on the hub."""
    overwrite: bool = False
    """Replace an earlier result that was made with other settings or inputs."""
    teacher_path: Path | None = None
    """The fine-tuned teacher; by default teacher_model in models_dir."""
    variant: Literal["labels_and_teacher", "soft_labels"] = "labels_and_teacher"
    """Learn from labels and teacher, or from the teacher's soft labels alone."""
    temperature: float = 2.0
    """Softening of both models' logits."""
    alpha: float = 0.5
    """Weight of the soft-label loss, cross-entropy has the rest; with soft_labels it counts as 1."""

    presets: ClassVar = {"fast": dict(num_epochs=2, batch_size=64, max_length=64, amp="auto")}

    def check(self) -> None:
        super().check()
        self.check_range("temperature", 0.1, 100)
        self.check_range("alpha", 0, 1)


class Distillation(Recipe):
    """alpha * T^2 * KL to the teacher + (1 - alpha) * cross-entropy."""

    def __init__(self, config: DistillationConfig, teacher_logits):
        super().__init__(config, len(teacher_logits))
        self.teacher_logits = teacher_logits
        self.alpha = 1.0 if config.variant == "soft_labels" else config.alpha

    def loss(self, model, batch, step):
        logits = model(**model_inputs(model, batch)).logits
        teacher = self.teacher_logits[batch["rows"]]
        return distillation_loss(logits, teacher, batch["labels"], self.config.temperature, self.alpha)


def main(config: DistillationConfig) -> None:
    name, folder = VARIANTS[config.variant]
    teacher = config.teacher_path or config.models_dir / "teacher_model"
    require_classifier(teacher, "--teacher_path", "python 1_finetune_teacher.py")
    start = ensure_student(config.student, config.models_dir / "distilbert-local")
    stage = Stage(name, config, parent=start, output=folder, teacher=teacher)
    if stage.is_done():
        return

    with stage.running():
        model, task = stage.load_model(new_head=True)
        recipe = Distillation(config, stage.teacher_logits().to(model.device))
        history = stage.train(model, task, recipe)
        stage.save(model, task, history)


if __name__ == "__main__":
    run_script(DistillationConfig, main)

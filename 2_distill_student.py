"""Stage 2: distil the teacher into the student.

    python 2_distill_student.py [--fast]
    python 2_distill_student.py --variant soft_labels [--fast]
    python 2_distill_student.py --student_layers 3 [--fast]

Reads the student's start (models/distilbert-local, fetched if it is not there; with --student_layers the teacher
itself), models/teacher_model and the data; writes models/student_model, or with soft labels alone
models/student_softlabel_model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from compression.batching import model_inputs
from compression.classifier.augment import Augmentation
from compression.classifier.stage import DataSettings, Stage, require_classifier
from compression.classifier.student import StudentStart
from compression.config import NO_EFFECT, AtLeast, Between, Config, Flat, group, run_script
from compression.distillation import distillation_loss
from compression.hub import Publishing
from compression.runtime import MODELS
from compression.training import Recipe, Training

# Variant -> what stage.json calls the result, and its folder.
VARIANTS = {
    "labels_and_teacher": ("student", "student_model"),
    "soft_labels": ("student_softlabel", "student_softlabel_model"),
}


@dataclass
class DistillationConfig(Config):
    start: Flat[StudentStart] = group(StudentStart)
    teacher_path: Annotated[Path | None, NO_EFFECT] = None
    """The fine-tuned teacher; by default teacher_model in models_dir."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that checkpoints are read from and written to."""
    overwrite: Annotated[bool, NO_EFFECT] = False
    """Replace an earlier result that was made with other settings or inputs."""
    variant: Literal["labels_and_teacher", "soft_labels"] = "labels_and_teacher"
    """Learn from labels and teacher, or from the teacher's soft labels alone."""
    temperature: Annotated[float, Between(0.1, 100)] = 2.0
    """Softening of both models' logits."""
    alpha: Annotated[float, Between(0, 1)] = 0.5
    """Weight of the soft-label loss, cross-entropy has the rest; with soft_labels it counts as 1."""
    beta_hidden: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the hidden-state loss: each layer learns, token by token, what a layer of the teacher
    gives."""
    data: Flat[DataSettings] = group(DataSettings, max_length=128, train_fraction=1.0)
    augmentation: Flat[Augmentation] = group(Augmentation)
    training: Flat[Training] = group(Training, num_epochs=3, batch_size=32, learning_rate=5e-5)
    publishing: Flat[Publishing] = group(Publishing)

    presets: ClassVar = {"fast": dict(num_epochs=2, batch_size=64, max_length=64, amp="auto")}


class Distillation(Recipe):
    """alpha * T^2 * KL to the teacher + (1 - alpha) * cross-entropy, and the hidden-state loss by its weight."""

    def __init__(self, training: Training, teacher_logits, temperature: float, alpha: float, hidden_states):
        super().__init__(training, len(teacher_logits))
        self.teacher_logits, self.hidden_states = teacher_logits, hidden_states
        self.temperature, self.alpha = temperature, alpha

    def loss(self, model, batch, step):
        student = model(**model_inputs(model, batch), output_hidden_states=self.hidden_states.wanted)
        teacher = self.teacher_logits[batch["rows"]]
        terms = distillation_loss(student.logits, teacher, batch["labels"], self.temperature, self.alpha)
        return self.hidden_states.added(terms, student, batch)


def main(config: DistillationConfig) -> None:
    name, folder = VARIANTS[config.variant]
    teacher = config.teacher_path or config.models_dir / "teacher_model"
    require_classifier(teacher, "--teacher_path", "python 1_finetune_teacher.py")
    start = config.start.folder(teacher, config.models_dir)
    stage = Stage(name, config, start, folder, teacher, config.overwrite, config.augmentation)
    if stage.is_done():
        return

    with stage.running():
        model, task = config.start.load_model(stage)
        alpha = 1.0 if config.variant == "soft_labels" else config.alpha
        hidden_states = stage.hidden_states(model, task, config.beta_hidden)
        teacher_logits = stage.teacher_logits().to(model.device)
        recipe = Distillation(config.training, teacher_logits, config.temperature, alpha, hidden_states)
        history = stage.train(model, task, recipe)
        hidden_states.finish()
        stage.save(model, task, history)


if __name__ == "__main__":
    run_script(DistillationConfig, main)

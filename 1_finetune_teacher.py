"""Stage 1: fine-tune the teacher.

    python 1_finetune_teacher.py [--fast]

Reads the teacher's start (models/bert-local, fetched if it is not there) and the sentiment data; writes
models/teacher_model.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from compression.assets import ensure_teacher
from compression.batching import model_inputs
from compression.classifier.stage import Stage
from compression.config import run_script
from compression.sources import TEACHER
from compression.training import Recipe, TrainingConfig


@dataclass
class TeacherConfig(TrainingConfig):
    teacher: str = TEACHER
    """BERT or DistilBERT to start from: a folder, or a name on the hub."""
    overwrite: bool = False
    """Replace an earlier result that was made with other settings or inputs."""

    presets: ClassVar = {"fast": dict(num_epochs=2, batch_size=64, max_length=64, amp="auto")}


class FineTuning(Recipe):
    """Cross-entropy on the labels."""

    def loss(self, model, batch, step):
        logits = model(**model_inputs(model, batch)).logits
        return {"loss": F.cross_entropy(logits.float(), batch["labels"])}


def main(config: TeacherConfig) -> None:
    start = ensure_teacher(config.teacher, config.models_dir / "bert-local")
    stage = Stage("teacher", config, parent=start, output="teacher_model")
    if stage.is_done():
        return

    with stage.running():
        model, task = stage.load_model(new_head=True)
        recipe = FineTuning(config, len(task.train))
        history = stage.train(model, task, recipe)
        stage.save(model, task, history)


if __name__ == "__main__":
    run_script(TeacherConfig, main)

"""Stage 1: fine-tune the teacher.

    python 1_finetune_teacher.py [--fast]

Reads the teacher's start (models/bert-local, fetched if it is not there) and the data; writes
models/teacher_model.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch.nn.functional as F

from compression.assets import ensure_teacher
from compression.batching import model_inputs
from compression.classifier.stage import DataSettings, Stage
from compression.config import NO_EFFECT, Config, Flat, group, run_script
from compression.hub import Publishing
from compression.runtime import MODELS
from compression.sources import TEACHER
from compression.training import Recipe, Training


@dataclass
class TeacherConfig(Config):
    teacher: Annotated[str, NO_EFFECT] = TEACHER
    """Encoder to start from: a folder, or a name on the hub."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that checkpoints are read from and written to."""
    overwrite: Annotated[bool, NO_EFFECT] = False
    """Replace an earlier result that was made with other settings or inputs."""
    data: Flat[DataSettings] = group(DataSettings, max_length=128, train_fraction=1.0)
    training: Flat[Training] = group(Training, num_epochs=3, batch_size=32, learning_rate=5e-5)
    publishing: Flat[Publishing] = group(Publishing)

    presets: ClassVar = {"fast": dict(num_epochs=2, batch_size=64, max_length=64, amp="auto")}


class FineTuning(Recipe):
    """Cross-entropy on the labels."""

    def loss(self, model, batch, step):
        logits = model(**model_inputs(model, batch)).logits
        return {"loss": F.cross_entropy(logits.float(), batch["labels"])}


def main(config: TeacherConfig) -> None:
    start = ensure_teacher(config.teacher, config.models_dir / "bert-local")
    stage = Stage("teacher", config, parent=start, output="teacher_model", overwrite=config.overwrite)
    if stage.is_done():
        return

    with stage.running():
        model, task = stage.load_model(new_head=True)
        recipe = FineTuning(config.training, len(task.train))
        history = stage.train(model, task, recipe)
        stage.save(model, task, history)


if __name__ == "__main__":
    run_script(TeacherConfig, main)

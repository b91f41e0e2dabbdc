"""Stage 1: fine-tune the teacher.

    python 1_finetune_teacher.py [--fast]

Reads the teacher's start (models/bert-local, fetched if it is not there) and the data; writes
models/teacher_model.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from compression.assets import ensure_teacher
from compression.classifier.finetuning import FineTuning, Smoothing
from compression.classifier.stage import DataSettings, Stage
from compression.config import NO_EFFECT, AtLeast, Between, Config, Flat, group, pick, run_script
from compression.hub import Publishing
from compression.runtime import MODELS
from compression.schedule import EarlyStopping
from compression.sources import TEACHER
from compression.training import Training


@dataclass
class TeacherConfig(Config):
    teacher: Annotated[str, NO_EFFECT] = TEACHER
    """Encoder to start from: a folder, or a name on the hub."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that checkpoints are read from and written to."""
    overwrite: Annotated[bool, NO_EFFECT] = False
    """Replace an earlier result that was made with other settings or inputs."""
    layer_decay: Annotated[float, Between(0.1, 1)] = 0.9
    """Learning rate of each layer as a share of the next one's; 1, as with --fast: all layers learn alike."""
    r_drop: Annotated[float, AtLeast(0)] = 1.0
    """Weight of R-Drop: two passes with other dropout shall agree; 0, as with --fast: one pass, in half the time."""
    patience: Annotated[int, AtLeast(1)] = 2
    """Epochs without a better accuracy (or the task's own metric) on held-out training sentences, after which training
    stops; the best epoch is kept."""
    data: Flat[DataSettings] = group(DataSettings, max_length=128, train_fraction=1.0)
    training: Flat[Training] = group(Training, num_epochs=3, batch_size=32, learning_rate=5e-5)
    publishing: Flat[Publishing] = group(Publishing)

    presets: ClassVar = {
        "fast": dict(num_epochs=2, batch_size=64, max_length=64, amp="auto", layer_decay=1.0, r_drop=0.0)
    }


def main(config: TeacherConfig) -> None:
    start = ensure_teacher(config.teacher, config.models_dir / "bert-local")
    stage = Stage("teacher", config, parent=start, output="teacher_model", overwrite=config.overwrite)
    if stage.is_done():
        return

    with stage.running():
        model, task = stage.load_model(new_head=True)
        stopping = EarlyStopping(config.patience, min_delta=0.0)
        smoothing = pick(Smoothing, config)
        recipe = FineTuning(model, config.training, smoothing, len(task.train), stopping, stage.task.primary)
        history = stage.train(model, task, recipe)
        recipe.best.restore()
        stage.save(model, task, history)


if __name__ == "__main__":
    run_script(TeacherConfig, main)

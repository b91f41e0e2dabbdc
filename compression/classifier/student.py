"""What the student of stage 2 starts from: a pretrained encoder, or layers of its teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transformers import PreTrainedModel

from compression.assets import ensure_student
from compression.checkpoint import load_config
from compression.classifier.stage import Stage, TokenizedTask
from compression.config import NO_EFFECT, Settings
from compression.inputs import require_unquantized
from compression.runtime import UserError, log
from compression.sources import STUDENT, STUDENT_FOLDER
from compression.student_init import with_layers


@dataclass
class StudentStart(Settings):
    """A pretrained encoder, or with `student_layers` the fine-tuned teacher itself with fewer layers."""

    student: Annotated[str, NO_EFFECT] = STUDENT
    """Encoder to start from: a folder, or a name on the hub."""
    student_layers: str | None = None
    """Start from layers of the teacher: so many, evenly spaced from the first (3), or these (0,2,4)."""

    def check(self) -> None:
        if self.student_layers is None:
            return
        if self.student != STUDENT:
            raise UserError(
                f"--student {self.student} --student_layers {self.student_layers}: the student starts from a model of "
                "its own or from layers of the teacher; give one of the two"
            )
        named_layers(self.student_layers)

    def folder(self, teacher: Path, models_dir: Path) -> Path:
        """The checkpoint that the student is made from, fetched if it is not there.

        Raises:
            UserError: it cannot be had, or has not the layers that are asked for.
        """
        if self.student_layers is None:
            return ensure_student(self.student, models_dir / STUDENT_FOLDER.name)
        require_unquantized(teacher, "--teacher_path")
        config = load_config(teacher)
        if config.model_type.startswith("pruned_"):
            raise UserError(
                f"--teacher_path {teacher}: is pruned, and --student_layers takes layers of a dense model; name the "
                "one it was made from"
            )
        layers = chosen_layers(self.student_layers, config.num_hidden_layers)
        log.info("The student starts from the teacher's layers %s", ", ".join(map(str, layers)))
        return teacher

    def load_model(self, stage: Stage) -> tuple[PreTrainedModel, TokenizedTask]:
        """The student as it starts, and the data tokenized for it: see `Stage.load_model`."""
        model, task = stage.load_model(new_head=self.student_layers is None)
        if self.student_layers is not None:
            model = with_layers(model, chosen_layers(self.student_layers, model.config.num_hidden_layers))
        return model, task


def named_layers(text: str) -> list[int]:
    """The numbers that `--student_layers` holds: one alone is how many layers, several are layers.

    Raises:
        UserError: something else, no layers, or layers twice or not in their order.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    lowest = 1 if len(numbers) == 1 else 0
    if not numbers or numbers[0] < lowest or numbers != sorted({*numbers}):
        raise UserError(
            f"--student_layers {text}: allowed is how many layers (3), or layers from 0 on, each once and in their "
            "order (0,2,4)"
        )
    return numbers


def chosen_layers(text: str, count: int) -> tuple[int, ...]:
    """The layers of a teacher that a student takes.

    Of so many layers, the student's layer i is the teacher's floor(i * count / many): one out of two where it has half
    of them, as DistilBERT was made.

    Args:
        text: as for `--student_layers`.
        count: layers of the teacher.

    Raises:
        UserError: see `named_layers`, or the teacher has not so many layers.
    """
    numbers = named_layers(text)
    needed = numbers[0] if len(numbers) == 1 else numbers[-1] + 1
    if needed > count:
        raise UserError(
            f"--student_layers {text}: the teacher has {count} layers; allowed is 1 to {count} of them, or some of "
            f"layers 0 to {count - 1}"
        )
    return tuple(numbers if len(numbers) > 1 else (place * count // needed for place in range(needed)))

"""The models that the report and the comparison show."""

import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

from compression.classifier.data import DatasetSettings
from compression.plots import COLOURS, MARKERS, spare_markers


@dataclass(frozen=True)
class EvaluatedModel:
    """A kind of model.

    Attributes:
        stage: what `stage.json` calls it; the newest checkpoint of it is taken.
        name: in the report.
        short_name: in the comparison.
        command: what makes it.
        colour, marker: in figures, whatever else they show.
        reads_data: whether the command takes the flags that name the data.
    """

    stage: str
    name: str
    short_name: str
    command: str
    colour: str
    marker: str
    reads_data: bool = True

    def command_on(self, dataset: DatasetSettings) -> str:
        """The command that makes it for this data."""
        given = {field.name: str(getattr(dataset, field.name)) for field in fields(dataset)}
        defaults = {field.name: str(field.default) for field in fields(dataset)}
        flags = [f" --{name} {shlex.quote(value)}" for name, value in given.items() if value != defaults[name]]
        return self.command + "".join(flags) * self.reads_data

    def names(self, checkpoint: str) -> bool:
        """Whether this is what a checkpoint is called by, or it with the checkpoint's folder behind it."""
        return checkpoint in (self.name, self.short_name) or checkpoint.startswith(f"{self.name}, ")


EVALUATED = [
    EvaluatedModel(
        stage="teacher",
        name="Teacher",
        short_name="Teacher",
        command="python 1_finetune_teacher.py",
        colour=COLOURS[0],
        marker=MARKERS[0],
    ),
    EvaluatedModel(
        stage="student",
        name="Distilled Student (Baseline)",
        short_name="Student",
        command="python 2_distill_student.py",
        colour=COLOURS[1],
        marker=MARKERS[1],
    ),
    EvaluatedModel(
        stage="student_softlabel",
        name="Distilled Student (Soft Labels)",
        short_name="Student, soft labels",
        command="python 2_distill_student.py --variant soft_labels",
        colour=COLOURS[2],
        marker=MARKERS[2],
    ),
    EvaluatedModel(
        stage="student_quantized",
        name="Quantized Distilled Student",
        short_name="Student, 4 bits",
        command="python 9_quantize_pruned_model.py --pruned_model_path models/student_model"
        " --output_dir models/student_quantized_model",
        colour=COLOURS[3],
        marker=MARKERS[3],
        reads_data=False,
    ),
    EvaluatedModel(
        stage="pruned",
        name="Pruned Student (KGSP + MSP)",
        short_name="Pruned",
        command="python 8_pruning_with_finetuning.py",
        colour=COLOURS[4],
        marker=MARKERS[4],
    ),
    EvaluatedModel(
        stage="pruned_quantized",
        name="Pruned + Quantized Student (PTQ)",
        short_name="Pruned, 4 bits (PTQ)",
        command="python 9_quantize_pruned_model.py",
        colour=COLOURS[5],
        marker=MARKERS[5],
        reads_data=False,
    ),
    EvaluatedModel(
        stage="pruned_qkd4bit",
        name="Pruned + QKD-4bit (QAT)",
        short_name="Pruned, 4 bits (QAT)",
        command="python 10_qat_kd_4bit.py",
        colour=COLOURS[6],
        marker=MARKERS[6],
    ),
]
BASELINE = next(model.name for model in EVALUATED if model.stage == "student")
"""What the report compares the models with, if it is there."""


def baseline_of(found: Collection[str]) -> str:
    """What models with these names are compared with: the student, without one the teacher."""
    teacher = next(model.name for model in EVALUATED if model.stage == "teacher")
    return teacher if teacher in found and BASELINE not in found else BASELINE


def looks(checkpoints: Sequence[str], models: Sequence[EvaluatedModel] = EVALUATED) -> Iterator[tuple[str, str]]:
    """Colour and marker of each checkpoint, by what it is called.

    A model's newest checkpoint has the model's own, which do not depend on what else there is. Its older ones share the
    colour and have markers that nothing else has; what is none of the models is grey.
    """
    spare, seen = spare_markers(), set()
    for checkpoint in checkpoints:
        model = next((model for model in models if model.names(checkpoint)), None)
        colour = model.colour if model else "0.5"
        yield colour, next(spare) if model is None or model.stage in seen else model.marker
        seen.add(model and model.stage)

"""The tasks that classifiers are made for: a task is one record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from compression.files import read_object
from compression.runtime import UserError


@dataclass(frozen=True)
class Metric:
    """A figure of merit: its title in the report, and the function of (labels, predictions) that gives it."""

    title: str
    function: Callable[[Any, Any], float]


METRICS = {
    "accuracy": Metric("Accuracy", accuracy_score),
    "f1": Metric("F1", partial(f1_score, zero_division=0.0)),
    "f1_macro": Metric("Macro F1", partial(f1_score, average="macro", zero_division=0.0)),
    "matthews_correlation": Metric("Matthews correlation", matthews_corrcoef),
}
"""By the name that JSON files have for them. `f1` is of two classes, of the second one."""


@dataclass(frozen=True)
class Task:
    """One or two texts per row, and a label.

    Attributes:
        name: what messages and reports call it.
        text: the columns of text, one or two.
        labels: what the label's values 0, 1, ... mean.
        metrics: by the name that JSON files have for them. Accuracy is among them; where there are two labels, F1 and
            the like are of the second one.
        primary: the metric that epochs are chosen by.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: dict[str, Metric]
    primary: str = "accuracy"

    @property
    def title(self) -> str:
        """The title of the primary metric."""
        return self.metrics[self.primary].title


def make_task(name: str, text: Sequence[str], labels: Sequence[str], primary: str = "accuracy") -> Task:
    """A task with accuracy, F1 (of two classes that of the second one, of more the macro average), and `primary`."""
    names = dict.fromkeys(("accuracy", "f1" if len(labels) == 2 else "f1_macro", primary))
    return Task(name, tuple(text), tuple(labels), {name: METRICS[name] for name in names}, primary)


SST2 = make_task("SST-2", ["sentence"], ["negative", "positive"])


# Label names in checkpoints.


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The label names that a model's `config.json` has, those of transformers (LABEL_0, ...) where it has none."""
    names = config.get("id2label")
    if isinstance(names, dict):
        return tuple(str(names[key]) for key in sorted(names, key=lambda key: (len(key), key)))
    return _stock_names(config.get("num_labels", 2))


def _stock_names(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{place}" for place in range(count))


def check_labels(folder: Path, flag: str, task: Task) -> None:
    """Raise UserError where a checkpoint's label names are not the task's, in their order.

    The names that transformers gives labels without one agree with any names, if they are as many.

    Args:
        flag: what named the folder, for the error text; may be empty.
    """
    found = label_names(read_object(Path(folder) / "config.json"))
    if found not in (task.labels, _stock_names(len(task.labels))):
        raise UserError(
            f"{flag} {folder}: has {listed(found)}; allowed are those of {task.name}, {listed(task.labels)}; name a "
            "model of that task, or with --dataset the data that this one is of".lstrip()
        )


def listed(labels: Sequence[str]) -> str:
    """The number of labels and their names, for messages: of many the first ones."""
    more = ", ..." if len(labels) > 20 else ""
    return f"{len(labels)} labels ({', '.join(labels[:20])}{more})"

"""The tasks that classifiers are made for: a task is one record."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sklearn.metrics import accuracy_score, f1_score

from compression.sources import SENTIMENT_FOLDER


@dataclass(frozen=True)
class Metric:
    """A figure of merit: its title in the report, and the function of (labels, predictions) that gives it."""

    title: str
    function: Callable[[Any, Any], float]


@dataclass(frozen=True)
class Task:
    """One or two texts per row, and a label.

    Attributes:
        name: also that of the folder that its GLUE files may lie in.
        about: what the data is about, for messages.
        text: the columns of text, one or two.
        labels: what the label's values 0, 1, ... mean.
        metrics: by the name that JSON files have for them. Accuracy is among them; where there are two labels, F1 and
            the like are of the second one.
        primary: the metric that epochs are chosen by.
        tsv: the columns of GLUE's train.tsv and dev.tsv in their order, empty names for those that are not read.
        tsv_header: the first line of these files, None where there is none.
        repository, subset: the data set on the hub; its columns are those of `text` and `label`.
        folder: where fetched data goes.
        reviews_stand_in: the embedded review sentences are taken where the hub is not reachable.
    """

    name: str
    about: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: dict[str, Metric]
    primary: str
    tsv: tuple[str, ...]
    tsv_header: str | None
    repository: str
    subset: str
    folder: Path
    label: str = "label"
    reviews_stand_in: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of each row."""
        return *self.text, self.label


SST2 = Task(
    name="SST-2",
    about="sentiment",
    text=("sentence",),
    labels=("negative", "positive"),
    metrics={"accuracy": Metric("Accuracy", accuracy_score), "f1": Metric("F1", partial(f1_score, zero_division=0.0))},
    primary="accuracy",
    tsv=("sentence", "label"),
    tsv_header="sentence\tlabel",
    repository="nyu-mll/glue",
    subset="sst2",
    folder=SENTIMENT_FOLDER,
    reviews_stand_in=True,
)

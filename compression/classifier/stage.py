"""What the training stages of the classifier track share: inputs, tokenized data, training, saving."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import check_positions, load_classifier, save_checkpoint
from compression.classifier.augment import Augmentation, more_rows
from compression.classifier.data import DatasetSettings, Encoded, encode, load_data
from compression.classifier.embeddings import EmbeddingSettings
from compression.classifier.hidden_states import HiddenStates, LiveTeacher
from compression.classifier.metrics import predict, score
from compression.classifier.parts import Split, TaskData
from compression.classifier.tasks import Task, check_labels
from compression.classifier.teacher import teacher_logits
from compression.config import Between, Flat, Settings, group
from compression.flops import count_macs, count_parameters
from compression.hub import Publishing
from compression.inputs import find_all, require_type
from compression.integrity import digest_of
from compression.outputs import HISTORY_FILE, STATES_END, Output, fresh_path, owned
from compression.runtime import UserError, from_main_process, log, pick_device, processes, seed_everything, shown
from compression.stage_record import contents, describe_stage, identify, is_made_from
from compression.structures import ENCODERS, positions_of
from compression.training import Recipe, Training, clean_up, fit

COST_LENGTH = 128
"""Tokens per sequence that a stage counts its model's GFLOPs at, as stage 7 does by default."""


@dataclass
class DataSettings(Settings):
    """What every training stage is trained on."""

    dataset: Flat[DatasetSettings] = group(DatasetSettings)
    max_length: Annotated[int, Between(4, 512)] = 128
    """Tokens at which sentences are cut."""
    train_fraction: Annotated[float, Between(1e-6, 1)] = 1.0
    """Share of the training data that is used."""


class StageConfig(Protocol):
    """What the configuration of a training stage has, besides the stage's own fields."""

    models_dir: Path
    data: DataSettings
    training: Training
    publishing: Publishing

    def as_dict(self) -> dict[str, Any]: ...

    def result_fields(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TokenizedTask:
    """Tokenized splits: `train` is cut to the configured share, the other splits are whole."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    selection: Encoded
    validation: Encoded

    def predict(self, model: PreTrainedModel, encoded: Encoded) -> Tensor:
        """Logits [rows, classes] in the order of the rows."""
        return predict(model, encoded, self.tokenizer.pad_token_id, task=self.task)

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """The primary metric on the validation set, and on the sentences held out of training."""
        name = self.task.primary
        return {name: self._score(model, self.validation), f"selection_{name}": self._score(model, self.selection)}

    def _score(self, model: PreTrainedModel, encoded: Encoded) -> float:
        return score(self.predict(model, encoded), encoded.labels, self.task)


def cost(model: PreTrainedModel) -> dict[str, int | float]:
    """Parameters, and GFLOPs of one sequence of `COST_LENGTH` tokens (or as many as the model has positions for)."""
    count = count_macs(model, min(COST_LENGTH, positions_of(model.config)))
    parameters = count_parameters(model)["total"]
    return {"parameters": parameters, "gflops": count.gflops, "sequence_length": count.sequence_length}


def require_classifier(folder: Path, flag: str, command: str) -> None:
    """Raise UserError unless a supported classifier is there.

    Args:
        flag, command: what names the folder, and what makes it, for the error text.
    """
    require_type(folder, flag, command, ENCODERS)


class Stage:
    """One training stage, from its inputs to its checkpoint.

    Args:
        name: what `stage.json` calls it.
        config: the resolved configuration.
        parent: the checkpoint that the stage starts from.
        output: the folder in `models_dir` that the stage writes: its name, or with a `*` at its end a new one each
            time, with the time in the star's place.
        teacher: the checkpoint that it learns from, if any.
        overwrite: whether a result of other settings or inputs may be replaced.
        augmentation: how the training rows are added to; needs a teacher.

    Raises:
        UserError: an input that is not there or of the wrong kind, a teacher of other labels, or an output that must
            not be replaced.
    """

    def __init__(
        self,
        name: str,
        config: StageConfig,
        parent: Path,
        output: str,
        teacher: Path | None = None,
        overwrite: bool = False,
        augmentation: Augmentation | None = None,
    ):
        self.name, self.config, self.parent, self.teacher = name, config, Path(parent), teacher
        self.overwrite, self.augmentation = overwrite, augmentation or Augmentation()
        self.inputs: dict[str, Any] = {"parent": identify(parent)}
        if teacher is not None:
            check_labels(teacher, "--teacher_path", self.task)
            self.inputs["teacher"] = identify(teacher)
        self.inputs["data"] = {"name": self.data.name, "sha256": self.data.digest()}
        self.prefix = output.removesuffix("_*") if output.endswith("*") else None
        self.output = Output(Path(config.models_dir) / output.removesuffix("_*"), "--models_dir", name)
        self.work_dir = Path(config.models_dir) / f".{name}_{self.fingerprint()}{STATES_END}"

    def fingerprint(self) -> str:
        """A hash of what the result depends on: settings, inputs, number of processes (each draws its own dropout)."""
        return digest_of([self.config.result_fields(), contents(self.inputs), processes().num_processes], 12)

    @cached_property
    def data(self) -> TaskData:
        return load_data(self.config.data.dataset)

    @cached_property
    def training_rows(self) -> Split:
        """What is trained on: `own_rows`, then their changed copies."""
        return self._taught[0] if self.augmentation.augment else self.own_rows

    @cached_property
    def own_rows(self) -> Split:
        """The share of the training data that is used."""
        share = self.config.data.train_fraction
        rows = self.data.train.sample(share, self.config.training.seed)
        if missing := len(self.task.labels) - len(set(rows.labels)):
            log.warning("--train_fraction %g leaves no training rows of %d classes", share, missing)
        return rows

    @property
    def task(self) -> Task:
        """What the model is made for."""
        return self.data.task

    def is_done(self) -> bool:
        """Whether `--skip_existing` is given and a result was made with these settings from these inputs."""
        if not self.config.training.skip_existing:
            return False
        outputs = find_all(self.config.models_dir, self.name) if self.prefix else [self.output.path]
        for output in outputs:
            if is_made_from(output, self.config.result_fields(), self.inputs):
                log.info("%s exists and matches configuration and inputs: skipped", shown(output))
                clean_up(self.work_dir)  # left if the run was killed right after saving its result
                self.config.publishing.publish(output)
                return True
        return False

    @contextmanager
    def running(self) -> Iterator[None]:
        """The output is this run's alone while it lasts; refused before any work where it must not be replaced."""
        paths = [self.work_dir]
        if self.prefix is None:
            paths.append(self.output.path)
            inputs = [self.parent, *filter(None, [self.teacher])]
            self.output.check(inputs, shared=[self.config.models_dir])
            same = is_made_from(self.output.path, self.config.result_fields(), self.inputs)
            self.output.check_same(same, self.overwrite)
        with owned(*paths):
            yield

    def load_model(
        self, new_head: bool = False, embeddings: EmbeddingSettings | None = None
    ) -> tuple[PreTrainedModel, TokenizedTask]:
        """The parent checkpoint on this process's device, and the data tokenized for it.

        Args:
            new_head: the parent is a bare encoder that gets a new classification head.
            embeddings: how its table of word embeddings is made smaller.

        Raises:
            UserError: the parent has a head, of other labels than the task's, or its embeddings cannot be made so.
        """
        labels = self.task.labels
        if not new_head:
            check_labels(self.parent, "", self.task)
        seed_everything(self.config.training.seed)
        model, tokenizer = load_classifier(self.parent, pick_device(), len(labels) if new_head else None)
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: place for place, label in enumerate(labels)}
        log.info("Data: %s (%s), %d training sentences", self.data.name, self.data.source, len(self.training_rows))
        if embeddings is not None:
            texts = [*self.data.train.sentences, *self.training_rows.sentences]  # changed copies, too
            tokenizer = embeddings.apply(model, tokenizer, texts)
        splits = (self.training_rows, self.data.selection, self.data.validation)
        encoded = [encode(tokenizer, part, self.config.data.max_length) for part in splits]
        for part in encoded:
            check_positions(model, "max_length", int(part.lengths.max()))
        return model, TokenizedTask(self.task, tokenizer, *encoded)

    def teacher_logits(self) -> Tensor:
        """The teacher's logits [rows, classes] on the training sentences of this stage, computed once and kept."""
        return self._taught[1]

    @cached_property
    def _taught(self) -> tuple[Split, Tensor]:
        """The training rows and the teacher's logits on them; changed copies have its label."""
        folder, data = self.teacher, self.config.data
        if folder is None:
            raise ValueError(f"the stage {self.name} has no teacher")
        model, tokenizer = load_classifier(folder, pick_device())

        def logits_on(rows: Split) -> Tensor:
            encoded = encode(tokenizer, rows, data.max_length)
            return teacher_logits(model, folder, encoded, tokenizer.pad_token_id, self.config.models_dir, self.task)

        rows, logits = self.own_rows, logits_on(self.own_rows)
        if not self.augmentation.augment:
            return rows, logits
        # One process draws for all: rounding must not give them different texts.
        seed = self.config.training.seed
        copies = from_main_process(lambda: more_rows(self.data, rows, self.augmentation, model, tokenizer, seed))
        if not copies:
            count = self.augmentation.augment
            raise UserError(f"--augment {count}: no training text can be changed so; use --augment 0")
        added = logits_on(Split(copies, [0] * len(copies)))  # what their labels are is seen from it
        labels = rows.labels + added.argmax(-1).tolist()
        return Split([*rows.sentences, *copies], labels), torch.cat([logits, added])

    def hidden_states(self, model: PreTrainedModel, task: TokenizedTask, weight: float) -> HiddenStates:
        """What the student's hidden states learn; the teacher runs on every batch only where they have a weight.

        Raises:
            UserError: the teacher splits text otherwise than the student, so that their hidden states are of other
                tokens.
        """
        if not weight:
            return HiddenStates(model)
        assert self.teacher is not None, "without a teacher there is nothing to learn from"
        teacher, tokenizer = load_classifier(self.teacher, pick_device())
        encoded = encode(tokenizer, self.training_rows, self.config.data.max_length)
        if not encoded.lengths.equal(task.train.lengths):
            raise UserError(
                f"--teacher_path {self.teacher}: splits text otherwise than the student; use --beta_hidden 0"
            )
        return HiddenStates(model, LiveTeacher(teacher, encoded, tokenizer.pad_token_id), weight)

    def train(
        self, model: PreTrainedModel, task: TokenizedTask, recipe: Recipe, phase: str = ""
    ) -> list[dict[str, Any]]:
        """Train in place; returns the history.

        Args:
            phase: a name of its own where the run trains a second time; its states to resume from stand apart.
        """
        return fit(
            model,
            recipe,
            task.train,
            task.evaluate,
            self.work_dir / phase,
            task.tokenizer.pad_token_id,
            self.config.as_dict(),
            logs_dir=Path(self.config.models_dir) / "logs",
        )

    def save(
        self,
        model: PreTrainedModel,
        task: TokenizedTask,
        history: list[dict[str, Any]],
        files: dict[str, Any] | None = None,
        **metrics: Any,
    ) -> None:
        """Write the checkpoint with its metrics, drop the states to resume from, upload it where that is asked for.

        Args:
            files: JSON files beside it, by name.
        """
        metrics = task.evaluate(model) | {"cost": cost(model)} | metrics
        added = len(self.training_rows) - len(self.own_rows)
        data = self.data.describe() | ({"added": added} if added else {})
        stage = describe_stage(self.name, self.config.as_dict(), self.inputs, metrics, data)
        output = fresh_path(self.config.models_dir, self.prefix) if self.prefix else self.output.path
        files = {HISTORY_FILE: history} | (files or {})
        save_checkpoint(output, model, task.tokenizer, stage, files, new=self.prefix is not None)
        clean_up(self.work_dir)
        title, value, sentences = self.task.title, metrics[self.task.primary], len(task.validation)
        log.info("%s %.4f on %s (%d sentences) -> %s", title, value, self.data.name, sentences, shown(output))
        self.config.publishing.publish(output)

"""Zero-shot accuracy of a language model, by lm-evaluation-harness and its own task definitions.

The data sets come from the hub, or from plain files: `DIR/zeroshot/TASK/validation.jsonl` with the columns that the
task reads (HellaSwag pre-processed: `query`, `choices`, `gold`). Nothing else of the task is changed.
"""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.progress import bars_of_libraries
from compression.runtime import UserError
from compression.text_files import read_json_lines

# What a task's definition says otherwise of data that is pre-processed already.
PREPROCESSED = {"hellaswag": {"process_docs": None, "doc_to_target": "gold"}}


@cache
def _manager() -> Any:
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager  # takes seconds, and many runs need none

    disable_progress_bars()  # of reading a file, which would stand before an error's one line
    return TaskManager()


def check_tasks(tasks: list[str], data_dir: str | None, limit: int | None = None) -> None:
    """Raise UserError for an unknown task, or one whose data cannot be had or read; fetches data from the hub.

    Args:
        limit: number of questions of each task that are used; the files of the folder are read as far as that.
    """
    for task in tasks:
        if data_dir is not None and not _local_data(task, data_dir).is_file():
            raise UserError(
                f"--data_dir {data_dir}: has no zeroshot/{task}/validation.jsonl; leave it out to ask the hub"
            )
    manager = _manager()
    unknown = set(tasks) - set(manager.all_subtasks)
    if unknown:
        raise UserError(f"zero-shot task {min(unknown)!r}: lm-evaluation-harness has none of that name")
    for task in tasks:
        if data_dir is None:
            _fetch(task, manager)
        else:
            _check_file(task, data_dir, limit, _local_data(task, data_dir).stat().st_mtime_ns)


@cache
def _check_file(task: str, data_dir: str, limit: int | None, written: int) -> None:
    """Raise UserError unless a task can read its file, which is checked once for the time that it was written at."""
    path = _local_data(task, data_dir)
    rows = list(read_json_lines(path, "--data_dir"))
    _check_columns(path, rows)
    with TemporaryDirectory() as folder:
        specification = _with_local_data(task, _manager(), data_dir, Path(folder))
        try:
            built = _manager().load([str(specification)])["tasks"][task]
        except Exception as error:  # of several libraries; whichever it is, the harness cannot read the file
            known = {name: value for _, row in rows for name, value in row.items()}
            raise _unreadable(path, task, known, error) from None
    if built.config.process_docs is None:  # else its questions are not the rows of the file
        for number, row in rows[:limit]:
            known = {name: value for name, value in row.items() if value is not None}
            try:
                _check_question(built, known)
            except Exception as error:  # of the task's own code and templates
                raise _unreadable(f"{path}: line {number}", task, known, error) from None


def _check_columns(path: Path, rows: list[tuple[int, Any]]) -> None:
    """Raise UserError unless all rows are objects and each column is of one type."""
    if not rows:
        raise UserError(f"--data_dir {path}: holds no questions; allowed is one object per line")
    types: dict[str, type] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"--data_dir {path}: line {number} holds a {type(row).__name__}; allowed is an object")
        for name, value in row.items():
            found = float if type(value) is int else type(value)
            if value is not None and types.setdefault(name, found) is not found:
                raise UserError(
                    f"--data_dir {path}: line {number}: {name} is {str(value)[:40]!r}, a {type(value).__name__}; "
                    "allowed is one type in all lines"
                )


def _check_question(task: Any, row: dict[str, Any]) -> None:
    """Raise what the task raises on a question, or ValueError where its answers are no texts or none is right."""
    text, target = task.doc_to_text(row), task.doc_to_target(row)
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(row)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"its answers are {str(choices)[:40]}")
    right = text if task.multiple_input else target
    for answer in right if isinstance(right, list) else [right]:
        if answer not in choices and answer not in range(len(choices)):
            raise ValueError(f"the right answer is {str(answer)[:40]!r}, of {len(choices)}")


def _unreadable(place: object, task: str, known: dict[str, Any], error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}"
    if lacking := sorted(_template_columns(task) - known.keys()):
        reason = f"it lacks {', '.join(lacking)}"
    return UserError(f"--data_dir {place}: the task {task} cannot read it ({reason}); mend the file")


def _template_columns(task: str) -> set[str]:
    """The columns that the templates of a task's definition name."""
    from jinja2 import Environment, meta

    definition = _manager().task_index[task].cfg | PREPROCESSED.get(task, {})
    templates = [definition.get(name) for name in ("doc_to_text", "doc_to_target", "doc_to_choice")]
    parse = Environment().parse
    return {name for text in templates if isinstance(text, str) for name in meta.find_undeclared_variables(parse(text))}


def _fetch(task: str, manager: Any) -> None:
    try:
        manager.load([task])
    except Exception as error:  # of several libraries; whichever it is, the data was not fetched
        reason = str(error).splitlines()[0]
        raise UserError(
            f"zero-shot task {task}: {reason}; give a folder with zeroshot/{task}/validation.jsonl: --data_dir"
        ) from None


def _local_data(task: str, data_dir: str) -> Path:
    return Path(data_dir).expanduser() / "zeroshot" / task / "validation.jsonl"


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    data_dir: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Accuracy on each task.

    Args:
        tasks: names of lm-evaluation-harness such as piqa, hellaswag, winogrande, arc_easy.
        data_dir: folder with `zeroshot/TASK/validation.jsonl`; None asks the hub.
        limit: number of questions of each task, from the first.

    Returns:
        By task: n, acc and its standard error, and acc_norm (answers compared by log-likelihood per byte) where the
        task has it. Nothing in a process that is not the first: the harness gives it no results.

    Raises:
        UserError: an unknown task, data that is not there or cannot be read, or the harness fails on it.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    check_tasks(tasks, data_dir, limit)
    manager = _manager()
    with TemporaryDirectory() as folder:
        specs = tasks
        if data_dir is not None:
            specs = [str(_with_local_data(task, manager, data_dir, Path(folder))) for task in tasks]
        try:
            with bars_of_libraries():
                found = simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=specs,
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=False,
                )
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            files = ", ".join(str(_local_data(task, data_dir)) for task in tasks) if data_dir else "the hub's data"
            raise UserError(
                f"zero-shot tasks {', '.join(tasks)}: lm-evaluation-harness failed on {files} "
                f"({type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}); leave one out to find it"
            ) from error
    if found is None:
        return {}
    return {task: _figures(found["results"][task], found["n-samples"][task]) for task in tasks}


def _with_local_data(task: str, manager: Any, data_dir: str, folder: Path) -> Path:
    """A definition that includes the harness's own and names another place for the data."""
    definition = {
        "include": str(manager.task_index[task].yaml_path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(_local_data(task, data_dir).resolve())}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    } | PREPROCESSED.get(task, {})
    path = folder / f"{task}.yaml"
    path.write_text(json.dumps(definition))  # JSON is YAML
    return path


def _figures(result: dict[str, Any], samples: dict[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {"n": samples["effective"]}
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in result:
            accuracy = found[metric] = result[f"{metric},none"]
            found[f"{metric}_standard_error"] = (accuracy * (1 - accuracy) / found["n"]) ** 0.5
    return found

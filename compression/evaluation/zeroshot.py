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

from compression.runtime import UserError

# What a task's definition says otherwise of data that is pre-processed already.
PREPROCESSED = {"hellaswag": {"process_docs": None, "doc_to_target": "gold"}}


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager  # takes seconds, and many runs need none

    return TaskManager()


def check_tasks(tasks: list[str], data_dir: str | None) -> None:
    """Raise UserError for an unknown task, or one whose data cannot be had; fetches data from the hub."""
    for task in tasks if data_dir is not None else ():
        if not _local_data(task, data_dir).is_file():
            raise UserError(
                f"--data_dir {data_dir}: has no zeroshot/{task}/validation.jsonl; leave it out to ask the hub"
            )
    manager = _manager()
    unknown = set(tasks) - set(manager.all_subtasks)
    if unknown:
        raise UserError(f"zero-shot task {min(unknown)!r}: lm-evaluation-harness has none of that name")
    for task in tasks if data_dir is None else ():
        _fetch(task, manager)


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
        limit: the first so many questions of each task only.

    Returns:
        By task: n, acc and its standard error, and acc_norm (answers compared by log-likelihood per byte) where the
        task has it.

    Raises:
        UserError: an unknown task, or data that is not there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    check_tasks(tasks, data_dir)
    manager = _manager()
    with TemporaryDirectory() as folder:
        specs = tasks
        if data_dir is not None:
            specs = [str(_with_local_data(task, manager, data_dir, Path(folder))) for task in tasks]
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=specs, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
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

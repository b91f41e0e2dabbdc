"""How well a classifier classifies: its task's metrics, F1, AUC, confusion matrix."""

from typing import Any

import torch
from sklearn.metrics import confusion_matrix, roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel

from compression.batching import batches, model_inputs
from compression.checkpoint import check_positions
from compression.classifier.data import Encoded
from compression.classifier.parts import Split
from compression.classifier.tasks import METRICS, Metric, Task, listed
from compression.runtime import UserError


def reported_metrics(task: Task) -> dict[str, Metric]:
    """What reports show of a task: its own metrics, F1 where it has two labels, macro F1."""
    usual = ("f1", "f1_macro") if len(task.labels) == 2 else ("f1_macro",)
    return task.metrics | {name: METRICS[name] for name in usual}


def describe_task(task: Task) -> dict[str, Any]:
    """What a report's JSON says about a task; titles of metrics by their names."""
    metrics = {name: metric.title for name, metric in reported_metrics(task).items()}
    return {"name": task.name, "labels": list(task.labels), "metrics": metrics, "primary": task.primary}


@torch.inference_mode()
def predict(model: PreTrainedModel, encoded: Encoded, pad_token_id: int, task: Task, batch_size: int = 64) -> Tensor:
    """Logits [rows, labels] on the CPU, in the order of the rows, in evaluation mode and full precision.

    Raises:
        UserError: the model has another number of labels or too few positions, or a logit is not finite.
    """
    name, labels = model.name_or_path or type(model).__name__, model.config.num_labels
    if labels != len(task.labels):
        raise UserError(f"{name}: has {labels} labels; allowed are those of {task.name}, {listed(task.labels)}")
    check_positions(model, "max_length", int(encoded.lengths.max()))
    was_training = model.training
    model.eval()
    logits = torch.empty(len(encoded), labels)
    for batch in batches(encoded, batch_size, pad_token_id):
        inputs = {key: tensor.to(model.device) for key, tensor in model_inputs(model, batch).items()}
        logits[batch["rows"]] = model(**inputs).logits.float().cpu()
    model.train(was_training)
    if bad := int((~logits.isfinite()).any(-1).sum()):
        raise UserError(f"{name}: its logits are not finite on {bad} of {len(encoded)} sentences; make the model again")
    return logits


def score(logits: Tensor, labels: Tensor, task: Task) -> float:
    """The task's primary metric, see `classification_metrics`."""
    return float(task.metrics[task.primary].function(labels.numpy(), logits.argmax(-1).numpy()))


def classification_metrics(logits: Tensor, labels: Tensor, task: Task) -> dict[str, Any]:
    """All metrics of a classifier.

    Args:
        logits: [rows, labels]. labels: [rows].

    Returns:
        n, accuracy and its binomial standard error sqrt(p (1 - p) / n), the other metrics of `reported_metrics`, of two
        labels the area under the ROC curve (else, and where only one class occurs, None), the confusion matrix
        [truth, predicted].
    """
    predicted, truth = logits.argmax(-1).numpy(), labels.numpy()
    scores = {name: float(metric.function(truth, predicted)) for name, metric in reported_metrics(task).items()}
    accuracy, places = scores.pop("accuracy"), range(len(task.labels))
    has_auc = len(places) == 2 and 0 < truth.sum() < len(truth)
    return {
        "n": len(truth),
        "accuracy": accuracy,
        "accuracy_standard_error": (accuracy * (1 - accuracy) / len(truth)) ** 0.5,
        **scores,
        "roc_auc": float(roc_auc_score(truth, logits.softmax(-1)[:, 1].numpy())) if has_auc else None,
        "confusion_matrix": confusion_matrix(truth, predicted, labels=list(places)).tolist(),
    }


LISTED_DISAGREEMENTS, LISTED_CHARACTERS = 20, 400
"""Of the rows on which two models disagree so many are listed at most, each up to so many characters."""


def disagreements(split: Split, logits: Tensor, baseline: Tensor) -> dict[str, Any]:
    """On which rows a model's class is another than the baseline's.

    Args:
        logits, baseline: [rows, labels], of the model and of the baseline.

    Returns:
        n: how many; examples: those of them whose probabilities are furthest apart, with the text (a pair's joined by
        " | "), and the class by its place: the true one, the model's, the baseline's.
    """
    predicted, expected = logits.argmax(-1), baseline.argmax(-1)
    apart = (logits.softmax(-1) - baseline.softmax(-1)).abs().sum(-1)
    rows = sorted((predicted != expected).nonzero().flatten().tolist(), key=lambda row: -apart[row].item())
    examples = [
        {
            "text": _clipped(split.sentences[row]),
            "label": split.labels[row],
            "predicted": int(predicted[row]),
            "baseline": int(expected[row]),
        }
        for row in rows[:LISTED_DISAGREEMENTS]
    ]
    return {"n": len(rows), "examples": examples}


def _clipped(text: str | tuple[str, ...]) -> str:
    whole = text if isinstance(text, str) else " | ".join(text)
    return whole if len(whole) <= LISTED_CHARACTERS else f"{whole[: LISTED_CHARACTERS - 1]}…"


def paired_difference(correct: Tensor, baseline_correct: Tensor) -> dict[str, float]:
    """Difference in accuracy between two models on the same rows, in points, and its standard error.

    The rows are paired, so the error is that of the mean of the per-row differences: smaller than what the errors of
    the two accuracies suggest, because models mostly fail on the same rows.

    Args:
        correct, baseline_correct: [rows] bool, whether each model is right.
    """
    difference = 100 * (correct.double() - baseline_correct.double())
    error = difference.std(correction=0) / len(difference) ** 0.5
    return {"accuracy_points": difference.mean().item(), "accuracy_points_standard_error": error.item()}

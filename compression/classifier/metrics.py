"""How well a classifier classifies: accuracy, F1, AUC, confusion matrix."""

from typing import Any

import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel

from compression.batching import batches, model_inputs
from compression.checkpoint import check_positions
from compression.classifier.tasks import Encoded
from compression.runtime import UserError


@torch.inference_mode()
def predict(model: PreTrainedModel, encoded: Encoded, pad_token_id: int, batch_size: int = 64) -> Tensor:
    """Logits [rows, 2] on the CPU, in the order of the rows, in evaluation mode and full precision.

    Raises:
        UserError: the model has another number of labels or too few positions, or a logit is not finite.
    """
    name, labels = model.name_or_path or type(model).__name__, model.config.num_labels
    if labels != 2:
        raise UserError(f"{name}: has {labels} labels; allowed is 2, for the sentences are negative or positive")
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


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Metrics of a two-class classifier.

    Args:
        logits: [rows, 2]. labels: [rows], 0 negative, 1 positive.

    Returns:
        n, accuracy and its binomial standard error sqrt(p (1 - p) / n), F1 and area under the ROC curve of the
        positive class (None where only one class occurs), confusion matrix [[tn, fp], [fn, tp]].
    """
    predicted, truth = logits.argmax(-1).numpy(), labels.numpy()
    accuracy = accuracy_score(truth, predicted)
    positive = logits.softmax(-1)[:, 1].numpy()
    return {
        "n": len(truth),
        "accuracy": accuracy,
        "accuracy_standard_error": (accuracy * (1 - accuracy) / len(truth)) ** 0.5,
        "f1": f1_score(truth, predicted, zero_division=0.0),
        "roc_auc": roc_auc_score(truth, positive) if 0 < truth.sum() < len(truth) else None,
        "confusion_matrix": confusion_matrix(truth, predicted, labels=[0, 1]).tolist(),
    }


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

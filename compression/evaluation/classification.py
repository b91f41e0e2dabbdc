"""How well a classifier classifies: accuracy, F1, AUC, confusion matrix."""

import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel

from compression.data import Encoded, batches


@torch.inference_mode()
def predict(model: PreTrainedModel, encoded: Encoded, pad_token_id: int, batch_size: int = 64) -> Tensor:
    """Logits [rows, classes] on the CPU, in the order of the rows, in evaluation mode and full precision."""
    was_training = model.training
    model.eval()
    logits = torch.empty(len(encoded), model.config.num_labels)
    for batch in batches(encoded, batch_size, pad_token_id):
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        logits[batch["rows"]] = model(**inputs).logits.float().cpu()
    model.train(was_training)
    return logits


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float | int | list[list[int]]]:
    """Metrics of a two-class classifier.

    Args:
        logits: [rows, 2]. labels: [rows], 0 negative, 1 positive.

    Returns:
        n, accuracy, f1 and auc of the positive class, confusion_matrix [[tn, fp], [fn, tp]].
    """
    predicted, truth = logits.argmax(-1).numpy(), labels.numpy()
    return {
        "n": len(truth),
        "accuracy": accuracy_score(truth, predicted),
        "f1": f1_score(truth, predicted),
        "auc": roc_auc_score(truth, logits.softmax(-1)[:, 1].numpy()),
        "confusion_matrix": confusion_matrix(truth, predicted, labels=[0, 1]).tolist(),
    }

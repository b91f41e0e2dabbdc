"""Losses that teach a student what its teacher knows, and the teacher's outputs, computed once per data set."""

import hashlib
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from compression.checkpoint import identify, load_tensors, new_folder, save_tensors
from compression.data import Encoded
from compression.evaluation.classification import predict
from compression.runtime import log, processes


def soft_label_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of the distributions softened by temperature T, mean over rows.

    The factor T^2 keeps the size of the gradient independent of T (Hinton et al. 2015, "Distilling the Knowledge in a
    Neural Network").

    Args:
        student_logits, teacher_logits: [rows, classes].
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float
) -> dict[str, Tensor]:
    """alpha * soft-label loss + (1 - alpha) * cross-entropy, and its two terms."""
    soft = soft_label_loss(student_logits, teacher_logits, temperature)
    hard = F.cross_entropy(student_logits.float(), labels)
    return {"loss": alpha * soft + (1 - alpha) * hard, "soft_label_loss": soft, "cross_entropy": hard}


def teacher_logits(model: PreTrainedModel, folder: Path, encoded: Encoded, pad_token_id: int) -> Tensor:
    """The teacher's logits [rows, classes] on a data set, computed once and kept.

    They are stored beside the teacher's folder, named by a hash of its weights and of the token ids, so that later
    stages and resumed runs read them.
    """
    key = hashlib.sha256(f"{identify(folder)['sha256']} {encoded.digest()}".encode()).hexdigest()[:16]
    stored = Path(folder).parent / f".teacher_logits_{key}"
    # The first process computes, the others wait and read.
    with processes().main_process_first():
        if not stored.exists():
            log.info("Computing the teacher's logits on %d sentences, once", len(encoded))
            logits = predict(model, encoded, pad_token_id)
            with new_folder(stored) as temporary:
                save_tensors(temporary / "logits.safetensors", {"logits": logits})
    return load_tensors(stored / "logits.safetensors")["logits"]

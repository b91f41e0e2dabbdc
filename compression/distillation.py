"""Losses that teach a student what its teacher knows, and the teacher's outputs, computed once per data set."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.checkpoint import identify, load_tensors, save_tensors
from compression.data import Encoded
from compression.evaluation.classification import predict
from compression.files import new_folder
from compression.integrity import seal, verify
from compression.outputs import KEPT_LOGITS
from compression.runtime import UserError, log, processes

LOGITS = "logits.safetensors"


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


def layer_map(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher's layer for each of the student's layers, evenly spread; layers count from 1, the last is the last.

    As hidden states are counted: 0 would be the embeddings' output.
    """
    return [max(1, round(layer * teacher_layers / student_layers)) for layer in range(1, student_layers + 1)]


def hidden_state_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor, projection: nn.Module | None = None
) -> Tensor:
    """Mean squared difference of hidden states: mean over features, real tokens, rows and layers.

    Args:
        student: one [rows, length, width] per layer. teacher: the same for the layers mapped to them, of the teacher's
            width.
        attention_mask: [rows, length], 1 for real tokens.
        projection: maps the student's width to the teacher's (Jiao et al. 2020, "TinyBERT"); None where they agree.
    """
    losses = []
    for mine, target in zip(student, teacher, strict=True):
        mine = mine if projection is None else projection(mine)
        per_token = (mine.float() - target.float()).square().mean(-1)
        losses.append(((per_token * attention_mask).sum(-1) / attention_mask.sum(-1)).mean())
    return torch.stack(losses).mean()


def teacher_logits(model: PreTrainedModel, folder: Path, encoded: Encoded, pad_token_id: int, cache: Path) -> Tensor:
    """The teacher's logits [rows, classes] on a data set, computed once and kept.

    Args:
        folder: where the teacher was loaded from.
        cache: the folder they are kept in, under a hash of the teacher's weights and of the token ids, so that later
            stages and resumed runs read them. Where they are damaged they are computed again.
    """
    key = hashlib.sha256(f"{identify(folder)['sha256']} {encoded.digest()}".encode()).hexdigest()[:16]
    stored = Path(cache) / f"{KEPT_LOGITS}{key}"
    # The first process computes, the others wait and read.
    with processes().main_process_first():
        if not _is_whole(stored):
            log.info("Computing the teacher's logits on %d sentences, once", len(encoded))
            logits = {"logits": predict(model, encoded, pad_token_id)}
            with new_folder(stored) as temporary:
                save_tensors(temporary / LOGITS, logits)
                seal(temporary, {"stage": "teacher_logits"})
    return load_tensors(stored / LOGITS)["logits"]


def _is_whole(stored: Path) -> bool:
    """Whether kept logits are there and as they were written."""
    try:
        verify(stored)
    except UserError as problem:
        log.info("%s", problem)
        return False
    return (stored / LOGITS).is_file()

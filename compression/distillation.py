"""Losses that teach a student what its teacher knows, and the teacher's outputs, computed once per data set."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def soft_label_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The mean of `soft_label_losses` over rows."""
    return soft_label_losses(student_logits, teacher_logits, temperature).mean()


def soft_label_losses(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of the distributions softened by temperature T, for each row [rows].

    The factor T^2 keeps the size of the gradient independent of T (Hinton et al. 2015, "Distilling the Knowledge in a
    Neural Network").

    Args:
        student_logits, teacher_logits: [rows, classes].
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def largest_label_losses(student_logits: Tensor, largest: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """`soft_label_losses` where only the K largest of the teacher's probabilities are known, [rows].

    The KL divergence of K + 1 outcomes: the K classes, and any other. It is the divergence over all classes where K
    is their number, and never more than that otherwise: how the teacher spreads the rest is not learned.

    Args:
        student_logits: [rows, classes].
        largest: the teacher's log-probabilities at this temperature, [rows, K]. classes: which these are, [rows, K].
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    known = F.kl_div(student.gather(-1, classes), largest, reduction="none", log_target=True).sum(-1)
    if largest.shape[-1] < student.shape[-1]:
        rest = (1 - largest.exp().sum(-1)).clamp(min=0)
        known = known + torch.xlogy(rest, rest) - rest * student.scatter(-1, classes, -torch.inf).logsumexp(-1)
    return temperature**2 * known


def relative_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 of each row [rows].

    A few tokens and the later layers of a language model have states that are larger by orders of magnitude (Sun et al.
    2024, "Massive Activations in Large Language Models"); relative to their own size all count alike, as layers do in
    the SquareHead loss (Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models").

    Args:
        student, teacher: [rows, width].
    """
    target = teacher.float()
    size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (student.float() - target).square().sum(-1) / size


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

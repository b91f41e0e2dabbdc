"""Fine-tuning a classifier on labels, with what keeps it general: layer-wise rates, R-Drop, the best epoch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.batching import model_inputs
from compression.distillation import soft_label_loss
from compression.schedule import EarlyStopping
from compression.structures import depths_of
from compression.training import BestEpoch, Recipe, Training


@dataclass(frozen=True)
class Smoothing:
    """What keeps fine-tuning close to what the encoder knows, and its predictions smooth."""

    layer_decay: float
    r_drop: float


class FineTuning(Recipe):
    """The recipe of stage 1: cross-entropy on the labels.

    With `layer_decay` the learning rate falls from layer to layer towards the embeddings (Clark et al. 2020,
    "ELECTRA"). With `r_drop` each row passes twice, with other dropout, and r_drop / 2 times the mean of the two KL
    divergences between the two predictions is added (Liang et al. 2021, "R-Drop", with their loss halved).

    Args:
        model: what is trained; its best epoch is kept in `best`.
        rows: training sentences.
        metric: chooses the best epoch, on the sentences held out of training.
    """

    best: BestEpoch

    def __init__(
        self,
        model: PreTrainedModel,
        training: Training,
        smoothing: Smoothing,
        rows: int,
        early_stopping: EarlyStopping,
        metric: str = "accuracy",
    ):
        super().__init__(training, rows)
        self.smoothing, self.criterion = smoothing, f"selection_{metric}"
        self.depths = depths_of(model)
        self.best = BestEpoch(model, early_stopping)

    def rate_share(self, name: str) -> float:
        return self.smoothing.layer_decay ** self.depths[name]

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        inputs, labels, weight = model_inputs(model, batch), batch["labels"], self.smoothing.r_drop
        if not weight:
            return {"loss": F.cross_entropy(model(**inputs).logits.float(), labels)}
        logits = model(**{name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}).logits.float()
        cross_entropy = F.cross_entropy(logits, torch.cat([labels, labels]))
        one, other = logits.chunk(2)
        divergence = (soft_label_loss(one, other, 1.0) + soft_label_loss(other, one, 1.0)) / 2
        loss = cross_entropy + weight / 2 * divergence
        return {"loss": loss, "cross_entropy": cross_entropy, "r_drop": divergence}

    def after_epoch(self, epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
        self.best.update(metrics[self.criterion])
        return {}

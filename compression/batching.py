"""Rows of token ids into batches: padding, order, and what a model takes of a batch."""

import inspect
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TrainingData(Protocol):
    """What the training loop needs of its data: rows of token ids, however they came about."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, [rows]."""

    @property
    def weights(self) -> Tensor:
        """What each row counts in the mean loss of a batch, whole numbers above 0 [rows]."""

    def __len__(self) -> int: ...

    def collate(self, rows: list[int], pad_token_id: int) -> dict[str, Tensor]:
        """A batch of these rows, what the recipe's loss takes."""


def pad(ids: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of token ids as input_ids and attention_mask [rows, length of the longest]."""
    input_ids = pad_rows(ids, pad_token_id)
    lengths = torch.tensor([len(row) for row in ids])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()}


def pad_rows(rows: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def model_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a classifier takes of a batch, on the batch's device: all its inputs but the labels.

    Token types go to the architectures that have them (BERT), not to the others (DistilBERT).

    Args:
        model: may be wrapped for several processes.
    """
    takes = inspect.signature(type(getattr(model, "module", model)).forward).parameters
    return {name: batch[name] for name in INPUTS if name in batch and name in takes}


def batches(encoded: TrainingData, batch_size: int, pad_token_id: int) -> Iterator[dict[str, Tensor]]:
    """Batches for evaluation, in the order of length; `rows` says which rows of `encoded` each one holds."""
    for rows in encoded.lengths.argsort(stable=True).split(batch_size):
        yield encoded.collate(rows.tolist(), pad_token_id) | {"rows": rows}


def length_grouped_order(lengths: Tensor, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows of each training batch of an epoch: rows of like length together, in random order.

    The shuffled rows are cut into groups of 50 batches; within a group they are sorted by length and cut into batches,
    and the batches are shuffled. Little padding, and still a new composition every epoch.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator)
    batch_rows = []
    for group in order.split(50 * batch_size):
        ranked = group[lengths[group].argsort(descending=True, stable=True)]
        batch_rows += [rows.tolist() for rows in ranked.split(batch_size)]
    return [batch_rows[index] for index in torch.randperm(len(batch_rows), generator=generator)]

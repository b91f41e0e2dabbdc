"""Rows of token ids into batches: padding, order, and what a model takes of a batch."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from compression.progress import progress


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


def pad(inputs: Mapping[str, Sequence[Sequence[int]]], rows: list[int], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of rows, padded to the longest of them: each input and the attention mask [rows, length].

    Args:
        inputs: by name what a tokenizer gives, all rows without padding. Token ids are padded with `pad_token_id`,
            what there is beside them with zeros.
    """
    lengths = torch.tensor([len(inputs["input_ids"][row]) for row in rows])
    batch = {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
    for name, values in inputs.items():
        tensors = [torch.tensor(values[row]) for row in rows]
        padding = pad_token_id if name == "input_ids" else 0
        batch[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)
    return batch


def model_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes of a batch, on the batch's device: all but the labels, its loss is computed outside of it.

    Token types go to the models that tell several apart (BERT), not to the others (DistilBERT, RoBERTa).

    Args:
        model: may be wrapped for several processes.
    """
    whole: nn.Module = getattr(model, "module", model)
    takes = inspect.signature(whole.forward).parameters.keys() - {"labels"}
    if getattr(getattr(whole, "config", None), "type_vocab_size", 2) < 2:
        takes -= {"token_type_ids"}
    return {name: tensor for name, tensor in batch.items() if name in takes}


def batches(
    encoded: TrainingData, batch_size: int, pad_token_id: int, description: str = "predictions"
) -> Iterator[dict[str, Tensor]]:
    """Batches for evaluation, in the order of length; `rows` says which rows of `encoded` each one holds.

    Args:
        description: of what is done with them, for the progress bar.
    """
    for rows in progress(encoded.lengths.argsort(stable=True).split(batch_size), description):
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

"""A language model's checkpoint, read and written by processes of which each holds a part of the model."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import load_skeleton, load_tokenizer, save_folder, write_description
from compression.decoder import Decoder, decoder_of
from compression.llm.head import Within
from compression.sharding import fill, own_part, shard, whole, within
from compression.weights import MAX_SHARD_SIZE, Shards, ShardWriter, check_finite


def load_unfilled(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint's model without its weights, see `checkpoint.load_skeleton`, and its tokenizer."""
    model, _ = load_skeleton(folder, dtype)
    model.tie_weights()
    return model, load_tokenizer(folder, model)


def spread(module: Within, folder: Path, more: Iterable[tuple[str, Tensor]]) -> None:
    """Spread a model over all processes and fill it with the weights of a checkpoint, of which each reads its part.

    Args:
        module: holds the model, see `load_unfilled`, which may have got adapters.
        more: values of the adapters, by name.

    Raises:
        UserError: a weight is not finite, or the model is none that can be trained here.
    """
    model = module.model
    shard(module, Decoder(model).layers)
    fill(model, chain(_stored(model, folder), more))
    model.tie_weights()  # the weights came as new tensors
    parts = {name: own_part(parameter) for name, parameter in model.named_parameters()}
    check_finite(parts, str(folder), "make or fetch that folder again")
    within(module, lambda: decoder_of(model))


def _stored(model: PreTrainedModel, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint under the names that they have in a model, mapped into memory one by one."""
    shards = Shards(folder)
    for name, _ in model.named_parameters():
        stored = name.replace(".base_layer.", ".")
        if "lora_" not in name:
            yield name, shards.tensors([stored])[stored]


def save_spread(
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: dict[str, Any],
    files: dict[str, Any],
) -> None:
    """Write a model that is spread over processes: see `checkpoint.save_checkpoint`.

    Its weights are gathered one by one: no process holds more of the others' than the largest one.
    """

    def weights() -> Iterator[tuple[str, Tensor]]:
        return ((name, whole(parameter.detach())) for name, parameter in model.named_parameters())

    def write(folder: Path) -> None:
        write_description(model, folder)
        tokenizer.save_pretrained(folder)
        writer = ShardWriter(folder, MAX_SHARD_SIZE, len(list(model.parameters())))
        for name, tensor in weights():
            check_finite({name: tensor}, f"the model for {output}", "nothing was saved")
            writer.add(name, tensor)
        writer.close()

    def take_part() -> None:
        for _ in weights():
            pass

    save_folder(output, write, stage, files, others=take_part)

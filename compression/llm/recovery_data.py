"""What a recovery training is trained on, and what each of its epochs is judged by."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import check_positions
from compression.llm.mixture import Mixture, parse_mixture
from compression.llm.recovery_settings import Recovery
from compression.llm.rows import Packed, Sequences, of_instructions, of_windows, packed, read_instructions, taken
from compression.runtime import log


def training_data(
    recovery: Recovery, data_dir: str | None, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[Sequences | Packed, dict[str, Any]]:
    """What is trained on, and what a report says about it.

    Raises:
        UserError: windows that are longer than the model's positions, or data that is malformed or not there.
    """
    check_positions(model, "max_length", recovery.max_length)
    if (path := recovery.instructions) is not None:
        train = _instructions(recovery, tokenizer, read_instructions(path))
        described: dict[str, Any] = {"name": path.name, "source": "a local file"}
    else:
        texts = Mixture(recovery.texts, "train", data_dir, tokenizer)
        train = _windows_of(recovery, texts)
        described = {"name": texts.name, "source": texts.source, "texts": texts.describe()}
    sizes = {"rows": len(train), "tokens": int(train.weights.sum()), "tokens_read": int(train.lengths.sum())}
    said = (described["name"], described["source"], *sizes.values())
    log.info("Training data: %s (%s), %d rows, %d tokens to predict, %d in all", *said)
    if not recovery.packing:
        return train, described | sizes
    joined = packed(train, recovery.max_length)
    full = sizes["tokens_read"] / (len(joined) * recovery.max_length)
    log.info("Packed into %d windows of %d tokens, %.1f %% full", len(joined), recovery.max_length, 100 * full)
    return joined, described | sizes | {"windows": len(joined)}


def _instructions(recovery: Recovery, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> Sequences:
    """As many of the rows as are asked for, or as have the tokens that are."""
    length, seed = recovery.max_length, recovery.training.seed
    if recovery.tokens:
        every = of_instructions(tokenizer, rows, length, recovery.train_on_inputs)
        return taken(every, recovery.tokens, seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = [rows[row] for row in order[: recovery.finetune_samples].sort().values]
    return of_instructions(tokenizer, chosen, length, recovery.train_on_inputs)


def _windows_of(recovery: Recovery, texts: Mixture) -> Sequences:
    """As many windows of the texts as are asked for, or as have the tokens that are; the last of these is cut."""
    length, seed = recovery.max_length, recovery.training.seed
    if not recovery.tokens:
        return of_windows(texts.sample("training", length, recovery.finetune_samples, seed))
    count = -(-recovery.tokens // (length - 1))
    every = of_windows(texts.repeated("training", length, count, seed))
    return every.shortened(count * (length - 1) - recovery.tokens)


def validation_windows(recovery: Recovery, data_dir: str | None, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows [count, length] of the texts that each epoch is judged by."""
    default = recovery.dataset if recovery.instructions is None else "wikitext2"
    flag = "--validation_dataset" if recovery.validation_dataset else "--dataset"
    names = parse_mixture(recovery.validation_dataset or default, flag)
    texts = Mixture(names, "validation", data_dir, tokenizer, flag)
    return texts.sample("validation", recovery.max_length, recovery.validation_samples, recovery.training.seed)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are filled up with; it is masked, so any token will do where the tokenizer has none for it."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)

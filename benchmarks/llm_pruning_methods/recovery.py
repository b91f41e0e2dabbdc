"""The same recovery for every method: all weights, the same tokens in the same order, one learning rate."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.config import pick
from compression.llm.iterate import cast_weights
from compression.llm.recovery import LanguageModelling
from compression.llm.recovery_data import padding_token, training_data
from compression.llm.recovery_settings import Recovery
from compression.training import clean_up, fit
from post_training import PostTrainingConfig


def recovery_of(tokens: int, learning_rate: float, length: int, seed: int) -> Recovery:
    """How models are trained: as post_training.py does by default, but with all weights.

    Args:
        tokens: to predict. length: of a window, in tokens.
    """
    settings = PostTrainingConfig.make(
        finetune_method="full", tokens=tokens, learning_rate=learning_rate, max_length=length, seed=seed
    )
    return pick(Recovery, settings).in_one_epoch()


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recovery: Recovery, data_dir: str | None, states: Path
) -> None:
    """Train a model in place; its weights are in float32 meanwhile.

    Args:
        states: folder of what the training keeps on its way; it is removed at the end.
    """
    dtype = model.dtype
    rows, _ = training_data(recovery, data_dir, tokenizer, model)
    cast_weights(model.requires_grad_(True), torch.float32)
    recipe = LanguageModelling(recovery, len(rows))
    fit(model, recipe, rows, lambda _: {}, states, padding_token(tokenizer), recovery.as_dict())
    clean_up(states)
    cast_weights(model.eval(), dtype)

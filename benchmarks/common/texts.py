"""Texts that several benchmarks prune and measure on."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compression.llm.text import load_corpus, sample_windows, tokenize

# Gives so many windows, by a seed: token ids [count, length].
Draw = Callable[[int, int], Tensor]


def wikitext2(tokenizer: PreTrainedTokenizerBase, data_dir: str | None, length: int) -> tuple[Draw, Draw]:
    """What draws windows of the train part, and of the validation part."""
    parts = (tokenize(tokenizer, load_corpus("wikitext2", part, data_dir)) for part in ("train", "validation"))
    train, validation = (partial(sample_windows, ids, length) for ids in parts)
    return train, validation

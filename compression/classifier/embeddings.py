"""Smaller tables of word embeddings: fewer rows (a trimmed vocabulary), or two narrow factors in a table's place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.classifier.vocabulary import FLAG, Places, split, trimmed
from compression.config import AtLeast, Settings
from compression.modeling import FactorizedEmbedding
from compression.runtime import UserError, log
from compression.structures import family_of

Texts = Sequence[str | tuple[str, ...]]
"""Single texts, or pairs of them."""


@dataclass
class EmbeddingSettings(Settings):
    """How the table of word embeddings, most of a small classifier's weights, is made smaller."""

    embedding_rank: Annotated[int | None, AtLeast(1)] = None
    """Numbers that the table of word embeddings holds for each token; a projection makes them as wide as the model. By
    default the table stays whole."""
    trim_vocabulary: bool = False
    """Leave out tokens that no training text needs; every character stays, so that any word can still be spelt."""

    def apply(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts
    ) -> PreTrainedTokenizerBase:
        """Make a classifier's table smaller, in place; returns the tokenizer that belongs to it from then on.

        Args:
            model: dense or pruned, not quantized.
            tokenizer: it is left as it is.
            texts: what the model is trained on.

        Raises:
            UserError: the rank is no smaller than the table's, or the tokenizer cannot be trimmed.
        """
        single = list(dict.fromkeys(chain.from_iterable([text] if isinstance(text, str) else text for text in texts)))
        if self.trim_vocabulary:
            tokenizer = trim(model, tokenizer, single)
        if self.embedding_rank is not None:
            # Once more, so that tokens that no training text has count for something.
            factorize(model, self.embedding_rank, 1 + token_counts(tokenizer, single, table_of(model).num_embeddings))
        return tokenizer


def trim(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Take the rows of tokens that no text needs out of a model; returns the tokenizer without these tokens.

    Raises:
        UserError: the tokenizer cannot be trimmed.
    """
    special = {
        name: value
        for name, value in vars(model.config).items()
        if name.endswith("_token_id") and isinstance(value, int)
    }
    needed = set(special.values())
    padding, before = model.config.pad_token_id, len(tokenizer)
    behind_padding = family_of(model).behind_padding
    if behind_padding:  # positions are counted from behind the padding's id, which therefore must not change
        needed |= set(range(padding))
    tokenizer, places = trimmed(tokenizer, texts, needed)
    if behind_padding and places.get(padding) != padding:
        raise UserError(f"{FLAG}: some ids up to the padding token's, {padding}, have no token; leave the flag out")
    keep_rows(model, places)
    for name, value in special.items():
        setattr(model.config, name, places.get(value))
    log.info("Vocabulary: %d of %d tokens stay", len(places), before)
    return tokenizer


def table_of(model: PreTrainedModel) -> nn.Embedding:
    """The table that has a row for each token; of a factorized one the narrow factor."""
    found: Any = model.get_input_embeddings()
    return found.table if isinstance(found, FactorizedEmbedding) else found


@torch.no_grad()
def keep_rows(model: PreTrainedModel, places: Places) -> None:
    """Keep the embeddings of some tokens, in place.

    Args:
        places: old id -> new id, in the order of both.
    """
    table = table_of(model)
    table.weight = nn.Parameter(table.weight[list(places)].clone())
    table.num_embeddings = model.config.vocab_size = len(places)
    if table.padding_idx is not None:
        table.padding_idx = places.get(table.padding_idx)


@torch.no_grad()
def factorize(model: PreTrainedModel, rank: int, weights: Tensor) -> None:
    """Replace the table of word embeddings, in place, by the best product of two factors [rows, rank] @ [rank, width].

    Best is the least squared error, a row's counted by its weight: of a table whose rows are multiplied with the roots
    of the weights it is the truncated SVD (Eckart and Young 1936). Hsu et al. 2022, "Language model compression with
    weighted low-rank factorization", weigh rows by Fisher information.

    Args:
        weights: [rows], at least 0.

    Raises:
        UserError: the rank is no smaller than that of the table.
    """
    found: Any = model.get_input_embeddings()
    before = table_of(model)
    rows, width = before.weight.shape
    if rank >= min(rows, width):
        allowed = f"allowed is 1 to {min(rows, width) - 1}"
        raise UserError(f"--embedding_rank {rank}: {allowed}, the table of word embeddings is {rows} x {width}")
    table = before.weight if found is before else before.weight @ found.projection.weight.T
    directions = principal_directions(table, weights.to(table.device))[:, :rank]
    factors = FactorizedEmbedding(rows, found.embedding_dim, rank, before.padding_idx).to(table.device)
    factors.table.weight.copy_(table @ directions)
    factors.projection.weight.copy_(directions)
    model.set_input_embeddings(factors)
    model.config.embedding_rank = rank


def principal_directions(table: Tensor, weights: Tensor) -> Tensor:
    """The right singular vectors [width, width] of a table [rows, width], the largest singular value's first.

    They are the eigenvectors of the columns' products with one another, which are few however many rows there are.

    Args:
        weights: [rows], how often each row counts.
    """
    products = table.T @ (weights.to(table.dtype).unsqueeze(1) * table)
    _, directions = torch.linalg.eigh(products.double())
    return directions.flip(1).to(table.dtype)


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int) -> Tensor:
    """How often each token is in some texts, [tokens]."""
    return torch.bincount(torch.tensor([*chain.from_iterable(split(tokenizer, texts))]), minlength=tokens)

"""Tiny random models and a tiny slice of real-looking data that the tests share."""

import os

# Two test processes on two cores must not fight over them, and bitwise repeatability needs a fixed thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from compression import structures

HIDDEN, HEADS, HEAD_SIZE, NEURONS, LAYERS, VOCABULARY = 32, 4, 8, 48, 3, 120
# What stays of the tiny models in most tests: layers of different widths.
KEPT = {
    structures.HEADS: [torch.tensor(row).bool() for row in ([1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0])],
    structures.NEURONS: [torch.arange(48) % 2 == 0, torch.arange(48) < 8, torch.ones(48, dtype=torch.bool)],
}


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=2, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tiny_distilbert(seed: int = 0) -> DistilBertForSequenceClassification:
    torch.manual_seed(seed)
    config = DistilBertConfig(
        dim=HIDDEN, n_heads=HEADS, hidden_dim=NEURONS, n_layers=LAYERS, vocab_size=VOCABULARY,
        max_position_embeddings=64, num_labels=2, initializer_range=0.2,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config).eval()


MODELS = {"bert": tiny_bert, "distilbert": tiny_distilbert}


@pytest.fixture(params=sorted(MODELS))
def tiny_model(request):
    """A tiny dense classifier of each supported family."""
    return MODELS[request.param]()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A BERT tokenizer whose words are the letters a (id 5) to z."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def batch():
    """Token ids [5, 9] with padding of different lengths."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, VOCABULARY, (5, 9), generator=generator)
    attention_mask = (torch.arange(9) < torch.tensor([9, 7, 4, 9, 2])[:, None]).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}

"""A language model with random weights, written tensor by tensor; its tokenizer, and text in its words."""

import random
from math import sqrt
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from compression.checkpoint import save_folder
from compression.llm.memory import Shape
from compression.weights import ShardWriter

STD = 0.02
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
MOST_WORDS = 1000
INTO_THE_STATE = ("o_proj.weight", "down_proj.weight")


def save_random_model(folder: Path, shape: Shape, max_shard_size: int, seed: int, stage: dict) -> Path:
    """Write a checkpoint in bfloat16; of its weights one tensor at a time is in memory.

    Args:
        max_shard_size: bytes of weights per file.
        stage: contents of `stage.json`.
    """
    config = shape.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shape.tied:
        del sizes["lm_head.weight"]
    device = "cuda" if torch.cuda.is_available() else "cpu"  # one draws a hundred times as fast as the other
    generator = torch.Generator(device).manual_seed(seed)

    def write(temporary: Path) -> None:
        writer = ShardWriter(temporary, max_shard_size, len(sizes))
        for name, size in sizes.items():
            writer.add(name, random_tensor(name, size, shape.layers, generator))
        writer.close()
        config.architectures = [type(model).__name__]
        config.save_pretrained(temporary)
        tokenizer_for(shape.vocabulary).save_pretrained(temporary)

    save_folder(folder, write, stage)
    torch.cuda.empty_cache()  # the GPU is the pruning run's
    return folder


def random_tensor(name: str, size: torch.Size, layers: int, generator: torch.Generator) -> Tensor:
    """A tensor of a model; the more layers add to the state, the less each of them does, so that it stays finite."""
    tensor = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    if tensor.dim() == 1:
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, STD / sqrt(2 * layers) if name.endswith(INTO_THE_STATE) else STD, generator=generator)


def words_of(vocabulary: int) -> list[str]:
    """The words that a tokenizer of a model with so many tokens knows: all of one length."""
    return [f"w{number:03}" for number in range(min(MOST_WORDS, vocabulary - len(SPECIAL)))]


def tokenizer_for(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer that needs no files, a token for each word."""
    names = [*SPECIAL, *words_of(vocabulary)]
    words = Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def random_text(vocabulary: int, tokens: int, seed: int) -> str:
    """A text of so many words, each drawn with a probability that falls with its place, as in a language."""
    words = words_of(vocabulary)
    chances = [1 / (place + 3) for place in range(len(words))]
    return " ".join(random.Random(seed).choices(words, chances, k=tokens))

"""What a language model is and how good it is: parameters, sizes of its layers, perplexities, zero-shot accuracy."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.corpus import load_corpus, tokenize, windows
from compression.evaluation.perplexity import perplexity
from compression.evaluation.zeroshot import zero_shot
from compression.flops import count_parameters
from compression.runtime import log
from compression.structures import layers_of


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, names: list[str], length: int, samples: int = 0, data_dir: str | None = None
) -> dict[str, Tensor]:
    """Windows [count, length] of the test part of each text that perplexity is measured on, by name.

    Args:
        names: texts, see `load_corpus`.
        samples: so many windows of each only; 0: all there are.

    Raises:
        UserError: a text is not there, or shorter than one window.
    """
    found = {}
    for name in names:
        corpus = load_corpus(name, "test", data_dir)
        found[corpus.name] = windows(tokenize(tokenizer, corpus), length)[: samples or None]
    return found


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: dict[str, Tensor],
    batch_size: int = 1,
    zeroshot_tasks: list[str] | None = None,
    data_dir: str | None = None,
    zeroshot_limit: int | None = None,
) -> dict[str, Any]:
    """Parameters, sizes of the layers, perplexity on each text, zero-shot accuracy where tasks are named.

    Args:
        tests: windows of token ids [count, length] by name of the text.
        zeroshot_tasks, data_dir, zeroshot_limit: see `zero_shot`.
    """
    layers = layers_of(model)
    found = {
        "parameters": count_parameters(model) | {"structures": sum(parts.parameters for parts in layers)},
        "layers": [
            {"query_heads": parts.query_heads, "key_value_heads": parts.heads, "intermediate_size": parts.neurons}
            for parts in layers
        ],
        "perplexity": {name: perplexity(model, ids, batch_size) for name, ids in tests.items()},
        "perplexity_windows": {name: list(ids.shape) for name, ids in tests.items()},
    }
    for name, value in found["perplexity"].items():
        log.info("Perplexity on %s (%d windows of %d tokens): %.2f", name, *tests[name].shape, value)
    if zeroshot_tasks:
        found["zeroshot"] = zero_shot(model, tokenizer, zeroshot_tasks, data_dir, zeroshot_limit)
        for task, figures in found["zeroshot"].items():
            accuracy, error = figures["acc"], figures["acc_standard_error"]
            log.info("%s: %.1f ± %.1f %% of %d", task, 100 * accuracy, 100 * error, figures["n"])
    return found

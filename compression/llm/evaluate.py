"""What a language model is worth and what it costs, as every script of the language-model track measures it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import check_positions
from compression.config import StageConfig
from compression.flops import count_macs, count_parameters
from compression.llm.perplexity import perplexity
from compression.llm.text import load_corpus, tokenize, windows
from compression.llm.zeroshot import check_tasks, zero_shot
from compression.runtime import UserError, log
from compression.structures import layers_of
from compression.timing import measure_generation

NEW_TOKENS = 32


@dataclass
class EvaluationFields(StageConfig):
    """Fields of every script that measures language models."""

    data_dir: str | None = None
    """Folder with text files (wikitext2/, ptb/); without it the hub, then the embedded default."""
    run_evaluation: str = "ppl"
    """What is measured of each model: some of ppl,zeroshot,efficiency, or all, or none."""
    eval_ppl_datasets: str = "wikitext2"
    """Texts for perplexity, separated by commas: wikitext2, ptb, c4, or text files."""
    eval_length: int = 1024
    """Tokens per window there."""
    eval_samples: int = 0
    """So many windows only; 0: the whole test part."""
    eval_zeroshot_tasks: str = "piqa,hellaswag,winogrande,arc_easy"
    """Tasks of lm-evaluation-harness, separated by commas."""
    eval_zeroshot_limit: int = 0
    """The first so many questions of each task only; 0: all of them."""
    efficiency_repeats: int = 10
    """Timed prefills and decodes of each model."""

    fast_evaluation: ClassVar = dict(eval_samples=4, eval_zeroshot_limit=20, efficiency_repeats=3)
    evaluations: ClassVar = ("ppl", "zeroshot", "efficiency")

    def check(self) -> None:
        super().check()
        self.check_range("eval_samples", 0)
        self.check_range("eval_zeroshot_limit", 0)
        self.check_range("efficiency_repeats", 1)
        unknown = set(self.run_evaluation.split(",")) - {*self.evaluations, "all", "none"}
        if unknown:
            raise UserError(
                f"--run_evaluation {self.run_evaluation}: unknown {', '.join(sorted(unknown))}; allowed are "
                f"{', '.join(self.evaluations)}, separated by commas, or all, or none"
            )
        # What is decoded goes on behind a prompt of that length, with the prompt's own tokens.
        self.check_range("eval_length", NEW_TOKENS if self.evaluates("efficiency") else 2)

    def evaluates(self, what: str) -> bool:
        """Whether a kind of evaluation is asked for."""
        return what in self.run_evaluation.split(",") or self.run_evaluation == "all"

    def check_zero_shot(self) -> None:
        """Raise UserError early where zero-shot accuracy is asked for and its data cannot be had."""
        if self.evaluates("zeroshot"):
            check_tasks(self.eval_zeroshot_tasks.split(","), self.data_dir, self.eval_zeroshot_limit or None)


def evaluation_windows(
    config: EvaluationFields, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> dict[str, Tensor]:
    """Windows [count, length] of the test part of each text that perplexity is measured on, by name.

    Args:
        model: whose positions `eval_length` is checked against.

    Raises:
        UserError: a text that is not there, or that is shorter than a window; windows beyond the model's positions.
    """
    if config.evaluates("ppl") or config.evaluates("efficiency"):
        check_positions(model, "eval_length", config.eval_length)
    if not config.evaluates("ppl"):
        return {}
    found = {}
    for name in config.eval_ppl_datasets.split(","):
        corpus = load_corpus(name, "test", config.data_dir, flag="--eval_ppl_datasets")
        every = windows(tokenize(tokenizer, corpus), config.eval_length, corpus.name)
        found[corpus.name] = every[: config.eval_samples or None]
    return found


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: dict[str, Tensor],
    config: EvaluationFields,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Parameters, sizes of the layers, perplexity on each text, zero-shot accuracy where it is asked for.

    Args:
        tests: see `evaluation_windows`.
        batch_size: windows per forward pass.
    """
    layers = layers_of(model)
    found = {
        "parameters": count_parameters(model) | {"structures": sum(parts.parameters for parts in layers)},
        "layers": [
            {"query_heads": parts.query_heads, "key_value_heads": parts.groups, "intermediate_size": parts.channels}
            for parts in layers
        ],
        "perplexity": {name: perplexity(model, ids, batch_size) for name, ids in tests.items()},
        "perplexity_windows": {name: list(ids.shape) for name, ids in tests.items()},
    }
    for name, value in found["perplexity"].items():
        log.info("Perplexity on %s (%d windows of %d tokens): %.2f", name, *tests[name].shape, value)
    if config.evaluates("zeroshot"):
        tasks = config.eval_zeroshot_tasks.split(",")
        found["zeroshot"] = zero_shot(model, tokenizer, tasks, config.data_dir, config.eval_zeroshot_limit or None)
        for task, figures in found["zeroshot"].items():
            accuracy, error = figures["acc"], figures["acc_standard_error"]
            log.info("%s: %.1f ± %.1f %% of %d", task, 100 * accuracy, 100 * error, figures["n"])
    return found


def measure_efficiency(
    models: dict[str, PreTrainedModel], device: torch.device, config: EvaluationFields
) -> dict[str, dict[str, Any]]:
    """MACs, prefill and decode speed of each model, interleaved; peak memory of a prefill where there is a GPU."""
    length = config.eval_length
    found = measure_generation(models, device, length, NEW_TOKENS, config.efficiency_repeats)
    for name, model in models.items():
        found[name]["macs"] = count_macs(model, length).as_dict()
        if device.type == "cuda":
            found[name]["peak_memory_bytes"] = peak_memory(model, length)
    return found


def efficiency_ratios(model: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
    """MACs of the layers and speeds of a model, relative to those of another; both from `measure_efficiency`."""
    speeds = {
        phase: model[phase]["median_tokens_per_second"] / baseline[phase]["median_tokens_per_second"]
        for phase in ("prefill", "decode")
    }
    return {"macs": model["macs"]["encoder"] / baseline["macs"]["encoder"]} | speeds


@torch.inference_mode()
def peak_memory(model: PreTrainedModel, length: int) -> int:
    """Bytes on the GPU at the peak of one forward pass, all that lies there included."""
    torch.cuda.reset_peak_memory_stats(model.device)
    model(torch.zeros(1, length, dtype=torch.long, device=model.device), logits_to_keep=1)
    return torch.cuda.max_memory_allocated(model.device)

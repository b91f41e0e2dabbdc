"""What a language model is worth and what it costs, as every script of the language-model track measures it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import check_positions
from compression.config import AtLeast, Settings
from compression.flops import count_macs, count_parameters
from compression.llm.perplexity import perplexity
from compression.llm.rows import is_instruction_file
from compression.llm.text import load_corpus, tokenize, windows
from compression.llm.zeroshot import check_tasks, zero_shot
from compression.offload import offload_of
from compression.quantization import compute_type
from compression.runtime import UserError, from_main_process, log
from compression.sharding import is_spread
from compression.structures import layers_of
from compression.timing import measure_generation

NEW_TOKENS = 32
SAMPLES = 3
"""Windows of each text whose beginnings a model goes on from, to be read side by side."""


STANDARD, WINDOWS_OF_OTHERS = "wikitext2", 128
EVALUATIONS = ("ppl", "zeroshot", "efficiency")
FAST_EVALUATION = dict(eval_samples=4, eval_zeroshot_limit=20, efficiency_repeats=3)


@dataclass
class Evaluation(Settings):
    """What is measured of a language model, and on what."""

    run_evaluation: str = "ppl"
    """What is measured of each model: some of ppl,zeroshot,efficiency, or all, or none."""
    eval_ppl_datasets: str = "auto"
    """Texts for perplexity, separated by commas: those of --dataset, without weights; auto: wikitext2, and of each
    other text that --dataset names the first 128 windows."""
    eval_length: int = 1024
    """Tokens per window there."""
    eval_samples: Annotated[int, AtLeast(0)] = 0
    """Number of windows of each; 0: the whole test part."""
    eval_zeroshot_tasks: str = "piqa,hellaswag,winogrande,arc_easy"
    """Tasks of lm-evaluation-harness, separated by commas."""
    eval_zeroshot_limit: Annotated[int, AtLeast(0)] = 0
    """Number of questions of each task, from the first; 0: all of them."""
    efficiency_repeats: Annotated[int, AtLeast(1)] = 10
    """Timed prefills and decodes of each model."""

    def check(self) -> None:
        self.check_allowed(EVALUATIONS)
        # What is decoded goes on behind a prompt of that length, with the prompt's own tokens.
        AtLeast(NEW_TOKENS if self.evaluates("efficiency") else 2).check("eval_length", self.eval_length)

    def check_allowed(self, allowed: Sequence[str]) -> None:
        """Raise UserError where anything else is to be measured."""
        unknown = set(self.run_evaluation.split(",")) - {*allowed, "all", "none"}
        if unknown:
            raise UserError(
                f"--run_evaluation {self.run_evaluation}: unknown {', '.join(sorted(unknown))}; allowed are "
                f"{', '.join(allowed)}, separated by commas, or all, or none"
            )

    def evaluates(self, what: str) -> bool:
        """Whether a kind of evaluation is asked for."""
        return what in self.run_evaluation.split(",") or self.run_evaluation == "all"

    def texts(self, calibrated: Sequence[str]) -> list[tuple[str, int | None]]:
        """Texts for perplexity, and of how many windows at most.

        Args:
            calibrated: what calibration and training take, which `auto` goes by.
        """
        limit = self.eval_samples or None
        if self.eval_ppl_datasets != "auto":
            return [(name, limit) for name in self.eval_ppl_datasets.split(",")]
        others = [name for name in calibrated if name != STANDARD]
        if len(calibrated) == 1 and is_instruction_file(calibrated[0]):
            others = []  # all of its rows are trained on
        return [(STANDARD, limit), *((name, limit or WINDOWS_OF_OTHERS) for name in others)]

    @property
    def tasks(self) -> list[str]:
        """The zero-shot tasks."""
        return self.eval_zeroshot_tasks.split(",")

    def check_zero_shot(self, data_dir: str | None) -> None:
        """Raise UserError early where zero-shot accuracy is asked for and its data cannot be had."""
        if self.evaluates("zeroshot"):
            check_tasks(self.tasks, data_dir, self.eval_zeroshot_limit or None)


def evaluation_windows(
    evaluation: Evaluation,
    data_dir: str | None,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    calibrated: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Windows [count, length] of the test part of each text that perplexity is measured on, by name.

    Args:
        data_dir: folder with the texts; None asks the hub.
        model: whose positions `eval_length` is checked against.
        calibrated: see `Evaluation.texts`.

    Raises:
        UserError: a text that is not there, or that is shorter than a window, unless only `auto` takes it, which is
            logged; windows beyond the model's positions.
    """
    if evaluation.evaluates("ppl") or evaluation.evaluates("efficiency"):
        check_positions(model, "eval_length", evaluation.eval_length)
    if not evaluation.evaluates("ppl"):
        return {}
    found: dict[str, Tensor] = {}
    for name, limit in evaluation.texts(calibrated):
        try:
            corpus = load_corpus(name, "test", data_dir, flag="--eval_ppl_datasets")
            every = windows(tokenize(tokenizer, corpus), evaluation.eval_length, corpus.name)[:limit]
        except UserError as problem:
            if evaluation.eval_ppl_datasets != "auto" or name == STANDARD:
                raise
            log.info("Perplexity on %s: left out (%s)", name, problem)
            continue
        # Where there is no hub, one text stands in for another.
        if not any(torch.equal(every, other[: len(every)]) for other in found.values()):
            titles = chain([corpus.name], (f"{corpus.name} ({number})" for number in count(2)))
            found[next(title for title in titles if title not in found)] = every
    return found


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: dict[str, Tensor],
    evaluation: Evaluation,
    data_dir: str | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Parameters, sizes of the layers, perplexity and samples on each text, zero-shot accuracy where it is asked for.

    Args:
        tests: see `evaluation_windows`.
        data_dir: folder with the data of zero-shot tasks; None asks the hub.
        batch_size: windows per forward pass.
    """
    found: dict[str, Any] = sizes(model) | {
        "computes_in": compute_type(model),
        "perplexity": {name: perplexity(model, ids, batch_size) for name, ids in tests.items()},
        "perplexity_windows": {name: list(ids.shape) for name, ids in tests.items()},
    }
    for name, value in found["perplexity"].items():
        log.info("Perplexity on %s (%d windows of %d tokens): %.2f", name, *tests[name].shape, value)
    if tests and not is_spread(model) and offload_of(model) is None:  # there, each token would fetch all layers
        found["samples"] = from_main_process(lambda: samples(model, tokenizer, tests))
    if evaluation.evaluates("zeroshot"):
        limit = evaluation.eval_zeroshot_limit or None
        answer = partial(zero_shot, model, tokenizer, evaluation.tasks, data_dir, limit)
        if is_spread(model):  # all processes run it together
            answers = answer()
            found["zeroshot"] = from_main_process(lambda: answers)
        else:
            found["zeroshot"] = from_main_process(answer)
        for task, figures in found["zeroshot"].items():
            accuracy, error = figures["acc"], figures["acc_standard_error"]
            log.info("%s: %.1f ± %.1f %% of %d", task, 100 * accuracy, 100 * error, figures["n"])
    return found


@torch.inference_mode()
def samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tests: dict[str, Tensor]
) -> list[dict[str, str]]:
    """How a model goes on from the beginnings of the first windows of each text, by its likeliest token each time.

    Returns:
        text: its name; prompt; continuation, of `NEW_TOKENS` tokens at most.
    """
    found = []
    for name, ids in tests.items():
        begin = min(NEW_TOKENS, ids.shape[1] // 2)
        prompts = ids[:SAMPLES, :begin].to(model.device)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(NEW_TOKENS, ids.shape[1] - begin),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        generate: Any = model.generate
        made = generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy)
        said, more = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in (prompts, made[:, begin:]))
        found += [{"text": name, "prompt": a, "continuation": b} for a, b in zip(said, more, strict=True)]
    return found


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """Parameters and sizes of the layers; the weights need not be there."""
    layers = layers_of(model)
    return {
        "parameters": count_parameters(model) | {"structures": sum(parts.parameters for parts in layers)},
        "layers": [
            {"query_heads": parts.query_heads, "key_value_heads": parts.groups, "intermediate_size": parts.channels}
            for parts in layers
        ],
    }


def measure_efficiency(
    models: dict[str, PreTrainedModel], device: torch.device, evaluation: Evaluation
) -> dict[str, dict[str, Any]]:
    """MACs, prefill and decode speed of each model, interleaved; peak memory of a prefill where there is a GPU."""
    length = evaluation.eval_length
    repeats = evaluation.efficiency_repeats
    found: dict[str, dict[str, Any]] = measure_generation(models, device, length, NEW_TOKENS, repeats)
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

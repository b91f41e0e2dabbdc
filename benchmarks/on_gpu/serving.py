"""A pruned language model served by vLLM, beside the same in transformers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.checkpoint import load_language_model
from compression.llm.text import load_corpus, tokenize
from on_gpu.language import pruned_small, small_model
from on_gpu.setting import Figures, Setting

PROMPTS = 8

Answers = list[tuple[list[int], list[float]]]
"""For each prompt the tokens that greedy decoding appends, and the log-probabilities of its own but the first."""


def vllm(setting: Setting) -> Figures:
    """Continuations and log-probabilities of prompts, from both."""
    if find_spec("vllm") is None:
        return {"not run": "vLLM is not installed"}
    folder = pruned_small(setting, "served", "--keep_attention") / "models"
    prompts = some_text(setting, folder)
    # vLLM first: it starts processes of its own, which must find the GPU free.
    found, expected = (answer(folder, prompts) for answer in (from_vllm, from_transformers))
    return compared(found, expected)


def some_text(setting: Setting, folder: Path) -> Tensor:
    """Prompts of test text, ids [prompts, tokens]."""
    _, texts, _ = small_model(setting)
    _, tokenizer = load_language_model(folder)
    ids = tokenize(tokenizer, load_corpus("wikitext2", "test", str(texts[1]) if texts else None))
    length = setting.sizes.length // 2
    return ids[: PROMPTS * length].view(PROMPTS, length)


def from_vllm(folder: Path, prompts: Tensor) -> Answers:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    length = prompts.shape[1]
    engine = LLM(
        model=str(folder),
        trust_remote_code=True,
        model_impl="transformers",
        dtype="bfloat16",
        max_model_len=2 * length,
        gpu_memory_utilization=0.5,
    )
    wanted = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, prompt_logprobs=0)
    results = engine.generate([{"prompt_token_ids": ids} for ids in prompts.tolist()], wanted)
    return [(list(result.outputs[0].token_ids), prompt_logprobs(result)) for result in results]


def prompt_logprobs(result: Any) -> list[float]:
    """Of a prompt's tokens but the first, of which nothing is known."""
    known = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
    return [candidates[token].logprob for token, candidates in known]


@torch.no_grad()
def from_transformers(folder: Path, prompts: Tensor) -> Answers:
    model, _ = load_language_model(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)  # type: ignore[call-overload]
    ids, length = prompts.to(model.device), prompts.shape[1]
    logits = model(ids).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    generated: Any = model.generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=None)
    return list(zip(generated[:, length:].tolist(), logprobs.tolist(), strict=True))


def compared(found: Answers, expected: Answers) -> Figures:
    """How far one's answers are from the other's."""
    pairs = list(zip(found, expected, strict=True))
    differences = torch.tensor([one[1] for one in found]) - torch.tensor([one[1] for one in expected])
    alike = [agreement(one[0], other[0]) for one, other in pairs]
    return {
        "prompts": len(pairs),
        "continuations alike to the last token": sum(one[0] == other[0] for one, other in pairs),
        "tokens until the first that differs, mean": sum(alike) / len(alike),
        "tokens of a continuation": len(expected[0][0]),
        "log-probabilities of the prompts' tokens, largest difference": differences.abs().max().item(),
        "log-probabilities of the prompts' tokens, mean difference": differences.abs().mean().item(),
    }


def agreement(one: list[int], other: list[int]) -> int:
    """Leading tokens that two continuations share."""
    same = [first == second for first, second in zip(one, other, strict=True)]
    return same.index(False) if False in same else len(same)

"""How often language models predict the last word of a passage, and the next token anywhere in it.

    python benchmarks/last_words.py --data_dir TEXTS --models models/llm-local results/NAME/models
    python benchmarks/last_words.py --data_dir TEXTS --others others.txt     # what is not measured, to calibrate on

Passages are of the zero-shot data, which nothing is calibrated on: those of BoolQ, those of HellaSwag with more than 60
words, the sentences of WinoGrande, the goals of PIQA with their right solution. A last word is predicted where each of
its tokens is the first choice behind all that comes before it, as in LAMBADA (Paperno et al. 2016, arXiv:1606.06031).
Differences are to the first model, over the same passages.

Writes results/last_words.json, or with --others that text alone.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import load_language_model
from compression.classifier.metrics import paired_difference
from compression.config import AtLeast, Config, run_script
from compression.files import real_path, write_json, write_text
from compression.llm.agreement import PASSAGES, read_passages
from compression.progress import progress
from compression.runtime import RESULTS, Dtype, UserError, fingerprint, log, pick_device, pick_dtype
from compression.sources import LLM_FOLDER
from compression.tables import Column, at, text_table

# Words that a passage has at least.
LEAST_WORDS = {"hellaswag": 61}
TEXTS: dict[str, Callable[[Any], str]] = PASSAGES | {
    "winogrande": lambda row: row["sentence"].replace("_", row[f"option{row['answer']}"]),
    "piqa": lambda row: " ".join((row["goal"], row["sol1"] if row["label"] == 0 else row["sol2"])),
}


@dataclass
class LastWordsConfig(Config):
    models: tuple[Path, ...] = (LLM_FOLDER,)
    """Folders of models, the one to compare with first."""
    data_dir: Path | None = None
    """Folder with zeroshot/."""
    passages: Annotated[int, AtLeast(2)] = 1000
    """Passages of each task, drawn at random, at most."""
    length: Annotated[int, AtLeast(2)] = 512
    """Tokens of a passage, its last ones, at most."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    seed: int = 0
    """Fixes which passages are taken."""
    others: Path | None = None
    """Measure nothing; write passages that are not measured here, up to four times as many of a task."""

    presets: ClassVar = {"fast": dict(passages=50)}


def passages_of(task: str, config: LastWordsConfig) -> tuple[list[str], list[str]]:
    """Those of a task's passages that are measured, each once, and all others.

    Raises:
        UserError: they are not there, or malformed.
    """
    if config.data_dir is None:
        raise UserError("--data_dir: is not given; name the folder that has zeroshot/")
    path = config.data_dir.expanduser() / "zeroshot" / task / "validation.jsonl"
    every = read_passages(path, TEXTS[task])
    long = [text for text in every if len(text.split()) >= LEAST_WORDS.get(task, 2)]
    random.Random(config.seed).shuffle(long)
    measured = dict.fromkeys(long[: config.passages])
    return list(measured), [text for text in every if text not in measured]


def write_others(path: Path, others: list[list[str]], config: LastWordsConfig) -> None:
    """A text of other passages, of all tasks in any order.

    Raises:
        UserError: something is there already.
    """
    if real_path(path, "--others").exists():
        raise UserError(f"--others {path}: is there already; name a file that is not, or remove it")
    taken = []
    for passages in others:
        random.Random(config.seed + 1).shuffle(passages)
        taken += passages[: 4 * config.passages]
    random.Random(config.seed + 2).shuffle(taken)
    write_text(path, "\n\n".join(text.replace("\n", " ") for text in taken) + "\n")
    log.info("%d passages -> %s", len(taken), path)


@torch.no_grad()
def read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int
) -> tuple[Tensor, Tensor, int]:
    """Of each token but the first whether it is the first choice, and its loss; and how many the last word has."""
    before, word = text.rsplit(" ", 1)
    last = tokenizer(f" {word}").input_ids
    ids = torch.tensor([*tokenizer(before).input_ids, *last][-length:], device=model.device)
    logits = model(ids[None]).logits[0, :-1].float()
    return logits.argmax(-1) == ids[1:], F.cross_entropy(logits, ids[1:], reduction="none"), len(last)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int
) -> tuple[dict[str, float], Tensor]:
    """Accuracy of last words and of next tokens, and the perplexity of these; and which last words were right."""
    hits, right, losses = [], [], []
    for text in progress(texts, "passages"):
        correct, loss, word = read(model, tokenizer, text, length)
        hits.append(correct[-word:].all())
        right.append(correct)
        losses.append(loss)
    words, tokens = torch.stack(hits).cpu(), torch.cat(right).double()
    found = {
        "passages": len(texts),
        "tokens": len(tokens),
        "last_words": words.double().mean().item(),
        "next_tokens": tokens.mean().item(),
        "perplexity": torch.cat(losses).double().mean().exp().item(),
    }
    return found, words


def main(config: LastWordsConfig) -> None:
    passages = {task: passages_of(task, config) for task in TEXTS}
    if config.others is not None:
        write_others(config.others, [others for _, others in passages.values()], config)
        return
    texts, rows = {task: measured for task, (measured, _) in passages.items()}, []
    first: dict[str, Tensor] = {}
    for folder in config.models:
        model, tokenizer = load_language_model(folder, pick_device(), pick_dtype(config.dtype, "Weights"))
        for task, passages in texts.items():
            found, words = measure(model, tokenizer, passages, config.length)
            points, error = paired_difference(words, first.setdefault(task, words)).values()
            paired = {"difference": points / 100, "standard_error": error / 100}
            rows.append({"model": str(folder), "task": task} | found | paired)
    columns = [
        Column("model", at("model")),
        Column("passages", at("task")),
        Column("last words", at("last_words", per=0.01), "{:.1f} %"),
        Column("to the first", lambda row: (100 * row["difference"], 100 * row["standard_error"]), "{:+.1f} ± {:.1f}"),
        Column("next tokens", at("next_tokens", per=0.01), "{:.1f} %"),
        Column("perplexity", at("perplexity"), "{:.2f}"),
    ]
    path = RESULTS / "last_words.json"
    write_json(path, {"config": config.as_dict(), "environment": fingerprint(), "rows": rows})
    log.info("%s\n-> %s", text_table(columns, rows), path)


if __name__ == "__main__":
    run_script(LastWordsConfig, main)

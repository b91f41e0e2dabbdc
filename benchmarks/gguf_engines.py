"""Compare llama.cpp with PyTorch in what it computes, and a dense model with pruned ones in how fast it does.

    python benchmarks/gguf_engines.py --models DENSE PRUNED ... [--data_dir TEXTS] [--precisions f16 q8_0 q4_0]

Each model is exported to GGUF at each precision. Perplexity: of the first windows of WikiText-2, the same token ids in
both engines; llama.cpp computes as it does by default (attention in 16 bits), PyTorch in fp32. Speed: at batch 1, the
files in turn, round after round, each round's ratio to the dense model's; the median is compared with what the sizes
predict. A token that is decoded reads every weight once (of embeddings that are not the head's too only a row) and the
key-value cache; a prompt's time goes with its multiply-accumulates.

Writes results/gguf_engines.json and .md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gguf import GGUFReader
from torch import Tensor

from compression.checkpoint import load_language_model, load_skeleton, load_tokenizer
from compression.config import AtLeast, Config, run_script
from compression.export.gguf import PRECISIONS, Plan, check_exportable, write_gguf
from compression.export.llama_cpp import LlamaCpp
from compression.files import write_json, write_text
from compression.flops import encoder_macs_formula
from compression.llm.perplexity import perplexity
from compression.llm.text import load_corpus, tokenize, windows
from compression.runtime import RESULTS, fingerprint, log, relative_path
from compression.sources import LLM_FOLDER
from compression.tables import Column, at, markdown_table

NAME = "gguf_engines"
CACHE_BYTES = 2  # of a number in llama.cpp's key-value cache


@dataclass
class EnginesConfig(Config):
    models: tuple[Path, ...] = (LLM_FOLDER,)
    """Checkpoints; the others are compared with the first, the dense one."""
    precisions: tuple[Literal[tuple(PRECISIONS)], ...] = ("f16", "q8_0", "q4_0")
    """What the matrices are stored in, where perplexity is measured."""
    timed_precisions: tuple[Literal[tuple(PRECISIONS)], ...] = ("f16", "q8_0")
    """What they are stored in where speed is."""
    data_dir: str | None = None
    """Folder with wikitext2/."""
    eval_samples: Annotated[int, AtLeast(1)] = 8
    """Windows of text."""
    length: Annotated[int, AtLeast(2)] = 512
    """Tokens per window."""
    prompt_length: Annotated[int, AtLeast(1)] = 256
    """Tokens of a prompt that is timed."""
    new_tokens: Annotated[int, AtLeast(1)] = 64
    """Tokens behind it."""
    rounds: Annotated[int, AtLeast(0)] = 11
    """Turns of each file; 0: no speed."""
    threads: Annotated[int, AtLeast(0)] = 0
    """Threads of llama.cpp; 0: as many as PyTorch uses."""
    work_dir: Path | None = None
    """Folder for the files while the run lasts; none: the system's for temporary files."""
    results_dir: Path = field(default_factory=lambda: RESULTS)
    """Folder that the results go to."""

    presets: ClassVar = {"fast": dict(eval_samples=1, length=64, prompt_length=16, new_tokens=4, rounds=2)}


@dataclass(frozen=True)
class File:
    """One model at one precision."""

    model: str
    precision: str
    path: Path
    sizes: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        return {"model": self.model, "precision": self.precision}


def export(config: EnginesConfig, folder: Path, work: Path) -> list[File]:
    """Write a model's files."""
    plan, files = check_exportable(folder, flag="--models"), []
    for precision in dict.fromkeys((*config.precisions, *config.timed_precisions)):
        path = work / f"{len(list(work.iterdir()))}.gguf"
        metrics = write_gguf(plan, path, precision)
        sizes = {name: metrics[name] for name in ("bytes", "architecture")} | costs(config, plan, path)
        files.append(File(relative_path(folder), precision, path, sizes))
    return files


def costs(config: EnginesConfig, plan: Plan, path: Path) -> dict[str, int]:
    """Bytes that a decoded token reads, at the middle of those that are timed, and multiply-accumulates of a prompt."""
    read = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if not plan.tied:
        del read["token_embd.weight"]
    cached = 2 * plan.head_size * sum(layer.groups for layer in plan.layers)
    macs = encoder_macs_formula(plan.layers, config.prompt_length) + plan.config.vocab_size * plan.config.hidden_size
    cache_bytes = cached * (config.prompt_length + config.new_tokens // 2) * CACHE_BYTES
    return {"decode_bytes": sum(read.values()) + cache_bytes, "prefill_macs": macs}


def compare_perplexities(config: EnginesConfig, files: Sequence[File], llama: LlamaCpp) -> list[dict[str, Any]]:
    """Perplexity of each file, and of its model in PyTorch."""
    rows, in_torch = [], {}
    for folder in config.models:
        model, _ = load_language_model(folder)
        in_torch[relative_path(folder)] = perplexity(model, text_windows(config, folder))
    for file in files:
        if file.precision in config.precisions:
            folder = next(folder for folder in config.models if relative_path(folder) == file.model)
            found, expected = llama.perplexity(file.path, text_windows(config, folder)), in_torch[file.model]
            rows.append(file.about | {"pytorch": expected, "llama_cpp": found, "difference": found / expected - 1})
            log.info("%s", rows[-1])
    return rows


def text_windows(config: EnginesConfig, folder: Path) -> Tensor:
    """Token ids [windows, length]."""
    tokenizer = load_tokenizer(folder, load_skeleton(folder, torch.float32)[0])
    ids = tokenize(tokenizer, load_corpus("wikitext2", "test", config.data_dir))
    return windows(ids, config.length, "wikitext2")[: config.eval_samples]


def compare_speeds(config: EnginesConfig, files: Sequence[File], llama: LlamaCpp) -> list[dict[str, Any]]:
    """Tokens per second of each file, and the speed-up over the dense model against what the sizes predict."""
    timed = [file for file in files if file.precision in config.timed_precisions]
    found: dict[Path, list[tuple[float, float]]] = {file.path: [] for file in timed}
    for turn in range(config.rounds):
        first = turn % len(timed)
        for file in timed[first:] + timed[:first]:
            found[file.path].append(llama.speed(file.path, config.prompt_length, config.new_tokens))
    rows = []
    for file in timed:
        dense = next(other for other in timed if other.precision == file.precision)
        row: dict[str, Any] = file.about | file.sizes
        for part, (name, cost) in enumerate((("prefill", "prefill_macs"), ("decode", "decode_bytes"))):
            speeds, ratios = [speed[part] for speed in found[file.path]], []
            for mine, other in zip(found[file.path], found[dense.path], strict=True):
                ratios.append(mine[part] / other[part])
            predicted = dense.sizes[cost] / file.sizes[cost]
            row[name] = {
                "tokens_per_second": median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "speed_up": median(ratios),
                "predicted": predicted,
                "of_predicted": median(ratios) / predicted,
            }
        rows.append(row)
    return rows


def tables(perplexities: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> str:
    file = [Column("model", at("model")), Column("precision", at("precision"))]
    text = markdown_table(
        [
            *file,
            Column("PyTorch, fp32", at("pytorch"), "{:.3f}"),
            Column("llama.cpp", at("llama_cpp"), "{:.3f}"),
            Column("difference", at("difference"), "{:+.2%}"),
        ],
        perplexities,
    )
    for part, cost in (("prefill", "prefill_macs"), ("decode", "decode_bytes")) if speeds else ():
        columns = [
            *file,
            Column(f"{part}, tokens/s", at(part, "tokens_per_second"), "{:.1f}"),
            Column(f"{cost.split('_')[1]}, millions".replace("macs", "MACs"), at(cost, per=1e6), "{:.1f}"),
            Column("speed-up", at(part, "speed_up"), "{:.3f}"),
            Column("predicted", at(part, "predicted"), "{:.3f}"),
            Column("of predicted", at(part, "of_predicted"), "{:.2f}"),
        ]
        text += f"\n\n{markdown_table(columns, speeds)}"
    return text


def main(config: EnginesConfig) -> None:
    with TemporaryDirectory(dir=config.work_dir) as work, LlamaCpp(config.threads or None) as llama:
        files = [file for folder in config.models for file in export(config, folder, Path(work))]
        perplexities = compare_perplexities(config, files, llama)
        speeds = compare_speeds(config, files, llama) if config.rounds else []
        threads = llama.threads
    found = {"config": config.as_dict(), "environment": fingerprint(), "threads": threads}
    text = tables(perplexities, speeds)
    write_json(config.results_dir / f"{NAME}.json", found | {"perplexity": perplexities, "speed": speeds})
    write_text(config.results_dir / f"{NAME}.md", f"{threads} threads of llama.cpp.\n\n{text}\n")
    log.info("%s\n-> %s", text, config.results_dir / f"{NAME}.json")


if __name__ == "__main__":
    run_script(EnginesConfig, main)

"""Compare ways of pruning a language model: one run, one model, one text, the same budgets.

    python benchmarks/llm_pruning_methods.py --data_dir TEXTS [--ratios 0.2 0.3 0.5] [--methods FLAP SliceGPT]
    python benchmarks/llm_pruning_methods.py --data_dir TEXTS --recover_tokens 250000 --output_name llm_recovered
    python benchmarks/llm_pruning_methods.py --data_dir TEXTS --report

Every method gets the same calibration windows and gives a physically smaller model that lacks at least the share of the
decoder layers' parameters that is asked for, as near to it as it can; biases and matrices that it adds count. With
--recover_tokens each model is trained then, on the same tokens with the same settings, and measured again.

Perplexities are on the test parts of WikiText-2 and PTB, and on a text that no calibration sees: passages of the
zero-shot data, else film plots or reviews. `seconds` leaves out what of the dense model another method or ratio has
computed before.

Writes results/llm_pruning_methods.json after each row; run again, the command goes on behind what is there. At the end
a table and curves are written beside it (.md, .png).

Torch-Pruning is no part of the environment, and is left out where it is missing:
pip install --no-deps torch-pruning==1.6.1
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.rows import earlier, missing
from llm_pruning_methods.flap import flap
from llm_pruning_methods.ground import Ground, layer_parameters
from llm_pruning_methods.layers import by_removal, short_gpt, sleb
from llm_pruning_methods.libraries import torch_pruning
from llm_pruning_methods.ours import METHODS, by_fields
from llm_pruning_methods.recovery import recovery_of, train
from llm_pruning_methods.report import draw, table, title
from llm_pruning_methods.slicegpt import slice_gpt
from llm_pruning_methods.two_stage import two_stage
from torch import Tensor
from transformers import PreTrainedModel

from compression.assets import ensure_llm
from compression.checkpoint import check_positions, load_language_model
from compression.config import LARGEST_WHOLE_NUMBER, AtLeast, Between, Config, FolderName, run_script
from compression.decoder import decoder_of
from compression.files import write_json, write_text
from compression.llm.agreement import Agreement, unseen_text
from compression.llm.perplexity import perplexity
from compression.llm.recovery_settings import LEARNING_RATE
from compression.llm.text import CalibrationText, load_corpus, sample_windows, tokenize, windows
from compression.llm.zeroshot import check_tasks, zero_shot
from compression.plots import save_figure
from compression.runtime import RESULTS, Dtype, UserError, log, pick_device, pick_dtype
from compression.sources import LLM, LLM_FOLDER

Method = Callable[[Ground, float], PreTrainedModel]
PEERS: dict[str, Method] = {
    "whole layers, by removal perplexity": by_removal,
    "ShortGPT": short_gpt,
    "SLEB": sleb,
    "FLAP": flap,
    "SliceGPT": slice_gpt,
    "2SSP": two_stage,
    "Torch-Pruning": torch_pruning,
}
PACKAGES = {"Torch-Pruning": ("torch_pruning", "torch-pruning==1.6.1")}
ALL_METHODS = (*METHODS, *PEERS)
# Positions that a window of the recovery has at most.
RECOVERY_LENGTH = 512


@dataclass
class MethodsConfig(Config):
    base_model: str = LLM
    """Model to prune: a folder, or a name on the hub."""
    ratios: tuple[Annotated[float, Between(0.01, 0.99)], ...] = (0.2, 0.3, 0.5)
    """Shares of the decoder layers' parameters to remove."""
    methods: tuple[str, ...] = ALL_METHODS
    """Which methods, by name."""
    data_dir: str | None = None
    """Folder with wikitext2/, ptb/ and zeroshot/."""
    num_samples: Annotated[int, AtLeast(1)] = 32
    """Windows that scores are computed on."""
    repair_samples: Annotated[int, AtLeast(1)] = 64
    """Windows that repairs are fitted to; a method that looks at text once gets those of scores and these."""
    held_out_samples: Annotated[int, AtLeast(1)] = 8
    """Windows that models are compared on, where a method chooses between some."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    length: Annotated[int, AtLeast(2)] = 1024
    """Tokens per window, also of the test texts."""
    search_levels: Annotated[int, AtLeast(2)] = 8
    """Of a search over the allocation: steps between nothing and all of an attention or MLP."""
    search_generations: Annotated[int, AtLeast(1)] = 30
    """Generations of it."""
    search_population: Annotated[int, AtLeast(1)] = 16
    """Candidates in each generation."""
    search_tokens: Annotated[int, AtLeast(1)] = 1024
    """Tokens of held-out text that all candidates are judged on."""
    recover_tokens: Annotated[int, AtLeast(0)] = 0
    """Tokens of WikiText-2 that each model is trained on after pruning, all weights; 0: it is not trained."""
    recover_learning_rate: Annotated[float, Between(0, 1)] = LEARNING_RATE
    """Highest learning rate there."""
    eval_samples: Annotated[int, AtLeast(0)] = 30
    """Windows of each test text; 0: all of it."""
    unseen: str = "auto"
    """The third test text, as --agreement_text of run_global_pruning.py; none: only two."""
    zeroshot_tasks: str = "piqa,hellaswag,winogrande,arc_easy"
    """Tasks of lm-evaluation-harness, separated by commas, whose mean accuracy is measured; or none."""
    zeroshot_limit: Annotated[int, AtLeast(0)] = 100
    """Questions of each task, from the first; 0: all of them."""
    seed: int = 42
    """Fixes which windows calibration takes."""
    report: bool = False
    """Measure no further rows: write table and curves of those that are there."""
    results_dir: Path = field(default_factory=lambda: RESULTS)
    """Folder that the results go to."""
    output_name: Annotated[str, FolderName()] = "llm_pruning_methods"
    """Name of the results there."""

    presets: ClassVar = {
        "fast": dict(
            num_samples=4,
            repair_samples=16,
            held_out_samples=1,
            eval_samples=4,
            zeroshot_limit=20,
            search_generations=3,
            search_population=4,
        )
    }

    def check(self) -> None:
        for name in self.methods:
            if name not in ALL_METHODS:
                raise UserError(f"--methods {name!r}: unknown; allowed are {'; '.join(ALL_METHODS)}")
        for ratio in self.ratios:
            Between(0.01, 0.99).check("ratios", ratio)

    @property
    def path(self) -> Path:
        """The rows."""
        return self.results_dir / f"{self.output_name}.json"

    @property
    def tasks(self) -> list[str]:
        """The zero-shot tasks."""
        return [] if self.zeroshot_tasks == "none" else self.zeroshot_tasks.split(",")

    @property
    def settings(self) -> dict[str, Any]:
        """What a row depends on, beside its method and ratio."""
        other = {"ratios", "methods", "report", "results_dir", "output_name"}
        return {name: value for name, value in self.as_dict().items() if name not in other}


class Bench:
    """The model, what methods get, and what models are measured on."""

    def __init__(self, config: MethodsConfig):
        self.config = config
        base, dtype = ensure_llm(config.base_model, LLM_FOLDER), pick_dtype(config.dtype, "Weights")
        load = partial(load_language_model, base, pick_device(), dtype)
        model, self.tokenizer = load()
        check_positions(model, "length", config.length)
        self.dense = layer_parameters(model)
        corpora = [load_corpus("wikitext2", part, config.data_dir) for part in ("train", "validation")]
        train_ids, choice_ids = (tokenize(self.tokenizer, corpus) for corpus in corpora)
        text = CalibrationText(
            sample_windows(train_ids, config.length, config.num_samples, config.seed),
            sample_windows(train_ids, config.length, config.repair_samples, config.seed + 1),
            sample_windows(choice_ids, config.length, config.held_out_samples, config.seed),
            seed=config.seed,
        )
        searched = {name: value for name, value in config.as_dict().items() if name.startswith("search_")}
        self.ground = Ground(lambda: load()[0], text, searched)
        self.tests = self.test_windows(model, [corpus.name for corpus in corpora])
        length = min(RECOVERY_LENGTH, config.length)
        self.recovery = None
        if config.recover_tokens:
            self.recovery = recovery_of(config.recover_tokens, config.recover_learning_rate, length, config.seed)

    def test_windows(self, model: PreTrainedModel, seen: list[str]) -> dict[str, Tensor]:
        """Token ids [count, length] of the texts that perplexity is measured on.

        Args:
            seen: what the texts of calibration are called.
        """
        config, tests = self.config, {}
        for name in ("wikitext2", "ptb"):
            ids = tokenize(self.tokenizer, load_corpus(name, "test", config.data_dir))
            tests[name] = windows(ids, config.length, name)[: config.eval_samples or None]
        count = config.eval_samples or LARGEST_WHOLE_NUMBER
        settings = Agreement(config.unseen, agreement_samples=count, agreement_length=config.length)
        found = unseen_text(settings, seen, config.data_dir, config.seed, self.tokenizer, model)
        return tests if found is None else tests | {found.corpus.name: found.windows}

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """Perplexity on each text, and accuracy over the zero-shot tasks."""
        config = self.config
        found: dict[str, Any] = {"perplexity": {name: perplexity(model, ids) for name, ids in self.tests.items()}}
        if config.tasks:
            limit = config.zeroshot_limit or None
            tasks = zero_shot(model, self.tokenizer, config.tasks, config.data_dir, limit)
            found["zero_shot"] = mean_accuracy(tasks) | {"tasks": tasks}
        return found

    def sizes(self, model: PreTrainedModel) -> dict[str, Any]:
        """How large a model is."""
        return {
            "removed": 1 - layer_parameters(model) / self.dense,
            "layers": len(decoder_of(model).layers),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    def dense_row(self) -> dict[str, Any]:
        """The dense model, measured."""
        model = self.ground.load()
        return self.sizes(model) | self.measure(model)

    def row(self, method: str, ratio: float) -> dict[str, Any]:
        """One model, measured."""
        row: dict[str, Any] = {"method": method, "ratio": ratio}
        make, started = PEERS.get(method) or partial(by_fields, fields=METHODS[method]), time.perf_counter()
        try:
            model = make(self.ground, ratio)
            row |= {"seconds": time.perf_counter() - started} | self.sizes(model)
            row["pruned"] = self.measure(model)
            if self.recovery is not None:
                states = self.config.results_dir / f".{self.config.output_name}_states"
                train(model, self.tokenizer, self.recovery, self.config.data_dir, states)
                row["recovered"] = self.measure(model)
        except UserError as error:
            row["impossible"] = str(error)
        return row


def mean_accuracy(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean accuracy over tasks, and its standard error, that of each task being independent of the others'."""
    squares = sum(figures["acc_standard_error"] ** 2 for figures in tasks.values())
    mean = sum(figures["acc"] for figures in tasks.values()) / len(tasks)
    return {"mean": mean, "standard_error": squares**0.5 / len(tasks)}


def measure_rows(config: MethodsConfig, found: dict[str, Any]) -> None:
    """Add the rows that are not there yet, writing them one by one."""
    done = {(row["method"], row["ratio"]) for row in found["rows"]}
    methods = [method for method in config.methods if not missing(method, PACKAGES.get(method))]
    todo = [place for place in itertools.product(methods, config.ratios) if place not in done]
    if not todo:
        return
    if config.tasks:
        check_tasks(config.tasks, config.data_dir, config.zeroshot_limit or None)
    bench = Bench(config)
    found["dense"] = found["dense"] or bench.dense_row()
    log.info("dense: %s", found["dense"]["perplexity"])
    for method, ratio in todo:
        log.info("%s, %g %% of the layers' parameters removed", method, 100 * ratio)
        row = bench.row(method, ratio)
        found["rows"].append(row)
        write_json(config.path, found)
        log.info("%s, %g: %s", method, ratio, row.get("impossible") or row["pruned"]["perplexity"])


def main(config: MethodsConfig) -> None:
    found = earlier(config.path, config.settings, dense=None, rows=[])
    if not config.report:
        measure_rows(config, found)
    if not any("pruned" in row for row in found["rows"]):
        raise UserError(f"{config.path}: has no rows to report; leave out --report, or choose other --methods")
    write_text(config.path.with_suffix(".md"), f"{title(found)}\n\n{table(found)}\n")
    save_figure(draw(found), config.path.with_suffix(".png"))
    log.info("%s\n-> %s", table(found), config.path)


if __name__ == "__main__":
    run_script(MethodsConfig, main)

"""What a run that prunes a language model needs, whatever the method: fields, calibration text, records."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import SavedParts, check_positions, contents, is_made_from, load_language_model
from compression.integrity import RUN_FILE, digest_of, seal
from compression.llm.evaluate import EvaluationFields, efficiency_ratios, measure, measure_efficiency
from compression.llm.text import CalibrationText, Corpus, load_corpus, sample_windows, tokenize
from compression.outputs import STATES_END, Output, owned
from compression.runtime import MODELS, RESULTS, Dtype, device_named, fingerprint, log, log_file, shown
from compression.sources import LLM

FINETUNING = ("finetune", "finetune_method", "finetune_samples", "lora_r")
NOT_RESULT = (
    "resume", "overwrite", "output_name", "results_dir", "models_dir", "base_model", "save_bin", *FINETUNING,
)  # fmt: skip
FAST = EvaluationFields.fast_evaluation | dict(num_samples=4, repair_samples=16, held_out_samples=1, analysis_samples=1)


@dataclass
class RunFields(EvaluationFields):
    """Which model, which text, what is measured, where it goes."""

    base_model: str = LLM
    """Model to prune: a folder, or a name on the hub."""
    output_name: str = "pruned"
    """Results go to results/NAME."""
    results_dir: Path = RESULTS
    """Where results go."""
    models_dir: Path = MODELS
    """Where a fetched model goes."""
    dataset: str = "wikitext2"
    """Calibration text: wikitext2, c4, ptb, or a text file."""
    num_samples: int = 32
    """Windows of calibration text that scores are computed on."""
    sequence_length: int = 1024
    """Tokens per window."""
    repair_samples: int = 64
    """Windows that least-squares repairs are fitted to."""
    held_out_samples: int = 4
    """Windows of the validation part that choices are made by."""
    analysis_samples: int = 2
    """Windows of the validation part that the removal analysis is done on; 0 leaves it out where it is not needed."""
    analysis_length: int = 512
    """Tokens per window there."""
    gradient_batch_size: int = 1
    """Windows per forward and backward pass."""
    use_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    device_map: str = "auto"
    """The device the model is on: auto (a GPU where there is one, else the CPU), cpu or cuda:N."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32. Scores are float32 always."""
    resume: bool = False
    """Go on behind what a killed run with the same settings had finished."""
    overwrite: bool = False
    """Replace an earlier result that was made with other settings or from another model."""
    seed: int = 42
    """Fixes which windows calibration takes."""

    def check(self) -> None:
        super().check()
        for name in ("num_samples", "repair_samples", "held_out_samples", "gradient_batch_size"):
            self.check_range(name, 1)
        for name in ("sequence_length", "analysis_length"):
            self.check_range(name, 2)
        self.check_range("analysis_samples", 0)
        if self.device_map != "auto":
            device_named(self.device_map)
        self.check_name("output_name")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.results_dir / self.output_name

    def result_fields(self) -> dict[str, Any]:
        """The fields that the pruned model depends on."""
        return {name: value for name, value in self.as_dict().items() if name not in NOT_RESULT}


class Results:
    """The folder of a run's results: model, analysis and evaluation are replaced together or not at all.

    Args:
        config: of the run.
        kind: what its records say the run is.
        base: the folder of the dense model.
        inputs: what identifies what the run is made from, see `checkpoint.describe_stage`.

    Raises:
        UserError: what lies there must not be replaced.
    """

    def __init__(self, config: RunFields, kind: str, base: Path, inputs: dict[str, Any]):
        self.config, self.base, self.inputs = config, base, inputs
        self.output = Output(config.folder, "--output_name", kind, RUN_FILE)
        self.output.check([base], shared=[config.results_dir, config.models_dir])
        settings = config.result_fields()
        if (config.folder / "finetuned").exists():
            settings |= {name: getattr(config, name) for name in FINETUNING}
        self.output.check_same(is_made_from(config.folder, settings, inputs, RUN_FILE), config.overwrite)

    @contextmanager
    def running(self) -> Iterator[SavedParts]:
        """The folder is this run's alone while it lasts; gives what a killed run had finished, and keeps the log."""
        config = self.config
        key = digest_of([config.result_fields(), contents(self.inputs)], 12)
        states = config.folder.with_name(f".{config.output_name}_{key}{STATES_END}")
        with owned(config.folder, states):
            saved = SavedParts(states, config.resume)
            with log_file(saved.folder / "logs"):
                yield saved
            saved.remove()

    @contextmanager
    def written(self, saved: SavedParts) -> Iterator[Path]:
        """Yield a temporary folder to put the results into; on success it takes the place of the results' folder."""
        with self.output.written() as temporary:
            yield temporary
            shutil.copytree(saved.folder / "logs", temporary / "logs", dirs_exist_ok=True)
            record = {"stage": self.output.kind, "config": self.config.as_dict(), "inputs": self.inputs}
            seal(temporary, record | {"environment": fingerprint()}, RUN_FILE)
        log.info("-> %s", shown(self.config.folder))


def calibration_text(
    config: RunFields, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[list[Corpus], CalibrationText, Tensor]:
    """Windows for scores and repair (of the train part), for choices and for the analysis (of the validation part)."""
    check_positions(model, "sequence_length", config.sequence_length)
    check_positions(model, "analysis_length", config.analysis_length)
    train, held_out = (load_corpus(config.dataset, part, config.data_dir) for part in ("train", "validation"))
    length, seed = config.sequence_length, config.seed
    ids = tokenize(tokenizer, train)
    scores = sample_windows(ids, length, config.num_samples, seed, train.name)
    repair = sample_windows(ids, length, config.repair_samples, seed + 1)
    validation = tokenize(tokenizer, held_out)
    choices = sample_windows(validation, length, config.held_out_samples, seed, held_out.name)
    analysis = sample_windows(validation, config.analysis_length, config.analysis_samples, seed + 1, held_out.name)
    log.info("Calibration: %s (%s), %d windows of %d tokens", train.name, train.source, len(scores), length)
    text = CalibrationText(scores, repair, choices, config.gradient_batch_size, config.use_gradient_checkpointing)
    return [train, held_out], text, analysis


def compare(
    base: Path,
    dense: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: dict[str, Tensor],
    config: RunFields,
) -> dict[str, Any]:
    """What the pruned model is beside the dense one, as evaluation_results.json says it.

    Args:
        base: the dense model's folder; it is loaded again where speeds are asked for.
        dense: what `measure` found of it.
        model: the pruned one.
    """
    pruned = measure(model, tokenizer, tests, config, config.gradient_batch_size)
    results = {"dense": dense, "pruned": pruned, "reduction": reduction(dense, pruned)}
    if config.evaluates("efficiency"):
        again, _ = load_language_model(base, model.device, model.dtype)
        found = measure_efficiency({"dense": again, "pruned": model}, model.device, config)
        ratios = efficiency_ratios(found["pruned"], found["dense"])
        log.info("MACs of the layers x %.3f; prefill x %.2f, decode x %.2f as fast", *ratios.values())
        results["efficiency"] = found | {"ratios": ratios}
    gone, sizes = results["reduction"], [found["parameters"]["total"] / 1e6 for found in (dense, pruned)]
    log.info(
        "Gone: %.1f %% of the layers' parameters, %.1f %% of the whole model's (%.1f -> %.1f million); %d -> %d layers",
        100 * gone["structures"], 100 * gone["total"], *sizes, len(dense["layers"]), len(pruned["layers"]),
    )  # fmt: skip
    return results


def reduction(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, float]:
    """Shares of parameters that are gone: of the decoder layers' structures, and of the whole model."""
    return {part: 1 - pruned["parameters"][part] / dense["parameters"][part] for part in ("structures", "total")}

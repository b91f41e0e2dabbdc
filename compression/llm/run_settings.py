"""The settings that both pruning scripts have, and the recovery training that follows from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from accelerate.utils.modeling import convert_file_size_to_int

from compression.config import NO_EFFECT, AtLeast, FolderName, Settings
from compression.hub import Publishing
from compression.llm.agreement import Agreement
from compression.llm.evaluate import FAST_EVALUATION, Evaluation
from compression.llm.mixture import Weighted, check_one_of_each, parse_mixture
from compression.llm.recovery_settings import EVALUATIONS, LEARNING_RATE, Recovery
from compression.offload import OffloadName
from compression.runtime import MODELS, RESULTS, Dtype, UserError, device_named
from compression.sources import LLM
from compression.training import Training

FAST = FAST_EVALUATION | dict(num_samples=4, repair_samples=16, analysis_samples=1, finetune_samples=64)


@dataclass
class RunSettings(Settings):
    """Which model is pruned, where it is computed, where the results go."""

    base_model: Annotated[str, NO_EFFECT] = LLM
    """Model to prune: a folder, or a name on the hub."""
    output_name: Annotated[str, FolderName(), NO_EFFECT] = "pruned"
    """Name of the folder in results_dir that the results go to."""
    results_dir: Annotated[Path, NO_EFFECT] = RESULTS
    """Folder of all results."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that a fetched model goes to."""
    save_bin: Annotated[bool, NO_EFFECT] = False
    """Also write pruned_model.bin, a plain state dict."""
    device_map: str = "auto"
    """The device the model is on: auto (a GPU where there is one, else the CPU), cpu or cuda:N."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32. Scores are float32 always."""
    offload: Annotated[OffloadName, NO_EFFECT] = "auto"
    """Where layers are that do not compute: none (on the device), cpu (in RAM), disk (in their files; states of the
    text too), auto: on the device if the model fits there, else the next that it fits. Same result but for rounding."""
    max_shard_size: Annotated[str, NO_EFFECT] = "5GB"
    """Size of the weight files of the pruned model, at most: a number with MB or GB."""
    resume: Annotated[bool, NO_EFFECT] = False
    """Go on behind what a killed run with the same settings had finished."""
    overwrite: Annotated[bool, NO_EFFECT] = False
    """Replace an earlier result that was made with other settings or from another model."""
    seed: int = 42
    """Fixes which windows calibration takes."""

    def check(self) -> None:
        if self.device_map != "auto":
            device_named(self.device_map)
        try:
            fits = self.shard_bytes > 0
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"--max_shard_size {self.max_shard_size}: allowed is a size above 0 such as 500MB or 5GB")

    @property
    def shard_bytes(self) -> int:
        """Most bytes of a weight file.

        Raises:
            ValueError: the text is no size.
        """
        return convert_file_size_to_int(self.max_shard_size)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.results_dir / self.output_name


@dataclass
class Calibration(Settings):
    """Text that structures are scored on, that repairs are fitted to, that choices are made by."""

    dataset: str = "wikitext2"
    """Calibration text: wikitext2, ptb, c4, fineweb-edu, plots, reviews, a text file or one of instructions (.json,
    .jsonl); several with commas, each with its weight behind a colon: wikitext2:2,ptb,mine.txt."""
    num_samples: Annotated[int, AtLeast(1)] = 32
    """Windows of calibration text that scores are computed on."""
    sequence_length: Annotated[int, AtLeast(2)] = 1024
    """Tokens per window."""
    repair_samples: Annotated[int, AtLeast(1)] = 64
    """Windows that least-squares repairs are fitted to."""
    held_out_samples: Annotated[int, AtLeast(1)] = 4
    """Windows of the validation part that choices are made by."""
    analysis_samples: Annotated[int, AtLeast(0)] = 2
    """Windows of the validation part that the removal analysis is done on; 0 leaves it out where it is not needed."""
    analysis_length: Annotated[int, AtLeast(2)] = 512
    """Tokens per window there."""
    gradient_batch_size: Annotated[int, AtLeast(1)] = 1
    """Windows per forward and backward pass."""
    use_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""

    def check(self) -> None:
        texts = self.texts
        for flag in ("num_samples", "repair_samples", "held_out_samples"):
            check_one_of_each(flag, getattr(self, flag), texts)

    @property
    def texts(self) -> list[Weighted]:
        """The texts of `dataset`.

        Raises:
            UserError: it is malformed, or names what is no text.
        """
        return parse_mixture(self.dataset)


@dataclass
class Finetuning(Settings):
    """Whether and how the pruned model is trained on, with the defaults of post_training.py otherwise."""

    finetune: Annotated[bool, NO_EFFECT] = False
    """Train the pruned model on, as post_training.py does, and measure it again."""
    finetune_method: Annotated[Literal["lora", "full"], NO_EFFECT] = "lora"
    """Train adapters beside the frozen weights, or all weights."""
    finetune_samples: Annotated[int, AtLeast(1), NO_EFFECT] = 500
    """Windows of the train part of --dataset that are trained on."""
    lora_r: Annotated[int, AtLeast(1), NO_EFFECT] = 8
    """Rank of the adapters."""
    shard: Annotated[bool, NO_EFFECT] = False
    """Spread the model over the processes while it is trained on, as post_training.py does."""


class RunConfig(Protocol):
    """What the configuration of a pruning script has, besides the method's own fields."""

    data_dir: str | None
    run: RunSettings
    calibration: Calibration
    evaluation: Evaluation
    agreement: Agreement
    finetuning: Finetuning
    publishing: Publishing

    def as_dict(self) -> dict[str, Any]: ...

    def result_fields(self) -> dict[str, Any]: ...

    @classmethod
    def modernized(cls, noted: dict[str, Any]) -> dict[str, Any]: ...


def recovery_after(config: RunConfig) -> Recovery:
    """How a pruned model is trained on: as post_training.py would by default, on the calibration's texts.

    Raises:
        UserError: flags that do not go together, or a text that is not there.
    """
    run, finetuning, evaluation = config.run, config.finetuning, config.evaluation
    measured = [what for what in EVALUATIONS if evaluation.evaluates(what)]
    return Recovery(
        finetune_method=finetuning.finetune_method,
        finetune_samples=finetuning.finetune_samples,
        tokens=None,
        dataset=config.calibration.dataset,
        train_on_inputs=False,
        max_length=min(512, config.calibration.sequence_length),
        packing=False,
        validation_dataset=None,
        validation_samples=16,
        lora_r=finetuning.lora_r,
        lora_alpha=16.0,
        lora_dropout=0.0,
        lora_projections="auto",
        lora_rank_by_share=False,
        load_in_4bit=False,
        dtype=run.dtype if finetuning.finetune_method == "lora" else "auto",
        kd_weight=0.0,
        kd_temperature=1.0,
        hidden_weight=0.0,
        teacher=None,
        teacher_offload="none",
        teacher_cache=0,
        shard=finetuning.shard,
        schedule="linear",
        training=Training(
            num_epochs=2,
            batch_size=8,
            learning_rate=LEARNING_RATE,
            amp="auto",
            save_steps=100,
            seed=run.seed,
            resume=run.resume,
            skip_existing=run.resume,
        ),
        evaluation=evaluation.updated(run_evaluation=",".join(measured) or "none"),
        agreement=config.agreement,
    )

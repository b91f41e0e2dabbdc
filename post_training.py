"""Recovery training of a pruned language model: LoRA adapters, or all weights.

    python post_training.py --pruned_model results/NAME/models --output_name NAME_lora [--dataset FILE] [--fast]
    python post_training.py --finetune_method full --kd_weight 0.5

Reads the model and training data; writes results/OUTPUT_NAME or --output_dir: an adapter in PEFT's format, or with
`full` an ordinary checkpoint.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from compression.config import NO_EFFECT, AtLeast, Between, Config, Flat, FolderName, group, pick, run_script
from compression.hub import Publishing
from compression.llm.agreement import FAST_AGREEMENT, Agreement
from compression.llm.evaluate import FAST_EVALUATION, Evaluation
from compression.llm.recovery import recover
from compression.llm.recovery_settings import LEARNING_RATE, Recovery
from compression.outputs import check_place
from compression.page import update_page
from compression.runtime import MODELS, RESULTS, Dtype
from compression.schedule import ScheduleName
from compression.training import Training

# What the authors of GQA-aware pruning train with, after either of their presets in gqa_aware_pruning.py.
AUTHORS = dict(
    finetune_samples=49_760,  # their data, alpaca-cleaned, without the 2,000 rows that they keep for validation
    max_length=256,
    num_epochs=2,
    batch_size=128,
    gradient_accumulation_steps=32,
    learning_rate=5e-5,
    lora_r=8,
    lora_alpha=16.0,
)


@dataclass
class PostTrainingConfig(Config):
    pruned_model: Annotated[Path, NO_EFFECT] = RESULTS / "hgsp" / "models"
    """Model to train on: a checkpoint of a language model, pruned or dense."""
    output_name: Annotated[str, FolderName(), NO_EFFECT] = "recovered"
    """Name of the folder in results_dir that the result goes to."""
    results_dir: Annotated[Path, NO_EFFECT] = RESULTS
    """Folder of all results."""
    output_dir: Annotated[Path | None, NO_EFFECT] = None
    """Folder that the result goes to instead."""
    overwrite: Annotated[bool, NO_EFFECT] = False
    """Replace an earlier result that was made with other settings or inputs."""

    # What is trained, and on what.
    finetune_method: Literal["lora", "full"] = "lora"
    """Train adapters beside the frozen weights, or all weights."""
    data_dir: Annotated[str | None, NO_EFFECT] = None
    """Folder with text files (wikitext2/, ptb/); without it the hub, then the embedded default."""
    dataset: str = "wikitext2"
    """Texts, as for pruning (wikitext2:2,ptb,mine.txt; of each the train part), or a .json or .jsonl file of
    instructions."""
    finetune_samples: Annotated[int, AtLeast(1)] = 500
    """Windows of text, or rows of instructions, that are trained on."""
    tokens: Annotated[int | None, AtLeast(1)] = None
    """Tokens to predict in training in all, exactly; --finetune_samples and --num_epochs are not used then."""
    max_length: Annotated[int, AtLeast(8)] = 512
    """Tokens per window; instructions with their responses are cut there."""
    packing: bool = False
    """Join instructions to windows of max_length, of which none sees the others: less padding, the same loss."""
    train_on_inputs: bool = False
    """With instructions: predict the prompts too, and not the responses alone."""
    validation_dataset: str | None = None
    """Texts whose validation part gives the perplexity after each epoch; by default --dataset, else wikitext2."""
    validation_samples: Annotated[int, AtLeast(1)] = 16
    """Windows of it."""

    # Adapters.
    lora_r: Annotated[int, AtLeast(1)] = 8
    """Rank of the adapters."""
    lora_alpha: Annotated[float, AtLeast(1e-6)] = 16.0
    """Numerator of lora_alpha / lora_r, by which the adapters' output is scaled."""
    lora_dropout: Annotated[float, Between(0, 0.99)] = 0.0
    """Dropout on the adapters' input."""
    lora_projections: str = "auto"
    """Projections that get adapters, separated by commas (q_proj,v_proj); auto: all that the model's layers have."""
    lora_rank_by_share: bool = False
    """Choose each layer's rank by how much of it was pruned; the adapters have as many weights in all."""
    load_in_4bit: bool = False
    """Frozen weights under the adapters in 4 bits (NF4)."""
    dtype: Dtype = "auto"
    """Of frozen weights; auto: bfloat16 where the hardware multiplies it, else float32. What is trained is float32."""

    # Distillation: (1 - kd_weight) * cross-entropy + kd_weight * T^2 * KL(teacher || student)
    # + hidden_weight * |student's state - teacher's|^2 / |teacher's|^2, means over the tokens.
    kd_weight: Annotated[float, Between(0, 1)] = 0.0
    """Share of the loss that is KL to the teacher's predictions; the rest is cross-entropy."""
    kd_temperature: Annotated[float, Between(0.1, 100)] = 1.0
    """Softening of both models' logits there."""
    hidden_weight: Annotated[float, AtLeast(0)] = 0.0
    """Weight of the states behind each layer, compared with those behind the same layer of the teacher."""
    teacher: Annotated[Path | None, NO_EFFECT] = None
    """The model to learn from and to be compared with; by default the dense one that the records of the pruned model
    lead to."""
    teacher_offload: Annotated[Literal["none", "cpu", "disk"], NO_EFFECT] = "none"
    """Where the teacher's layers are that do not compute: none (on the device), cpu (in RAM), disk (in their files)."""
    teacher_cache: Annotated[int, AtLeast(0)] = 0
    """Keep this many of the teacher's largest predictions of each token on disk, and learn from these; 0: from all."""

    shard: Annotated[bool, NO_EFFECT] = False
    """Spread the model over the processes (FSDP): each holds a part of all weights, gradients and moments."""
    schedule: ScheduleName = "linear"
    """How the learning rate falls behind its warm-up: in a line, along a cosine, or in the last fifth alone (wsd)."""
    training: Flat[Training] = group(
        Training, num_epochs=2, batch_size=8, learning_rate=LEARNING_RATE, amp="auto", save_steps=100
    )
    evaluation: Flat[Evaluation] = group(Evaluation, run_evaluation="ppl")
    agreement: Flat[Agreement] = group(Agreement, agreement_text="auto")
    publishing: Flat[Publishing] = group(Publishing)

    presets: ClassVar = {
        "fast": dict(finetune_samples=64, num_epochs=1, max_length=128, validation_samples=4)
        | FAST_EVALUATION
        | FAST_AGREEMENT,
        "authors": AUTHORS,
        "headline": AUTHORS,
    }

    def check(self) -> None:
        pick(Recovery, self)


def main(config: PostTrainingConfig) -> None:
    output, flag = config.output_dir, "--output_dir"
    if output is None:
        output, flag = config.results_dir / config.output_name, "--output_name"
    check_place(output, flag, shared=[config.results_dir])
    recovery = pick(Recovery, config)
    recover(recovery, config.pruned_model, output, flag, config.data_dir, config.overwrite, config.as_dict())
    config.publishing.publish(output)
    if config.output_dir is None:
        update_page(MODELS, config.results_dir)


if __name__ == "__main__":
    run_script(PostTrainingConfig, main)

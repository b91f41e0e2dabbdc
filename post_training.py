"""Recovery training of a pruned language model: LoRA adapters, or all weights.

    python post_training.py --pruned_model results/NAME/models --output_name NAME_lora [--dataset FILE] [--fast]
    python post_training.py --finetune_method full --kd_weight 0.5

Reads the model and training data; writes results/OUTPUT_NAME or --output_dir: an adapter in PEFT's format, or with
`full` an ordinary checkpoint. The method's fields are documented in compression/llm/recovery.py, those of any training
in compression/training.py, those of the evaluation before and after it in compression/llm/evaluate.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compression.config import run_script
from compression.llm.evaluate import EvaluationFields
from compression.llm.recovery import RecoveryFields, recover
from compression.outputs import check_place
from compression.runtime import RESULTS


@dataclass
class PostTrainingConfig(RecoveryFields):
    pruned_model: Path = RESULTS / "hgsp" / "models"
    """Model to train on: a checkpoint of a language model, pruned or dense."""
    output_name: str = "recovered"
    """The result goes to results/NAME."""
    results_dir: Path = RESULTS
    """Where results go."""
    output_dir: Path | None = None
    """Where the result goes instead."""

    presets: ClassVar = {
        "fast": dict(finetune_samples=64, num_epochs=1, max_length=128, validation_samples=4)
        | EvaluationFields.fast_evaluation,
    }

    def check(self) -> None:
        super().check()
        self.check_name("output_name")


def main(config: PostTrainingConfig) -> None:
    output, flag = config.output_dir, "--output_dir"
    if output is None:
        output, flag = config.results_dir / config.output_name, "--output_name"
    check_place(output, flag, shared=[config.results_dir])
    recover(config, config.pruned_model, output, flag)


if __name__ == "__main__":
    run_script(PostTrainingConfig, main)

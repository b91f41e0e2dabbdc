"""Stage 10: 4-bit quantization-aware training of the pruned student, with distillation from its teacher (QKD-4bit).

    python 10_qat_kd_4bit.py [--fast] [--pruned_model_path DIR] [--num_epochs 2] [--learning_rate 1e-5]

Reads the newest pruned model, models/teacher_model and the data; writes
models/pruned_qkd4bit_<timestamp>, a 4-bit model that computes with exactly the weights it was trained with.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from compression.classifier.qat import LossWeights, QuantizationAwareDistillation
from compression.classifier.stage import DataSettings, Stage, require_classifier
from compression.config import NO_EFFECT, AtLeast, Between, Config, Flat, group, pick, run_script
from compression.hub import Publishing
from compression.inputs import find_unquantized
from compression.quantization import Storage, bytes_by_part, check_exact, pack
from compression.runtime import MODELS, UserError, log, pick_dtype
from compression.training import Training


@dataclass
class QATKDConfig(Config):
    pruned_model_path: Annotated[Path | None, NO_EFFECT] = None
    """The model to train; by default the newest pruned one in models_dir."""
    teacher_path: Annotated[Path | None, NO_EFFECT] = None
    """The fine-tuned teacher; by default teacher_model in models_dir."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that checkpoints are read from and written to."""

    # beta_ce * cross-entropy + beta_logits * T^2 * KL(teacher || student) + beta_hidden * MSE of hidden states.
    beta_ce: Annotated[float, AtLeast(0)] = 0.3
    """Weight of the cross-entropy on the labels."""
    beta_logits: Annotated[float, AtLeast(0)] = 0.5
    """Weight of the soft-label loss."""
    beta_hidden: Annotated[float, AtLeast(0)] = 0.2
    """Weight of the hidden-state loss; with 0 the teacher runs once and no more."""
    temperature: Annotated[float, Between(0.1, 100)] = 4.0
    """Softening of both models' logits."""

    storage: Flat[Storage] = group(
        Storage, quant_type="nf4", blocksize=64, double_quant=False, embedding_bits=4, compute_dtype="auto"
    )
    data: Flat[DataSettings] = group(DataSettings, max_length=128, train_fraction=1.0)
    training: Flat[Training] = group(Training, num_epochs=2, batch_size=16, learning_rate=1e-5, max_grad_norm=1.0)
    publishing: Flat[Publishing] = group(Publishing)

    presets: ClassVar = {
        "fast": dict(num_epochs=1, batch_size=32, train_fraction=0.3, max_length=64, beta_hidden=0.0, amp="auto")
    }

    def check(self) -> None:
        if not (self.beta_ce or self.beta_logits or self.beta_hidden):
            raise UserError("--beta_ce 0 --beta_logits 0 --beta_hidden 0: one of them must be above 0")


def make_recipe(stage: Stage, model, task, config: QATKDConfig) -> QuantizationAwareDistillation:
    """The losses, with a teacher that runs on every batch only where its hidden states are needed."""
    weights, storage = pick(LossWeights, config), config.storage.format()
    hidden_states = stage.hidden_states(model, task, config.beta_hidden)
    return QuantizationAwareDistillation(
        model, config.training, weights, storage, stage.teacher_logits(), hidden_states
    )


def main(config: QATKDConfig) -> None:
    teacher = config.teacher_path or config.models_dir / "teacher_model"
    require_classifier(teacher, "--teacher_path", "python 1_finetune_teacher.py")
    pruned = find_unquantized(config.pruned_model_path, config.models_dir)
    require_classifier(pruned, "--pruned_model_path", "python 8_pruning_with_finetuning.py")
    stage = Stage("pruned_qkd4bit", config, parent=pruned, output="pruned_qkd4bit_*", teacher=teacher)
    if stage.is_done():
        return

    with stage.running():
        # From here on the forward pass computes with 4-bit weights; before training that is what stage 9 would save.
        model, task = stage.load_model()
        metric = stage.task.primary
        metrics = {f"{metric}_fp32": task.evaluate(model)[metric], "bytes_before": bytes_by_part(model)}
        recipe = make_recipe(stage, model, task, config)
        metrics[f"{metric}_ptq"] = task.evaluate(model)[metric]
        fp32, ptq = metrics[f"{metric}_fp32"], metrics[f"{metric}_ptq"]
        log.info("%s %.4f in fp32, %.4f in 4 bits before training", stage.task.title, fp32, ptq)
        history = stage.train(model, task, recipe)

        # The same fp32 weights are packed once; every layer must have the values it was trained with.
        trained_logits = task.predict(model, task.validation)
        values = recipe.finish()
        packed = pack(model, config.storage.format(), pick_dtype(config.storage.compute_dtype, "Compute dtype"))
        check_exact(packed, values)
        metrics["logit_difference"] = (task.predict(packed, task.validation) - trained_logits).abs().max().item()
        metrics["bytes_after"] = bytes_by_part(packed)
        log.info("Packed: all weights as trained, logits to %.1e", metrics["logit_difference"])
        stage.save(packed, task, history, **metrics)


if __name__ == "__main__":
    run_script(QATKDConfig, main)

"""Stage 10: 4-bit quantization-aware training of the pruned student, with distillation from its teacher (QKD-4bit).

    python 10_qat_kd_4bit.py [--fast] [--pruned_model_path DIR] [--num_epochs 2] [--learning_rate 1e-5]

Reads the newest pruned model, models/teacher_model and the sentiment data; writes
models/pruned_qkd4bit_<timestamp>, a 4-bit model that computes with exactly the weights it was trained with. The fields
of the losses are documented in compression/classifier/qat.py, those of any training in compression/training.py.
"""

from dataclasses import dataclass
from pathlib import Path

from compression.checkpoint import find_unquantized, load_classifier
from compression.classifier.qat import QuantizationAwareConfig, QuantizationAwareDistillation
from compression.classifier.stage import Stage, require_classifier
from compression.config import run_script
from compression.quantization import bytes_by_part, check_exact, pack
from compression.runtime import UserError, log, pick_dtype


@dataclass
class QATKDConfig(QuantizationAwareConfig):
    pruned_model_path: Path | None = None
    """The model to train; by default the newest pruned one in models_dir."""
    teacher_path: Path | None = None
    """The fine-tuned teacher; by default teacher_model in models_dir."""


def make_recipe(stage: Stage, model, task, config: QATKDConfig) -> QuantizationAwareDistillation:
    """The losses, with a teacher that runs on every batch only where its hidden states are needed."""
    rows = len(task.train)
    if not config.beta_hidden:
        return QuantizationAwareDistillation(model, config, rows, teacher_logits=stage.teacher_logits())
    teacher, tokenizer = load_classifier(stage.teacher, model.device)
    if tokenizer.get_vocab() != task.tokenizer.get_vocab():
        raise UserError(f"--teacher_path {stage.teacher}: splits text otherwise than the student; use --beta_hidden 0")
    return QuantizationAwareDistillation(model, config, rows, teacher=teacher)


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
        metrics = {"accuracy_fp32": task.evaluate(model)["accuracy"], "bytes_before": bytes_by_part(model)}
        recipe = make_recipe(stage, model, task, config)
        metrics["accuracy_ptq"] = task.evaluate(model)["accuracy"]
        log.info(
            "Accuracy %.4f in fp32, %.4f in 4 bits before training", metrics["accuracy_fp32"], metrics["accuracy_ptq"]
        )
        history = stage.train(model, task, recipe)

        # The same fp32 weights are packed once; every layer must have the values it was trained with.
        trained_logits = task.predict(model, task.validation)
        values = recipe.finish()
        packed = pack(model, config.storage(), pick_dtype(config.compute_dtype, "Compute dtype"))
        check_exact(packed, values)
        metrics["logit_difference"] = (task.predict(packed, task.validation) - trained_logits).abs().max().item()
        metrics["bytes_after"] = bytes_by_part(packed)
        log.info("Packed: all weights as trained, logits to %.1e", metrics["logit_difference"])
        stage.save(packed, task, history, **metrics)


if __name__ == "__main__":
    run_script(QATKDConfig, main)

"""What KGSP and MSP add to a training step.

    python benchmarks/pruning_overhead.py [--student_path models/student_model]

Times training steps with gradual pruning on (to separate sparsities, and to budgets of MACs), with it off, and with the
naive way that visits every structure in a Python loop, interleaved in one process, on the student and on a random model
of DistilBERT-base size (72 heads, 18,432 neurons). Writes results/pruning_overhead.json.
"""

import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression.checkpoint import load_classifier
from compression.classifier.budget import macs_budget
from compression.classifier.gradual_pruning import GradualPruning
from compression.classifier.hidden_states import HiddenStates
from compression.config import Config, run_script
from compression.distillation import distillation_loss
from compression.files import write_json
from compression.inputs import require
from compression.runtime import RESULTS, ROOT, fingerprint, log, pick_device
from compression.structures import ENCODER_KINDS

# Its name begins with a digit, so it cannot be imported.
STAGE = runpy.run_path(str(ROOT / "8_pruning_with_finetuning.py"))


@dataclass
class OverheadConfig(Config):
    student_path: Path = Path("models/student_model")
    """The student to time besides the random model."""
    models: tuple[str, ...] = ("student", "distilbert_base_size")
    """Which of the two."""
    budgets: tuple[float, ...] = (0.5, 0.1)
    """Shares of its own MACs that a budget leaves each model."""
    batch_size: int = 32
    """Sentences per step."""
    sequence_length: int = 16
    """Tokens per sentence; SST-2's training sentences have 13 on average."""
    rounds: int = 60
    """Timed steps of each kind; the pruning phase is timed from its start, events and windows included."""
    seed: int = 0
    """Fixes the token ids and the random model."""

    presets: ClassVar = {"fast": dict(rounds=20)}


class Trainer:
    """A plain training loop's step on one model; `pruning` are the settings of stage 8 where it prunes."""

    def __init__(self, model, config: OverheadConfig, pruning: dict | None = None):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        rows = 40 * config.batch_size
        self.teacher_logits = torch.randn(rows, 2).to(model.device)
        self.recipe = None if pruning is None else self._recipe(config, pruning)
        self.step = 0

    def _recipe(self, config: OverheadConfig, pruning: dict) -> GradualPruning:
        model, shared = self.model, dict(batch_size=config.batch_size, pruning_start_epoch=1)
        settings = STAGE["GradualPruningWithFinetuningConfig"].make(**shared | pruning)
        share = settings.target and settings.target[1]
        budget = macs_budget(share, model, model, config.sequence_length) if share else None
        target = STAGE["make_target"](model, settings, budget)
        return STAGE["make_recipe"](model, self.teacher_logits, settings, target, HiddenStates(model))

    def take(self, batch) -> None:
        """One optimizer step."""
        if self.recipe:
            terms = self.recipe.loss(self.model, batch, self.step)
        else:
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            terms = distillation_loss(logits, self.teacher_logits[batch["rows"]], batch["labels"], 5.0, 0.5)
        terms["loss"].backward()
        if self.recipe:
            self.recipe.after_backward(self.step)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.recipe:
            self.recipe.after_step(self.step)
        self.optimizer.zero_grad()
        self.step += 1


def naive_scores(recipe: GradualPruning) -> None:
    """|weight * gradient| of every structure, one structure after the other."""
    for kind in ENCODER_KINDS:
        for parts in recipe.layers:
            rows, outer = parts.split(kind)
            linears, size = [part.module for part in rows], outer.in_features // parts.count(kind)
            for index in range(parts.count(kind)):
                place = slice(index * size, (index + 1) * size)
                score = sum((linear.weight[place] * linear.weight.grad[place]).abs().sum() for linear in linears)
                score = score + (outer.weight[:, place] * outer.weight.grad[:, place]).abs().sum()


def seconds(call, device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def compare(name: str, make_model, config: OverheadConfig, device: torch.device) -> dict:
    """Median seconds of a step with pruning off and on, and of the naive scores alone; ratios per round."""
    presets = STAGE["GradualPruningWithFinetuningConfig"].presets["half"]  # what deep compression has; other targets
    long = dict(pruning_end_epoch=8, num_epochs=15)  # so that it lasts as long as with separate sparsities
    budgets = {f"mac {share}": presets | long | dict(target=("mac", share)) for share in config.budgets}
    ways = {"off": None, "on": {}} | budgets
    trainers = {way: Trainer(make_model(), config, settings) for way, settings in ways.items()}
    plain, pruning = trainers["off"], trainers["on"]
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.sequence_length)
    batch = {
        "input_ids": torch.randint(1, plain.model.config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, shape[:1], generator=generator),
        "rows": torch.arange(config.batch_size),
    }
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    for trainer in (*trainers.values(),) * 3:
        trainer.take(batch)
    times: dict[str, list[float]] = {way: [] for way in trainers}
    for turn in range(config.rounds):
        for way in list(trainers) if turn % 2 else reversed(trainers):
            times[way].append(seconds(lambda way=way: trainers[way].take(batch), device))
    off, on = times["off"], times["on"]
    pruning.recipe.loss(pruning.model, batch, 0)["loss"].backward()
    with torch.no_grad():
        naive = median(seconds(lambda: naive_scores(pruning.recipe), device) for _ in range(3))
    result = {
        "structures": {kind: sum(parts.count(kind) for parts in pruning.recipe.layers) for kind in ENCODER_KINDS},
        "step_off_ms": 1e3 * median(off),
        "step_on_ms": 1e3 * median(on),
        "on_over_off": median(on) / median(off),
        "mean_on_over_off": sum(on) / sum(off),
        "budget_over_off": {way: sum(times[way]) / sum(off) for way in budgets},
        "naive_scores_ms": 1e3 * naive,
        "naive_over_off": 1 + naive / median(off),
    }
    log.info(
        "%s: on/off %.3f (median), %.3f (mean); naive loop/off %.2f; budgets/off (mean) %s",
        name,
        result["on_over_off"],
        result["mean_on_over_off"],
        result["naive_over_off"],
        result["budget_over_off"],
    )
    return result


def main(config: OverheadConfig) -> None:
    require(config.student_path, "--student_path", "python 2_distill_student.py")
    device = pick_device()

    def student():
        return load_classifier(config.student_path, device)[0]

    def distilbert_base():
        torch.manual_seed(config.seed)
        return DistilBertForSequenceClassification(DistilBertConfig()).to(device)

    known = {"student": student, "distilbert_base_size": distilbert_base}
    results = {name: compare(name, known[name], config, device) for name in config.models}
    path = RESULTS / "pruning_overhead.json"
    write_json(path, {"config": config.as_dict(), "environment": fingerprint(), "results": results})
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(OverheadConfig, main)

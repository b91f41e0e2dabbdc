"""Compare ways to make a classifier small: one run, one teacher, the same MACs, the same training.

    python benchmarks/classifier_pruning_methods.py --data_dir SST2 [--ratios 0.8 0.95] [--methods ours kwon]
    python benchmarks/classifier_pruning_methods.py --data_dir SST2 --report

The teacher is a fine-tuned BERT. Every method gives a physically smaller model of at most the MACs that are asked for
(of the encoder, at 128 tokens), nearest to them. `ours` is stage 8, which prunes while it trains; the others are pruned
or built at once and then distilled as stage 2 does, with as many steps of the same sentences and changed copies;
kwon is not trained.

Writes results/classifier_pruning_methods.json after each row; run again, the command goes on behind what is there. At
the end all models are timed interleaved, and a table and a curve are written beside it (.md, .png).

Torch-Pruning and ModelOpt are no part of the environment, and are left out where they are missing:
pip install --no-deps torch-pruning==1.6.1
pip install --no-deps nvidia-modelopt==0.39.0 torchprofile==0.0.4 pulp
"""

import itertools
import math
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from classifier_pruning_methods.ground import SEQUENCE_LENGTH, Ground, macs_of
from classifier_pruning_methods.kwon import kwon
from classifier_pruning_methods.libraries import modelopt, torch_pruning
from classifier_pruning_methods.plain import small_layers, small_scratch, uniform_magnitude
from classifier_pruning_methods.report import OURS, TEACHER, draw, key_of, table
from common.rows import earlier, missing
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from compression.checkpoint import load_classifier, load_config
from compression.classifier.augment import Augmentation
from compression.classifier.data import Encoded
from compression.classifier.hidden_states import HiddenStates
from compression.classifier.stage import DataSettings, Stage
from compression.config import AtLeast, Between, Config, Flat, FolderName, group, run_script
from compression.files import remove_folder, write_json, write_text
from compression.flops import count_macs, count_parameters
from compression.inputs import find_newest, require_type
from compression.outputs import KEPT_LOGITS
from compression.plots import save_figure
from compression.runtime import MODELS, RESULTS, ROOT, UserError, log, pick_device
from compression.structures import ENCODER_KINDS, layers_of
from compression.timing import measure_latency
from compression.training import clean_up, fit

STAGE_2 = runpy.run_path(str(ROOT / "2_distill_student.py"))
# Share of the epochs at whose end stage 8 has removed everything, as in its presets.
PRUNED_BY = 1 / 3


@dataclass(frozen=True)
class Method:
    """A way to make a model of so many MACs.

    Attributes:
        make: gives it.
        trained: whether it is distilled then.
        package: the module that it needs, and how that is installed.
    """

    make: Callable[[Ground, int], PreTrainedModel]
    trained: bool = True
    package: tuple[str, str] | None = None


METHODS = {
    "small_scratch": Method(small_scratch),
    "small_layers": Method(small_layers),
    "uniform_magnitude": Method(uniform_magnitude),
    "kwon": Method(kwon, trained=False),
    "torch_pruning": Method(torch_pruning, package=("torch_pruning", "torch-pruning==1.6.1")),
    "modelopt": Method(modelopt, package=("modelopt", "nvidia-modelopt==0.39.0 torchprofile==0.0.4 pulp")),
}
ALL_METHODS = (OURS, *METHODS)


@dataclass
class PruningMethodsConfig(Config):
    teacher_path: Path = MODELS / "teacher_model"
    """The fine-tuned teacher, a dense BERT."""
    ratios: tuple[Annotated[float, Between(0.01, 0.99)], ...] = (0.5, 0.6, 0.8, 0.9, 0.95)
    """Shares of the teacher's encoder MACs to remove."""
    methods: tuple[Literal[ALL_METHODS], ...] = ALL_METHODS
    """Which methods."""
    seeds: Annotated[int, AtLeast(1)] = 1
    """Runs of each method at each ratio: seeds 0, 1, ..."""
    num_epochs: Annotated[int, AtLeast(1)] = 3
    """Passes over the training data that each trained method has."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """Sentences per step."""
    learning_rate: Annotated[float, Between(0, 1)] = 1e-4
    """Highest learning rate."""
    amp: Literal["no", "auto", "bf16", "fp16"] = "no"
    """Mixed precision of the training."""
    scored_rows: Annotated[int, AtLeast(1)] = 2048
    """Training sentences that kwon, torch_pruning and modelopt compute scores on."""
    throughput_repeats: Annotated[int, AtLeast(1)] = 10
    """Batches that each model is timed on."""
    data: Flat[DataSettings] = group(DataSettings, max_length=128, train_fraction=1.0)
    augmentation: Flat[Augmentation] = group(Augmentation, augment=2, augment_join=0.3)
    report: bool = False
    """Measure no further rows: time the models that are there, and write table and curve."""
    results_dir: Path = field(default_factory=lambda: RESULTS)
    """Folder that the results go to."""
    output_name: Annotated[str, FolderName()] = "classifier_pruning_methods"
    """Name of the results there."""

    presets: ClassVar = {"fast": dict(num_epochs=1, train_fraction=0.02, ratios=(0.8,), scored_rows=256)}

    def check(self) -> None:
        for ratio in self.ratios:
            Between(0.01, 0.99).check("ratios", ratio)

    @property
    def path(self) -> Path:
        """The rows."""
        return self.results_dir / f"{self.output_name}.json"

    @property
    def work(self) -> Path:
        """The folder of the models' configurations, and of what a row needs while it is made."""
        return self.results_dir.resolve() / self.output_name

    @property
    def settings(self) -> dict[str, Any]:
        """What a row depends on, beside its method, ratio and seed."""
        other = {"ratios", "methods", "seeds", "throughput_repeats", "report", "results_dir", "output_name"}
        return {name: value for name, value in self.as_dict().items() if name not in other}

    @property
    def stage_flags(self) -> dict[str, Any]:
        """What stages 2 and 8 are told alike."""
        same = ("num_epochs", "batch_size", "learning_rate", "amp")
        shared = self.data.as_dict() | self.augmentation.as_dict()
        return {name: getattr(self, name) for name in same} | {k: v for k, v in shared.items() if v is not None}


class Bench:
    """Teacher, data and training of one seed."""

    def __init__(self, config: PruningMethodsConfig, seed: int):
        self.config, self.seed, self.device = config, seed, pick_device()
        teacher = config.teacher_path.resolve()
        settings = STAGE_2["DistillationConfig"].make(
            teacher_path=teacher, models_dir=config.work, seed=seed, resume=True, **config.stage_flags
        )
        stage = Stage("student", settings, teacher, "student_model", teacher, augmentation=config.augmentation)
        self.settings, self.stage = settings, stage
        self.teacher, self.task = stage.load_model()
        self.ground = Ground(
            lambda: load_classifier(teacher, self.device)[0],
            some_rows(self.task.train, config.scored_rows, seed),
            self.task.tokenizer.pad_token_id,
            seed,
        )

    def hits(self, model: PreTrainedModel) -> Tensor:
        """Whether each validation sentence is classified right, bool [sentences]."""
        return self.task.predict(model, self.task.validation).argmax(-1) == self.task.validation.labels

    def row(self, method: str, ratio: float) -> dict[str, Any]:
        """One model, measured."""
        named = {"method": method, "ratio": ratio, "seed": self.seed}
        macs, key, started = int((1 - ratio) * macs_of(self.teacher)), key_of(named), time.perf_counter()
        try:
            model = self.by_stage_8(ratio, key) if method == OURS else METHODS[method].make(self.ground, macs)
        except UserError as error:
            return named | {"impossible": str(error)}
        made = time.perf_counter() - started
        if method != OURS and METHODS[method].trained:
            self.distil(model, key)
        model.config.save_pretrained(self.config.work / key)
        return named | {
            **describe(model, self.hits(model)),
            "share": count_macs(model, SEQUENCE_LENGTH).encoder / count_macs(self.teacher, SEQUENCE_LENGTH).encoder,
            "seconds_to_make": made,
            "seconds": time.perf_counter() - started,
        }

    def distil(self, model: PreTrainedModel, key: str) -> None:
        """Train by stage 2's recipe, in place."""
        settings, logits = self.settings, self.stage.teacher_logits().to(self.device)
        losses = settings.temperature, settings.alpha, HiddenStates(model)
        recipe = STAGE_2["Distillation"](settings.training, logits, *losses)
        states = self.config.work / f".{key}_states"
        fit(model, recipe, self.task.train, self.task.evaluate, states, self.ground.pad_token_id)
        clean_up(states)

    def by_stage_8(self, ratio: float, key: str) -> PreTrainedModel:
        """What stage 8 makes of the teacher, in a process of its own, which finds the teacher's logits."""
        config, models = self.config, self.config.work / f".{key}_models"
        self.stage.teacher_logits()
        for kept in config.work.glob(f"{KEPT_LOGITS}*"):
            shutil.copytree(kept, models / kept.name, dirs_exist_ok=True)
        flags = config.stage_flags | {
            "finetuning_learning_rate": config.learning_rate,
            "preset": "half",  # what the presets of deep compression share; the target is another
            "teacher_path": config.teacher_path.resolve(),
            "models_dir": models,
            "seed": self.seed,
            "pruning_end_epoch": math.ceil(PRUNED_BY * config.num_epochs),
            "patience": config.num_epochs,
        }
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        # Digits of no binary fraction: 0.05, not 0.050000000000000044.
        target = ["--target", "mac", f"{1 - ratio:.6g}"]
        command = [sys.executable, "8_pruning_with_finetuning.py", *words, *target, "--resume", "--skip_existing"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        model = load_classifier(find_newest(models, "pruned"), self.device)[0]
        remove_folder(models)
        return model


def some_rows(encoded: Encoded, count: int, seed: int) -> Encoded:
    """So many of the rows, drawn."""
    rows = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return Encoded(
        {name: [values[row] for row in rows] for name, values in encoded.inputs.items()}, encoded.labels[rows]
    )


def describe(model: PreTrainedModel, hits: Tensor) -> dict[str, Any]:
    """What a row says of a model; `hits` is 1 for each sentence that it has right, else 0."""
    return {
        "accuracy": hits.double().mean().item(),
        "hits": "".join(map(str, hits.int().tolist())),
        "macs": count_macs(model, SEQUENCE_LENGTH).as_dict(),
        "parameters": count_parameters(model),
        "layers": [[parts.count(kind) for kind in ENCODER_KINDS] for parts in layers_of(model)],
    }


def measure_rows(config: PruningMethodsConfig, found: dict[str, Any]) -> None:
    """Add the rows that are not there yet, writing them one by one."""
    methods = [name for name in config.methods if name == OURS or not missing(name, METHODS[name].package)]
    done = {key_of(row) for row in found["rows"]}
    for seed in range(config.seeds):
        todo = [
            (method, ratio)
            for ratio, method in itertools.product(config.ratios, methods)
            if key_of({"method": method, "ratio": ratio, "seed": seed}) not in done
        ]
        if not todo:
            continue
        bench = Bench(config, seed)
        found["teacher"] = found["teacher"] or describe(bench.teacher, bench.hits(bench.teacher))
        for method, ratio in todo:
            log.info("%s, %g %% of the MACs removed, seed %d", method, 100 * ratio, seed)
            row = bench.row(method, ratio)
            found["rows"].append(row)
            write_json(config.path, found)
            log.info("%s: %s", method, row.get("impossible") or f"accuracy {row['accuracy']:.4f}")


def measure_throughput(config: PruningMethodsConfig, found: dict[str, Any]) -> None:
    """Sentences per second at batch 32 of the teacher and of each method's first seed, all interleaved."""
    keys = [key_of(row) for row in found["rows"] if "hits" in row and row["seed"] == 0]
    if set(found["throughput"]) == {TEACHER, *keys}:
        return
    device = pick_device()
    models = {TEACHER: load_classifier(config.teacher_path, device)[0]}
    for key in keys:  # speed depends on the sizes, not on the weights
        model = AutoModelForSequenceClassification.from_config(load_config(config.work / key))
        models[key] = model.to(device).eval()
    times = measure_latency(models, device, SEQUENCE_LENGTH, 1, config.throughput_repeats)
    found["throughput"] = {name: figures["throughput"]["median_samples_per_second"] for name, figures in times.items()}
    write_json(config.path, found)


def write_report(config: PruningMethodsConfig, found: dict[str, Any]) -> None:
    """Table and curve beside the rows."""
    accuracy, speed = 100 * found["teacher"]["accuracy"], found["throughput"][TEACHER]
    where = "{processor}, GPU {gpu}, {threads} threads, torch {torch}".format(**found["environment"])
    title = f"Teacher: accuracy {accuracy:.2f}, {speed:,.1f} sentences per second at batch 32 ({where})."
    write_text(config.path.with_suffix(".md"), f"{title}\n\n{table(found)}\n")
    save_figure(draw(found), config.path.with_suffix(".png"))
    log.info("%s\n-> %s", table(found), config.path)


def main(config: PruningMethodsConfig) -> None:
    require_type(config.teacher_path, "--teacher_path", "python 1_finetune_teacher.py", {"bert"})
    found = earlier(config.path, config.settings, teacher=None, rows=[], throughput={})
    if not config.report:
        measure_rows(config, found)
    if not any("hits" in row for row in found["rows"]):
        raise UserError(f"{config.path}: has no rows to report; leave out --report, or choose other --methods")
    measure_throughput(config, found)
    write_report(config, found)


if __name__ == "__main__":
    run_script(PruningMethodsConfig, main)

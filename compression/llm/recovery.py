"""Recovery training: a pruned language model gets back part of what pruning cost it.

Either LoRA adapters are trained beside the frozen weights (Hu et al. 2021), which may be in 4 bits (QLoRA, Dettmers et
al. 2023), or all weights are. The loss is that of language modelling, with a share for the dense model's predictions
where `kd_weight` asks for it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import (
    SavedParts,
    check_positions,
    contents,
    describe_stage,
    identify,
    is_made_from,
    load_language_model,
    read_stage,
    require_language_model,
    save_checkpoint,
    save_folder,
)
from compression.distillation import distillation_loss
from compression.integrity import digest_of
from compression.llm.evaluate import EvaluationFields, evaluation_windows, measure
from compression.llm.lora import PROJECTIONS, add_lora, write_adapter
from compression.llm.perplexity import perplexity
from compression.llm.rows import Sequences, is_instruction_file, of_instructions, of_windows, read_instructions
from compression.llm.text import FILES, load_corpus, sample_windows, tokenize
from compression.outputs import STATES_END, Output, owned
from compression.quantization import nf4_base
from compression.runtime import (
    ROOT,
    Dtype,
    UserError,
    log,
    pick_device,
    pick_dtype,
    processes,
    seed_everything,
    shown,
)
from compression.training import Recipe, TrainingFields, clean_up, fit


@dataclass
class RecoveryFields(TrainingFields, EvaluationFields):
    """What a recovery training does; the fields of any training and of any evaluation are beside these."""

    finetune_method: Literal["lora", "full"] = "lora"
    """Train adapters beside the frozen weights, or all weights."""
    finetune_samples: int = 500
    """Windows of text, or rows of instructions, that are trained on."""
    dataset: str = "wikitext2"
    """wikitext2, ptb, c4, a text file (of each the train part), or a .json or .jsonl file of instructions."""
    train_on_inputs: bool = False
    """With instructions: predict the prompts too, and not the responses alone."""
    max_length: int = 512
    """Tokens per window; instructions with their responses are cut there."""
    validation_dataset: str | None = None
    """Text whose validation part gives the perplexity after each epoch; by default --dataset, else wikitext2."""
    validation_samples: int = 16
    """Windows of it."""
    lora_r: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """The adapters' output is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    lora_projections: str = ",".join(PROJECTIONS)
    """The projections that get adapters, separated by commas."""
    overwrite: bool = False
    """Replace an earlier result that was made with other settings or inputs."""
    load_in_4bit: bool = False
    """The frozen weights under the adapters are in 4 bits (NF4)."""
    dtype: Dtype = "auto"
    """Of frozen weights; auto: bfloat16 where the hardware multiplies it, else float32. What is trained is float32."""
    kd_weight: float = 0.0
    """Share of the loss that is KL to the teacher's predictions; the rest is cross-entropy."""
    kd_temperature: float = 2.0
    """Softening of both models' logits there."""
    teacher: Path | None = None
    """The model to learn from; by default the one that the pruned model was made from."""
    num_epochs: int = 2
    """Passes over the training data."""
    batch_size: int = 8
    """Windows or rows per optimizer step, over all processes and accumulation steps."""
    save_steps: int = 100
    """A state to resume from is saved every so many steps, and after every epoch."""
    amp: Literal["no", "auto", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: bf16 (else fp16) on CUDA, none on the CPU."""

    evaluations = ("ppl", "zeroshot")

    def check(self) -> None:
        super().check()
        for name in ("finetune_samples", "validation_samples", "lora_r"):
            self.check_range(name, 1)
        self.check_range("max_length", 8)
        self.check_range("lora_alpha", 1e-6)
        self.check_range("lora_dropout", 0, 0.99)
        self.check_range("kd_weight", 0, 1)
        self.check_range("kd_temperature", 0.1, 100)
        self._check_texts()
        unknown = set(self.projections) - set(PROJECTIONS)
        if unknown:
            raise UserError(
                f"--lora_projections {self.lora_projections}: unknown {', '.join(sorted(unknown))}; allowed are "
                f"{', '.join(PROJECTIONS)}, separated by commas"
            )
        if self.finetune_method == "full" and self.load_in_4bit:
            raise UserError("--load_in_4bit: not allowed with --finetune_method full; use --finetune_method lora")
        if self.finetune_method == "full" and self.dtype not in ("auto", "float32"):
            raise UserError(
                f"--dtype {self.dtype}: with --finetune_method full allowed is auto or float32, for 16 bits lose small "
                "updates; use --amp bf16 to compute in them"
            )
        if self.teacher is not None and not self.kd_weight:
            raise UserError(f"--teacher {self.teacher}: is used with --kd_weight above 0 alone; give that too")

    def _check_texts(self) -> None:
        for flag in ("dataset", "validation_dataset"):
            name = getattr(self, flag)
            if name is not None and name not in FILES and not os.path.isfile(name):
                raise UserError(
                    f"--{flag} {name}: no such file; allowed is a file or one of {', '.join(FILES)}; give its path"
                )
        if is_instruction_file(self.validation_dataset or ""):
            raise UserError(f"--validation_dataset {self.validation_dataset}: allowed is plain text, not instructions")

    @property
    def projections(self) -> list[str]:
        return self.lora_projections.split(",")


class LanguageModelling(Recipe):
    """Cross-entropy of the tokens that are predicted, with `kd_weight` for the teacher's distribution of each.

    Args:
        teacher: runs on every batch; None leaves it out.
    """

    def __init__(self, config: RecoveryFields, rows: int, teacher: PreTrainedModel | None = None):
        super().__init__(config, rows)
        self.teacher = teacher

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        logits, labels = _logits(model, batch), batch["input_ids"][batch["targets"]]
        if self.teacher is None:
            return {"loss": F.cross_entropy(logits.float(), labels)}
        with torch.no_grad():
            teacher = _logits(self.teacher, batch)
        return distillation_loss(logits, teacher, labels, self.config.kd_temperature, self.config.kd_weight)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits [tokens, vocabulary] of the tokens that are predicted, each from the place before it."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.logits[:, :-1][batch["targets"][:, 1:]]


def recover(config: RecoveryFields, pruned: Path, output: Path, flag: str = "--output_dir") -> dict[str, Any]:
    """Train a language model on and write the result.

    Args:
        pruned: the checkpoint, pruned or dense.
        output: where the adapters go, or with `full` the new checkpoint; each with its `stage.json`.
        flag: what named that place.

    Returns:
        The metrics, as in `stage.json`: what `measure` finds `before` and `after`.

    Raises:
        UserError: an input that is missing or of the wrong kind, or an output that must not be replaced.
    """
    require_language_model(pruned, "--pruned_model")
    place = Output(output, flag, "recovery")
    place.check(filter(None, [pruned, config.teacher]))
    config.check_zero_shot()
    teacher = find_teacher(config, pruned)
    inputs = {"parent": identify(pruned)} | ({"teacher": identify(teacher)} if teacher else {})
    seed_everything(config.seed)
    device = pick_device()
    model, tokenizer = load_language_model(
        pruned, device, training_dtype(config), nf4_base() if config.load_in_4bit else None
    )
    train, data = training_data(config, tokenizer, model)
    inputs["data"] = {"name": data["name"], "sha256": train.digest()}
    same = is_made_from(output, config.result_fields(), inputs)
    if config.skip_existing and same:
        log.info("%s exists and matches configuration and inputs: skipped", shown(output))
        return read_stage(output)["metrics"]
    place.check_same(same, config.overwrite)
    recipe = LanguageModelling(config, len(train), teacher and load_teacher(teacher, model, config))
    held_out, tests = validation_windows(config, tokenizer), evaluation_windows(config, tokenizer, model)
    # The same folder names keep runs with other settings or inputs apart.
    key = digest_of([config.result_fields(), contents(inputs), processes().num_processes], 12)
    work_dir, parts = (output.with_name(f".{output.name}_{key}{end}") for end in (STATES_END, f".parts{STATES_END}"))
    with owned(output, work_dir, parts):
        saved = SavedParts(parts, config.resume)
        before = saved.json("before", lambda: measure(model, tokenizer, tests, config))

        adapted = None
        if config.finetune_method == "lora":
            adapted = add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, config.projections)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("Trained: %.2f million weights of %.2f", trained / 1e6, before["parameters"]["total"] / 1e6)
        history = fit(
            model, recipe, train, lambda model: {"validation_perplexity": perplexity(model.eval(), held_out)},
            work_dir, padding_token(tokenizer),
        )  # fmt: skip

        metrics = {"before": before, "after": measure(model.eval(), tokenizer, tests, config), "trained": trained}
        stage = describe_stage("recovery", config.as_dict(), inputs, metrics, data)
        files = {"training_history.json": history}
        if adapted is None:
            save_checkpoint(output, model, tokenizer, stage, files)
        else:
            save_folder(output, lambda folder: write_adapter(adapted, folder), stage, files)
        clean_up(work_dir)
        saved.remove()
    log.info("-> %s", shown(output))
    return metrics


def training_dtype(config: RecoveryFields) -> torch.dtype:
    """The type of the weights as they are loaded: where all are trained, float32."""
    return torch.float32 if config.finetune_method == "full" else pick_dtype(config.dtype, "Frozen weights")


def find_teacher(config: RecoveryFields, pruned: Path) -> Path | None:
    """The checkpoint to learn from, None where there is nothing to learn from it.

    Raises:
        UserError: it is not there, or not known.
    """
    if not config.kd_weight:
        return None
    parent = (read_stage(pruned) or {}).get("parent")
    if config.teacher is None and not isinstance(parent, str):
        raise UserError(
            f"--kd_weight {config.kd_weight}: needs a teacher, and {pruned} does not say what it was made from "
            "(stage.json); name the dense model: --teacher"
        )
    teacher = config.teacher or ROOT / parent
    require_language_model(teacher, "--teacher", "python download_model.py --only llm")
    return teacher


def load_teacher(folder: Path, student: PreTrainedModel, config: RecoveryFields) -> PreTrainedModel:
    """The teacher, frozen, on the student's device.

    Raises:
        UserError: its vocabulary is another one.
    """
    teacher, _ = load_language_model(folder, student.device, pick_dtype(config.dtype, "Teacher"))
    sizes = [model.config.vocab_size for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(f"--teacher {folder}: it has {sizes[0]} tokens, allowed are the student's {sizes[1]}")
    return teacher.requires_grad_(False)


def training_data(
    config: RecoveryFields, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[Sequences, dict[str, Any]]:
    """What is trained on, and what a report says about it.

    Raises:
        UserError: windows that are longer than the model's positions, or data that is malformed or not there.
    """
    check_positions(model, "max_length", config.max_length)
    if is_instruction_file(config.dataset):
        rows = read_instructions(Path(config.dataset))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
        chosen = [rows[row] for row in order[: config.finetune_samples].sort().values]
        train = of_instructions(tokenizer, chosen, config.max_length, config.train_on_inputs)
        data = {"name": Path(config.dataset).name, "source": "a local file"}
    else:
        corpus = load_corpus(config.dataset, "train", config.data_dir)
        ids = tokenize(tokenizer, corpus)
        train = of_windows(sample_windows(ids, config.max_length, config.finetune_samples, config.seed, corpus.name))
        data = corpus.describe()
    tokens = train.weights.sum().item()
    log.info("Training data: %s (%s), %d rows, %d tokens", data["name"], data["source"], len(train), tokens)
    return train, data | {"rows": len(train), "tokens": tokens}


def validation_windows(config: RecoveryFields, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows [count, length] of the text that each epoch is judged by."""
    default = "wikitext2" if is_instruction_file(config.dataset) else config.dataset
    flag = "--validation_dataset" if config.validation_dataset else "--dataset"
    corpus = load_corpus(config.validation_dataset or default, "validation", config.data_dir, flag=flag)
    ids = tokenize(tokenizer, corpus)
    return sample_windows(ids, config.max_length, config.validation_samples, config.seed, corpus.name)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are filled up with; it is masked, so any token will do where the tokenizer has none for it."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)

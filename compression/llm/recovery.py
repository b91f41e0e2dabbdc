"""Recovery training: a pruned language model gets back part of what pruning cost it.

Either LoRA adapters are trained beside the frozen weights (Hu et al. 2021), which may be in 4 bits (QLoRA, Dettmers et
al. 2023), or all weights are. The loss is that of language modelling, with a share for the dense model's predictions
where `kd_weight` asks for it, and a term for its hidden states where `hidden_weight` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import (
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
from compression.config import NO_EFFECT, AtLeast, Between, Originally, Settings
from compression.decoder import decoder_of
from compression.distillation import relative_errors
from compression.files import read_object
from compression.integrity import digest_of
from compression.llm.evaluate import Evaluation, evaluation_windows, measure, sizes
from compression.llm.head import TRAINED_ROWS, Within, before_predicted, in_blocks
from compression.llm.lora import adapter_weights, add_lora, draw_adapter, ranks_by_share, write_adapter
from compression.llm.mixture import Mixture, Weighted, parse_mixture
from compression.llm.origin import kept_layers, pruned_shares
from compression.llm.perplexity import perplexity
from compression.llm.rows import (
    Packed,
    Sequences,
    is_instruction_file,
    of_instructions,
    of_windows,
    packed,
    read_instructions,
    taken,
)
from compression.llm.spread import load_unfilled, save_spread, spread
from compression.llm.teacher import KeptTeacher, LiveTeacher, Teacher, keep_largest
from compression.outputs import HISTORY_FILE, KEPT_LOGITS, STATES_END, Output, owned
from compression.quantization import nf4_base
from compression.runtime import ROOT, Dtype, UserError, log, pick_device, pick_dtype, processes, seed_everything, shown
from compression.saved_parts import SavedParts
from compression.schedule import ScheduleName
from compression.sharding import fill, within
from compression.structures import DECODERS
from compression.training import Recipe, Training, clean_up, fit

RANK_FLAG = "--lora_rank_by_share"
LEARNING_RATE = 4e-4
"""The default, for adapters and for all weights (docs/results.md)."""
EVALUATIONS = ("ppl", "zeroshot")
"""What can be measured before and after."""


@dataclass
class Recovery(Settings):
    """What a recovery training does. The fields are documented in post_training.py, where their defaults are."""

    finetune_method: Literal["lora", "full"]
    finetune_samples: int
    tokens: Annotated[int | None, Originally(None)]
    dataset: str
    train_on_inputs: bool
    max_length: int
    packing: Annotated[bool, Originally(False)]
    validation_dataset: str | None
    validation_samples: int
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_projections: str
    lora_rank_by_share: Annotated[bool, Originally(False)]
    load_in_4bit: bool
    dtype: Dtype
    kd_weight: float
    kd_temperature: float
    hidden_weight: Annotated[float, Originally(0.0)]
    teacher: Annotated[Path | None, NO_EFFECT]
    teacher_offload: Annotated[Literal["none", "cpu", "disk"], NO_EFFECT]
    teacher_cache: Annotated[int, AtLeast(0), Originally(0)]
    shard: Annotated[bool, NO_EFFECT]
    schedule: Annotated[ScheduleName, Originally("linear")]
    training: Training
    evaluation: Evaluation

    def check(self) -> None:
        self.evaluation.check_allowed(EVALUATIONS)
        self._check_texts()
        if self.finetune_method == "full" and self.load_in_4bit:
            raise UserError("--load_in_4bit: not allowed with --finetune_method full; use --finetune_method lora")
        if self.finetune_method == "full" and self.dtype not in ("auto", "float32"):
            raise UserError(
                f"--dtype {self.dtype}: with --finetune_method full allowed is auto or float32, for 16 bits lose small "
                "updates; use --amp bf16 to compute in them"
            )
        if self.shard and self.load_in_4bit:
            raise UserError(
                "--shard: not allowed with --load_in_4bit, whose weights are stored in blocks; leave one out"
            )
        if self.lora_rank_by_share and self.finetune_method == "full":
            raise UserError("--lora_rank_by_share: not allowed with --finetune_method full; leave one out")
        if self.hidden_weight and self.teacher_cache:
            raise UserError(
                f"--teacher_cache {self.teacher_cache}: keeps no hidden states; not allowed with --hidden_weight"
            )
        if self.teacher_cache and not self.kd_weight:
            raise UserError(
                f"--teacher_cache {self.teacher_cache}: is used with --kd_weight above 0 alone; give that too"
            )
        if self.teacher_offload != "none" and not self.learns:
            raise UserError(
                f"--teacher_offload {self.teacher_offload}: is used with --kd_weight or --hidden_weight above 0 alone; "
                "give one of them too"
            )
        if self.teacher is not None and self.needs_dense is None:
            raise UserError(
                f"--teacher {self.teacher}: is used with --kd_weight or --hidden_weight above 0, or with "
                "--lora_rank_by_share, alone; give one of them too"
            )

    def _check_texts(self) -> None:
        texts = self.texts
        if self.validation_dataset is not None:
            parse_mixture(self.validation_dataset, "--validation_dataset")
        if self.tokens:
            flag, least = f"--tokens {self.tokens}", (len(texts) - 1) * (self.max_length - 1) + 1
        else:
            flag, least = f"--finetune_samples {self.finetune_samples}", len(texts)
        if (self.tokens or self.finetune_samples) < least:
            raise UserError(f"{flag}: allowed is at least {least}, for a window of each text of --dataset")
        if self.packing and self.instructions is None:
            raise UserError(
                f"--packing: is for instructions (.json, .jsonl); the windows of --dataset {self.dataset}, a text, are "
                "full without it: leave it out"
            )
        if self.packing and self.teacher_cache:
            raise UserError(f"--packing: not allowed with --teacher_cache {self.teacher_cache}; leave one out")
        if is_instruction_file(self.validation_dataset or ""):
            raise UserError(f"--validation_dataset {self.validation_dataset}: allowed is plain text, not instructions")

    @property
    def texts(self) -> list[Weighted]:
        """What is trained on."""
        return parse_mixture(self.dataset)

    @property
    def instructions(self) -> Path | None:
        """The file of instructions, where nothing else is trained on; beside texts it is one of them."""
        text, *others = self.texts
        return Path(text.name) if not others and is_instruction_file(text.name) else None

    @property
    def learns(self) -> bool:
        """Whether anything is learned from a teacher."""
        return bool(self.kd_weight or self.hidden_weight)

    @property
    def needs_dense(self) -> str | None:
        """The flag that needs the dense model, if one does."""
        flags = ("kd_weight", "hidden_weight", "lora_rank_by_share")
        return next((f"--{flag}" for flag in flags if getattr(self, flag)), None)

    def in_one_epoch(self) -> "Recovery":
        """The same; a budget of tokens is spent in one epoch."""
        return self.updated(num_epochs=1) if self.tokens else self

    @property
    def projections(self) -> list[str]:
        return self.lora_projections.split(",")

    @property
    def spread(self) -> bool:
        """Whether the model is spread over processes; a single one has all of it."""
        return self.shard and processes().num_processes > 1

    @property
    def states_of(self) -> str | int:
        """By which processes a killed run can be resumed: any, or this number of them."""
        return "any" if self.shard else processes().num_processes


class LanguageModelling(Recipe):
    """Cross-entropy of the tokens that are predicted, with `kd_weight` for the teacher's distribution of each.

    Args:
        teacher: what is learned from besides the text; None leaves it out.
        module: the model as it is trained; None makes it.
    """

    unit = "tokens"

    def __init__(self, recovery: Recovery, rows: int, teacher: Teacher | None = None, module: Within | None = None):
        super().__init__(recovery.training, rows)
        self.recovery, self.teacher, self.within, self.decay = recovery, teacher, module, recovery.schedule

    def module(self, model: PreTrainedModel) -> nn.Module:
        decoder_of(model)  # refuses a model whose loss is not that of its head's logits
        return self.within or Within(model)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        known = self.teacher.known(batch) if self.teacher else ()
        inputs = (batch["input_ids"], batch["targets"], batch.get("position_ids"))
        cross_entropy, *taught = model(self._terms, *inputs, *known)
        if not taught:
            return {"loss": cross_entropy}
        weights = {"soft_label_loss": self.recovery.kd_weight, "hidden_state_loss": self.recovery.hidden_weight}
        terms = dict(zip((name for name, weight in weights.items() if weight), taught, strict=True))
        loss = (1 - self.recovery.kd_weight) * cross_entropy
        for name, term in terms.items():
            loss = loss + weights[name] * term
        return {"loss": loss} | terms | {"cross_entropy": cross_entropy}

    def _terms(
        self, model: PreTrainedModel, ids: Tensor, targets: Tensor, positions: Tensor | None, *known: Tensor
    ) -> Tensor:
        """Means over the predicted tokens [terms]."""
        decoder, teacher = decoder_of(model), self.teacher
        layers = range(len(teacher.layers) if teacher else 0)
        words, targeted_states = known[: len(known) - len(layers)], known[len(known) - len(layers) :]

        def losses(states: Tensor, labels: Tensor, *known: Tensor) -> Tensor:
            logits = decoder.logits(states).float()
            terms = [F.cross_entropy(logits, labels, reduction="none")]
            if teacher and self.recovery.kd_weight:
                terms.append(teacher.losses(logits, *known))
            return torch.stack(terms, dim=-1)

        # Rows are padded behind their end: what is before the padding does not see it.
        with decoder.recorded(layers) as found:
            states = before_predicted(decoder.final_states(ids, positions), targets)
        terms = in_blocks(losses, states, ids[targets], *words, size=TRAINED_ROWS).mean(0)
        if not layers:
            return terms
        errors = [
            relative_errors(before_predicted(found[layer], targets), target).mean()
            for layer, target in zip(layers, targeted_states, strict=True)
        ]
        return torch.cat([terms, torch.stack(errors).mean()[None]])


def recover(
    recovery: Recovery,
    pruned: Path,
    output: Path,
    flag: str = "--output_dir",
    data_dir: str | None = None,
    overwrite: bool = False,
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a language model on and write the result.

    Args:
        pruned: the checkpoint, pruned or dense.
        output: where the adapters go, or with `full` the new checkpoint; each with its `stage.json`.
        flag: what named that place.
        data_dir: folder with the texts; None asks the hub.
        overwrite: whether an earlier result of other settings or inputs may be replaced.
        record: what `stage.json` says of the settings besides those of the recovery.

    Returns:
        The metrics, as in `stage.json`: what `measure` finds `before` and `after`.

    Raises:
        UserError: an input that is missing or of the wrong kind, or an output that must not be replaced.
    """
    require_language_model(pruned, "--pruned_model")
    place = Output(output, flag, "recovery")
    place.check(filter(None, [pruned, recovery.teacher]))
    recovery.evaluation.check_zero_shot(data_dir)
    dense = find_dense(recovery, pruned)
    teacher = dense if recovery.learns else None
    layers = kept_layers(pruned, dense, "--hidden_weight") if dense and recovery.hidden_weight else []
    recovery = recovery.updated(lora_projections=named_projections(recovery.lora_projections, pruned)).in_one_epoch()
    inputs = {"parent": identify(pruned)} | ({"teacher": identify(teacher)} if teacher else {})
    seed_everything(recovery.training.seed)
    device = pick_device()
    model, tokenizer = load_student(recovery, pruned, device)
    train, data = training_data(recovery, data_dir, tokenizer, model)
    inputs["data"] = {"name": data["name"], "sha256": train.digest()}
    same = is_made_from(output, recovery.result_fields(), inputs, modernized=lambda noted: recovery.originals() | noted)
    if recovery.training.skip_existing and same and (earlier := read_stage(output)):
        log.info("%s exists and matches configuration and inputs: skipped", shown(output))
        return earlier["metrics"]
    place.check_same(same, overwrite)
    held_out = validation_windows(recovery, data_dir, tokenizer)
    tests = evaluation_windows(recovery.evaluation, data_dir, tokenizer, model)
    # The same folder names keep runs with other settings or inputs apart.
    key = digest_of([recovery.result_fields(), contents(inputs), recovery.states_of], 12)
    work_dir, parts = (output.with_name(f".{output.name}_{key}{end}") for end in (STATES_END, f".parts{STATES_END}"))
    with owned(output, work_dir, parts):
        saved = SavedParts(parts, recovery.training.resume)
        bare = sizes(model)
        shares = pruned_shares(model, pruned, dense, RANK_FLAG) if dense and recovery.lora_rank_by_share else None
        student = Student(recovery, model, pruned, shares)
        learned_from = make_teacher(recovery, teacher, layers, train, output, parts) if teacher else None
        figures = partial(student.compute, partial(measure, model, tokenizer, tests, recovery.evaluation, data_dir))
        before = saved.json("before", lambda: figures() | bare)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("Trained: %.2f million weights of %.2f", trained / 1e6, before["parameters"]["total"] / 1e6)
        history = fit(
            model,
            LanguageModelling(recovery, len(train), learned_from, student.module),
            train,
            lambda model: {"validation_perplexity": student.compute(partial(perplexity, model.eval(), held_out))},
            work_dir,
            padding_token(tokenizer),
            recovery.as_dict(),
            recovery.shard,
        )

        model.eval()
        metrics = {"before": before, "after": figures(), "trained": trained}
        stage = describe_stage("recovery", (record or {}) | recovery.as_dict(), inputs, metrics, data)
        student.save(output, tokenizer, stage, {HISTORY_FILE: history})
        clean_up(work_dir)
        saved.remove()
    log.info("-> %s", shown(output))
    return metrics


def named_projections(names: str, folder: Path) -> str:
    """The Linear modules of a checkpoint's model that get adapters, separated by commas.

    Args:
        names: as --lora_projections has them; auto is all of them.

    Raises:
        UserError: the model's family has none of a name.
    """
    model_type = read_object(folder / "config.json")["model_type"]
    own = DECODERS[model_type].projections
    if names == "auto":
        return ",".join(own)
    if unknown := sorted(set(names.split(",")) - set(own)):
        raise UserError(
            f"--lora_projections {names}: unknown {', '.join(unknown)}; allowed are {', '.join(own)}, separated by "
            f"commas (those of {folder}, model type {model_type!r}), or auto for all of them"
        )
    return names


def load_student(
    recovery: Recovery, folder: Path, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train; where it will be spread over processes, without its weights."""
    dtype = training_dtype(recovery)
    if recovery.spread:
        return load_unfilled(folder, dtype)
    return load_language_model(folder, device, dtype, nf4_base() if recovery.load_in_4bit else None)


class Student:
    """The model that is trained: with adapters or without, in this process or spread over several.

    Args:
        model: with its weights, or where it is spread without them, see `load_student`; gets its adapters in place.
        folder: where its weights are.
        shares: of each layer, how much of it was pruned, by which its rank is chosen; None: all have the same rank.

    Attributes:
        module: the model as the training loop uses it.
    """

    def __init__(self, recovery: Recovery, model: PreTrainedModel, folder: Path, shares: Sequence[float] | None = None):
        self.model, self.module = model, Within(model)
        self.adapted: PeftModel | None = None
        if recovery.finetune_method == "lora":
            r, alpha, dropout = recovery.lora_r, recovery.lora_alpha, recovery.lora_dropout
            ranks = None if shares is None else ranks_by_share(model, recovery.projections, shares, r)
            self.adapted = add_lora(model, r, alpha, dropout, recovery.projections, ranks)
        drawn = draw_adapter(model, recovery.training.seed)
        if recovery.spread:
            spread(self.module, folder, drawn)
        else:
            fill(model, drawn)

    def compute(self, compute: Callable[[], Any]) -> Any:
        """What is computed with the model, without gradients; of all processes together where it is spread."""
        return within(self.module, compute)

    def save(
        self, output: Path, tokenizer: PreTrainedTokenizerBase, stage: dict[str, Any], files: dict[str, Any]
    ) -> None:
        """Write the adapters, or the whole model where there are none, see `checkpoint.save_checkpoint`."""
        if (adapted := self.adapted) is not None:
            weights = adapter_weights(adapted)
            save_folder(output, lambda folder: write_adapter(adapted, folder, weights), stage, files)
        elif isinstance(self.module, FSDPModule):
            save_spread(output, self.model, tokenizer, stage, files)
        else:
            save_checkpoint(output, self.model, tokenizer, stage, files)


def training_dtype(recovery: Recovery) -> torch.dtype:
    """The type of the weights as they are loaded: where all are trained, float32."""
    return torch.float32 if recovery.finetune_method == "full" else pick_dtype(recovery.dtype, "Frozen weights")


def find_dense(recovery: Recovery, pruned: Path) -> Path | None:
    """The checkpoint to learn from, or to compare the pruned one with; None where nothing needs it.

    Raises:
        UserError: it is not there, or not known; its vocabulary or hidden size is another one, or the former smaller
            than `teacher_cache`.
    """
    if recovery.needs_dense is None:
        return None
    dense = recovery.teacher
    if dense is None:
        parent = (read_stage(pruned) or {}).get("parent")
        if not isinstance(parent, str):
            raise UserError(
                f"{recovery.needs_dense}: needs the dense model, and {pruned} does not say what it was made from "
                "(stage.json); name it: --teacher"
            )
        dense = ROOT / parent
    require_language_model(dense, "--teacher", "python download_model.py --only llm")
    found, wanted = (read_object(folder / "config.json") for folder in (dense, pruned))
    for field, what in (("vocab_size", "tokens"), ("hidden_size", "hidden features")):
        if found.get(field) != wanted.get(field):
            raise UserError(
                f"--teacher {dense}: it has {found.get(field)} {what}, allowed are the student's {wanted.get(field)}"
            )
    Between(0, wanted.get("vocab_size") or 0).check("teacher_cache", recovery.teacher_cache)
    return dense


def make_teacher(
    recovery: Recovery, folder: Path, layers: Sequence[int], train: Sequences | Packed, output: Path, scratch: Path
) -> Teacher:
    """What is learned from: the teacher, frozen, or its largest predictions, which are computed unless they are kept.

    Args:
        folder: the teacher's checkpoint, see `find_dense`.
        layers: those whose states are learned from.
        output: beside which its predictions are kept. scratch: for what an offloaded teacher does not keep in memory.
    """
    largest, temperature = recovery.teacher_cache, recovery.kd_temperature
    dtype = pick_dtype(recovery.dtype, "Teacher")

    def load() -> PreTrainedModel:
        place, device = recovery.teacher_offload, processes().device
        teacher, _ = load_language_model(folder, device, dtype, offload=place, scratch=scratch)
        return teacher.requires_grad_(False)

    if not largest:
        return LiveTeacher(load(), temperature, layers)
    key = digest_of([identify(folder)["sha256"], train.digest(), largest, temperature, str(dtype)], 16)
    kept = output.with_name(f"{KEPT_LOGITS}{key}")
    keep_largest(kept, load, train, largest, temperature, recovery.training.part_size)
    return KeptTeacher(kept, temperature)


def training_data(
    recovery: Recovery, data_dir: str | None, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[Sequences | Packed, dict[str, Any]]:
    """What is trained on, and what a report says about it.

    Raises:
        UserError: windows that are longer than the model's positions, or data that is malformed or not there.
    """
    check_positions(model, "max_length", recovery.max_length)
    if (path := recovery.instructions) is not None:
        train = _instructions(recovery, tokenizer, read_instructions(path))
        described: dict[str, Any] = {"name": path.name, "source": "a local file"}
    else:
        texts = Mixture(recovery.texts, "train", data_dir, tokenizer)
        train = _windows_of(recovery, texts)
        described = {"name": texts.name, "source": texts.source, "texts": texts.describe()}
    sizes = {"rows": len(train), "tokens": int(train.weights.sum()), "tokens_read": int(train.lengths.sum())}
    said = (described["name"], described["source"], *sizes.values())
    log.info("Training data: %s (%s), %d rows, %d tokens to predict, %d in all", *said)
    if not recovery.packing:
        return train, described | sizes
    joined = packed(train, recovery.max_length)
    full = sizes["tokens_read"] / (len(joined) * recovery.max_length)
    log.info("Packed into %d windows of %d tokens, %.1f %% full", len(joined), recovery.max_length, 100 * full)
    return joined, described | sizes | {"windows": len(joined)}


def _instructions(recovery: Recovery, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> Sequences:
    """As many of the rows as are asked for, or as have the tokens that are."""
    length, seed = recovery.max_length, recovery.training.seed
    if recovery.tokens:
        every = of_instructions(tokenizer, rows, length, recovery.train_on_inputs)
        return taken(every, recovery.tokens, seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = [rows[row] for row in order[: recovery.finetune_samples].sort().values]
    return of_instructions(tokenizer, chosen, length, recovery.train_on_inputs)


def _windows_of(recovery: Recovery, texts: Mixture) -> Sequences:
    """As many windows of the texts as are asked for, or as have the tokens that are; the last of these is cut."""
    length, seed = recovery.max_length, recovery.training.seed
    if not recovery.tokens:
        return of_windows(texts.sample("training", length, recovery.finetune_samples, seed))
    count = -(-recovery.tokens // (length - 1))
    every = of_windows(texts.repeated("training", length, count, seed))
    return every.shortened(count * (length - 1) - recovery.tokens)


def validation_windows(recovery: Recovery, data_dir: str | None, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows [count, length] of the texts that each epoch is judged by."""
    default = recovery.dataset if recovery.instructions is None else "wikitext2"
    flag = "--validation_dataset" if recovery.validation_dataset else "--dataset"
    names = parse_mixture(recovery.validation_dataset or default, flag)
    texts = Mixture(names, "validation", data_dir, tokenizer, flag)
    return texts.sample("validation", recovery.max_length, recovery.validation_samples, recovery.training.seed)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are filled up with; it is masked, so any token will do where the tokenizer has none for it."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)

"""Recovery training: a pruned language model gets back part of what pruning cost it.

Either LoRA adapters are trained beside the frozen weights (Hu et al. 2021), which may be in 4 bits (QLoRA, Dettmers et
al. 2023), or all weights are. The loss is that of language modelling, with a share for the dense model's predictions
where `kd_weight` asks for it, and a term for its hidden states where `hidden_weight` does.
"""

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import load_language_model, save_checkpoint, save_folder
from compression.config import Between
from compression.decoder import decoder_of
from compression.distillation import relative_errors
from compression.files import read_object
from compression.inputs import require_language_model
from compression.integrity import digest_of
from compression.lineage import texts_behind
from compression.llm.agreement import Reference, last_states, unseen_text
from compression.llm.evaluate import evaluation_windows, measure, sizes
from compression.llm.head import TRAINED_ROWS, Within, before_predicted, in_blocks
from compression.llm.lora import adapter_weights, add_lora, draw_adapter, ranks_by_share, write_adapter
from compression.llm.origin import dense_of, kept_layers, pruned_shares
from compression.llm.perplexity import perplexity
from compression.llm.recovery_data import padding_token, training_data, validation_windows
from compression.llm.recovery_settings import Recovery
from compression.llm.rows import Packed, Sequences
from compression.llm.spread import load_unfilled, save_spread, spread
from compression.llm.teacher import KeptTeacher, LiveTeacher, Teacher, keep_largest
from compression.offload import pick_offload
from compression.outputs import HISTORY_FILE, KEPT_LOGITS, STATES_END, Output, owned
from compression.quantization import nf4_base
from compression.runtime import UserError, log, pick_device, pick_dtype, processes, seed_everything, shown
from compression.saved_parts import SavedParts
from compression.sharding import fill, within
from compression.stage_record import contents, describe_stage, identify, is_made_from, read_stage
from compression.structures import DECODERS
from compression.training import Recipe, clean_up, fit
from compression.weights import Shards

RANK_FLAG = "--lora_rank_by_share"


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
        The metrics, as in `stage.json`: what `measure` finds `before` and `after`, with the agreement with the dense
        model where that is there.

    Raises:
        UserError: an input that is missing or of the wrong kind, or an output that must not be replaced.
    """
    require_language_model(pruned, "--pruned_model")
    place = Output(output, flag, "recovery")
    place.check(filter(None, [pruned, recovery.teacher]))
    recovery.evaluation.check_zero_shot(data_dir)
    dense = find_dense(recovery, pruned, recovery.needs_dense) if recovery.needs_dense else None
    teacher = dense if recovery.learns else None
    layers = kept_layers(pruned, dense, "--hidden_weight") if dense and recovery.hidden_weight else []
    recovery = recovery.updated(lora_projections=named_projections(recovery.lora_projections, pruned)).in_one_epoch()
    inputs = {"parent": identify(pruned)} | ({"teacher": identify(teacher)} if teacher else {})
    skeleton, tokenizer = load_unfilled(pruned, training_dtype(recovery))
    train, data = training_data(recovery, data_dir, tokenizer, skeleton)
    inputs["data"] = {"name": data["name"], "sha256": train.digest()}
    same = is_made_from(output, recovery.result_fields(), inputs, modernized=lambda noted: recovery.originals() | noted)
    if recovery.training.skip_existing and same and (earlier := read_stage(output)):
        log.info("%s exists and matches configuration and inputs: skipped", shown(output))
        return earlier["metrics"]
    place.check_same(same, overwrite)
    held_out = validation_windows(recovery, data_dir, tokenizer)
    texts = [text.name for text in recovery.texts]
    tests = evaluation_windows(recovery.evaluation, data_dir, tokenizer, skeleton, texts)
    # The same folder names keep runs with other settings or inputs apart.
    key = digest_of([recovery.result_fields(), contents(inputs), recovery.states_of], 12)
    work_dir, parts = (output.with_name(f".{output.name}_{key}{end}") for end in (STATES_END, f".parts{STATES_END}"))
    with owned(output, work_dir, parts):
        saved = SavedParts(parts, recovery.training.resume)
        seen = texts_behind({"data": data, "inputs": inputs})
        # Before the student, so that the dense model is not there beside it.
        reference = find_reference(recovery, pruned, dense, seen, data_dir, parts) if recovery.compares else None
        seed_everything(recovery.training.seed)
        device = pick_device()
        model = skeleton if recovery.spread else load_student(recovery, pruned, device)
        bare = sizes(model)
        shares = pruned_shares(model, pruned, dense, RANK_FLAG) if dense and recovery.lora_rank_by_share else None
        student = Student(recovery, model, pruned, shares)
        learned_from = make_teacher(recovery, teacher, layers, train, output, parts) if teacher else None

        def figures() -> dict[str, Any]:
            found = measure(model, tokenizer, tests, recovery.evaluation, data_dir)
            return found if reference is None else found | {"agreement": reference.compare(model)}

        before = saved.json("before", lambda: student.compute(figures) | bare)
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
        metrics = {"before": before, "after": student.compute(figures), "trained": trained}
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


def load_student(recovery: Recovery, folder: Path, device: torch.device) -> PreTrainedModel:
    """The model to train, with its weights."""
    quantization = nf4_base() if recovery.load_in_4bit else None
    model, _ = load_language_model(folder, device, training_dtype(recovery), quantization)
    return model


class Student:
    """The model that is trained: with adapters or without, in this process or spread over several.

    Args:
        model: with its weights, see `load_student`, or where it is spread without them; gets its adapters in place.
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


def find_dense(recovery: Recovery, pruned: Path, flag: str) -> Path:
    """The checkpoint to learn from, or to compare the pruned one with.

    Args:
        flag: what needs it, for the error text.

    Raises:
        UserError: it is not there, or not known; its vocabulary or hidden size is another one, or the former smaller
            than `teacher_cache`.
    """
    dense = recovery.teacher or dense_of(pruned, flag)
    require_language_model(dense, "--teacher", "python download_model.py --only llm")
    found, wanted = (read_object(folder / "config.json") for folder in (dense, pruned))
    for field, what in (("vocab_size", "tokens"), ("hidden_size", "hidden features")):
        if found.get(field) != wanted.get(field):
            raise UserError(
                f"--teacher {dense}: it has {found.get(field)} {what}, allowed are the student's {wanted.get(field)}"
            )
    Between(0, wanted.get("vocab_size") or 0).check("teacher_cache", recovery.teacher_cache)
    return dense


def find_reference(
    recovery: Recovery, pruned: Path, dense: Path | None, seen: Collection[str], data_dir: str | None, scratch: Path
) -> Reference | None:
    """What the trained model's predictions are compared with, on text that it has not seen; None where the dense model
    or such a text is not there, which is logged.

    Args:
        dense: the dense model's checkpoint, where something else needed it; None: it is looked for.
        seen: what the texts of calibration and training are called.
        scratch: for what an offloaded dense model does not keep in memory.

    Raises:
        UserError: one of them is not there, and was named.
    """
    try:
        dense = dense or find_dense(recovery, pruned, f"--agreement_text {recovery.agreement.agreement_text}")
    except UserError as problem:
        if recovery.agreement.agreement_text != "auto" or recovery.teacher is not None:
            raise
        log.info("Agreement with the dense model: left out (%s)", problem)
        return None
    device, dtype = processes().device, pick_dtype(recovery.dtype, "Dense model")
    place = pick_offload("auto", Shards(dense), device, dtype)
    model, tokenizer = load_language_model(dense, device, dtype, offload=place, scratch=scratch)
    unseen = unseen_text(recovery.agreement, seen, data_dir, recovery.training.seed, tokenizer, model)
    if unseen is None:
        return None
    return Reference(unseen, last_states(model, unseen.windows), deepcopy(model.lm_head).cpu())


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

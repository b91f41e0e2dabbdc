"""The one training loop: Accelerate, AMP, clipping, resume after a kill, tracker.

What differs between the stages is a `Recipe`: its loss, its learning rate and what it does around a step.
"""

import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from compression.batching import TrainingData, length_grouped_order
from compression.config import NO_EFFECT, AtLeast, Between, Settings
from compression.files import remove_folder
from compression.health import Health
from compression.progress import progress
from compression.runtime import UserError, log, multiplies_bf16, processes, seed_step
from compression.saved_states import SavedStates
from compression.schedule import SCHEDULES, EarlyStopping, ScheduleName
from compression.sharding import whole


@dataclass
class Training(Settings):
    """Settings that every training has, whatever is trained on."""

    num_epochs: Annotated[int, AtLeast(1)] = 3
    """Passes over the training data."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """Rows of training data per optimizer step, over all processes and accumulation steps."""
    gradient_accumulation_steps: Annotated[int, NO_EFFECT] = 1
    """Parts that each process cuts its share of a batch into; they need less memory one by one."""
    gradient_checkpointing: Annotated[bool, NO_EFFECT] = False
    """Recompute activations in the backward pass instead of keeping them."""
    learning_rate: Annotated[float, Between(0, 1)] = 5e-5
    """Highest learning rate of AdamW."""
    weight_decay: Annotated[float, Between(0, 1)] = 0.01
    """Weight decay of AdamW, on matrices only."""
    warmup_ratio: Annotated[float, Between(0, 1)] = 0.06
    """Share of the steps over which the learning rate rises from zero."""
    max_grad_norm: Annotated[float, AtLeast(1e-6)] = 1.0
    """Norm that gradients are scaled down to."""
    amp: Literal["no", "auto", "bf16", "fp16"] = "no"
    """Mixed precision; auto: bf16 where the hardware multiplies it, else fp16 on CUDA, none on the CPU."""
    track: Annotated[Literal["none", "tensorboard", "trackio", "wandb"], NO_EFFECT] = "none"
    """Tracker that gets the metrics of each epoch besides the log."""
    save_steps: Annotated[int, AtLeast(1), NO_EFFECT] = 500
    """Steps between saved states to resume from; one is also saved after every epoch."""
    resume: Annotated[bool, NO_EFFECT] = False
    """Continue a run that was killed, from its last saved state."""
    skip_existing: Annotated[bool, NO_EFFECT] = False
    """Do nothing if the output exists and was made with this configuration from these inputs."""
    seed: Annotated[int, Between(0, 2**31 - 1)] = 42
    """Fixes data order, initialisation of new layers, and dropout."""

    def check(self) -> None:
        Between(1, self.batch_size).check("gradient_accumulation_steps", self.gradient_accumulation_steps)
        if self.amp == "fp16" and not torch.cuda.is_available():
            raise UserError("--amp fp16: needs a CUDA GPU, and none was found; allowed here is no, bf16 or auto")

    @property
    def part_size(self) -> int:
        """Rows that a process takes at once."""
        return -(-self.batch_size // (processes().num_processes * self.gradient_accumulation_steps))


class Recipe:
    """What one stage does in the loop. Steps count optimizer steps from 0 over the whole run, epochs from 1."""

    removes_weights = False
    """Whether weights may go while it trains: processes then look after each step which of them have gradients."""
    best: "BestEpoch | None" = None
    """The best epoch so far, where the recipe keeps it."""
    decay: ScheduleName = "linear"
    """How the learning rate falls behind the warm-up."""
    unit = "rows"
    """What the weights of the training data's rows count."""

    def __init__(self, training: Training, rows: int, first_epoch: int = 1, last_epoch: int | None = None):
        """
        Args:
            rows: of the training data.
            first_epoch, last_epoch: what this recipe trains, of all epochs of the run.
        """
        self.training = training
        self.first_epoch, self.last_epoch = first_epoch, training.num_epochs if last_epoch is None else last_epoch
        self.steps_per_epoch = -(-rows // training.batch_size)
        self.total_steps = self.steps_per_epoch * training.num_epochs

    @property
    def stop(self) -> bool:
        """Whether training ends before its last epoch."""
        return self.best is not None and self.best.stopping.stop

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then the schedule down to zero."""
        warmup = int(self.training.warmup_ratio * self.total_steps)
        return self.training.learning_rate * SCHEDULES[self.decay](step, self.total_steps, warmup)

    def module(self, model: PreTrainedModel) -> nn.Module:
        """What is wrapped for several processes: the model, or a module that has it and in whose forward it is used."""
        return model

    def rate_share(self, name: str) -> float:
        """What the learning rate of a parameter, named as in the model, is multiplied with."""
        return 1.0

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Loss terms of a batch (means by the rows' weights); the term `loss` is the one that is minimised.

        Args:
            model: what `module` gave, maybe wrapped.
        """
        raise NotImplementedError

    def after_backward(self, step: int) -> None:
        """Gradients are there (averaged over processes, unscaled, not yet clipped)."""

    def after_step(self, step: int) -> None:
        """The weights have been updated."""

    def after_epoch(self, epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
        """Returns what the history of the epoch says besides losses and metrics."""
        return {}

    def state(self) -> dict[str, Any]:
        """JSON values to resume from."""
        return {} if self.best is None else self.best.state()

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to resume from."""
        return {} if self.best is None else self.best.tensors()

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `state` and `tensors` gave."""
        if self.best is not None:
            self.best.load(state, tensors)


class BestEpoch:
    """The weights of the epoch with the best metric, kept on the CPU while training goes on."""

    def __init__(self, model: PreTrainedModel, stopping: EarlyStopping):
        self.model, self.stopping = model, stopping
        self.weights: dict[str, Tensor] = {}

    def update(self, metric: float) -> None:
        """Take in one epoch's metric."""
        if self.stopping.update(metric):
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def restore(self) -> None:
        """Give the model these weights back, if an epoch was taken in."""
        if self.weights:
            self.model.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        """JSON values to resume from."""
        best = None if self.stopping.best == float("-inf") else self.stopping.best
        return {"best_metric": best, "waited": self.stopping.waited}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to resume from."""
        return {f"best.{name}": tensor for name, tensor in self.weights.items()}

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `state` and `tensors` gave."""
        self.stopping.waited = state["waited"]
        if state["best_metric"] is not None:
            self.stopping.best = state["best_metric"]
        self.weights = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best.")}


def fit(
    model: PreTrainedModel,
    recipe: Recipe,
    train: TrainingData,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    work_dir: Path,
    pad_token_id: int,
    record: dict[str, Any] | None = None,
    in_parts: bool = False,
    logs_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """Train a model in place.

    Args:
        recipe: the stage's loss, learning rate and hooks; its `training` sets the rest.
        train: the training data; batches have the rows' indices in `rows`. Weights that are frozen are not trained,
            and not in the states to resume from.
        evaluate: called after each epoch, gives the metrics of the epoch.
        work_dir: where states to resume from are kept while the run lasts, one folder for each set of
            settings and inputs; the caller removes it (`clean_up`) once the result is saved.
        record: the settings that a tracker notes; by default those of the training.
        in_parts: whether states are written by all processes, each what it has, and read by any number of them.
        logs_dir: where a tracker writes; by default beside `work_dir`.

    Returns:
        The history: one dictionary per epoch.

    Raises:
        UserError: a tracker that is not installed, a damaged state, a loss or gradient that is not finite.
    """
    training = recipe.training
    AcceleratorState._reset_state()  # the precision of an earlier training in this process does not bind this one
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=pick_precision(training.amp),
        log_with=_tracker(training.track),
        project_dir=logs_dir or Path(work_dir).parent / "logs",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.removes_weights)],
    )
    log.info(
        "Training: %d rows, %d epochs of %d steps on %d process(es), %s, mixed precision %s",
        len(train),
        recipe.last_epoch - recipe.first_epoch + 1,
        recipe.steps_per_epoch,
        accelerator.num_processes,
        accelerator.device,
        accelerator.mixed_precision,
    )
    if training.track != "none":
        accelerator.init_trackers("compression", config={k: str(v) for k, v in (record or training.as_dict()).items()})
    if training.gradient_checkpointing:
        recompute_activations(model, True)
    optimizer = _optimizer(model, recipe)
    wrapped = recipe.module(model)
    if isinstance(wrapped, FSDPModule):  # its parameters are spread over the processes already
        optimizer = accelerator.prepare(optimizer)
    else:
        wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
        # Accelerate makes every forward pass of a prepared model run in mixed precision. Training steps ask for it
        # themselves; evaluation, and whoever uses the model afterwards, gets full precision.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    run = _Run(accelerator, wrapped, model, optimizer, recipe, work_dir, in_parts)
    run.restore()
    for epoch in range(run.epoch, recipe.last_epoch + 1):
        if recipe.stop:
            break
        run.epoch = epoch
        started = time.perf_counter()
        trained = run.train_epoch(train, pad_token_id)
        losses = run.mean_losses()
        speed = trained / (time.perf_counter() - started)
        # One process decides for all: processes that disagree on early stopping would wait for each other forever.
        metrics = broadcast_object_list([evaluate(model)])[0]
        record = {"epoch": epoch} | losses | metrics | recipe.after_epoch(epoch, metrics)
        run.history.append(record)
        accelerator.log({k: v for k, v in record.items() if isinstance(v, int | float)}, step=run.step)
        seconds = time.perf_counter() - started
        log.info("%s  (%.0f s, %.4g %s/s in training)", _line(record), seconds, speed, recipe.unit)
        run.epoch += 1
        run.save()
    if training.gradient_checkpointing:
        recompute_activations(model, False)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.free_memory()
    return run.history


def clean_up(work_dir: Path) -> None:
    """Remove the states to resume from, once the result is saved."""
    if processes().is_main_process:
        remove_folder(work_dir)


def recompute_activations(model: PreTrainedModel, recompute: bool) -> None:
    """Whether the backward pass computes what is inside the layers anew (Chen et al. 2016, arXiv:1604.06174), or the
    forward pass keeps it."""
    # transformers 5.17 has only the older of two names, later releases warn of it.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if recompute:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def pick_precision(amp: str) -> str:
    """Accelerate's name for the mixed precision to use."""
    if amp != "auto":
        return amp
    if multiplies_bf16():
        return "bf16"
    return "fp16" if torch.cuda.is_available() else "no"


def _tracker(name: str) -> str | None:
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name}: not installed; install it with: pip install {name}, or use --track none")
    return name


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    training, groups = recipe.training, defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = training.weight_decay if parameter.dim() > 1 else 0.0
            groups[decay, recipe.rate_share(name)].append(parameter)
    described = [{"params": p, "weight_decay": decay, "share": share} for (decay, share), p in groups.items()]
    # The fused kernel takes a fifth of the time of the default one on a CPU, where the embeddings dominate it.
    return torch.optim.AdamW(described, lr=training.learning_rate, fused=True)


def _line(record: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name} {text(value)}" for name, value in record.items())


class _Run:
    """The moving parts of one training run, and what of them is saved and restored."""

    def __init__(
        self,
        accelerator: Accelerator,
        wrapped: nn.Module,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        work_dir: Path,
        in_parts: bool,
    ):
        self.accelerator, self.wrapped, self.model, self.optimizer = accelerator, wrapped, model, optimizer
        self.recipe, self.training, self.work_dir = recipe, recipe.training, Path(work_dir)
        self.states = SavedStates(work_dir, model, optimizer, in_parts)
        self.epoch = recipe.first_epoch
        self.step = (self.epoch - 1) * recipe.steps_per_epoch
        self.history: list[dict[str, Any]] = []
        self.sums: dict[str, Tensor] = {}
        self.health = Health(accelerator.device)

    def train_epoch(self, train: TrainingData, pad_token_id: int) -> int:
        """The steps of the current epoch that are still to do; the weight of their rows, of all processes."""
        training = self.training
        self.wrapped.train()
        order = length_grouped_order(train.lengths, training.batch_size, training.seed, self.epoch)
        done = self.step - (self.epoch - 1) * len(order)
        for rows in progress(order[done:], f"epoch {self.epoch}", len(order), done):
            self._step(train, rows, pad_token_id)
            if self.step % training.save_steps == 0 and self.step < self.epoch * len(order):
                self.save()
        return int(train.weights[[row for rows in order[done:] for row in rows]].sum())

    def _step(self, train: TrainingData, rows: list[int], pad_token_id: int) -> None:
        accelerator, recipe = self.accelerator, self.recipe
        total = train.weights[rows].sum().item()
        seed_step(self.training.seed, self.step, accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * recipe.learning_rate(self.step)
        *first, last = self._parts(rows)
        # Gradients add up here, and processes share them once, with the last part; a model that is spread over them
        # shares those of each part, so that no process holds the gradient of a whole model.
        with accelerator.no_sync(self.wrapped):
            for part in first:
                self._backward(train, part, total, pad_token_id)
        self._backward(train, last, total, pad_token_id)
        accelerator.unscale_gradients()
        recipe.after_backward(self.step)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm))
        if accelerator.scaler is None:  # with fp16, steps whose gradients overflow are skipped
            self.health.watch("the gradient's norm", norm, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        recipe.after_step(self.step)
        self._add("rows", torch.tensor(total, dtype=torch.double, device=accelerator.device))
        self.step += 1

    def _parts(self, rows: list[int]) -> list[list[int]]:
        """This process's share of a batch, in the parts that it takes one by one; at least one, which may be empty."""
        mine, size = rows[self.accelerator.process_index :: self.accelerator.num_processes], self.training.part_size
        return [mine[start : start + size] for start in range(0, len(mine), size)] or [[]]

    def _backward(self, train: TrainingData, part: list[int], total: float, pad_token_id: int) -> None:
        """Add a part's gradients, and its loss terms to the sums of the epoch.

        The part's loss is a mean by the weights of its own rows. Its share of the batch's total weight turns sums over
        parts and means over processes into the mean over the batch, however it is cut.
        """
        share = train.weights[part].sum().item() * self.accelerator.num_processes / total
        rows = part or [0]  # without a share it takes any row, which counts nothing: the other processes wait for it
        batch = train.collate(rows, pad_token_id) | {"rows": torch.tensor(rows)}
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        with self.accelerator.autocast():
            terms = self.recipe.loss(self.wrapped, batch, self.step)
        for name, term in terms.items():
            self.health.watch(f"the term {name}" if name != "loss" else "the loss", term.detach(), self.step)
        self.accelerator.backward(terms["loss"] * share)
        for name, term in terms.items():
            self._add(name, term.detach().double() * (share * total))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value

    def mean_losses(self) -> dict[str, float]:
        """Means of the loss terms by the weights of the epoch's rows; the sums end with this call."""
        self.health.check()
        rows = self.sums.pop("rows")
        means = {name: self.accelerator.reduce(value / rows, "mean").item() for name, value in self.sums.items()}
        self.sums = {}
        return means

    def save(self) -> None:
        """Save the state to resume from."""
        self.health.check()
        scaler = self.accelerator.scaler
        record = {
            "step": self.step,
            "epoch": self.epoch,
            "history": self.history,
            "sums": {name: self.accelerator.reduce(value, "mean").item() for name, value in self.sums.items()},
            "recipe": self.recipe.state(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        self.states.save(self.step, self.epoch, record, self.recipe.tensors())

    def restore(self) -> None:
        """Go back to the last saved state if the run is to be resumed and there is one, else start clean."""
        found = self.states.restore() if self.training.resume else None
        if found is None:
            if self.training.resume:
                log.info("Nothing to resume for these settings and inputs: starting from the beginning")
            clean_up(self.work_dir)
            self.accelerator.wait_for_everyone()
            return
        record, tensors = found
        self.recipe.load(record["recipe"], tensors)
        if record["scaler"]:
            self.accelerator.scaler.load_state_dict(record["scaler"])
        device = self.accelerator.device
        self.sums = {k: torch.tensor(v, dtype=torch.double, device=device) for k, v in record["sums"].items()}
        self.step, self.epoch, self.history = record["step"], record["epoch"], record["history"]
        log.info("Resumed at epoch %d, step %d", self.epoch, self.step)

"""Training between the steps of a pruning run: prune a little, train a little, again."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compression.checkpoint import load_tensors, save_tensors
from compression.files import read_json, write_json
from compression.llm.perplexity import perplexity
from compression.llm.recovery import LanguageModelling
from compression.llm.recovery_data import padding_token, training_data, validation_windows
from compression.llm.recovery_settings import Recovery
from compression.llm.run import Run
from compression.llm.run_settings import RunConfig, recovery_after
from compression.llm.teacher import LiveTeacher
from compression.offload import offload_of
from compression.runtime import UserError, log_phase
from compression.training import clean_up, fit

WEIGHTS, HISTORY = "model.safetensors", "history.json"


def recovery_between(config: RunConfig, tokens: int, learning_rate: float, kd_weight: float) -> Recovery:
    """How the model is trained after each step: all its weights, on the calibration's text.

    Args:
        tokens: to predict after each step. learning_rate: the highest.
        kd_weight: share of the loss that is from the dense model's predictions.

    Raises:
        UserError: a text that is not there, or too few tokens for all of them.
    """
    recovery = recovery_after(config)
    recovery.check_tokens("recover_tokens", tokens)
    changes = dict(finetune_method="full", dtype="auto", tokens=tokens, learning_rate=learning_rate, shard=False)
    return recovery.updated(**changes, kd_weight=kd_weight).in_one_epoch()


class TrainingBetween:
    """Trains the smaller model after each step; a killed run goes on from the last saved state of the training.

    Args:
        recovery: see `recovery_between`.

    Attributes:
        histories: of each step that is done, as `training.fit` gives them.

    Raises:
        UserError: the model is offloaded.
    """

    def __init__(self, run: Run, recovery: Recovery):
        if offload_of(run.model) is not None:
            raise UserError(
                f"--recover_tokens {recovery.tokens}: trains the model in memory, and it is offloaded (--offload); "
                "leave it out, or prune where the model fits"
            )
        self.run, self.recovery = run, recovery
        if run.unseen is not None:
            run.dense_head = deepcopy(run.model.lm_head)  # what is trained is compared with it in the end
        self.held_out = validation_windows(recovery, run.config.data_dir, run.tokenizer)
        self.histories: list[list[dict[str, Any]]] = []

    def __call__(self, model: PreTrainedModel, step: int) -> PreTrainedModel:
        """Train a model in place, on other text in each step.

        Args:
            step: counts from 1.
        """
        log_phase(f"training after step {step}")
        recovery = self.recovery.updated(seed=self.recovery.training.seed + step)
        dtype, device = model.dtype, model.device
        states = self.run.saved.folder / f"states_of_step_{step}"

        def write(folder: Path | None) -> None:
            history = self._train(model, recovery, states)
            cast_weights(model, dtype)
            if folder is not None:
                save_tensors(folder / WEIGHTS, dict(model.named_parameters()))
                write_json(folder / HISTORY, history)

        part = self.run.saved.files(f"trained_in_step_{step}", write)
        clean_up(states)
        self.histories.append(read_json(part / HISTORY))
        model.to(device)  # type: ignore[arg-type]
        trained = load_tensors(part / WEIGHTS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(trained[name])
        return model

    def _train(self, model: PreTrainedModel, recovery: Recovery, states: Path) -> list[dict[str, Any]]:
        train, _ = training_data(recovery, self.run.config.data_dir, self.run.tokenizer, model)
        teacher = None
        if recovery.kd_weight:
            teacher = LiveTeacher(self.run.load().requires_grad_(False), recovery.kd_temperature)
        cast_weights(model, torch.float32)  # 16 bits lose small updates
        history = fit(
            model,
            LanguageModelling(recovery, len(train), teacher),
            train,
            lambda model: {"validation_perplexity": perplexity(model.eval(), self.held_out)},
            states,
            padding_token(self.run.tokenizer),
            recovery.as_dict(),
        )
        model.eval()
        return history


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give all weights a type; buffers keep theirs, for rotary tables lose positions in 16 bits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

"""One run that prunes a language model, whatever the method: its inputs, what is measured, what is written."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.assets import ensure_llm
from compression.checkpoint import (
    check_positions,
    check_weights_finite,
    finish_folder,
    load_language_model,
    open_offloaded,
    write_model,
)
from compression.decoder import decoder_of
from compression.files import link_or_copy, read_json, write_json
from compression.inputs import require_unquantized
from compression.integrity import RUN_FILE, digest_of, seal
from compression.llm.agreement import Reference, last_states, unseen_text
from compression.llm.evaluate import efficiency_ratios, evaluation_windows, measure, measure_efficiency
from compression.llm.mixture import Mixture
from compression.llm.recovery import recover
from compression.llm.removal import removal_perplexities
from compression.llm.run_settings import Calibration, RunConfig, recovery_after
from compression.llm.text import CalibrationText
from compression.offload import all_weights, offload_of, pick_offload
from compression.outputs import EVALUATION_FILE, STATES_END, Output, owned
from compression.runtime import (
    UserError,
    fingerprint,
    from_main_process,
    log,
    log_file,
    log_phase,
    pick_device,
    pick_dtype,
    processes,
    seed_everything,
    shown,
)
from compression.saved_parts import SavedParts
from compression.sources import LLM_FOLDER, describe_source
from compression.stage_record import contents, describe_stage, identify, is_made_from
from compression.weights import Shards


class Run:
    """One pruning run, from its inputs to its folder of results.

    Args:
        kind: what its records say it is.
        config: of the script.
        inputs: what it reads besides the model and texts, by role, as `stage_record.identify` gives it.

    Attributes:
        model, tokenizer: the dense ones, loaded.
        text: windows for scores and repair (of the train part) and for choices (of the validation part).
        saved: what a killed run had finished; there while the run is `running`.
        dense: what the dense model is, see `evaluate.measure`; there from then on.
        dense_head: its head, where pruning does not leave it as it is; else None.
        unseen: text for comparing both models' predictions; None leaves that out.

    Raises:
        UserError: an input that is missing or of the wrong kind, or results that must not be replaced.
    """

    saved: SavedParts
    dense: dict[str, Any]
    dense_states: Tensor | None
    dense_head: torch.nn.Module | None = None

    def __init__(self, kind: str, config: RunConfig, inputs: dict[str, dict[str, str]] | None = None):
        self.kind, self.config, run = kind, config, config.run
        self.base = ensure_llm(run.base_model, run.models_dir / LLM_FOLDER.name)
        require_unquantized(self.base, "--base_model")
        config.evaluation.check_zero_shot(config.data_dir)
        texts = [text.name for text in config.calibration.texts]
        config.agreement.check_unseen(texts)
        self.inputs = {"parent": identify(self.base)} | (inputs or {})
        self.output = Output(run.folder, "--output_name", kind, RUN_FILE)
        self._check_output()
        seed_everything(run.seed)
        key = digest_of([config.result_fields(), contents(self.inputs)], 12)
        self._states = run.folder.with_name(f".{run.output_name}_{key}{STATES_END}")
        self._load = self._loader(pick_device(run.device_map), pick_dtype(run.dtype, "Weights"))
        self.model, self.tokenizer = self._load()
        decoder_of(self.model)  # refuses an unsupported architecture at once
        self.calibration, self.text, self.analysis_windows = calibration_text(
            config.calibration, config.data_dir, run.seed, self.tokenizer, self.model
        )
        self.tests = evaluation_windows(config.evaluation, config.data_dir, self.tokenizer, self.model, texts)
        self.unseen = None
        if config.evaluation.run_evaluation != "none":
            seen = {corpus.name for mixture in self.calibration for corpus in mixture.corpora}
            self.unseen = unseen_text(config.agreement, seen, config.data_dir, run.seed, self.tokenizer, self.model)

    def _check_output(self) -> None:
        config = self.config
        self.output.check([self.base], shared=[config.run.results_dir, config.run.models_dir])
        settings = config.result_fields()
        if (config.run.folder / "finetuned").exists():
            settings |= config.finetuning.as_dict()
        same = is_made_from(config.run.folder, settings, self.inputs, RUN_FILE, config.modernized)
        self.output.check_same(same, config.run.overwrite)

    def _loader(self, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
        """What loads the dense model, offloaded where that is asked for or needed."""
        evaluation = self.config.evaluation
        place = pick_offload(self.config.run.offload, Shards(self.base), device, dtype)
        for what in ("zeroshot", "efficiency"):
            if place != "none" and evaluation.evaluates(what):
                raise UserError(
                    f"--run_evaluation {evaluation.run_evaluation}: {what} needs the model in memory, and --offload is "
                    f"{place}; allowed are ppl and none; measure the result with: python evaluate_lora_model.py"
                )
        scratch = self._states / "states"
        return partial(load_language_model, self.base, device, dtype, offload=place, scratch=scratch)

    def load(self) -> PreTrainedModel:
        """Another dense model."""
        model, _ = self._load()
        return model

    @contextmanager
    def running(self) -> Iterator[None]:
        """The folder is this run's alone while it lasts, and the log is kept; the dense model is measured first.

        In the end the pruned model is uploaded where that is asked for.
        """
        run = self.config.run
        with owned(run.folder, self._states):
            self.saved = SavedParts(self._states, run.resume)
            with log_file(self.saved.folder / "logs"):
                log_phase("evaluation of the dense model")
                self.dense = self.saved.json("dense", lambda: self._measure(self.model))
                self.dense_states = self._dense_states()
                yield
            self.saved.remove()
        self.config.publishing.publish(run.folder / "models")

    def _measure(self, model: PreTrainedModel) -> dict[str, Any]:
        config = self.config
        batch_size = config.calibration.gradient_batch_size
        return measure(model, self.tokenizer, self.tests, config.evaluation, config.data_dir, batch_size)

    def _dense_states(self) -> Tensor | None:
        """The dense model's last states of the text that the pruned one is compared on."""
        if (unseen := self.unseen) is None:
            return None
        batch_size = self.config.calibration.gradient_batch_size
        find = partial(last_states, self.model, unseen.windows, batch_size)
        return self.saved.tensors("dense_states", lambda: {"states": find()})["states"]

    def removal_perplexities(self, parts: tuple[str, ...] = ("layer", "attention", "mlp")) -> dict[str, Any] | None:
        """What removing each part of the dense model costs; None where the analysis is left out."""
        if not len(self.analysis_windows):
            return None
        log_phase("removal analysis")
        batch_size = self.config.calibration.gradient_batch_size
        analyse = partial(removal_perplexities, self.model, self.analysis_windows, batch_size, parts)
        return self.saved.json("removal", analyse)

    def store(self, name: str, model: PreTrainedModel, write: Callable[[Path | None, int], None]) -> PreTrainedModel:
        """The smaller form of an offloaded model: see `offload.Store`."""
        offloaded = offload_of(model)
        assert offloaded is not None
        folder = self.saved.files(name, lambda folder: write(folder, self.config.run.shard_bytes))
        log_phase("reload")
        return open_offloaded(folder, offloaded.placement)

    def finish(
        self,
        model: PreTrainedModel,
        write_analysis: Callable[[Path], None],
        more: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {},
    ) -> None:
        """Measure the pruned model, write everything, and train it on where that is asked for.

        Args:
            write_analysis: writes the method's tables and plots into the folder it gets.
            more: what the results say besides, given what `_compare` found.
        """
        log_phase("evaluation of the pruned model")
        results = self.saved.json("results", lambda: self._compare(model))
        results |= more(results)
        log.info("Base model: %s (%s)", shown(self.base), describe_source(self.base))
        data = {"calibration": [text for mixture in self.calibration for text in mixture.describe()]}
        stage = describe_stage(self.kind, self.config.as_dict(), self.inputs, results, data)
        log_phase("writing")
        check_weights_finite(model, self.config.run.folder)
        if processes().is_main_process:
            with self._written() as folder:
                models = folder / "models"
                models.mkdir()
                write_model(model, self.tokenizer, self.config.run.shard_bytes, models)
                finish_folder(models, stage, self.config.run.folder / models.name)
                if self.config.run.save_bin:
                    torch.save(all_weights(model), models / "pruned_model.bin")
                write_analysis(folder / "analysis")
                evaluation = results | {"data": data, "environment": stage["environment"]}
                write_json(folder / EVALUATION_FILE, evaluation)
        processes().wait_for_everyone()
        if self.config.finetuning.finetune:
            self._finetune()

    @contextmanager
    def _written(self) -> Iterator[Path]:
        """Yield a temporary folder to put the results into; on success it takes the place of the results' folder."""
        with self.output.written() as temporary:
            yield temporary
            shutil.copytree(self.saved.folder / "logs", temporary / "logs", dirs_exist_ok=True)
            record = {"stage": self.kind, "config": self.config.as_dict(), "inputs": self.inputs}
            seal(temporary, record | {"environment": fingerprint()}, RUN_FILE)
        log.info("-> %s", shown(self.config.run.folder))

    def _finetune(self) -> None:
        """Train the written model on; then it lies beside it, and what it is stands in the evaluation."""
        run, trained = self.config.run, self.saved.folder / "finetuned"
        recovery = recovery_after(self.config)
        record = {"data_dir": self.config.data_dir}
        metrics = recover(
            recovery, run.folder / "models", trained, "--output_name", self.config.data_dir, run.overwrite, record
        )
        if processes().is_main_process:
            with self._written() as folder:
                anew = shutil.ignore_patterns("logs", RUN_FILE)
                shutil.copytree(run.folder, folder, ignore=anew, copy_function=link_or_copy, dirs_exist_ok=True)
                shutil.copytree(trained, folder / "finetuned", copy_function=link_or_copy)
                path = folder / EVALUATION_FILE
                write_json(path, read_json(path) | {"finetuned": metrics["after"]})
        processes().wait_for_everyone()

    def _compare(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the pruned model is beside the dense one; the dense one is loaded again where speeds are asked for."""
        dense, pruned = self.dense, self._measure(model)
        results: dict[str, Any] = {"dense": dense, "pruned": pruned, "reduction": reduction(dense, pruned)}
        if self.config.evaluation.evaluates("efficiency"):
            models = {"dense": self.load(), "pruned": model}
            costs = from_main_process(lambda: measure_efficiency(models, model.device, self.config.evaluation))
            ratios = efficiency_ratios(costs["pruned"], costs["dense"])
            log.info("MACs of the layers x %.3f; prefill x %.2f, decode x %.2f as fast", *ratios.values())
            results["efficiency"] = costs | {"ratios": ratios}
        if self.unseen is not None and self.dense_states is not None:
            reference = Reference(self.unseen, self.dense_states, self.dense_head)
            results["agreement"] = reference.compare(model, self.config.calibration.gradient_batch_size)
        gone, sizes = results["reduction"], [figures["parameters"]["total"] / 1e6 for figures in (dense, pruned)]
        log.info(
            "Gone: %.1f %% of the layers' parameters, %.1f %% of the whole model's (%.1f -> %.1f million); "
            "%d -> %d layers",
            100 * gone["structures"],
            100 * gone["total"],
            *sizes,
            len(dense["layers"]),
            len(pruned["layers"]),
        )
        return results


def calibration_text(
    calibration: Calibration,
    data_dir: str | None,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> tuple[list[Mixture], CalibrationText, Tensor]:
    """The texts, train and validation part; windows for scores and repair (of the train part) and for choices (of the
    validation part); windows for the removal analysis (of the validation part)."""
    length = calibration.sequence_length
    check_positions(model, "sequence_length", length)
    check_positions(model, "analysis_length", calibration.analysis_length)
    train, held_out = (Mixture(calibration.texts, part, data_dir, tokenizer) for part in ("train", "validation"))
    scores = train.sample("scores", length, calibration.num_samples, seed)
    repair = train.sample("repair", length, calibration.repair_samples, seed + 1)
    choices = held_out.sample("choices", length, calibration.held_out_samples, seed)
    analysis = held_out.sample("analysis", calibration.analysis_length, calibration.analysis_samples, seed + 1)
    log.info("Calibration: %s, %d windows of %d tokens", train, len(scores), length)
    batch_size, checkpointing = calibration.gradient_batch_size, calibration.use_gradient_checkpointing
    text = CalibrationText(scores, repair, choices, batch_size, checkpointing, seed)
    return [train, held_out], text, analysis


def reduction(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, float]:
    """Shares of parameters that are gone: of the decoder layers' structures, and of the whole model."""
    return {part: 1 - pruned["parameters"][part] / dense["parameters"][part] for part in ("structures", "total")}

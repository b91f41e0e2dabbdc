"""Prune a random model of a large one's sizes, and say what memory each phase of that takes.

    python benchmarks/large_model.py --shape Llama-3-8B [--offload disk none] [--ratio 0.5] [--devices cuda:0]
    python benchmarks/large_model.py --shape tiny --offload none

The checkpoint is written tensor by tensor, then run_global_pruning.py prunes it in a process of its own, once for each
--offload and device, and one more process runs the pruned model over a window of text. Both processes are watched from
outside: resident memory, apart what only they hold (anonymous: it must stay) and pages of files that are mapped (the
system takes them back when it needs them), and what the GPU holds. The phases are those that the run's log names.

Writes results/OUTPUT_NAME.json and .png. The models are deleted at the end, or with --keep stay for a next run.
"""

import multiprocessing
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from large_model.random_model import random_text, save_random_model
from large_model.watch import Watch, measured, run_watched
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compression.checkpoint import load_language_model
from compression.config import AtLeast, Between, Config, FolderName, run_script
from compression.files import read_json, remove_folder, write_json
from compression.llm import memory
from compression.llm.memory import SHAPES, Shape
from compression.llm.perplexity import perplexity
from compression.llm.scoring import ScoreName
from compression.llm.text import load_corpus, tokenize, windows
from compression.outputs import check_place, remove_states
from compression.plots import COLOURS, new_figure, open_frame, save_figure
from compression.runtime import RESULTS, Dtype, UserError, fingerprint, log, pick_device, pick_dtype
from compression.stage_record import describe_stage, is_made_from
from compression.tables import Column, at, text_table

KNOWN = SHAPES | {"tiny": Shape(64, 4, 8, 4, 160, vocabulary=300, positions=512)}
TEXT, STATES = "text.txt", "states"
# Least share of a run that a phase takes whose name is drawn.
NAMED = 0.04
# Share of the disk's need that comes on top, for what is not weights.
DISK_MARGIN = 0.02


@dataclass
class LargeModelConfig(Config):
    shape: Literal[tuple(KNOWN)] = "Llama-3-8B"
    """Whose sizes the model has."""
    offload: tuple[Literal["none", "cpu", "disk", "auto"], ...] = ("disk",)
    """Where the layers are that do not compute just now; each place has a run of its own. none: all on the device."""
    devices: tuple[str, ...] = ("auto",)
    """Devices to prune on, as --device_map of run_global_pruning.py; each has a run of its own."""
    ratio: Annotated[float, Between(0, 0.95)] = 0.5
    """Share of the layers' parameters to remove."""
    importance_method: ScoreName = "fisher"
    """Score of a structure."""
    num_samples: Annotated[int, AtLeast(1)] = 32
    """Windows that scores are computed on."""
    repair_samples: Annotated[int, AtLeast(1)] = 64
    """Windows that repairs are fitted to."""
    length: Annotated[int, AtLeast(8)] = 1024
    """Tokens per window."""
    eval_samples: Annotated[int, AtLeast(0)] = 1
    """Windows that the dense and the pruned model are evaluated on while pruning; 0: no evaluation."""
    use_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass of a model that is in memory whole."""
    dtype: Dtype = "bfloat16"
    """Of the weights, where they compute."""
    shard_gigabytes: Annotated[float, AtLeast(1e-6)] = 5.0
    """Weights per file of the dense checkpoint, in 10^9 bytes."""
    interval: Annotated[float, AtLeast(0.001)] = 0.1
    """Seconds between two samples of the memory."""
    results_dir: Path = field(default_factory=lambda: RESULTS)
    """Folder that the results go to, and the models while the run lasts."""
    output_name: Annotated[str, FolderName()] = "large_model"
    """Name of the results there, and of the models' folder."""
    keep: bool = False
    """Keep the dense and the pruned checkpoints."""
    seed: int = 0
    """Fixes weights and text."""

    presets: ClassVar = {"fast": dict(num_samples=4, repair_samples=8)}

    def check(self) -> None:
        if self.length > KNOWN[self.shape].positions:
            raise UserError(f"--length {self.length}: allowed is at most {KNOWN[self.shape].positions} ({self.shape})")

    @property
    def folder(self) -> Path:
        """Where the models are."""
        return self.results_dir / self.output_name

    @property
    def base(self) -> Path:
        """Where the dense model is."""
        return self.folder / "dense"

    @property
    def made_of(self) -> dict[str, Any]:
        """What the dense model and the text beside it depend on."""
        largest = max(self.num_samples, self.repair_samples, 8)
        names = ("shape", "seed", "shard_gigabytes")
        return {name: getattr(self, name) for name in names} | {"tokens": (largest + 8) * self.length * 2}


def check_disk(config: LargeModelConfig, shape: Shape, there: bool) -> None:
    """Refuse a disk that is too small, before anything is written.

    Args:
        there: whether the dense model is on it.
    """
    runs = len(config.offload) * len(config.devices) if config.keep else 1
    pruned = runs * memory.BF16 * shape.pruned_weights(config.ratio)
    dense = 0 if there else memory.BF16 * shape.weights
    states = 0 if set(config.offload) == {"none"} else memory.states_on_disk(shape, config.num_samples, config.length)
    needed = (1 + DISK_MARGIN) * (dense + pruned + states)
    folder = config.results_dir.resolve()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < needed:
        raise UserError(
            f"--results_dir {config.results_dir}: has {free / 1e9:.1f} GB free, allowed is at least {needed / 1e9:.1f} "
            f"GB ({config.shape} takes {dense / 1e9:.1f}, pruned {pruned / 1e9:.1f}, states {states / 1e9:.1f}); "
            "name a folder on a larger disk, or a smaller --shape"
        )


def make_base(config: LargeModelConfig, shape: Shape) -> float:
    """Write the dense model and text for it, unless they are there; the seconds that took."""
    watch = Watch(config.interval)
    size = int(1e9 * config.shard_gigabytes)
    stage = describe_stage("random_model", config.made_of, {}, {}, {})
    save_random_model(config.base, shape, size, config.seed, stage)
    text = random_text(shape.vocabulary, config.made_of["tokens"], config.seed)
    (config.folder / TEXT).write_text(text, encoding="utf-8")
    return watch.close()


def pruning_command(config: LargeModelConfig, name: str, offload: str, device: str) -> list[str]:
    """The command line that prunes the dense model into a folder of that name beside it."""
    text = str(config.folder / TEXT)
    flags = {
        "base_model": config.base,
        "results_dir": config.folder,
        "output_name": name,
        "pruning_ratio": config.ratio,
        "importance_method": config.importance_method,
        "dataset": text,
        "num_samples": config.num_samples,
        "repair_samples": config.repair_samples,
        "held_out_samples": 1,
        "analysis_samples": 0,
        "analysis_length": config.length,
        "sequence_length": config.length,
        "run_evaluation": "ppl" if config.eval_samples else "none",
        "eval_ppl_datasets": text,
        "eval_samples": config.eval_samples,
        "eval_length": config.length,
        "agreement_text": "none",
        "device_map": device,
        "dtype": config.dtype,
        "offload": offload,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    checkpointing = ["--use_gradient_checkpointing"] if config.use_gradient_checkpointing else []
    return [sys.executable, "run_global_pruning.py", *words, *checkpointing, "--overwrite"]


def run_forward(folder: Path, text: Path, config: LargeModelConfig, offload: str, device: str, answers: Any) -> None:
    """Perplexity on one window, in a process of its own; answers with it and with CUDA's own peak in bytes."""
    where = pick_device(device)
    place = "disk" if offload == "auto" else offload
    options = dict(offload=place, scratch=config.folder / STATES)
    model, tokenizer = load_language_model(folder, where, pick_dtype(config.dtype, "Weights"), **options)
    ids = tokenize(tokenizer, load_corpus(str(text), "test"))
    value = perplexity(model, windows(ids, config.length)[:1])
    answers.put((value, torch.cuda.max_memory_allocated() if where.type == "cuda" else None))


def forward(config: LargeModelConfig, folder: Path, offload: str, device: str) -> dict[str, Any]:
    """A pass of the pruned model over a window, under watch."""
    processes = multiprocessing.get_context("spawn")
    answers, watch = processes.SimpleQueue(), Watch(config.interval, device)
    given = (folder, config.folder / TEXT, config, offload, device, answers)
    process = processes.Process(target=run_forward, args=given)
    process.start()
    watch.begin(process.pid)
    process.join()
    seconds = watch.close()
    if process.exitcode:
        raise UserError(f"the forward pass of {folder} ended with status {process.exitcode}; its error stands above")
    value, peak = answers.get()
    return measured(watch, seconds) | {"perplexity": value, "cuda_peak_bytes": peak}


def pruned_model(folder: Path) -> dict[str, Any]:
    """What came out: parameters, sizes of the layers, perplexities."""
    results = read_json(folder / "evaluation" / "evaluation_results.json")
    return {name: results[name] for name in ("dense", "pruned", "reduction")}


def run_once(config: LargeModelConfig, offload: str, device: str) -> dict[str, Any]:
    """One pruning run and one forward pass."""
    name = f"pruned_{offload}_{device.replace(':', '')}"
    folder = config.folder / name
    try:
        pruning = run_watched(pruning_command(config, name, offload, device), config.interval, device)
        found = {"pruning": pruning, "forward": forward(config, folder / "models", offload, device)}
        return found | {"model": pruned_model(folder)}
    finally:
        if not config.keep:
            remove_folder(folder)


def gigabytes(name: str) -> Any:
    """The getter of a size in 10^9 bytes."""
    return lambda row: None if row[name] is None else row[name] / 1e9


def phase_table(found: dict[str, Any]) -> str:
    """Seconds and peaks of each phase, and of the forward pass."""
    columns = [
        Column("phase", at("phase")),
        Column("seconds", at("seconds"), "{:.1f}"),
        Column("resident GB", gigabytes("peak_rss_bytes"), "{:.2f}", "-"),
        Column("anonymous GB", gigabytes("peak_anonymous_bytes"), "{:.2f}", "-"),
        Column("file GB", gigabytes("peak_file_bytes"), "{:.2f}", "-"),
        Column("GPU GB", gigabytes("peak_device_bytes"), "{:.2f}", "-"),
    ]
    passes = [row | {"phase": f"forward pass, {row['phase']}"} for row in found["forward"]["phases"]]
    return text_table(columns, [*found["pruning"]["phases"], *passes])


def draw(runs: dict[str, dict[str, Any]]) -> Figure:
    """Memory over time of each pruning run; phases are marked, and those named that the axis has space for."""
    figure = new_figure(8, 3 * len(runs))
    grid = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axes, (name, found) in zip(grid, runs.items(), strict=True):
        draw_run(axes, name, found["pruning"])
    return figure


def draw_run(axes: Axes, name: str, pruning: dict[str, Any]) -> None:
    """One run of `draw`."""
    samples, start = pruning["samples"], 0.0
    kinds = {"rss": "resident", "anonymous": "anonymous", "file": "file pages", "device": "GPU"}
    for colour, (kind, label) in zip(COLOURS, kinds.items(), strict=False):
        if any(sample[kind] for sample in samples):
            curve = [sample["seconds"] for sample in samples], [sample[kind] / 1e9 for sample in samples]
            axes.plot(*curve, color=colour, label=label)
    for phase in pruning["phases"]:
        axes.axvline(start, color="0.8", zorder=0)
        if phase["seconds"] > NAMED * pruning["seconds"]:
            place = start + phase["seconds"] / 2, 1.0
            axes.text(
                *place, phase["phase"], transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=6
            )
        start += phase["seconds"]
    axes.set(xlabel=f"seconds ({name})", ylabel="GB", ylim=(0, None))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    open_frame(axes)


def formulas(config: LargeModelConfig, shape: Shape) -> dict[str, int]:
    """What the formulas say of the peak on the device, in bytes."""
    return {
        "in_memory_bytes": memory.pruning_in_memory(shape, config.length),
        "streamed_bytes": memory.pruning_streamed(shape, config.length),
        "weights": shape.weights,
    }


def clean_up(config: LargeModelConfig) -> None:
    """Remove the dense model, its text and what a failed run left; the folder too, unless something else is in it."""
    remove_folder(config.base)
    remove_states(config.folder)
    remove_folder(config.folder / STATES)
    (config.folder / TEXT).unlink(missing_ok=True)
    with suppress(OSError):
        config.folder.rmdir()


def main(config: LargeModelConfig) -> None:
    shape = KNOWN[config.shape]
    check_place(config.folder, "--output_name", shared=[config.results_dir])
    there = is_made_from(config.base, config.made_of, {}) and (config.folder / TEXT).is_file()
    check_disk(config, shape, there)
    found: dict[str, Any] = {"config": config.as_dict(), "environment": fingerprint()}
    found |= {"shape": asdict(shape), "formula": formulas(config, shape), "runs": {}}
    path = config.results_dir / f"{config.output_name}.json"
    try:
        found["seconds_to_make_the_dense_model"] = None if there else make_base(config, shape)
        for offload, device in product(config.offload, config.devices):
            name = f"--offload {offload} on {device}"
            log.info("%s, %.2f billion weights, %s", config.shape, shape.weights / 1e9, name)
            found["runs"][name] = run_once(config, offload, device)
            log.info("%s", phase_table(found["runs"][name]))
            write_json(path, found)
        save_figure(draw(found["runs"]), path.with_suffix(".png"))
    finally:
        if not config.keep:
            clean_up(config)
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(LargeModelConfig, main)

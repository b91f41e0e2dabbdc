"""Prune one model in memory, layer by layer, and by two processes; compare what comes out, the memory and the time.

    python benchmarks/streamed_pruning.py [--base_model DIR] [--data_dir TEXTS] [--script gqa_aware_pruning.py] [--fast]

Each way is a run of the script's own command line in a process of its own, watched from outside; the first is what the
others are compared with. Writes results/streamed_pruning.json.
"""

import sys
from csv import DictReader
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from large_model.watch import run_watched

from compression.config import AtLeast, Between, Config, run_script
from compression.files import read_json, remove_folder, write_json
from compression.outputs import check_place
from compression.runtime import RESULTS, fingerprint, log
from compression.sources import LLM
from compression.tables import Column, at, text_table
from compression.weights import Shards

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
WAYS: dict[str, tuple[list[str], str]] = {
    "memory": (PYTHON, "none"),
    "ram": (PYTHON, "cpu"),
    "disk": (PYTHON, "disk"),
    "two_processes": (TORCHRUN, "none"),
    "two_processes_disk": (TORCHRUN, "disk"),
}
FOLDER = "streamed_pruning"


@dataclass
class StreamedPruningConfig(Config):
    base_model: str = LLM
    """Model to prune: a folder, or a name on the hub."""
    data_dir: str | None = None
    """Folder with wikitext2/."""
    script: Literal["run_global_pruning.py", "gqa_aware_pruning.py"] = "run_global_pruning.py"
    """What prunes."""
    ways: tuple[Literal[tuple(WAYS)], ...] = ("memory", "disk", "two_processes")
    """Ways to prune: where the layers are, and how many processes; the others are compared with the first."""
    pruning_ratio: Annotated[float, Between(0, 0.95)] = 0.2
    """Share of the layers' parameters to remove."""
    importance_method: str | None = None
    """Score of a structure; none: the script's default."""
    num_samples: Annotated[int, AtLeast(1)] = 32
    """Windows that scores are computed on."""
    repair_samples: Annotated[int, AtLeast(1)] = 64
    """Windows that repairs are fitted to."""
    analysis_samples: Annotated[int, AtLeast(0)] = 2
    """Windows of the removal analysis."""
    eval_samples: Annotated[int, AtLeast(0)] = 0
    """Windows that perplexity is measured on; 0: the whole test part."""
    length: Annotated[int, AtLeast(8)] = 1024
    """Tokens per window; of the removal analysis at most 512."""
    dtype: str = "auto"
    """Of the weights."""
    interval: Annotated[float, AtLeast(0.001)] = 0.05
    """Seconds between two samples of the memory."""
    results_dir: Path = field(default_factory=lambda: RESULTS)
    """Folder that the results go to, and the models while the run lasts."""

    presets: ClassVar = {"fast": dict(num_samples=2, repair_samples=4, analysis_samples=1, eval_samples=2)}


def command(config: StreamedPruningConfig, way: str, folder: Path) -> list[str]:
    """The command line of one way."""
    launch, place = WAYS[way]
    flags: dict[str, Any] = {"results_dir": folder.parent, "output_name": folder.name, "offload": place}
    flags["agreement_text"] = "none"
    for name in ("base_model", "data_dir", "importance_method"):
        if getattr(config, name) is not None:
            flags[name] = getattr(config, name)
    for name in ("pruning_ratio", "num_samples", "repair_samples", "analysis_samples", "eval_samples", "dtype"):
        flags[name] = getattr(config, name)
    flags |= dict.fromkeys(("sequence_length", "eval_length"), config.length)
    flags["analysis_length"] = min(512, config.length)
    return [*launch, config.script, *(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))]


def outcome(folder: Path) -> dict[str, Any]:
    """What a run gave: which structures went, perplexities; the weights stay in their files."""
    table = folder / "analysis" / "groups_to_prune.csv"
    removed = set()
    if table.is_file():
        with table.open(encoding="utf-8") as file:
            removed = {(row["layer"], row["kind"], row["index"]) for row in DictReader(file)}
    results = read_json(folder / "evaluation" / "evaluation_results.json")
    return {"removed": removed, "layers": results["pruned"]["layers"], "perplexity": results["pruned"]["perplexity"]}


def largest_difference(first: Path, second: Path) -> float | None:
    """The largest difference of a weight, relative to the largest of its tensor; None where shapes differ."""
    one, two = Shards(first / "models"), Shards(second / "models")
    if one.shapes != two.shapes:
        return None
    worst = 0.0
    for name in one.shapes:
        mine, other = (shards.tensors([name])[name].float() for shards in (one, two))
        worst = max(worst, ((mine - other).abs().max() / mine.abs().max().clamp_min(1e-30)).item())
    return worst


def compare(found: dict[str, dict[str, Any]], folders: dict[str, Path]) -> None:
    """Add to each way what differs from the first."""
    first = next(iter(found))
    base = outcome(folders[first])
    for way, row in found.items():
        this = outcome(folders[way])
        ratios = [this["perplexity"][name] / value for name, value in base["perplexity"].items()]
        row["structures_that_differ"] = len(base["removed"] ^ this["removed"])
        row["same_sizes"] = base["layers"] == this["layers"]
        row["largest_weight_difference"] = largest_difference(folders[first], folders[way])
        row["perplexity"] = this["perplexity"]
        row["perplexity_ratio"] = max(ratios, key=lambda ratio: abs(ratio - 1))
        row["time_ratio"] = row["seconds"] / found[first]["seconds"]


def memory(run: dict[str, Any]) -> dict[str, float]:
    """The highest memory of a run's phases in GB, interpreter and libraries included: what no file holds, and all that
    is resident. Its start, which reads and tokenizes the text, is left out."""
    phases = run["phases"][1:]
    kinds = ("anonymous", "rss")
    return {f"{kind}_gb": max(phase[f"peak_{kind}_bytes"] or 0 for phase in phases) / 1e9 for kind in kinds}


def table(found: dict[str, dict[str, Any]]) -> str:
    columns = [
        Column("way", at("way")),
        Column("structures that differ", at("structures_that_differ")),
        Column("largest difference of weights", at("largest_weight_difference"), "{:.1e}", "-"),
        Column("perplexity ratio", at("perplexity_ratio"), "{:.5f}"),
        Column("time ratio", at("time_ratio"), "{:.2f}"),
        Column("anonymous GB", at("anonymous_gb"), "{:.2f}"),
        Column("resident GB", at("rss_gb"), "{:.2f}"),
    ]
    return text_table(columns, [{"way": way} | row for way, row in found.items()])


def main(config: StreamedPruningConfig) -> None:
    work = config.results_dir / FOLDER
    check_place(work, "--results_dir", shared=[config.results_dir])
    folders = {way: work / f"way_{number}" for number, way in enumerate(config.ways)}
    found: dict[str, dict[str, Any]] = {}
    for way, folder in folders.items():
        log.info("%s", way)
        run = run_watched(command(config, way, folder), config.interval)
        found[way] = {"seconds": run["seconds"], "phases": run["phases"]} | memory(run)
    compare(found, folders)
    path = config.results_dir / f"{FOLDER}.json"
    write_json(path, {"config": config.as_dict(), "environment": fingerprint(), "ways": found})
    for folder in folders.values():
        remove_folder(folder)
    log.info("%s\n-> %s", table(found), path)


if __name__ == "__main__":
    run_script(StreamedPruningConfig, main)

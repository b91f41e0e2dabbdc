"""Everything that only a GPU can show, in one command that can be stopped and run again.

    python benchmarks/on_gpu.py [--data_dir TEXTS] [--part NAME ...]
    python benchmarks/on_gpu.py --list
    python benchmarks/on_gpu.py --rehearse

Each part runs in a process of its own, for at most --minutes, and leaves results/on_gpu/NAME.json: run again, the
command goes on behind what is there, and tries again what failed. The failure of one part ends no other. Writes
results/on_gpu.json, and results/on_gpu.md: a table of all parts that names GPU, versions and data types.

--rehearse runs all of it with tiny sizes, on the CPU too, into results/on_gpu_rehearsal.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from on_gpu import classifier, kernels, language, serving
from on_gpu.setting import Part, Setting

from compression.config import AtLeast, Config, run_script
from compression.files import read_json, write_json, write_text
from compression.runtime import RESULTS, UserError, fingerprint, log
from compression.sources import LLM
from compression.tables import Column, at, markdown_table

PARTS = {
    "stage8": Part("pruning while distilling; the result on CPU and GPU", classifier.stage_8),
    "stage9": Part("4 bits after training: the same on CPU and GPU? faster than bfloat16?", classifier.stage_9),
    "stage10": Part("training in 4 bits: the same values on CPU and GPU? faster than bfloat16?", classifier.stage_10),
    "attention": Part("flash attention against the plain one", kernels.attention),
    "compile": Part("torch.compile of a pruned classifier and a pruned language model", kernels.compiled),
    "large_in_memory": Part("the shape of Llama-3-8B pruned by half, whole on the GPU", language.large_in_memory),
    "large_streamed": Part("the same, one layer at a time on the GPU", language.large_streamed),
    "recovery": Part("SmolLM2-135M pruned by half, then all weights trained", language.recovery),
    "qlora": Part("adapters for it beside 4 bits and beside bfloat16", language.qlora),
    "vllm": Part("SmolLM2-135M pruned by half, served by vLLM: the same as in transformers?", serving.vllm),
}
# Seconds that a part's process has to end by itself once its time is over.
GRACE = 30


@dataclass
class OnGpuConfig(Config):
    part: tuple[str, ...] = ()
    """Which parts, by the names that --list shows, in this process; none: all, each in a process of its own."""
    rehearse: bool = False
    """Run with tiny sizes and random models, in this process, on the CPU where there is no GPU."""
    minutes: Annotated[float, AtLeast(0.01)] = 9.0
    """Longest time of a part."""
    recovery_tokens: Annotated[int, AtLeast(1)] = 10_000_000
    """Tokens that recovery trains on, all passes together."""
    base_model: str = LLM
    """The small language model: a folder, or a name on the hub."""
    data_dir: str | None = None
    """Folder with wikitext2/ and ptb/; without it the hub, then the embedded default."""
    teacher_path: Path | None = None
    """A fine-tuned teacher for the classifier parts; these use random models unless the next two are given too."""
    student_path: Path | None = None
    """Its student."""
    sentiment_dir: str | None = None
    """Folder with SST-2's train.tsv and dev.tsv."""
    results_dir: Path = field(default_factory=lambda: RESULTS)
    """Folder that the results go to."""
    keep: bool = False
    """Keep the models that were made, even once all parts have succeeded."""
    list: bool = False
    """Show the parts and end."""

    def check(self) -> None:
        for name in self.part:
            if name not in PARTS:
                raise UserError(f"--part {name}: unknown; allowed are {', '.join(PARTS)}")
        named = [self.teacher_path, self.student_path, self.sentiment_dir]
        if any(named) and not all(named):
            raise UserError("--teacher_path, --student_path, --sentiment_dir: allowed are all three or none; give all")

    @property
    def name(self) -> str:
        """Of the results."""
        return "on_gpu_rehearsal" if self.rehearse else "on_gpu"

    def file_of(self, part: str) -> Path:
        """Where a part's figures go."""
        return self.results_dir / self.name / f"{part}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        left_out = ("part", "minutes", "results_dir", "keep", "list")
        return {name: value for name, value in self.as_dict().items() if name not in left_out}

    def setting(self) -> Setting:
        """What the parts get."""
        return Setting(
            rehearse=self.rehearse,
            work=self.results_dir.resolve() / self.name / "work",
            base_model=self.base_model,
            data_dir=self.data_dir,
            teacher=self.teacher_path,
            student=self.student_path,
            sentiment_dir=self.sentiment_dir,
            recovery_tokens=100 if self.rehearse else self.recovery_tokens,
        )


def earlier(config: OnGpuConfig, part: str) -> dict[str, Any] | None:
    """What a part left with the same settings."""
    path = config.file_of(part)
    found = read_json(path) if path.is_file() else None
    return found if found and found["settings"] == config.settings else None


def leave(config: OnGpuConfig, part: str, outcome: dict[str, Any]) -> None:
    write_json(
        config.file_of(part), {"part": part, "settings": config.settings, "environment": fingerprint()} | outcome
    )


@contextmanager
def at_most(minutes: float) -> Iterator[None]:
    """Raise TimeoutError inside once the time is over."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"it took more than {minutes:g} minutes")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_here(config: OnGpuConfig, part: str) -> None:
    """Run a part in this process; whatever it raises is what it leaves."""
    started = time.perf_counter()
    try:
        with at_most(config.minutes):
            outcome: dict[str, Any] = {"figures": PARTS[part].run(config.setting())}
    except Exception as error:
        log.info("%s failed: %r", part, error)
        outcome = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    leave(config, part, outcome | {"seconds": time.perf_counter() - started})


def run_apart(config: OnGpuConfig, part: str) -> None:
    """Run a part in a process of its own, so that a GPU in a bad state ends with it."""
    config.file_of(part).unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--part", part]
    try:
        status = subprocess.run(command, timeout=60 * config.minutes + GRACE).returncode
    except subprocess.TimeoutExpired:
        status = "none: it was stopped"
    if not config.file_of(part).is_file():
        leave(config, part, {"failure": f"its process ended with status {status}", "seconds": 60 * config.minutes})


def shown(value: float | int | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def stated(environment: dict[str, Any]) -> str:
    return "GPU {gpu}, torch {torch}, transformers {transformers}, commit {git_commit}".format(**environment)


def report(config: OnGpuConfig) -> dict[str, dict[str, Any]]:
    """Write the JSON and the table of all parts that left something; gives them by name."""
    found = {part: outcome for part in PARTS if (outcome := earlier(config, part))}
    rows = []
    for part, outcome in found.items():
        figures = outcome.get("figures") or {"failed": outcome["failure"]}
        rows += [(part, what, shown(value)) for what, value in figures.items()]
    columns = [Column(title, at(place)) for place, title in enumerate(("part", "what", "value"))]
    about = "; ".join(sorted({stated(outcome["environment"]) for outcome in found.values()}))
    command = f"`python benchmarks/on_gpu.py{' --rehearse' if config.rehearse else ''}`"
    table = markdown_table(columns, rows)
    write_text(config.results_dir / f"{config.name}.md", f"{command}, {about}:\n\n{table}\n")
    write_json(config.results_dir / f"{config.name}.json", {"parts": found})
    return found


def main(config: OnGpuConfig) -> None:
    if config.list:
        log.info("%s", "\n".join(f"{name:16} {part.help}" for name, part in PARTS.items()))
        return
    run = run_here if config.part or config.rehearse else run_apart
    for part in config.part or PARTS:
        before = earlier(config, part)
        if before and "figures" in before:
            log.info("%s: there already", part)
            continue
        log.info("%s: %s", part, PARTS[part].help)
        run(config, part)
    found = report(config)
    failed = [part for part, outcome in found.items() if "failure" in outcome]
    log.info("-> %s", config.results_dir / f"{config.name}.md")
    if failed:
        raise UserError(f"{', '.join(failed)} failed; see {config.results_dir / config.name}, and run again")
    if len(found) == len(PARTS) and not config.keep:
        shutil.rmtree(config.setting().work, ignore_errors=True)


if __name__ == "__main__":
    run_script(OnGpuConfig, main)

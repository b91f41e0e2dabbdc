"""What the page shows, read from the folders. What cannot be read is noted and left out: it stops nothing."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from compression.classifier.report import REPORT_FILE
from compression.files import read_json, read_object
from compression.integrity import RUN_FILE, SOURCE_FILE, STAGE_FILE, read_record
from compression.lineage import Record, as_object
from compression.model_card import kind_of
from compression.outputs import EVALUATION_FILE, HISTORY_FILE, OWN_TEXT, STUDIES
from compression.runtime import ROOT, UserError, first_line, relative_path

RECOVERED = "recovered"
DEPTH = 3
"""Folders of checkpoints are at most so many levels below those that are looked through."""
STUDY_ROWS = 500
"""Rows of a study's table that are shown at most."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a record of what it is, or one that such a record names.

    Attributes:
        path: the folder, symbolic links resolved.
        record: its `stage.json` or `source.json`; empty where it has none that can be read.
        config: its `config.json`.
        history: of its training, an entry per epoch.
    """

    path: Path
    record: Record = field(default_factory=dict)
    config: Record = field(default_factory=dict)
    history: tuple[Record, ...] = ()

    @property
    def place(self) -> str:
        return relative_path(self.path)

    @property
    def stage(self) -> str | None:
        stage = self.record.get("stage")
        return stage if isinstance(stage, str) else None

    @property
    def about(self) -> str:
        """What it is, as a phrase."""
        if self.stage:
            return kind_of(self.stage).about
        fetched = self.record.get("source")
        return f"{self.record.get('name')}, fetched ({fetched})" if fetched else "no record of what it is"

    @property
    def settings(self) -> Record:
        return as_object(self.record.get("config"))

    @cached_property
    def inputs(self) -> dict[str, Path]:
        """The folders that it was made from, by role: parent, teacher, adapter, ..."""
        entries = {role: as_object(entry).get("path") for role, entry in as_object(self.record.get("inputs")).items()}
        paths = {"parent": self.record.get("parent")} | entries
        return {role: (ROOT / path).resolve() for role, path in paths.items() if isinstance(path, str)}


@dataclass
class LanguageResult:
    """What was measured of a language model before and after something was done to it.

    Attributes:
        name: of the run.
        path: its folder or file.
        models: what `measure` found of each, by what it is: dense, pruned, recovered, ...
        reduction: shares of the parameters that are gone.
        removal: perplexities without each part of the dense model, by part; and the dense model's.
        kept_layers: of each layer of the pruned model its place in the dense one; None: all layers are there.
        checkpoint: the folder of the model that was made.
    """

    name: str
    path: Path
    models: dict[str, Record]
    reduction: Record = field(default_factory=dict)
    removal: Record = field(default_factory=dict)
    kept_layers: list[int] | None = None
    checkpoint: Path | None = None

    @property
    def place(self) -> str:
        return relative_path(self.path)


@dataclass(frozen=True)
class Study:
    """A folder of a study: its table, a row per setting."""

    name: str
    place: str
    titles: list[str]
    rows: list[list[str]]
    rows_in_all: int


@dataclass
class Records:
    """All that the page shows.

    Attributes:
        report: of the classifiers; empty where there is none.
        checkpoints: by their paths, those of the report first.
        names: what the report calls checkpoints, by their paths.
        problems: what could not be read.
    """

    models_dir: Path
    results_dir: Path
    report: Record = field(default_factory=dict)
    checkpoints: dict[Path, Checkpoint] = field(default_factory=dict)
    names: dict[Path, str] = field(default_factory=dict)
    results: list[LanguageResult] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[Record]:
        """What was measured of each classifier, an entry per model and engine."""
        entries = self.report.get("models")
        found = map(as_object, entries if isinstance(entries, list) else [])
        return [one for one in found if isinstance(one.get("name"), str) and isinstance(one.get("folder"), str)]

    def folder_of(self, entry: Record) -> Path:
        """The checkpoint that an entry of the report was measured on."""
        return (ROOT / entry["folder"]).resolve()

    def name_of(self, path: Path) -> str:
        """What a folder is called: as in the report, else by its last names."""
        own = (
            path.name if path.name not in ("models", "finetuned", "onnx", "gguf") else f"{path.parent.name}/{path.name}"
        )
        return self.names.get(path, own)

    def noted(self, read: Callable[[Path], Any], path: Path) -> Any:
        """What is read of a path, None where it cannot be; that is noted."""
        try:
            return read(path)
        except (UserError, OSError, UnicodeError, csv.Error) as error:
            if (said := first_line(error).removeprefix("UserError: ")) not in self.problems:
                self.problems.append(said)
            return None


def dig(value: Any, *path: str | int) -> Any:
    """The value at a path in nested objects and lists, None where there is none."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def number(value: Any, times: float = 1) -> float | None:
    """A finite number, and None for anything else."""
    sound = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return value * times if sound else None


def read_records(models_dir: Path, results_dir: Path) -> Records:
    """Read all that lies in the folders of models and results."""
    records = Records(Path(models_dir).resolve(), Path(results_dir).resolve())
    path = records.results_dir / REPORT_FILE
    if path.is_file():
        records.report = records.noted(read_object, path) or {}
    for entry in records.entries:
        folder = records.folder_of(entry)
        _add(records, folder)
        records.names.setdefault(folder, entry["name"])
    for parent in (records.models_dir, records.results_dir):
        for folder in _record_folders(parent):
            _add(records, folder)
    for checkpoint in list(records.checkpoints.values()):
        _add_inputs(records, checkpoint)
    _read_runs(records)
    _read_studies(records)
    return records


def _record_folders(parent: Path) -> Iterator[Path]:
    """The folders below one that have a record; studies have too many to be shown one by one."""
    for depth in range(1, DEPTH + 1):
        for name in (STAGE_FILE, SOURCE_FILE):
            for path in sorted(parent.glob("/".join(["[!.]*"] * depth + [name]))):
                if STUDIES not in path.relative_to(parent).parts:
                    yield path.parent.resolve()


def _add(records: Records, folder: Path) -> Checkpoint:
    if folder not in records.checkpoints:
        record = next((found for name in (STAGE_FILE, SOURCE_FILE) if (found := _record(records, folder, name))), {})
        config, history = folder / "config.json", folder / HISTORY_FILE
        epochs = records.noted(read_json, history) if history.is_file() else None
        records.checkpoints[folder] = Checkpoint(
            folder,
            record,
            (records.noted(read_object, config) if config.is_file() else None) or {},
            tuple(map(as_object, epochs)) if isinstance(epochs, list) else (),
        )
    return records.checkpoints[folder]


def _record(records: Records, folder: Path, name: str) -> Record:
    return records.noted(lambda path: read_record(path, name), folder) or {}


def _add_inputs(records: Records, checkpoint: Checkpoint) -> None:
    for path in checkpoint.inputs.values():
        if path not in records.checkpoints and path != checkpoint.path:
            _add_inputs(records, _add(records, path))


# Language models.


def _read_runs(records: Records) -> None:
    for path in sorted(records.results_dir.glob(f"[!.]*/{RUN_FILE}")):
        if _record(records, path.parent, RUN_FILE).get("stage") == OWN_TEXT:
            continue
        if run := _pruning_run(records, path.parent):
            records.results.append(run)
    for checkpoint in list(records.checkpoints.values()):
        metrics = as_object(checkpoint.record.get("metrics"))
        before, after = as_object(metrics.get("before")), as_object(metrics.get("after"))
        if not before or not after:
            continue
        parent, name = checkpoint.inputs.get("parent"), records.name_of(checkpoint.path)
        run = next((run for run in records.results if run.checkpoint == parent), None)
        if run is None:
            models = {"before": before, RECOVERED: after}
            records.results.append(LanguageResult(name, checkpoint.path, models, checkpoint=checkpoint.path))
        elif checkpoint.path.parent != run.path:  # what lies in the run's own folder is in its evaluation
            run.models[f"{RECOVERED} ({name})"] = after
    for path in sorted(records.results_dir.glob("*.json")):
        found = {} if path.name.startswith(".") or path.name == REPORT_FILE else records.noted(read_json, path)
        models = {name: as_object(figures) for name, figures in as_object(dig(found, "models")).items()}
        if models and all("parameters" in figures for figures in models.values()):
            records.results.append(LanguageResult(path.stem, path, models))


def _pruning_run(records: Records, folder: Path) -> LanguageResult | None:
    path = folder / EVALUATION_FILE
    found = records.noted(read_object, path) if path.is_file() else None
    if found is None:
        if not path.is_file():
            records.problems.append(f"{relative_path(path)}: is missing, so the run is not shown")
        return None
    roles = {"dense": "dense", "pruned": "pruned", "finetuned": RECOVERED}
    models = {title: dict(as_object(found[role])) for role, title in roles.items() if role in found}
    for role, figures in models.items():
        if costs := as_object(dig(found, "efficiency", role)):
            figures["efficiency"] = costs
    if "pruned" in models and (agreement := as_object(found.get("agreement"))):
        models["pruned"]["agreement"] = agreement
    kept = found.get("kept_layers")
    return LanguageResult(
        folder.name,
        folder,
        models,
        as_object(found.get("reduction")),
        _removal(records, folder / "analysis"),
        kept if isinstance(kept, list) and all(isinstance(place, int) for place in kept) else None,
        folder / "models",
    )


def _removal(records: Records, folder: Path) -> Record:
    """Perplexities without each layer, attention and MLP, as far as the run has looked at them."""
    found: Record = {}
    for name in ("layer_removal_ppl.json", "block_removal_ppl.json"):
        if (folder / name).is_file():
            found |= records.noted(read_object, folder / name) or {}
    if (path := folder / "layer_rates.json").is_file():
        rates = records.noted(read_object, path) or {}
        layers = rates.get("layers")
        values = [dig(row, "removal_perplexity") for row in layers] if isinstance(layers, list) else []
        if any(value is not None for value in values):
            found |= {"dense": rates.get("dense_perplexity"), "layer": values}
    return found


# Studies.


def _read_studies(records: Records) -> None:
    for path in sorted(records.results_dir.glob(f"{STUDIES}/[!.]*/table.csv")):
        lines = records.noted(_lines, path)
        if lines:
            titles, *rows = lines
            place = relative_path(path.parent)
            records.studies.append(Study(path.parent.name, place, titles, rows[:STUDY_ROWS], len(rows)))


def _lines(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))

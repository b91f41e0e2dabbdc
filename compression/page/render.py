"""The page's text: records become tables, charts and sections, and these one file of HTML."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compression.classifier.models import looks
from compression.classifier.report import RELATIVE_COLUMNS, results_columns
from compression.files import json_text
from compression.lineage import Record, as_object
from compression.page import charts
from compression.page.charts import Axis, Spec, colour_on_page, path_of
from compression.page.commands import command_of, made_from
from compression.page.language import bars_of, language_columns, language_point, language_scatter, samples_of
from compression.page.parts import Cell, Look, Section, Table, TableRow, short, table, text_cells
from compression.page.records import Checkpoint, LanguageResult, Records, dig, number
from compression.plots import COLOURS, MARKERS
from compression.runtime import fingerprint, relative_path

HERE = Path(__file__).resolve().parent


class Page:
    """The page while it is put together.

    Attributes:
        specs: of the charts, by name.
        hrefs: where on the page a folder's section is.
    """

    def __init__(self, records: Records):
        self.records = records
        self.specs: dict[str, Spec] = {}
        self.hrefs: dict[Path, str] = {}
        task = as_object(records.report.get("task"))
        self.labels = [str(label) for label in listed(dig(task, "labels"))]
        metrics = dig(task, "metrics")
        self.metrics: dict[str, str] = {"accuracy": "Accuracy"} | (metrics if isinstance(metrics, dict) else {})
        self.primary = str(dig(task, "primary") or "accuracy")
        self.looks = [Look(colour_on_page(colour), path_of(marker)) for colour, marker in looks(self._titles())]

    def _titles(self) -> list[str]:
        """What classifiers are called: the entries of the report, then what it does not have."""
        return [entry["name"] for entry in self.records.entries] + [
            self.records.name_of(one.path) for one in self.unmeasured
        ]

    @property
    def unmeasured(self) -> list[Checkpoint]:
        """Classifiers that are there and not in the report."""
        known = set(self.records.names)
        return [
            one
            for one in self.records.checkpoints.values()
            if one.path not in known and one.stage and self.metrics.keys() & as_object(one.record.get("metrics")).keys()
        ]

    def chart(self, spec: Spec | None) -> list[str]:
        """Keep a specification; its name, in a list that is empty where there is nothing to draw."""
        if spec is None:
            return []
        name = f"chart-{len(self.specs) + 1}"
        self.specs[name] = spec
        return [name]

    # The classifiers.

    def classifiers(self) -> list[Section]:
        sections: dict[Path, Section] = {}
        for entry, look in zip(self.records.entries, self.looks, strict=False):
            folder = self.records.folder_of(entry)
            if folder not in sections:
                checkpoint = self.records.checkpoints[folder]
                sections[folder] = self._classifier(checkpoint, entry["name"], look, len(sections) + 1)
            self._measured(sections[folder], entry)
        for checkpoint, look in zip(self.unmeasured, self.looks[len(self.records.entries) :], strict=True):
            name = self.records.name_of(checkpoint.path)
            sections[checkpoint.path] = self._classifier(checkpoint, name, look, len(sections) + 1)
        return list(sections.values())

    def _classifier(self, checkpoint: Checkpoint, name: str, look: Look, place: int) -> Section:
        section = Section(f"model-{place}", name, facts_of(checkpoint), look)
        self.hrefs[checkpoint.path] = f"#{section.id}"
        for spec in charts.curves(checkpoint.history):
            section.charts += self.chart(spec)
        section.charts += self.chart(charts.kept_shares(charts.sizes_left(checkpoint.config)))
        section.settings = settings_of(checkpoint)
        section.command = command_of(checkpoint)
        return section

    def _measured(self, section: Section, entry: Record) -> None:
        """Add what was measured of an entry: the first one's confusions and disagreements stand for all its engines."""
        first = not section.texts and not any("confusion" in name for name, _ in section.tables)
        title = ", ".join(str(value) for value in as_object(entry.get("engine")).values())
        rows = self.result_rows([entry], [None])
        section.tables.append((f"Measured in {title}", rows))
        if not first or len(section.tables) > 1:
            return
        section.charts += self.chart(charts.confusion(dig(entry, "quality", "confusion_matrix"), self.labels))
        examples = dig(entry, "disagreements", "examples")
        if isinstance(examples, list) and examples:
            count, of = dig(entry, "disagreements", "n"), dig(entry, "quality", "n")
            title = f"Where it and {self.records.report.get('baseline')} disagree: {count} of {of} texts"
            title += f"; the {len(examples)} on which they are furthest apart" if len(examples) != count else ""
            section.texts.append((title, self._disagreements(examples)))

    def _disagreements(self, examples: list[Any]) -> Table:
        titles = ["Text", "True", "This model", "Baseline"]
        rows = []
        for example in examples:
            words = [str(dig(example, "text"))]
            words += [self._label(dig(example, role)) for role in ("label", "predicted", "baseline")]
            rows.append(TableRow(text_cells(*words)))
        return Table(titles, rows)

    def _label(self, place: Any) -> str:
        inside = isinstance(place, int) and 0 <= place < len(self.labels)
        return self.labels[place] if inside else str(place)

    def result_rows(self, entries: Sequence[Record], found: Sequence[Look | None]) -> Table:
        """The report's own columns of entries."""
        length = dig(self.records.report, "config", "flops_sequence_length")
        task = {"labels": self.labels, "metrics": {name: self.metrics[name] for name in self.metrics}}
        return table(results_columns(length, task), entries, found, self._href)

    def _href(self, entry: Record) -> str | None:
        return self.hrefs.get(self.records.folder_of(entry))

    def overview(self) -> Record:
        """Chart and tables of all classifiers in the report."""
        entries = self.records.entries
        found = self.looks[: len(entries)]
        relative = [entry for entry in entries if isinstance(entry.get("relative"), dict)]
        by_name = dict(zip((entry["name"] for entry in entries), found, strict=True))
        tables = [("Quality and cost", self.result_rows(entries, found))] if entries else []
        if relative:
            title = f"Against {self.records.report.get('baseline')}"
            marks = [by_name[entry["name"]] for entry in relative]
            tables.append((title, table(RELATIVE_COLUMNS, relative, marks, self._href)))
        if self.unmeasured:
            tables.append(("Not in the report: what their own runs measured", self._unmeasured_table()))
        return {"charts": self._scatter(), "tables": tables}

    def _unmeasured_table(self) -> Table:
        rows = []
        for checkpoint, look in zip(self.unmeasured, self.looks[len(self.records.entries) :], strict=True):
            metrics = as_object(checkpoint.record.get("metrics"))
            value = next(float(metrics[name]) for name in self.metrics if number(metrics.get(name)) is not None)
            title = next(str(self.metrics[name]) for name in self.metrics if number(metrics.get(name)) is not None)
            name, data = self.records.name_of(checkpoint.path), dig(checkpoint.record, "data", "name")
            cells = [Cell(name, name), *text_cells(checkpoint.about, str(data or "not recorded"), title)]
            rows.append(TableRow([*cells, Cell(f"{value:.4f}", value)], look, self.hrefs.get(checkpoint.path)))
        return Table(["Model", "What it is", "Data", "Metric", "Value"], rows)

    def _scatter(self) -> list[str]:
        points = [self._point(*found) for found in zip(self.records.entries, self.looks, strict=False)]
        length = dig(self.records.report, "config", "flops_sequence_length")
        batch = dig(self.records.report, "config", "throughput_batch_size")
        costs = [
            Axis("gflops", f"GFLOPs per sequence of {length} tokens", False),
            Axis("megabytes", "Weights (MB)", False),
            Axis("latency", "Latency, batch 1 (ms; bar: 10th to 90th percentile)", False),
            Axis("throughput", f"Samples/s, batch {batch} (bar: 10th to 90th percentile)", True),
            Axis("parameters", "Parameters (million)", False),
            Axis("encoder_macs", "GMACs of the encoder", False),
        ]
        names = [self.primary, *(name for name in self.metrics if name != self.primary)]
        titles = {name: str(self.metrics.get(name, name)) for name in names}
        titles["accuracy"] = "Accuracy (%; bar: ± 1 standard error)"
        qualities = [Axis(name, titles[name], True) for name in names if any(point.get(name) for point in points)]
        costs = [axis for axis in costs if any(point.get(axis.field) is not None for point in points)]
        if not points or not qualities or not costs:
            return []
        told = {"name": "Model", "engine": "Engine"} | {f"{axis.field}_text": axis.title for axis in costs + qualities}
        for point in points:
            point |= {f"{axis.field}_text": short(point.get(axis.field)) for axis in costs + qualities}
        return self.chart(charts.scatter(points, costs, qualities, told))

    def _point(self, entry: Record, look: Look) -> Record:
        quality = as_object(entry.get("quality"))
        point: Record = {
            "name": entry["name"],
            "engine": ", ".join(str(value) for value in as_object(entry.get("engine")).values()),
            "colour": look.colour,
            "shape": look.path,
            "href": self._href(entry),
            "gflops": number(dig(entry, "macs", "gflops")),
            "megabytes": number(dig(entry, "size", "weights_bytes"), 1e-6),
            "parameters": number(dig(entry, "parameters", "total"), 1e-6),
            "encoder_macs": number(dig(entry, "macs", "encoder"), 1e-9),
        }
        for name, group, unit in (("latency", "latency", "ms"), ("throughput", "throughput", "samples_per_second")):
            for end, part in (("", "median"), ("_low", "p10"), ("_high", "p90")):
                point[name + end] = number(dig(entry, group, f"{part}_{unit}"))
        for name in self.metrics:
            point[name] = number(quality.get(name), 100 if name == "accuracy" else 1)
        error = number(quality.get("accuracy_standard_error"), 100)
        if error is not None and point.get("accuracy") is not None:
            point |= {"accuracy_low": point["accuracy"] - error, "accuracy_high": point["accuracy"] + error}
        return point

    # The language models.

    def language_models(self) -> tuple[Record, list[Section]]:
        sections, points, entries, found = [], [], [], []
        for place, result in enumerate(self.records.results):
            section = self._run(result, place + 1)
            sections.append(section)
            for number_of_role, (role, figures) in enumerate(result.models.items()):
                colour = colour_on_page(COLOURS[place % len(COLOURS)])
                look = Look(colour, path_of(MARKERS[number_of_role % len(MARKERS)]))
                entry = figures | {"name": f"{result.name}: {role}", "href": f"#{section.id}"}
                entries.append(entry)
                found.append(look)
                points.append(language_point(entry, look))
        columns = language_columns(entries)
        tables = [("All models", table(columns, entries, found, lambda entry: entry["href"]))] if entries else []
        return {"charts": self.chart(language_scatter(points)), "tables": tables}, sections

    def _run(self, result: LanguageResult, place: int) -> Section:
        checkpoint = self.records.checkpoints.get(result.checkpoint) if result.checkpoint else None
        made = checkpoint or Checkpoint(result.path)
        section = Section(f"run-{place}", result.name, [("Results", result.place), *facts_of(made)])
        if result.checkpoint:
            self.hrefs[result.checkpoint] = f"#{section.id}"
        for name, title in (("structures", "Gone of the layers' parameters"), ("total", "Gone of all parameters")):
            if (share := number(result.reduction.get(name), 100)) is not None:
                section.facts.append((title, f"{share:.1f} %"))
        section.charts += self.chart(charts.kept_shares(charts.layer_rows(result)))
        section.charts += self.chart(charts.removal(result.removal))
        roles = list(result.models)
        for title, rows in bars_of(result).items():
            section.charts += self.chart(charts.grouped_bars(title, rows, roles))
        if made.history:
            for spec in charts.curves(made.history):
                section.charts += self.chart(spec)
        entries = [figures | {"name": role} for role, figures in result.models.items()]
        section.tables.append(("What was measured", table(language_columns(entries), entries, [None] * len(entries))))
        if (samples := samples_of(result)) is not None:
            section.texts.append(("How each model goes on (greedy)", samples))
        section.settings = settings_of(made)
        section.command = command_of(made)
        return section


def listed(value: Any) -> list[Any]:
    """A value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def facts_of(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """What a record says of a checkpoint, as pairs of words."""
    facts = [("Folder", checkpoint.place), ("What it is", checkpoint.about)]
    facts += [(f"Made from ({role})" if role != "data" else "Data", place) for role, place in made_from(checkpoint)]
    for title, name in (("Made", "created"), ("Seed", "seed")):
        if checkpoint.record.get(name) is not None:
            facts.append((title, str(checkpoint.record[name])))
    versions = as_object(checkpoint.record.get("environment"))
    if versions:
        facts.append(("Made with", ", ".join(f"{name} {value}" for name, value in versions.items())))
    return facts


def settings_of(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    return [(name, json_text(value, checkpoint.path).strip()) for name, value in checkpoint.settings.items()]


# The file.


def build(records: Records) -> str:
    """The whole page."""
    page = Page(records)
    classifiers = page.classifiers()
    language_overview, runs = page.language_models()
    overview = page.overview()
    lineage = page.chart(charts.lineage(records, page.hrefs))
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    context = {
        "report": records.report,
        "data": as_object(records.report.get("data")),
        "machine": as_object(records.report.get("environment")),
        "device": records.report.get("device"),
        "warnings": [str(line) for line in listed(records.report.get("warnings"))],
        "missing": [
            one for one in map(as_object, listed(records.report.get("missing"))) if {"name", "command"} <= one.keys()
        ],
        "classifiers": classifiers,
        "overview": overview,
        "lineage": lineage,
        "language_overview": language_overview,
        "runs": runs,
        "studies": [(study, _study_table(study)) for study in records.studies],
        "problems": records.problems,
        "places": (relative_path(records.models_dir), relative_path(records.results_dir)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": fingerprint()["git_commit"],
        "specs": {"config": charts.CONFIG, "charts": page.specs},
        "library": (HERE / "vega.js").read_text(encoding="utf-8"),
    }
    return environment.get_template("page.html.j2").render(context)


def _study_table(study: Any) -> Table:
    def cell(text: str) -> Cell:
        try:
            value = number(float(text))
        except ValueError:
            value = None
        return Cell(text if value is None else f"{value:.6g}", text if value is None else value)

    return Table(study.titles, [TableRow([cell(text) for text in row]) for row in study.rows])

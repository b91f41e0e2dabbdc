"""What the page says of language models: columns of their tables, their charts' rows, what they say."""

from collections.abc import Callable, Sequence
from typing import Any

from compression.lineage import Record, as_object
from compression.page import charts
from compression.page.charts import Axis, Spec
from compression.page.parts import Look, Table, TableRow, short, text_cells
from compression.page.records import LanguageResult, dig, number
from compression.tables import Column

ENDS = ("_low", "_high", "_text")
QUALITIES: dict[str, Callable[[str], str]] = {
    "perplexity": lambda text: f"Perplexity, {text}",
    "zeroshot": lambda task: f"{task} (%; bar: ± 1 standard error)",
}


def language_scatter(points: list[Record]) -> Spec | None:
    """All language models, quality against cost; None where there is nothing of both."""
    costs = [
        Axis("parameters", "Parameters (million)", False),
        Axis("structures", "Parameters of the layers (million)", False),
        Axis("macs", "GMACs of the layers", False),
        Axis("prefill", "Prefill (tokens/s)", True),
        Axis("decode", "Decode (tokens/s)", True),
    ]
    names = dict.fromkeys(name for point in points for name in point if ":" in name and not name.endswith(ENDS))
    qualities = [Axis(name, QUALITIES[name.split(":")[0]](name.split(":")[1]), name[0] == "z") for name in names]
    costs = [axis for axis in costs if any(point[axis.field] is not None for point in points)]
    if not costs or not qualities:
        return None
    told = {"name": "Model"} | {f"{axis.field.replace(':', '_')}_text": axis.title for axis in costs + qualities}
    for point in points:
        for axis in costs + qualities:
            point[f"{axis.field.replace(':', '_')}_text"] = short(point.get(axis.field))
    return charts.scatter(points, costs, qualities, told)


def _figure(*path: str, per: float = 1.0) -> Callable[[Record], float]:
    def value(entry: Record) -> float:
        found = number(dig(entry, *path), 1 / per)
        if found is None:
            raise KeyError(path)
        return found

    return value


def _with_error(task: str) -> Callable[[Record], tuple[float, float]]:
    accuracy, error = (_figure("zeroshot", task, name, per=0.01) for name in ("acc", "acc_standard_error"))
    return lambda entry: (accuracy(entry), error(entry))


def _keys(entries: Sequence[Record], name: str) -> list[str]:
    return list(dict.fromkeys(key for entry in entries for key in as_object(entry.get(name))))


def language_columns(entries: Sequence[Record]) -> list[Column]:
    """What the tables show of language models."""
    columns = [
        Column("Model", lambda entry: entry["name"]),
        Column("Engine", lambda entry: f"PyTorch, {entry['computes_in']}" if "computes_in" in entry else "PyTorch"),
        Column("Parameters (M)", _figure("parameters", "total", per=1e6), "{:.2f}"),
        Column("Layers' parameters (M)", _figure("parameters", "structures", per=1e6), "{:.2f}"),
    ]
    for text in _keys(entries, "perplexity"):
        windows = next((size for entry in entries if (size := dig(entry, "perplexity_windows", text))), None)
        size = f" ({windows[0]} × {windows[1]} tokens)" if isinstance(windows, list) and len(windows) == 2 else ""
        columns.append(Column(f"Perplexity, {text}{size}", _figure("perplexity", text), "{:.2f}"))
    columns += [Column(f"{task} (%)", _with_error(task), "{:.1f} ± {:.1f}") for task in _keys(entries, "zeroshot")]
    columns.append(Column("KL to the dense model", _figure("agreement", "kl"), "{:.3f}"))
    columns.append(Column("Same first choice (%)", _figure("agreement", "top1", per=0.01), "{:.1f}"))
    columns.append(Column("GMACs of the layers", _figure("efficiency", "macs", "encoder", per=1e9), "{:.3f}"))
    for phase in ("prefill", "decode"):
        speed = _figure("efficiency", phase, "median_tokens_per_second")
        columns.append(Column(f"{phase.capitalize()} (tokens/s)", speed, "{:.1f}"))
    return columns


def language_point(entry: Record, look: Look) -> Record:
    """A model in the chart of all."""
    point: Record = {"name": entry["name"], "colour": look.colour, "shape": look.path, "href": entry["href"]}
    point["parameters"] = number(dig(entry, "parameters", "total"), 1e-6)
    point["structures"] = number(dig(entry, "parameters", "structures"), 1e-6)
    point["macs"] = number(dig(entry, "efficiency", "macs", "encoder"), 1e-9)
    for phase in ("prefill", "decode"):
        point |= _ended(phase, _speed(entry, phase))
    for text, value in as_object(entry.get("perplexity")).items():
        point[f"perplexity:{text}"] = number(value)
    for task, found in as_object(entry.get("zeroshot")).items():
        point |= _ended(f"zeroshot:{task}", _accuracy(found))
    return point


def _ended(name: str, figure: Record) -> Record:
    """A figure and its ends under a name."""
    return {name if key == "value" else f"{name}_{key}": value for key, value in figure.items()}


def _accuracy(found: Any) -> Record:
    """A task's accuracy in %, with one standard error below and above where there is one."""
    value, error = (number(dig(found, name), 100) for name in ("acc", "acc_standard_error"))
    ends = {} if value is None or error is None else {"low": value - error, "high": value + error}
    return {"value": value} | ends


def _speed(entry: Record, phase: str) -> Record:
    """Tokens per second: the median, with the 10th and the 90th percentile."""
    parts = {"value": "median", "low": "p10", "high": "p90"}
    return {key: number(dig(entry, "efficiency", phase, f"{p}_tokens_per_second")) for key, p in parts.items()}


def bars_of(result: LanguageResult) -> dict[str, list[Record]]:
    """The rows of a run's bar charts, by their titles."""
    rows: dict[str, list[Record]] = {"Perplexity": [], "Zero-shot accuracy (%), ± 1 standard error": [], "Tokens/s": []}
    perplexities, accuracies, speeds = rows.values()
    for role, figures in result.models.items():
        for text, value in as_object(figures.get("perplexity")).items():
            perplexities.append({"role": role, "what": text, "value": number(value)})
        for task, found in as_object(figures.get("zeroshot")).items():
            accuracies.append({"role": role, "what": task} | _accuracy(found))
        for phase in ("prefill", "decode"):
            speeds.append({"role": role, "what": phase} | _speed(figures, phase))
    return rows


def samples_of(result: LanguageResult) -> Table | None:
    """What each model says behind the same words; None where no run has kept any."""
    told: dict[tuple[str, str], dict[str, str]] = {}
    for role, figures in result.models.items():
        samples = figures.get("samples")
        for sample in samples if isinstance(samples, list) else []:
            key = str(dig(sample, "text")), str(dig(sample, "prompt"))
            told.setdefault(key, {})[role] = str(dig(sample, "continuation"))
    if not told:
        return None
    roles = [role for role in result.models if any(role in found for found in told.values())]
    rows = [
        TableRow(text_cells(f"{prompt} … ({text})", *(found.get(role, "") for role in roles)))
        for (text, prompt), found in told.items()
    ]
    return Table(["Words it is given", *roles], rows)

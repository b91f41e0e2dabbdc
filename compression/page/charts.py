"""The page's charts, as Vega-Lite specifications that Altair builds and checks.

Text and lines have the colour of the page's text, so that one drawing serves light, dark and print; series have the
palette of all figures, and differ in shape, too. What is not a finite number is not drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import altair as alt
import numpy as np
from matplotlib.colors import to_hex

from compression.page.records import Checkpoint, LanguageResult, Records, dig, number
from compression.plots import COLOURS, MARKERS, marker_outline, unit_area

INK = "currentColor"
"""The page's text colour; also what the palette's black is, which a dark page would hide."""
HEIGHT, SMALL_HEIGHT, STEP, ROW = 340, 170, 22, 24
"""Heights of charts, and of rows of matrices and of the lineage, in pixels."""
INDENT, DOT = 16, 60
CELL_LABELS = 12
"""Of so many classes at most, a confusion matrix prints its counts."""
Spec = dict[str, Any]
Row = dict[str, Any]

FONT = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "axis": FONT | {"gridColor": INK, "gridOpacity": 0.12, "domainColor": INK, "tickColor": INK, "labelLimit": 140},
    "legend": FONT | {"orient": "bottom", "title": None, "columns": 2, "symbolSize": DOT, "labelLimit": 260},
    "title": {"color": INK, "fontSize": 13, "fontWeight": "normal", "anchor": "start"},
    "text": {"color": INK, "fontSize": 12},
    "rule": {"color": INK},
    "view": {"stroke": None},
}


def colour_on_page(colour: str) -> str:
    """A colour of matplotlib's as the page has it."""
    code = to_hex(colour)
    return INK if code == "#000000" else code


def path_of(marker: str) -> str:
    """A marker of matplotlib's as an SVG path, of the same area whichever it is (that of a square from -1 to 1)."""
    scale = 2 / unit_area(marker) ** 0.5
    parts = []
    for polygon in marker_outline(marker):
        points = np.round(polygon * [scale, -scale], 2)
        points = points[:: max(1, len(points) // 40)] if len(points) > 80 else points
        parts.append("M" + "L".join(f"{x:g},{y:g}" for x, y in points) + "Z")
    return "".join(parts)


PALETTE = [colour_on_page(colour) for colour in COLOURS]
SHAPES = [path_of(marker) for marker in MARKERS]


def finished(chart: Any, height: int | None, description: str) -> Spec:
    """The specification of a chart that is as wide as its place on the page."""
    sized = chart.properties(width="container", description=description)
    sized = sized if height is None else sized.properties(height=height)
    spec: Spec = sized.to_dict()
    return spec


def data_of(rows: Sequence[Row]) -> Any:
    return alt.Data(values=list(rows))


ROWS = alt.NamedData(name="rows")
"""The data of charts that many models have: those are built and checked once, and filled with each model's rows."""


def filled(template: Spec, rows: Sequence[Row]) -> Spec:
    """A chart of `ROWS` with these rows."""
    return template | {"datasets": {ROWS.name: list(rows)}}


def series(field: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and shape by a field, in the order of its names."""
    names = list(names)
    count = len(PALETTE)
    colours = [PALETTE[place % count] for place in range(len(names))]
    shapes = [SHAPES[place % count] for place in range(len(names))]
    return {
        "color": alt.Color(f"{field}:N", scale=alt.Scale(domain=names, range=colours)),
        "shape": alt.Shape(f"{field}:N", scale=alt.Scale(domain=names, range=shapes)),
    }


# Quality against cost.


@dataclass(frozen=True)
class Axis:
    """What an axis can show: a field of the rows, with `FIELD_low` and `FIELD_high` where it has a spread.

    Attributes:
        more_is_better: for the Pareto front.
    """

    field: str
    title: str
    more_is_better: bool


def scatter(rows: Sequence[Row], costs: Sequence[Axis], qualities: Sequence[Axis], tooltips: dict[str, str]) -> Spec:
    """Models as points, their spreads as bars, the Pareto front as a dashed line; what the axes show is chosen.

    Args:
        rows: each with name, colour, shape (an SVG path), href and the fields of the axes.
        tooltips: titles of what is shown of the point under the pointer, by field.
    """
    x, y = (
        alt.param(
            name=name,
            value=axes[0].field,
            bind=alt.binding_select(
                options=[axis.field for axis in axes], labels=[axis.title for axis in axes], name=f"{title} "
            ),
        )
        for name, title, axes in (("cost", "Across:", costs), ("quality", "Up:", qualities))
    )
    better = {axis.field: 1 if axis.more_is_better else -1 for axis in (*costs, *qualities)}
    signs = f"({better!r})"
    base = alt.Chart(data_of(rows)).transform_calculate(
        x="datum[cost]",
        y="datum[quality]",
        x_low="datum[cost + '_low']",
        x_high="datum[cost + '_high']",
        y_low="datum[quality + '_low']",
        y_high="datum[quality + '_high']",
    )
    points = base.transform_filter("isValid(datum.x) && isValid(datum.y)")
    across = alt.X("x:Q", title=None, scale=alt.Scale(zero=True, nice=True), axis=alt.Axis(tickCount=8))
    up = alt.Y("y:Q", title=None, scale=alt.Scale(zero=False, padding=10), axis=alt.Axis(tickCount=6))
    colour = alt.Color("colour:N", scale=None, legend=None)
    # Between two models of the front the worse one is the best that its cost buys.
    steps = alt.ExprRef(f"({signs}[cost]) < 0 ? 'step-after' : 'step-before'")
    front = (
        points.transform_calculate(worth=f"datum.y * {signs}[quality]", price=f"-datum.x * {signs}[cost]")
        .transform_window(
            best="max(worth)",
            sort=[alt.SortField("price", order="ascending"), alt.SortField("worth", order="descending")],
            frame=[None, 0],
        )
        .transform_window(
            before="lag(best)",
            sort=[alt.SortField("price", order="ascending"), alt.SortField("worth", order="descending")],
        )
        .transform_filter("!isValid(datum.before) || datum.worth > datum.before")
        .mark_line(strokeDash=[5, 4], color=INK, opacity=0.6, strokeWidth=1.2, interpolate=steps)
        .encode(across, up, order=alt.Order("price:Q"))
    )
    spread = {"strokeWidth": 1.2, "opacity": 0.75}
    bars_up = points.transform_filter("isValid(datum.y_low)").mark_rule(**spread)
    bars_across = points.transform_filter("isValid(datum.x_low)").mark_rule(**spread)
    marks = points.mark_point(size=120, filled=True, fillOpacity=0.4, strokeWidth=1.6, opacity=1).encode(
        across,
        up,
        color=colour,
        stroke=alt.Stroke("colour:N", scale=None, legend=None),
        shape=alt.Shape("shape:N", scale=None, legend=None),
        href="href:N",
        tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in tooltips.items()],
    )
    titles = {axis.field: axis.title for axis in (*costs, *qualities)}
    chart = alt.layer(
        front,
        bars_up.encode(across, alt.Y("y_low:Q"), alt.Y2("y_high:Q"), color=colour),
        bars_across.encode(alt.X("x_low:Q"), alt.X2("x_high:Q"), up, color=colour),
        marks,
    ).add_params(x, y)
    text = f"['↑ ' + ({titles!r})[quality], '→ ' + ({titles!r})[cost]]"
    chart = chart.properties(title=alt.TitleParams(text=alt.ExprRef(text), fontSize=12, lineHeight=17))
    return finished(chart, HEIGHT, "Quality of each model against what it costs, with the Pareto front")


# What was made from what.


@dataclass(frozen=True)
class Node:
    """A folder in the drawing of the lineage: how deep it stands, and in which row its parent is, if it has one."""

    checkpoint: Checkpoint
    depth: int
    parent_row: int | None


def family(records: Records) -> list[Node]:
    """All folders, each below what it was made from, in the order of the drawing's rows."""
    parents = {path: checkpoint.inputs.get("parent") for path, checkpoint in records.checkpoints.items()}
    children: dict[Any, list[Any]] = {}
    for path, parent in parents.items():
        children.setdefault(parent if parent in parents and parent != path else None, []).append(path)
    nodes: list[Node] = []
    placed = set()

    def place(path: Any, depth: int, parent_row: int | None) -> None:
        if path in placed:
            return
        placed.add(path)
        row = len(nodes)
        nodes.append(Node(records.checkpoints[path], depth, parent_row))
        for child in children.get(path, []):
            place(child, depth + 1, row)

    for path in [*children.get(None, []), *parents]:  # the latter: records that name one another in a circle
        place(path, 0, None)
    return nodes


def lineage(records: Records, hrefs: dict[Any, str]) -> Spec | None:
    """A row per folder, indented below what it was made from; None without any folder."""
    nodes = family(records)
    if not nodes:
        return None
    rows, lines = [], []
    for place, node in enumerate(nodes):
        checkpoint, x, y = node.checkpoint, 8 + INDENT * node.depth, ROW * place + ROW / 2
        others = [
            f"{role}: {records.name_of(path)}" for role, path in checkpoint.inputs.items() if role not in ("parent",)
        ]
        rows.append(
            {
                "x": x,
                "y": y,
                "text": records.name_of(checkpoint.path) + (f"  ({', '.join(others)})" if others else ""),
                "name": records.name_of(checkpoint.path),
                "about": checkpoint.about,
                "folder": checkpoint.place,
                "created": str(checkpoint.record.get("created") or "not recorded"),
                "href": hrefs.get(checkpoint.path),
                "shape": "circle" if checkpoint.stage else "square",
            }
        )
        if node.parent_row is not None:
            left, top = x - INDENT, ROW * node.parent_row + ROW / 2
            lines += [{"x": left, "y": top, "x2": left, "y2": y}, {"x": left, "y": y, "x2": x, "y2": y}]
    pixels = {"scale": None, "axis": None}
    across, up = alt.X("x:Q", **pixels), alt.Y("y:Q", **pixels)
    told = {"name": "Name", "about": "What it is", "folder": "Folder", "created": "Made"}
    common = {
        "tooltip": [alt.Tooltip(f"{name}:N", title=title) for name, title in told.items()],
        "href": alt.Href("href:N"),
    }
    edges = alt.Chart(data_of(lines)).mark_rule(opacity=0.45).encode(across, up, alt.X2("x2"), alt.Y2("y2"))
    base = alt.Chart(data_of(rows))
    shape = alt.Shape("shape:N", scale=None, legend=None)
    dots = base.mark_point(filled=True, size=DOT, color=PALETTE[0], opacity=1).encode(across, up, shape=shape, **common)
    texts = base.mark_text(align="left", dx=9, baseline="middle", limit=alt.ExprRef("width - datum.x - 14"))
    chart = alt.layer(edges, dots, texts.encode(across, up, text="text:N", **common))
    return finished(chart, ROW * len(nodes), "What each model was made from: every folder stands below its parent")


# One classifier.


@dataclass(frozen=True)
class Panel:
    """A chart of a training's course: its title, what numbers are multiplied with, and which entries it shows."""

    title: str
    times: float
    names: tuple[str, ...]
    ends: tuple[str, ...] = ()

    def shows(self, name: str) -> bool:
        return name in self.names or name.endswith(self.ends) if self.ends else name in self.names


PANELS = (
    Panel("Accuracy and other quality (%)", 100, ("accuracy", "f1", "f1_macro", "selection_accuracy"), ("_accuracy",)),
    Panel("Gone, and share of MACs that is left (%)", 100, ("mac_share",), ("_sparsity", "_share")),
    Panel("Temperature", 1, ("temperature",)),
    Panel("Weight of the soft labels (alpha)", 1, ("alpha",)),
    Panel("Learning rate", 1, ("learning_rate",)),
    Panel("Validation perplexity", 1, (), ("perplexity",)),
)
LOSSES = "Loss terms"
"""The panel of whatever no other one shows."""


def curves(history: Sequence[Row]) -> list[Spec]:
    """A training's course over its epochs, a chart per kind of figure."""
    panels: dict[str, list[Row]] = {title: [] for title in (LOSSES, *(panel.title for panel in PANELS))}
    for place, epoch in enumerate(history):
        for name, value in epoch.items():
            if name == "epoch" or number(value) is None:
                continue
            panel = next((panel for panel in PANELS if panel.shows(name)), None)
            row: Row = {"epoch": number(epoch.get("epoch")) or place + 1, "what": name.replace("_", " ")}
            row |= {"value": number(value, panel.times if panel else 1), "phase": str(epoch.get("phase") or "")}
            panels[panel.title if panel else LOSSES].append(row)
    return [_course(title, rows) for title, rows in panels.items() if rows]


def _course(title: str, rows: list[Row]) -> Spec:
    names = tuple(dict.fromkeys(row["what"] for row in rows))
    return filled(_course_of(title, names, tuple(sorted({row["epoch"] for row in rows}))), rows)


@cache
def _course_of(title: str, names: tuple[str, ...], epochs: tuple[float, ...]) -> Spec:
    ticks = list(epochs) if len(epochs) <= 10 else alt.Undefined
    tooltips = [alt.Tooltip("what:N", title="What"), alt.Tooltip("epoch:Q", title="Epoch")]
    tooltips += [alt.Tooltip("value:Q", title="Value", format=".5~g"), alt.Tooltip("phase:N", title="Phase")]
    base = alt.Chart(ROWS).encode(
        alt.X("epoch:Q", title="Epoch", axis=alt.Axis(values=ticks, format="d"), scale=alt.Scale(zero=False)),
        alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format=".3~g")),
        tooltip=tooltips,
    )
    looks = series("what", names)
    lines = base.mark_line(strokeWidth=1.4).encode(color=looks["color"])
    points = base.mark_point(filled=True, size=DOT, opacity=1).encode(**looks)
    return finished(alt.layer(lines, points).properties(title=title), SMALL_HEIGHT, f"{title} over the epochs")


# The config's names for the sizes of a layer, and the part whose absence makes them 0.
SIZES = {
    "attention heads": (("num_attention_heads", "n_heads"), "attention"),
    "neurons": (("intermediate_size", "hidden_dim"), "mlp"),
}


def sizes_left(config: Row) -> list[Row]:
    """Of each layer of a classifier what is left of its heads and neurons, and of how many."""
    depth = next((config[name] for name in ("num_hidden_layers", "n_layers") if number(config.get(name))), 0)
    own, rows = config.get("per_layer_config"), []
    for layer in range(int(depth)):
        for what, (names, part) in SIZES.items():
            dense = next((config[name] for name in names if number(config.get(name))), None)
            if dense is None:
                continue
            here = dig(own, str(layer)) or {}
            kept = next((found for name in names if (found := number(dig(here, name))) is not None), dense)
            kept = 0 if part in (dig(here, "skip") or ()) else kept
            rows.append({"layer": layer, "part": what, "kept": kept, "of": dense, "share": 100 * kept / dense})
    return rows


def kept_shares(rows: Sequence[Row]) -> Spec | None:
    """What each layer keeps, a pair of bars per layer."""
    return filled(_kept_shares_of(tuple(dict.fromkeys(row["part"] for row in rows))), rows) if rows else None


@cache
def _kept_shares_of(parts: tuple[str, ...]) -> Spec:
    base = alt.Chart(ROWS).encode(
        alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        alt.Y("share:Q", title=None, scale=alt.Scale(domain=[0, 100])),
        xOffset=alt.XOffset("part:N", sort=list(parts)),
        tooltip=[alt.Tooltip(f"{name}:N", title=name.capitalize()) for name in ("part", "layer", "kept", "of")],
    )
    colour = series("part", parts)["color"]
    bars = base.mark_bar(fillOpacity=0.55, strokeWidth=1).encode(color=colour, stroke=colour)
    titled = bars.properties(title="Left of each layer (%)")
    return finished(titled, SMALL_HEIGHT, "Share of each layer's parts that is left")


def confusion(matrix: Any, labels: Sequence[str]) -> Spec | None:
    """How often each class is taken for each; the darker, the larger the share of the true class."""
    rows = []
    for truth, counts in enumerate(matrix if isinstance(matrix, list) else []):
        counts = [number(count) or 0 for count in counts] if isinstance(counts, list) else []
        for predicted, count in enumerate(counts[: len(labels)]):
            if truth < len(labels):
                share = count / max(sum(counts), 1)
                rows.append({"truth": labels[truth], "predicted": labels[predicted], "n": count, "share": share})
    return filled(_confusion_of(tuple(labels)), rows) if rows else None


@cache
def _confusion_of(labels: tuple[str, ...]) -> Spec:
    base = alt.Chart(ROWS).encode(
        alt.X("predicted:N", title="Predicted", sort=list(labels), axis=alt.Axis(labelAngle=-40, labelOverlap=True)),
        alt.Y("truth:N", title="True", sort=list(labels), axis=alt.Axis(labelOverlap=True)),
        tooltip=[
            alt.Tooltip("truth:N", title="True"),
            alt.Tooltip("predicted:N", title="Predicted"),
            alt.Tooltip("n:Q", title="Rows"),
            alt.Tooltip("share:Q", title="Share of the true class", format=".1%"),
        ],
    )
    opacity = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 0.75]), legend=None)
    cells = base.mark_rect(color=PALETTE[0]).encode(opacity=opacity)
    counts = base.mark_text().encode(text="n:Q")
    chart = alt.layer(cells, counts) if len(labels) <= CELL_LABELS else alt.layer(cells)
    height = max(110, min(STEP * len(labels) + 40, 420))
    return finished(chart.properties(title="Confusion matrix (rows)"), height, "Confusion matrix")


# Language models.


def layer_rows(result: LanguageResult) -> list[Row]:
    """What each layer of the dense model keeps of its attention and of its MLP in the pruned one."""
    dense, pruned = (dig(result.models.get(role), "layers") or [] for role in ("dense", "pruned"))
    places = result.kept_layers if result.kept_layers is not None else range(len(pruned))
    by_place = dict(zip(places, pruned, strict=False))
    rows = []
    for layer, before in enumerate(dense):
        for part, name in (("attention", "query_heads"), ("MLP", "intermediate_size")):
            of, kept = number(dig(before, name)), number(dig(by_place.get(layer), name)) or 0
            if of:
                rows.append({"layer": layer, "part": part, "kept": kept, "of": of, "share": 100 * kept / of})
    return rows


def removal(found: Row) -> Spec | None:
    """Perplexity without each layer, each attention and each MLP, on a logarithmic axis."""
    titles = {"layer": "without the layer", "attention": "without its attention", "mlp": "without its MLP"}
    rows: list[Row] = [
        {"layer": place, "what": title, "perplexity": number(value)}
        for part, title in titles.items()
        for place, value in enumerate(found[part] if isinstance(found.get(part), list) else [])
        if (number(value) or 0) > 0
    ]
    if not rows:
        return None
    tooltips = [alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("what:N", title="Model")]
    base = alt.Chart(data_of(rows)).encode(
        alt.X("layer:Q", title="Layer", axis=alt.Axis(tickMinStep=1, format="d")),
        alt.Y("perplexity:Q", title=None, scale=alt.Scale(type="log", nice=True)),
        tooltip=[*tooltips, alt.Tooltip("perplexity:Q", title="Perplexity", format=".2f")],
    )
    looks = series("what", list(dict.fromkeys(row["what"] for row in rows)))
    layers = [base.mark_line(strokeWidth=1.2).encode(color=looks["color"])]
    layers.append(base.mark_point(filled=True, size=DOT, opacity=1).encode(**looks))
    if dense := number(found.get("dense")):
        line = alt.Chart(data_of([{"dense": dense}])).mark_rule(strokeDash=[5, 4], opacity=0.7)
        layers.append(line.encode(alt.Y("dense:Q"), tooltip=alt.Tooltip("dense:Q", title="Dense model", format=".2f")))
    title = "Perplexity without each part; dashed: the dense model"
    return finished(alt.layer(*layers).properties(title=title), SMALL_HEIGHT, title)


def grouped_bars(title: str, rows: Sequence[Row], roles: Sequence[str], number_format: str = ".2f") -> Spec | None:
    """Figures of several models side by side, a group of bars per kind; `low` and `high` are drawn where they are."""
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return None
    told = [alt.Tooltip("role:N", title="Model"), alt.Tooltip("what:N", title="What")]
    told += [alt.Tooltip("value:Q", title=title, format=number_format)]
    roles = [role for role in roles if any(row["role"] == role for row in rows)]
    base = alt.Chart(data_of(rows)).encode(
        alt.X("what:N", title=None, axis=alt.Axis(labelAngle=0), sort=None),
        xOffset=alt.XOffset("role:N", sort=roles),
        tooltip=told,
    )
    up, colour = alt.Y("value:Q", title=None), series("role", roles)["color"]
    bars = base.mark_bar(fillOpacity=0.55, strokeWidth=1).encode(up, color=colour, stroke=colour)
    spread = base.transform_filter("isValid(datum.low)").mark_rule().encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    return finished(alt.layer(bars, spread).properties(title=title), SMALL_HEIGHT, title)

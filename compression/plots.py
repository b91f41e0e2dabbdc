"""What all figures share: palette, markers, canvas, and how one is saved. No display is needed."""

from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D

from compression.files import new_file

# Okabe and Ito's palette, told apart by colour-blind readers too; shapes tell the models apart in grey print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "h")
SPARE_MARKERS = ("X", "p", "*", "<", ">", "d")
"""For what is drawn beside that which has a marker of its own."""
DPI = 200
OUTLINE_SCALE = 100
"""By how much markers are enlarged for their outlines, in which curves become lines about one unit long."""


def spare_markers() -> Iterator[str]:
    """`SPARE_MARKERS`, then numbers: none comes twice."""
    return chain(SPARE_MARKERS, (f"${number}$" for number in count(1)))


def marker_outline(marker: str) -> list[np.ndarray]:
    """A marker that is drawn with `s=1`, as polygons [points, 2] around the origin, in points."""
    style = MarkerStyle(marker)
    path = style.get_path().transformed(style.get_transform() + Affine2D().scale(OUTLINE_SCALE))
    return [np.asarray(polygon) / OUTLINE_SCALE for polygon in path.to_polygons()]


def unit_area(marker: str) -> float:
    """Area in square points of a marker that is drawn with `s=1`: those drawn with the same `s` differ in area."""
    return abs(sum(map(_signed_area, marker_outline(marker))))


def _signed_area(polygon: np.ndarray) -> float:
    """Holes have the other sign."""
    x, y = polygon.T
    return 0.5 * float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height are in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bar_style(colours: str | list[str]) -> dict[str, Any]:
    """How bars are filled and edged: of one colour, or each of its own."""
    return {"color": to_rgba_array(colours, 0.45), "edgecolor": colours}


def open_frame(axes: Axes) -> None:
    """Leave out the frame's top and right."""
    axes.spines[["top", "right"]].set_visible(False)


def require_finite(model: str, *numbers: float) -> None:
    """Raise ValueError where a number to draw is not finite."""
    if not np.isfinite(numbers).all():
        raise ValueError(f"{model}: a number to draw is not finite, among {', '.join(map(str, numbers))}")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all."""
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format=Path(path).suffix[1:])


def undominated(points: Sequence[tuple[float, ...]], maximize: Sequence[bool]) -> list[int]:
    """The places of the points that no other one is better than in one figure and at least as good in all."""
    signed = [tuple(v if up else -v for v, up in zip(point, maximize, strict=True)) for point in points]

    def beaten(one: tuple[float, ...]) -> bool:
        return any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in signed)

    return [place for place, point in enumerate(signed) if not beaten(point)]

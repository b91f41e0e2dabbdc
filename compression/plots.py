"""What all figures share: palette, markers, canvas, and how one is saved. No display is needed."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure

from compression.files import new_file

# Okabe and Ito's palette, told apart by colour-blind readers too; shapes tell the models apart in grey print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "h")
SPARE_MARKERS = ("X", "p", "*", "<", ">", "d")
"""For what is drawn beside that which has a marker of its own."""
DPI = 200


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

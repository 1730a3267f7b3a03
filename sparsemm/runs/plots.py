"""What all pictures share: size, saving, colours, and the lines of methods over budgets."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm.errors import DataError
from sparsemm.io import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "viridis"
"""The colour map of every picture: perceptually uniform, legible in print and with any kind of colour vision."""

SIGNED_COLOURS = "PuOr"
"""The same for values below and above zero, which is white."""

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, for lines."""

LABELS = {
    "sparsemm": "SparseMM",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "adakv": "AdaKV",
    "random": "Random heads",
    "fullkv": "Full cache",
    "mask": "Visual heads masked",
    "mask_random": "Random heads masked",
}
"""Methods as figures name them."""

# A colour of the palette and a marker each, for print without colour.
_STYLES = {
    "sparsemm": ("#D55E00", "o"),
    "snapkv": ("#0072B2", "s"),
    "pyramidkv": ("#009E73", "^"),
    "adakv": ("#CC79A7", "D"),
    "random": ("#7A7A7A", "v"),
}
_OTHER_STYLES = (("#E69F00", "P"), ("#56B4E9", "X"), ("#000000", "*"), ("#F0A58A", "p"))
_LEVELS = {"fullkv": ("black", "--"), "mask": ("#56B4E9", "-."), "mask_random": ("#56B4E9", ":")}

_LARGEST_SIDE = 60.0  # inches; at 150 dots an inch still less than PNG writers take


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Raises `DataError` when it would be absurdly large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if max(width, height) > _LARGEST_SIDE:
        raise DataError(f"a picture of {width:.0f} x {height:.0f} inches is too large; choose fewer heads or tokens")
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure as the file's ending says. Raises `DataError` for an ending that is no image format."""
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in figure.canvas.get_supported_filetypes():
        raise DataError(f"{path} does not end in an image format; use .png, .svg or .pdf")
    buffer = io.BytesIO()
    # No date and no version in the file: the same data give the same bytes.
    figure.savefig(buffer, format=ending, metadata={"png": {"Software": None}}.get(ending))
    write_bytes_atomic(path, buffer.getvalue())


def spaced(count: int, most: int = 16) -> list[int]:
    """At most about `most` evenly spaced tick positions of 0 .. count - 1."""
    return list(range(0, count, max(1, -(-count // most))))


def contrast(red: float, green: float, blue: float) -> str:
    """Black or white, whichever can be read on a colour of channels 0..1."""
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def plain_axes(axes: Any, title: str | None = None, *, grid: str = "both") -> None:
    """Thin grid behind the data, no frame above and at the right."""
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=11)


def log2_axis(axes: Any, values: Sequence[int], label: str, form: Callable[[float], str] = "{:g}".format) -> None:
    """A logarithmic x axis with a tick at each value, left out where labels would run into one another."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks: list[int] = []
    for value in sorted(set(values)):
        if not ticks or value >= 1.25 * ticks[-1]:
            ticks.append(value)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def method_lines(
    axes: Any,
    lines: dict[str, Sequence[tuple[float, float]]],
    levels: dict[str, float],
    labels: dict[str, str] = LABELS,
) -> None:
    """One line a method through its (x, y) points, and a horizontal line for each method that has a single value."""
    for method in sorted(levels, key=lambda name: list(_LEVELS).index(name)):
        colour, dashes = _LEVELS[method]
        axes.axhline(levels[method], color=colour, linestyle=dashes, linewidth=1.4, label=labels[method])
    others = iter(_OTHER_STYLES * len(lines))
    for method in sorted(lines, key=lambda name: list(_STYLES).index(name) if name in _STYLES else len(_STYLES)):
        colour, marker = _STYLES[method] if method in _STYLES else next(others)
        own = method == "sparsemm"
        axes.plot(
            *zip(*sorted(lines[method]), strict=True),
            color=colour,
            marker=marker,
            markersize=6 if own else 5,
            linewidth=2.4 if own else 1.5,
            zorder=3 if own else 2,
            label=labels.get(method, method),
        )

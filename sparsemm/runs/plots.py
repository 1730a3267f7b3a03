"""What all pictures share: size, saving, colours, names of methods."""

from __future__ import annotations

import io
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
    "rate_distortion": "Rate-distortion",
    "rate_distortion_mixkv": "Rate-distortion, also MixKV's rows",
    "streaming_llm": "StreamingLLM",
    "knorm": "Key norms",
    "keydiff": "KeyDiff",
    "expected_attention": "Expected attention",
    "vl_cache": "VL-Cache",
    "mixkv": "MixKV",
    "head_kv": "HeadKV",
    "random": "Random heads",
    "fullkv": "Full cache",
    "mask": "Visual heads masked",
    "mask_random": "Random heads masked",
}
"""Methods as figures name them."""

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


def image_format(path: str | Path) -> str:
    """The format that a file's ending names. Raises `DataError` when it names none."""
    from matplotlib.backend_bases import FigureCanvasBase

    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in FigureCanvasBase.get_supported_filetypes():
        raise DataError(f"{path} does not end in an image format; use .png, .svg or .pdf")
    return ending


def save_figure(figure: Figure, path: str | Path, further: str | None = None) -> None:
    """Write the figure as the file's ending says, and beside it in a `further` format ("svg", "pdf").

    Raises:
        DataError: An ending is no image format.
    """
    from matplotlib import rc_context

    # No date and no version in the files, no random names: the same data give the same bytes.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    for target in [Path(path)] + ([Path(path).with_suffix(f".{further}")] if further else []):
        ending = image_format(target)
        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "sparsemm"}):
            figure.savefig(buffer, format=ending, metadata=metadata.get(ending))
        write_bytes_atomic(target, buffer.getvalue())


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

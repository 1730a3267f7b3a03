"""Contact sheets over the page: what heads look at, and which prompt positions they keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparsemm.errors import DataError
from sparsemm.runs.plots import COLOURS, LINES, new_figure, save_figure
from sparsemm.viz.reading import Reading, grid_map

if TYPE_CHECKING:
    from sparsemm.head_scores import HeadScores
    from sparsemm.viz.kept import KeptRows

PANEL = 1.35  # inches of a panel's longer side
_PART_NAMES = {"grid": "", "high_res": "high resolution", "base": "base"}


def draw_overlays(
    reading: Reading,
    path: str | Path,
    *,
    tokens: Sequence[int | None] = (None,),
    parts: Sequence[str] | None = None,
    scores: HeadScores | None = None,
    title: str | None = None,
) -> None:
    """A sheet of pages under the attention of heads: one row a head, one column a token (and part of the image).

    Every panel has its own scale: its brightest cell, framed, is where the head looks most.

    Args:
        reading: From `read_with_attention`.
        path: Image file.
        tokens: Indices of generated tokens; None is the sum over all of them.
        parts: Parts of the image; the main one by default, ("base", "high_res") shows both of LLaVA-NeXT.
        scores: Each row then carries its head's share of the score.
        title: Above the sheet.

    Raises:
        DataError: A token or part is not there, or the file's ending is no image format.
    """
    parts = [reading.layout.main_part] if parts is None else list(parts)
    for token in tokens:
        if token is not None and not 0 <= token < len(reading.tokens):
            raise DataError(f"token {token} is not one of the {len(reading.tokens)} that were read")
    columns = [(token, part) for token in tokens for part in parts]
    shares = None if scores is None else scores.normalised()
    backdrop = _pale(reading.image)
    width, height = _panel_size(reading.image)
    figure = new_figure(max(4.6, 1.1 + (width + 0.08) * len(columns)), 0.75 + (height + 0.08) * len(reading.heads))
    panels = figure.subplots(len(reading.heads), len(columns), squeeze=False)
    for row, (layer, head) in enumerate(reading.heads):
        label = f"{layer}-{head}" if shares is None else f"{layer}-{head}\n{100 * float(shares[layer, head]):.1f} %"
        for column, (token, part) in enumerate(columns):
            axes = panels[row, column]
            _overlay(axes, backdrop, reading.part_map(token, row, part).numpy())
            if row == 0:
                axes.set_title(_column_title(reading, token, part if len(parts) > 1 else None), fontsize=8)
            if column == 0:
                axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    key = "layer-head" if shares is None else "layer-head, share of the score"
    figure.suptitle(title or f"Attention of heads ({key});\neach panel has its own scale", fontsize=9)
    save_figure(figure, path)


def draw_kept(
    kept: KeptRows,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    part: str | None = None,
    title: str | None = None,
) -> None:
    """A sheet of pages on which only what a kv head keeps is shown: one row a layer, one column a kv head.

    Cells whose row was dropped are washed out: dark on a light page, light on a dark one. Below each panel stands how
    many of the image's and of the text's rows are left.

    Args:
        kept: From `kept_rows`.
        path: Image file.
        layers: Rows of the sheet; all layers by default.
        part: Part of the image; the main one by default.
        title: Above the sheet.

    Raises:
        DataError: A layer or the part is not there, or the file's ending is no image format.
    """
    layers = list(range(len(kept.positions)) if layers is None else layers)
    if not layers or not all(0 <= layer < len(kept.positions) for layer in layers):
        raise DataError(f"layers {layers} are not some of the {len(kept.positions)} of the model, counted from 0")
    num_layers, num_heads = len(layers), len(kept.positions[0])
    width, height = _panel_size(kept.image)
    figure = new_figure(0.8 + (width + 0.1) * num_heads, 0.8 + (height + 0.3) * num_layers)
    panels = figure.subplots(num_layers, num_heads, squeeze=False)
    page = np.asarray(kept.image)
    washed = (0.2 * page + 0.8 * (40 if page.mean() > 127 else 225)).astype(page.dtype)
    for row, layer in enumerate(layers):
        for head in range(num_heads):
            axes = panels[row, head]
            mask = kept.on_image(layer, head)
            cells = grid_map(kept.layout, mask.float(), part).numpy() > 0
            shown = np.asarray(Image.fromarray(cells).resize(kept.image.size, Image.Resampling.NEAREST))
            axes.imshow(np.where(shown[..., None], page, washed))
            _bare(axes)
            image_rows = int(mask.sum())
            text_rows = len(kept.positions[layer][head]) - image_rows
            axes.set_xlabel(f"{image_rows} image + {text_rows} text", fontsize=6.5, labelpad=2)
            if row == 0:
                axes.set_title(f"kv head {head}", fontsize=8)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
    figure.suptitle(title or kept.describe(), fontsize=9)
    save_figure(figure, path)


def _overlay(axes: Any, backdrop: np.ndarray, values: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    height, width = backdrop.shape[:2]
    rows, cols = values.shape
    scaled = values / max(float(values.max()), 1e-12)
    extent = (0, width, height, 0)
    axes.imshow(backdrop, extent=extent)
    # What nobody looks at stays legible: the colours cover it less.
    axes.imshow(scaled, extent=extent, cmap=COLOURS, vmin=0, vmax=1, alpha=0.25 + 0.5 * scaled, interpolation="nearest")
    row, col = np.unravel_index(values.argmax(), values.shape)
    place = (col * width / cols, row * height / rows)
    axes.add_patch(Rectangle(place, width / cols, height / rows, fill=False, edgecolor=LINES[1], linewidth=1.2))
    axes.set(xlim=(0, width), ylim=(height, 0))
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _pale(image: Image.Image) -> np.ndarray:
    """The page in light grey levels: its text stays legible under the colours."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    return np.repeat((70 + 0.725 * grey).astype(np.uint8)[..., None], 3, axis=2)


def _panel_size(image: Image.Image) -> tuple[float, float]:
    longest = max(image.size)
    # A ribbon of an image still gets a panel that a label fits beside.
    return tuple(max(0.5, PANEL * side / longest) for side in image.size)


def _column_title(reading: Reading, token: int | None, part: str | None) -> str:
    name = "all tokens" if token is None else repr(reading.tokens[token])
    return name if not part or not _PART_NAMES.get(part, part) else f"{name}\n{_PART_NAMES.get(part, part)}"

"""Contact sheets over the page: what heads look at, and which prompt positions they keep."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm.errors import DataError
from sparsemm.runs.plots import LINES, new_figure
from sparsemm.viz.reading import Reading, grid_map, part_region

if TYPE_CHECKING:
    import PIL.Image
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from sparsemm.head_scores import HeadScores
    from sparsemm.models.geometry import Region
    from sparsemm.viz.kept import KeptRows

_PANEL = 1.45  # inches of a panel's longer side
_MOST_COLUMNS = 7  # pages side by side; further ones go on below


def draw_overlays(
    reading: Reading,
    *,
    tokens: Sequence[int | None] = (None,),
    parts: Sequence[str] | None = None,
    scores: HeadScores | None = None,
    title: str | None = None,
) -> Figure:
    """A sheet of pages coloured by the attention of heads: one row a head, one column a token (and part of the image).

    The page stays legible in grey; attention is the only colour. Every panel has its own scale: the cell of the largest
    weight is framed, and below stands how much of the attention falls there and on the page. A long list of tokens goes
    on below, all heads again.

    Args:
        reading: From `read_with_attention`.
        tokens: Indices of generated tokens; None is the mean over all of them.
        parts: Parts of the image; the main one by default; ("base", "high_res") shows two.
        scores: Each row then carries its head's share of the score.
        title: Above the sheet.

    Raises:
        DataError: A token or part is not there.
    """
    parts = [reading.layout.main_part] if parts is None else list(parts)
    for token in tokens:
        if token is not None and not 0 <= token < len(reading.tokens):
            raise DataError(f"token {token} is not one of the {len(reading.tokens)} that were read")
    columns = [(token, part) for token in tokens for part in parts]
    several = len(parts) > 1
    across = min(len(columns), _MOST_COLUMNS)
    lines = len(reading.heads) * -(-len(columns) // across)
    shares = None if scores is None else scores.normalised()
    width, height = _panel_size(reading.image)
    figure = new_figure(max(4.6, 0.8 + (width + 0.08) * across), 1.3 + (height + 0.2) * lines)
    panels = figure.subplots(lines, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for number, (token, part) in enumerate(columns):
        for row, head in enumerate(reading.heads):
            axes = panels[number // across * len(reading.heads) + row, number % across]
            draw_attention(axes, reading.image, reading.part_map(token, row, part).numpy(), reading.region(part))
            if row == 0:
                axes.set_title(_column_title(reading, token, part if several else ""), fontsize=8, parse_math=False)
            if number % across == 0:
                axes.set_ylabel(_head_label(head, shares), rotation=0, ha="right", va="center", fontsize=8)
    _colour_bar(figure, panels, reading.image)
    key = "layer-head" if shares is None else "layer-head and its share of the visual score"
    figure.suptitle(title or f"Where heads look ({key})", fontsize=10)
    return figure


def draw_kept(
    kept: KeptRows,
    *,
    layers: Sequence[int] | None = None,
    part: str | None = None,
    scores: HeadScores | None = None,
    title: str | None = None,
) -> Figure:
    """A sheet of pages on which what a kv head keeps is framed: one row a layer, one column a kv head.

    Cells whose row was dropped are greyed. Below each panel stands how many rows the head keeps: of the cells framed,
    and others, of the text or of another part of the image.

    Args:
        kept: From `kept_rows`.
        layers: Rows of the sheet; all layers by default.
        part: Part of the image; the main one by default.
        scores: Each panel then carries its kv head's share of the score.
        title: Above the sheet.

    Raises:
        DataError: A layer or the part is not there.
    """
    from matplotlib.patches import Patch

    layers = list(range(len(kept.positions)) if layers is None else layers)
    if not layers or not all(0 <= layer < len(kept.positions) for layer in layers):
        raise DataError(f"layers {layers} are not some of the {len(kept.positions)} of the model, counted from 0")
    num_layers, num_heads = len(layers), len(kept.positions[0])
    shares = None if scores is None else scores.to_kv_heads(num_heads) / scores.values.sum()
    width, height = _panel_size(kept.image)
    figure = new_figure(0.8 + (width + 0.1) * num_heads, 1.0 + (height + 0.45) * num_layers)
    panels = figure.subplots(num_layers, num_heads, squeeze=False)
    page, region = np.asarray(kept.image), part_region(kept.layout, kept.image.size, part)
    # Towards a grey between the page and its text.
    greyed = (0.3 * page + 0.7 * (page.mean() + (-55 if is_light(kept.image) else 55))).astype(page.dtype)
    for row, layer in enumerate(layers):
        for head in range(num_heads):
            axes = panels[row, head]
            cells = grid_map(kept.layout, kept.on_image(layer, head).float(), part).numpy() > 0
            axes.imshow(np.where(_on_pixels(cells, page, region)[..., None], page, greyed))
            _frame(axes, cells, region)
            bare(axes)
            axes.set_title(_head_label((layer, head), shares).replace("\n", ": "), fontsize=7.5, pad=3)
            others = len(kept.positions[layer][head]) - int(cells.sum())
            axes.set_xlabel(f"{int(cells.sum())} framed + {others} others", fontsize=6.5, labelpad=2)
    legend = [
        Patch(facecolor="none", edgecolor=LINES[0], label="framed: image tokens kept"),
        Patch(facecolor=tuple(greyed.reshape(-1, 3).mean(0) / 255), label="greyed: dropped"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    key = "layer-kv head" if shares is None else "layer-kv head and its share of the visual score"
    below = "below, the rows it keeps: framed ones, and others (text, further image tokens)"
    wrapped = fill(f"{key}; {below}", int(13 * figure.get_figwidth()))
    figure.suptitle(title or f"{kept.describe()}\n{wrapped}", fontsize=9)
    return figure


def draw_attention(axes: Any, image: PIL.Image.Image, weights: np.ndarray, region: Region) -> None:
    """A page under a head's weights `[rows, columns]` over `region`: grey where it does not look, the largest framed.

    Colours multiply a light page and brighten a dark one, so that the text keeps its contrast everywhere.
    """
    light = is_light(image)
    ground = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    ground = ground if light else 1 - ground
    ground = np.minimum(1, ground / np.quantile(ground, 0.9))  # a tinted page's ground is white, a dark one's black
    largest = float(weights.max())
    colours = attention_colours(image)(_on_pixels(weights / max(largest, 1e-12), ground, region))[..., :3]
    axes.imshow(ground * colours if light else 1 - ground * (1 - colours))
    _frame(axes, weights >= max(largest, 1e-12), region)
    bare(axes)
    axes.set_xlabel(f"frame {percent(largest)}, page {percent(float(weights.sum()))}", fontsize=6.5, labelpad=2)


def percent(share: float) -> str:
    """A share of the attention, small ones with a decimal."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %" if share >= 0.0005 else "< 0.1 %"


def attention_colours(image: PIL.Image.Image) -> Colormap:
    """From the page's own background, which an unattended cell keeps, to orange."""
    from matplotlib.colors import LinearSegmentedColormap

    ramp = ("#FFFFFF", "#FFE26A", "#FF9A1F") if is_light(image) else ("#000000", "#6A3C00", "#B86400")
    return LinearSegmentedColormap.from_list("attention", ramp)


def is_light(image: PIL.Image.Image) -> bool:
    """Whether a page is dark text on a light ground, rather than the other way round."""
    return float(np.asarray(image.convert("L")).mean()) > 127


def _on_pixels(cells: np.ndarray, page: np.ndarray, region: Region) -> np.ndarray:
    """The value of each pixel's cell, looked up as boxes are: cell floor(x * columns / width) of the region, or 0."""
    left, top, right, bottom = region
    (height, width), (rows, cols) = page.shape[:2], cells.shape
    row = np.clip((np.arange(height) - top) * rows // (bottom - top), -1, rows).astype(int) + 1
    col = np.clip((np.arange(width) - left) * cols // (right - left), -1, cols).astype(int) + 1
    return np.pad(cells, 1)[row[:, None], col]


def _frame(axes: Any, cells: np.ndarray, region: Region) -> None:
    """Outline the cells that are true, in blue with a white edge: seen on light and on dark pages."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.patheffects import Normal, Stroke

    (rows, cols), (left, top, right, bottom) = cells.shape, region
    padded = np.pad(cells, 1)
    upright = [[(c, r), (c, r + 1)] for r, c in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])]
    level = [[(c, r), (c + 1, r)] for r, c in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])]
    edges = np.array(upright + level, dtype=float).reshape(-1, 2)
    edges = edges * ((right - left) / cols, (bottom - top) / rows) + (left - 0.5, top - 0.5)
    # One path, so that its edges join without a seam.
    path = Path(edges, [Path.MOVETO, Path.LINETO] * (len(edges) // 2))
    effects = [Stroke(linewidth=2.2, foreground="white"), Normal()]
    style = dict(edgecolor=LINES[0], linewidth=1.0, capstyle="projecting", clip_on=False, path_effects=effects)
    axes.add_patch(PathPatch(path, fill=False, **style))


def bare(axes: Any) -> None:
    """Axes as the thin frame of a page: no ticks, no labels."""
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#BBBBBB", linewidth=0.5)


def _colour_bar(figure: Figure, panels: np.ndarray, image: PIL.Image.Image) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0, 100), attention_colours(image))
    label = "Attention weight (% of the panel's largest)"
    bar = figure.colorbar(
        colours, ax=panels, label=label, location="bottom", fraction=0.02, aspect=30, shrink=0.5, pad=0.01
    )
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)


def _panel_size(image: PIL.Image.Image) -> tuple[float, float]:
    longest = max(image.size)
    # A ribbon of an image still gets a panel that a label fits beside.
    return tuple(max(0.5, _PANEL * side / longest) for side in image.size)


def _head_label(head: tuple[int, int], shares: Any) -> str:
    name = "{}-{}".format(*head)
    return name if shares is None else f"{name}\n{100 * float(shares[head]):.1f} %"


def _column_title(reading: Reading, token: int | None, part: str) -> str:
    """The token, a long one cut in the middle, and the part where the image has several."""
    name = "mean of all tokens" if token is None else f"“{reading.tokens[token]}”".replace("\n", "⏎")
    name = name if len(name) <= 18 else f"{name[:8]}…{name[-8:]}"
    return f"{name}\n{part.replace('_', ' ')}" if part else name

"""The method in one picture: a word is read, a visual head looks at it, scores count that, budgets follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm.chase.matching import match_aligned
from sparsemm.errors import DataError
from sparsemm.runs.plots import LINES, new_figure
from sparsemm.viz.heads import draw_table
from sparsemm.viz.sheets import bare, draw_attention, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsemm.chase.page import TextBox
    from sparsemm.head_scores import HeadScores
    from sparsemm.viz.kept import KeptRows
    from sparsemm.viz.reading import Reading

_SHOWN_TEXT = 24  # characters of what was read before the token


def draw_summary(
    reading: Reading,
    scores: HeadScores,
    kept: KeptRows,
    *,
    words: Sequence[TextBox] = (),
    token: int | None = None,
    title: str | None = None,
) -> Figure:
    """One wide picture: the page at one token of its reading, where two heads look, all scores, and the rows kept.

    Args:
        reading: Of a visual head, and of others: the one that looks most at the page is drawn beside it.
        scores: Of the model's query heads.
        kept: What a method keeps of the same page.
        words: Text of the page and where it stands; the word being read is then framed on the page.
        token: Index of the generated token; by default, of those that read the longest word (of all where no word is
            known), the one at which the first head looks hardest at one place.
        title: Above the picture.

    Raises:
        DataError: The token is not there.
    """
    word_of = match_aligned(["" if name.startswith("<") else name for name in reading.tokens], [w.text for w in words])
    if token is None:
        longest = max((len(words[word].text) for word in word_of if word is not None), default=0)
        likely = [index for index, word in enumerate(word_of) if word is not None and len(words[word].text) == longest]
        token = max(likely or range(len(reading.tokens)), key=lambda index: float(reading.part_map(index, 0).max()))
    if not 0 <= token < len(reading.tokens):
        raise DataError(f"token {token} is not one of the {len(reading.tokens)} that were read")
    word = None if word_of[token] is None else words[word_of[token]]
    width, height = reading.image.size
    figure = new_figure(12.4, max(2.2, 2.8 * height / max(width, height)) + 0.75)
    maps = figure.subplot_mosaic(
        [["page", "visual", "other", "scores"], ["page", "visual", "other", "rows"]], width_ratios=[1, 1, 1, 1.3]
    )
    page, shares = maps["page"], scores.normalised()
    page.imshow(np.asarray(reading.image))
    bare(page)
    page.set_title("1. The model reads a word", fontsize=11)
    _say(page, reading, token)
    other = max(range(1, len(reading.heads)), key=lambda place: float(reading.part_map(token, place).sum()))
    for axes, place, heading in (
        (maps["visual"], 0, "2. A visual head looks at it"),
        (maps["other"], other, "3. A low-scoring head"),
    ):
        head, weights = reading.heads[place], reading.part_map(token, place)
        draw_attention(axes, reading.image, weights.numpy(), reading.region())
        axes.set_title(heading, fontsize=11)
        share, looks = percent(float(shares[head])), percent(float(weights.max()))
        label = f"head {head[0]}-{head[1]}: {share} of the score;\n{looks} of its attention in the frame"
        axes.set_xlabel(label, fontsize=9)
    for axes in (page, maps["visual"], maps["other"]) if word is not None else ():
        _box(axes, word.box)
    draw_table(figure, [maps["scores"]], [100 * shares.numpy()], "%", "{:.0f}", fontsize=8)
    maps["scores"].set_title("4. Share of such hits, by query head (%)", fontsize=11)
    draw_table(figure, [maps["rows"]], [kept.rows().double().numpy()], "rows", "{:.0f}", fontsize=8)
    maps["rows"].set_title(f"5. Rows kept of {kept.prompt_length}, by kv head", fontsize=11)
    figure.suptitle(title or "", fontsize=12)
    return figure


def _say(axes: Any, reading: Reading, token: int) -> None:
    """Below the page: what was read so far, and in colour the token that comes next."""
    before = "".join(name for name in reading.tokens[:token] if not name.startswith("<"))[-_SHOWN_TEXT:]
    style = dict(fontsize=11, parse_math=False, family="monospace", va="top", xycoords="axes fraction")
    axes.annotate(before.replace("\n", " "), (0.6, -0.03), ha="right", color="#555555", **style)
    axes.annotate(reading.tokens[token], (0.6, -0.03), ha="left", color=LINES[1], weight="bold", **style)


def _box(axes: Any, box: Sequence[float]) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    corner = (x0 - 3, y0 - 3)
    axes.add_patch(Rectangle(corner, x1 - x0 + 6, y1 - y0 + 6, fill=False, edgecolor=LINES[1], linewidth=1.4))

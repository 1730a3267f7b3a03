"""Full-size pages of running text, in the manner of SynthDoG: sheets on photo backgrounds, with word and line boxes.

Unlike the miniatures' pages they know no grid: any resolution, several fonts and sizes, columns, perspective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsemm.documents.fonts import font_paths
from sparsemm.documents.pages import TextBox, joined
from sparsemm.documents.photo import develop, homography, lay_on, paper, photo_background, place_corners, project
from sparsemm.documents.words import draw_word
from sparsemm.errors import DataError

SMALLEST_PAGE = 64

_COMMON = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man "
    "me even most made after also did many before must through back years where much your way well down should because "
    "each just those people how too little state good very make world still own see men work long get here between "
    "both life being under never day same another know while last might us great old year off come since against go "
    "came right used take three order total date number name street city bank paper letter water house night school "
    "small large early young music table light river market garden station window summer winter morning evening "
    "company account payment invoice customer address delivery service"
).split()


@dataclass(frozen=True)
class Span:
    """A word on the flat sheet: the left end of its baseline (pixels), its font, and which line it belongs to."""

    text: str
    x: float
    y: float
    font: str
    size: int
    line: int

    def box(self) -> tuple[float, float, float, float]:
        """The ink's extent (x0, y0, x1, y1); the ink ends before x1 and y1."""
        left, top, right, bottom = _font(self.font, self.size).getbbox(self.text, anchor="ls")
        return self.x + left, self.y + top, self.x + right, self.y + bottom


@dataclass(frozen=True)
class Document:
    """A page with its words and its lines of text, in reading order; boxes in pixels, both corners included."""

    image: Image.Image
    words: tuple[TextBox, ...]
    lines: tuple[TextBox, ...]


@lru_cache(maxsize=512)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def make_document(
    index: int, *, size: tuple[int, int] = (960, 1280), seed: int = 0, fonts: str = "all", strength: float = 1.0
) -> Document:
    """Page `index` of an endless collection: the same arguments give the same page.

    Args:
        index: Number of the page.
        size: (width, height) in pixels, each at least 64.
        seed: Another seed gives another collection.
        fonts: "train", "heldout" (see `sparsemm.documents.fonts`) or "all".
        strength: 0..1, how much the page is tilted, turned, unevenly lit and grainy; 0 is a scan.

    Raises:
        DataError: An argument is out of range, or the fonts are missing.
    """
    width, height = size
    if min(size) < SMALLEST_PAGE:
        raise DataError(f"size={size} is too small; a page has at least {SMALLEST_PAGE} x {SMALLEST_PAGE} pixels")
    if index < 0 or seed < 0:
        raise DataError(f"index={index} and seed={seed} must not be negative")
    if not 0.0 <= strength <= 1.0:
        raise DataError(f"strength={strength} must lie between 0 and 1")
    splits = ("train", "heldout") if fonts == "all" else (fonts,)
    paths = [str(path) for split in splits for path in font_paths(split)]
    rng = np.random.default_rng([seed, 0x5D06, index])
    sheet_size = (round(width * rng.uniform(0.8, 0.97)), round(height * rng.uniform(0.8, 0.97)))
    spans = lay_out(rng, sheet_size, paths)
    dark_paper = rng.random() < 0.12
    paper_colour = rng.uniform(15, 70, size=3) if dark_paper else rng.uniform(205, 255, size=3)
    ink = rng.uniform(190, 255, size=3) if dark_paper else rng.uniform(0, 90, size=3)
    sheet = paper(rng, sheet_size[1], sheet_size[0], paper_colour.astype(np.float32))
    paint(sheet, spans, tuple(int(value) for value in ink))
    corners = place_corners(rng, sheet_size, size, strength)
    page = lay_on(photo_background(rng, height, width), sheet, corners, shadow=0.6 * float(rng.random()))
    flat = np.array([[0, 0], [sheet_size[0], 0], list(sheet_size), [0, sheet_size[1]]], dtype=np.float64)
    words, lines = boxes_on_page(spans, homography(flat, corners), size)
    return Document(develop(rng, page, strength), words, lines)


def lay_out(rng: np.random.Generator, sheet: tuple[int, int], fonts: Sequence[str]) -> list[Span]:
    """Paragraphs in one to three columns, at times under a heading, until the sheet or its text ends."""
    width, height = sheet
    margin = max(3, round(min(sheet) * rng.uniform(0.03, 0.08)))
    body = max(8, round(height / rng.uniform(24, 48)))
    inner = width - 2 * margin
    most = max(1, min(3, inner // (14 * body)))
    columns = int(rng.integers(1, most + 1))
    gap = 2 * body
    column_width = (inner - (columns - 1) * gap) // columns
    spans: list[Span] = []
    top = float(margin)
    if rng.random() < 0.5:
        font = fonts[rng.integers(len(fonts))]
        title_size = max(8, round(body * rng.uniform(1.4, 2.0)))
        top = _paragraph(rng, spans, font, title_size, margin, top, inner, height - margin, num_lines=1) + 0.5 * body
    font = fonts[rng.integers(len(fonts))]
    for column in range(columns):
        x, y = margin + column * (column_width + gap), top
        bottom = height - margin if rng.random() < 0.7 else top + rng.uniform(0.4, 1.0) * (height - margin - top)
        while y + 1.3 * body < bottom:
            if rng.random() < 0.3:
                font = fonts[rng.integers(len(fonts))]
            size = max(8, round(body * rng.choice([0.8, 0.9, 1.0, 1.0, 1.0, 1.25])))
            lines = int(rng.integers(2, 8))
            y = _paragraph(rng, spans, font, size, x, y, column_width, bottom, num_lines=lines)
            y += rng.uniform(0.4, 1.4) * body
    return spans


def _paragraph(
    rng: np.random.Generator, spans: list[Span], font: str, size: int, left: float, top: float, width: float,
    bottom: float, *, num_lines: int,
) -> float:  # fmt: skip
    """Append the words of up to `num_lines` lines between `top` and `bottom`; the y below the last of them."""
    face = _font(font, size)
    ascent, descent = face.getmetrics()
    space = max(2.0, face.getlength(" "))
    leading = (ascent + descent) * rng.uniform(1.0, 1.25)
    alignment = rng.choice([0.0, 0.0, 0.0, 0.5, 1.0])  # share of the free room that stands before the line
    pushed: str | None = None
    for number in range(num_lines):
        if top + ascent + descent > bottom:
            break
        words, used = [], 0.0
        # The last line of a paragraph is a shorter one.
        room = width * (rng.uniform(0.3, 1.0) if number == num_lines - 1 else 1.0)
        while True:
            word = pushed if pushed is not None else _word(rng)
            pushed = None
            length = face.getlength(word) + (space if words else 0.0)
            if used + length > room:
                pushed = word if face.getlength(word) <= width else None
                break
            words.append((word, length))
            used += length
        if not words:
            continue
        x = left + alignment * (width - used)
        line = spans[-1].line + 1 if spans else 0
        for position, (word, length) in enumerate(words):
            start = x + (space if position else 0.0)
            spans.append(Span(word, round(start), round(top + ascent), font, size, line))
            x += length
        top += leading
    return top


def _word(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.55:
        word = _COMMON[int(len(_COMMON) * rng.random() ** 1.6)]  # the list begins with the most frequent
    elif kind < 0.85:
        word = draw_word(rng, "train" if rng.random() < 0.8 else "heldout", min_length=3, max_length=9)
    elif kind < 0.93:
        word = f"{int(rng.integers(0, 10000)):,}" if rng.random() < 0.6 else f"{rng.uniform(0, 500):.2f}"
    else:
        word = f"{rng.integers(1, 29):02d}/{rng.integers(1, 13):02d}/{rng.integers(1990, 2030)}"
    chance = rng.random()
    if chance < 0.15:
        word = word.capitalize()
    elif chance < 0.19:
        word = word.upper()
    return word + (rng.choice([",", ".", ";", ":"]) if rng.random() < 0.12 else "")


def paint(sheet: Image.Image, spans: Sequence[Span], ink: tuple[int, int, int]) -> None:
    """Draw the words on the flat sheet."""
    draw = ImageDraw.Draw(sheet)
    for span in spans:
        draw.text((span.x, span.y), span.text, fill=ink, font=_font(span.font, span.size), anchor="ls")


def boxes_on_page(
    spans: Sequence[Span], matrix: np.ndarray, size: tuple[int, int]
) -> tuple[tuple[TextBox, ...], tuple[TextBox, ...]]:
    """Word and line boxes after the projective map `[3, 3]` of the sheet, cut at the edges of the (width, height) page.

    Words that the page does not show are left out.
    """
    words: list[TextBox] = []
    lines: dict[int, list[TextBox]] = {}
    limit = np.array(size) - 1
    for span in spans:
        x0, y0, x1, y1 = span.box()
        moved = project(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), matrix)
        # Ink ends before its far corner: the pixel of that corner is the one before it.
        low, high = np.floor(moved.min(0)), np.ceil(moved.max(0)) - 1
        if (high < 0).any() or (low > limit).any():
            continue
        low, high = np.clip(low, 0, limit), np.clip(np.maximum(low, high), 0, limit)
        word = TextBox(span.text, (float(low[0]), float(low[1]), float(high[0]), float(high[1])))
        words.append(word)
        lines.setdefault(span.line, []).append(word)
    return tuple(words), tuple(joined(members) for members in lines.values())

"""Ink on paper: draws a layout with random fonts, places, backgrounds and colours."""

from __future__ import annotations

import numpy as np

from sparsemm.documents.fonts import Face, draw_face
from sparsemm.documents.layout import Layout, PlacedWord

CELL = 16
"""Pixels of a cell's side: one image token of every miniature."""

Box = tuple[float, float, float, float]


def _draw_word(ink: np.ndarray, word: PlacedWord, face: Face, rng: np.random.Generator) -> Box:
    """Adds `word` to the alpha page `ink` `[height, width]`; every character's ink stays inside its own cell."""
    slack = CELL - face.ascent - face.descent
    baseline = word.row * CELL + face.ascent + int(rng.integers(slack + 1))
    shift = int(rng.integers(-2, 3))
    x0 = y0 = max(ink.shape)
    x1 = y1 = 0
    for index, character in enumerate(word.text):
        glyph, top = face.glyph(character)
        height, width = glyph.shape
        width = min(width, CELL)
        left = (word.column + index) * CELL + int(np.clip((CELL - width) // 2 + shift, 0, CELL - width))
        # Unusual glyphs (a deep "f" of an italic, ":") may leave the face's own limits: pull them in.
        upper = int(np.clip(baseline + top, word.row * CELL, (word.row + 1) * CELL - min(height, CELL)))
        height = min(height, CELL)
        target = ink[upper : upper + height, left : left + width]
        np.maximum(target, glyph[:height, :width], out=target)
        x0, y0 = min(x0, left), min(y0, upper)
        x1, y1 = max(x1, left + width - 1), max(y1, upper + height - 1)
    return float(x0), float(y0), float(x1), float(y1)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A paper and an ink colour, float32 `[3]` in 0..255, at least 100 grey levels apart."""
    paper = rng.uniform(190, 255, size=3) if rng.random() < 0.8 else rng.uniform(0, 70, size=3)
    while True:
        ink = rng.uniform(0, 255, size=3)
        if abs(ink.mean() - paper.mean()) > 100:
            return paper.astype(np.float32), ink.astype(np.float32)


def _paper(rng: np.random.Generator, height: int, width: int, colour: np.ndarray) -> np.ndarray:
    """A background `[height, width, 3]`: plain, a gradient, or coarse blotches, with grain on top of any of them."""
    page = np.broadcast_to(colour, (height, width, 3)).astype(np.float32)
    kind = rng.random()
    if kind < 0.35:
        angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(10, 45)
        y, x = np.ogrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
        page += (depth * (np.cos(angle) * x + np.sin(angle) * y)).astype(np.float32)[..., None]
    elif kind < 0.6:
        coarse = rng.normal(0, rng.uniform(4, 14), size=(height // 28 + 1, width // 28 + 1)).astype(np.float32)
        page += coarse.repeat(28, 0).repeat(28, 1)[:height, :width, None]
    if rng.random() < 0.7:
        page += rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(1, 10))
    return page


def render(layout: Layout, rng: np.random.Generator, split: str) -> tuple[np.ndarray, list[Box], np.ndarray]:
    """Draws `layout` with the fonts of `split`.

    Returns the page, uint8 `[rows * 16, columns * 16, 3]`; per word the (x0, y0, x1, y1) of its first and last ink
    pixels (both included); and the ink alone, float32 `[height, width]` in 0..1.
    """
    height, width = layout.rows * CELL, layout.columns * CELL
    ink = np.zeros((height, width), dtype=np.float32)
    one_face = rng.random() < 0.6
    face = draw_face(rng, split, CELL)
    boxes = []
    for word in layout.words:
        if not one_face:
            face = draw_face(rng, split, CELL)
        boxes.append(_draw_word(ink, word, face, rng))
    paper_colour, ink_colour = _colours(rng)
    page = _paper(rng, height, width, paper_colour)
    if rng.random() < 0.15:  # ruled paper: thin lines on the cells' edges
        page[CELL - 1 :: CELL] += 0.25 * (ink_colour - page[CELL - 1 :: CELL])
    page += ink[..., None] * (ink_colour - page)
    return np.clip(page, 0, 255).astype(np.uint8), boxes, ink

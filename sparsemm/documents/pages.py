"""Pages by number: the same arguments give the same page, on any machine and in any order."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsemm.documents.layout import Layout, make_layout
from sparsemm.documents.render import CELL, render
from sparsemm.errors import DataError

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True)
class TextBox:
    """A word as painted, and the pixels (x0, y0, x1, y1) of its first and last ink, both included."""

    text: str
    box: tuple[float, float, float, float]


def joined(words: Sequence[TextBox], separator: str = " ") -> TextBox:
    """One text box around several, in their order; at least one."""
    x0, y0, x1, y1 = zip(*(word.box for word in words), strict=True)
    return TextBox(separator.join(word.text for word in words), (min(x0), min(y0), max(x1), max(y1)))


def sound_words(words: Iterable[TextBox], size: tuple[int, int]) -> tuple[list[TextBox], Counter[str]]:
    """The words that a picture of (width, height) shows, and how many had which flaw.

    Words without text and those outside of the picture are left out, the corners of inverted boxes are swapped, boxes
    across the edge are kept as they are.
    """
    width, height = size
    kept: list[TextBox] = []
    flaws: Counter[str] = Counter()
    for word in words:
        x0, y0, x1, y1 = word.box
        if x1 < x0 or y1 < y0:
            flaws["inverted box"] += 1
            x0, y0, x1, y1 = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
            word = TextBox(word.text, (x0, y0, x1, y1))
        if not word.text.strip():
            flaws["no text"] += 1
        elif x1 < 0 or y1 < 0 or x0 >= width or y0 >= height:
            flaws["outside the image"] += 1
        else:
            flaws["across the image's edge"] += x0 < 0 or y0 < 0 or x1 > width or y1 > height
            kept.append(word)
    return kept, +flaws


@dataclass(frozen=True)
class Page:
    """A document image, its words in reading order, and one question about it with the answer.

    `num_words` counts the words of a "read" page and the label and value lines of a "field" page.
    """

    image: PIL.Image.Image
    words: tuple[TextBox, ...]
    prompt: str
    answer: str
    task: str
    num_words: int
    seed: int


def room_for_answers(pages: Iterable[Page]) -> int:
    """Tokens that hold the longest answer, at most one a character, and a few that a model may add to it."""
    return max(len(page.answer) for page in pages) + 8


def page_generator(index: int, *, split: str, task: str, num_words: int | None, seed: int) -> np.random.Generator:
    """The random numbers of one page: a function of its arguments only."""
    key = zlib.crc32(f"{split}/{task}/{num_words}".encode())
    return np.random.default_rng([seed, key, index])


def page_layout(
    index: int, *, split: str, task: str = "read", num_words: int | None = None, seed: int = 0, size: int = 224
) -> tuple[Layout, np.random.Generator]:
    """The layout of page `index`, and the generator that goes on to draw it. Raises `DataError` as `make_page`."""
    if index < 0 or seed < 0:
        raise DataError(f"index={index} and seed={seed} must not be negative")
    if size % CELL:
        raise DataError(f"size={size} is no multiple of {CELL} pixels, the side of a cell")
    rng = page_generator(index, split=split, task=task, num_words=num_words, seed=seed)
    if num_words is None:
        num_words = int(rng.integers(1, 5)) if task == "read" else int(rng.integers(2, 6))
    cells = size // CELL
    return make_layout(rng, split=split, task=task, num_words=num_words, rows=cells, columns=cells), rng


def make_page(
    index: int, *, split: str, task: str = "read", num_words: int | None = None, seed: int = 0, size: int = 224
) -> Page:
    """Page `index` of an endless, seeded collection.

    `split` "train" or "heldout" (no word and no font in common); `task` "read" (the answer is all words) or "field"
    (the answer is one value of a form); `num_words` words or fields, by default 1-4 and 2-5 at random; `size` the
    page's side in pixels, a multiple of 16. Raises `DataError` for anything else.
    """
    from PIL import Image

    layout, rng = page_layout(index, split=split, task=task, num_words=num_words, seed=seed, size=size)
    pixels, boxes, _ = render(layout, rng, split)
    words = tuple(TextBox(word.text, box) for word, box in zip(layout.words, boxes, strict=True))
    image = Image.fromarray(pixels)
    return Page(image, words, layout.prompt, layout.answer, task, layout.num_words, seed)

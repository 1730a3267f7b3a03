"""Pages of PDF files: their pictures, and the words and boxes of their text layers, through PDFium."""

from __future__ import annotations

import ctypes
import math
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm.documents.pages import TextBox, joined
from sparsemm.errors import DataError

if TYPE_CHECKING:
    import PIL.Image

UNITS = ("word", "line", "character")
LARGEST_DPI = 200
"""Nothing becomes more legible beyond; it bounds the picture of a small page, as a pixel limit does that of a large."""

UNMAPPED_SHARE = 0.01
"""A text layer in which more of the characters have no Unicode value is another text than the page shows."""

_OVERLAP = 0.03  # of a page's side: a line that the edge of one crop cuts is whole in the next
_FAINTEST = 12  # grey levels between the ink and the paper of a word that is shown
_HYPHEN = 2  # PDFium's code of a hyphen that parts a word at the end of a line


@dataclass(frozen=True)
class Character:
    """One character of a text layer, its box in the page's own units; None between words."""

    text: str
    box: tuple[float, float, float, float] | None


def open_pdf(path: Path) -> Any:
    """The `pypdfium2.PdfDocument` of a file.

    Raises:
        DataError: The [pdf] extra is not installed, or the file is missing, broken or encrypted.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise DataError("reading PDF files needs pypdfium2: pip install 'sparsemm[pdf]'") from error
    try:
        document = pypdfium2.PdfDocument(path)
        document.init_forms()
    except (pypdfium2.PdfiumError, OSError) as error:
        raise DataError(f"{path} cannot be opened as a PDF, it is broken or encrypted ({error})") from error
    return document


def read_pdf_page(
    document: Any, number: int, *, max_pixels: int, crop: tuple[int, int] = (0, 1), unit: str = "word"
) -> tuple[PIL.Image.Image, list[TextBox]]:
    """The picture of a page and the text that it shows.

    Args:
        document: From `open_pdf`.
        number: Of the page, from 0.
        max_pixels: Largest area of the picture; it has at most `LARGEST_DPI`.
        crop: Which part of how many is shown: 1 is the page, 2 are halves of its longer side, 4 are quarters. They
            overlap a little; words that the edges cut are left out.
        unit: A text box is a "word", a "line" or a "character". Words of Chinese and Japanese end with punctuation.

    Returns:
        The picture in RGB; the text boxes in the order of the text layer, in pixels of the picture.

    Raises:
        DataError: The page is broken, or its text layer is not what it shows.
    """
    import pypdfium2

    try:
        with closing(document[number]) as page, closing(page.get_textpage()) as layer:
            image, to_pixels = _render(page, _edges(page.get_size(), *crop), max_pixels)
            boxes = text_boxes(characters(layer), unit)
    except pypdfium2.PdfiumError as error:
        raise DataError(f"page {number + 1} cannot be read ({error})") from error
    grey = np.asarray(image.convert("L"))
    placed = (TextBox(word.text, _pixels(word.box, to_pixels)) for word in boxes)
    return image, [shown for word in placed if (shown := _if_shown(word, grey)) is not None]


def characters(layer: Any) -> list[Character]:
    """The characters of a text page, in its order; those that stand for no text at all are left out.

    Raises:
        DataError: More than `UNMAPPED_SHARE` of them have no Unicode value.
    """
    import pypdfium2.raw as pdfium

    edges = [ctypes.c_double() for _ in range(4)]
    found: list[Character] = []
    high, total, unmapped = 0, 0, 0
    for index in range(pdfium.FPDFText_CountChars(layer)):
        code = pdfium.FPDFText_GetUnicode(layer, index)
        if 0xD800 <= code < 0xDC00:  # what lies beyond U+FFFF comes as two surrogates
            high = code
            continue
        if 0xDC00 <= code < 0xE000 and high:
            code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00)
        high = 0
        if pdfium.FPDFText_IsGenerated(layer, index) == 1 or chr(code).isspace():
            found.append(Character(chr(code), None))
            continue
        total += 1
        text = "-\n" if code == _HYPHEN else chr(code)
        if pdfium.FPDFText_HasUnicodeMapError(layer, index) == 1 or unicodedata.category(text[0]) in ("Cc", "Cs", "Cn"):
            unmapped += 1
        elif pdfium.FPDFText_GetCharBox(layer, index, *edges):
            left, right, bottom, top = (edge.value for edge in edges)
            found.append(Character(text[0], (left, bottom, right, top)))
            found += [Character(space, None) for space in text[1:]]
    if unmapped > UNMAPPED_SHARE * total:
        raise DataError(f"{unmapped} of {total} characters of its text layer have no Unicode value")
    return found


def text_boxes(characters: Iterable[Character], unit: str) -> list[TextBox]:
    """Words, lines or single characters, with boxes in the units of the characters'."""
    boxes: list[TextBox] = []
    line: list[TextBox] = []  # words, or in a "line" all of them so far
    word: list[TextBox] = []

    def end_word() -> None:
        if word:
            line.append(joined(word, ""))
            word.clear()

    def end_line() -> None:
        end_word()
        boxes.extend([joined(line)] if line and unit == "line" else line)
        line.clear()

    for character in characters:
        if character.box is None:
            (end_line if character.text in "\r\n" else end_word)()
            continue
        new = TextBox(character.text, character.box)
        if word:
            apart = _are_apart(word[-1], new)
            if apart or unit == "character" or (unit == "word" and _ends_phrase(word[-1].text, new.text)):
                end_word()
        word.append(new)
    end_line()
    return boxes


def _are_apart(last: TextBox, new: TextBox) -> bool:
    """Whether more than a character's size lies between two characters, as between columns."""
    (a0, b0, a1, b1), (c0, d0, c1, d1) = last.box, new.box
    return max(c0 - a1, a0 - c1, d0 - b1, b0 - d1) > max(a1 - a0, b1 - b0, c1 - c0, d1 - d0)


def _ends_phrase(last: str, new: str) -> bool:
    """Whether a word ends between two characters of a script without spaces: by punctuation, or where it ends."""
    return _is_cjk(last) != _is_cjk(new) or (_is_cjk(last) and unicodedata.category(last)[0] == "P")


def _is_cjk(character: str) -> bool:
    """Scripts without spaces between words that PDF files are full of: Chinese characters, kana, their punctuation."""
    code = ord(character)
    return 0x2E80 <= code < 0xA000 or 0xF900 <= code < 0xFB00 or 0xFF00 <= code < 0xFF61 or 0x20000 <= code < 0x40000


def _edges(size: tuple[float, float], index: int, count: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of one of `count` parts of a page of (width, height)."""
    width, height = size
    across, down = {1: (1, 1), 2: (2, 1) if width > height else (1, 2), 4: (2, 2)}[count]
    row, column = divmod(index, across)
    first = max(0.0, column / across - _OVERLAP), max(0.0, row / down - _OVERLAP)
    last = min(1.0, (column + 1) / across + _OVERLAP), min(1.0, (row + 1) / down + _OVERLAP)
    return first[0] * width, first[1] * height, last[0] * width, last[1] * height


def _render(page: Any, edges: Sequence[float], max_pixels: int) -> tuple[PIL.Image.Image, np.ndarray]:
    """A picture, and the affine map `[2, 3]` from the page's units to its pixels."""
    from pypdfium2 import PdfPosConv

    width, height = page.get_size()
    left, top, right, bottom = edges
    scale = min(LARGEST_DPI / 72, math.sqrt(max_pixels / ((right - left) * (bottom - top))))
    # Sizes are rounded up: an edge that is whole but for its last digits must not gain a pixel.
    bitmap = page.render(scale=scale * (1 - 1e-6), crop=(left, height - bottom, width - right, top), rev_byteorder=True)
    x, y, *size, rotation = bitmap.get_posconv(page).pos_args
    image = bitmap.to_pil().convert("RGB")
    bitmap.close()
    # PDFium knows rotation and crop box, but gives whole pixels: a picture so much larger has finer ones.
    fine = PdfPosConv(page, tuple(1024 * value for value in (x, y, *size)) + (rotation,))
    origin, right_of, above = (np.array(fine.to_bitmap(*point)) / 1024 for point in ((0, 0), (width, 0), (0, height)))
    return image, np.stack([(right_of - origin) / width, (above - origin) / height, origin], axis=1)


def _pixels(box: Sequence[float], to_pixels: np.ndarray) -> tuple[float, float, float, float]:
    """The first and last pixels that a box of the page touches."""
    left, bottom, right, top = box
    corners = np.array([[left, right], [bottom, top], [1.0, 1.0]])
    (x0, x1), (y0, y1) = np.sort(to_pixels @ corners, axis=1).tolist()
    slack = 0.02  # rounding of the map, and of what wrote the file
    x0, y0 = math.floor(x0 + slack), math.floor(y0 + slack)
    return x0, y0, max(x0, math.ceil(x1 - slack) - 1), max(y0, math.ceil(y1 - slack) - 1)


def _if_shown(word: TextBox, grey: np.ndarray) -> TextBox | None:
    """The word cut at the picture's edges; None where these cut more than a pixel, or nothing is drawn.

    Layers also hold what lies outside of the crop box, or is hidden or painted over.
    """
    height, width = grey.shape
    x0, y0, x1, y1 = (int(value) for value in word.box)
    if x0 < -1 or y0 < -1 or x1 > width or y1 > height:
        return None
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width - 1), min(y1, height - 1)
    around = grey[max(0, y0 - 1) : y1 + 2, max(0, x0 - 1) : x1 + 2]
    if around.size == 0 or int(around.max()) - int(around.min()) < _FAINTEST:
        return None
    return TextBox(word.text, (float(x0), float(y0), float(x1), float(y1)))

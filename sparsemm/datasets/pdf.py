"""PDF files as data sets: a page, or a part of one, is rendered and read when it is looked at."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from sparsemm.documents.pages import TextBox
from sparsemm.documents.pdf import UNITS, open_pdf, read_pdf_page
from sparsemm.errors import DataError

if TYPE_CHECKING:
    import PIL.Image

DEFAULT_PIXELS = 2_000_000
"""Largest picture where nobody says: an A4 page at 144 dpi."""

CROPS = {"none": 1, "halves": 2, "quarters": 4}


def is_pdf(path: Path) -> bool:
    """Whether a file's name says that it is a PDF, in whichever case."""
    return path.suffix.lower() == ".pdf" and path.is_file()


class PdfPages(Sequence):
    """Pages of a PDF file, or of all in a folder by their names.

    Files that cannot be opened count as one page each, which cannot be read; pages without text are of that kind, too.

    Args:
        source: A file, or a folder of `*.pdf`.
        limit: At most so many images.
        page_range: Which pages of each file, counted from 1: "1-3,8,20-"; all by default.
        max_pixels: Largest area of a picture.
        crops: "none"; "halves" (of the longer side) or "quarters" of a page as images of their own, for models that
            cannot read a whole page's letters.
        unit: A text box is a "word", a "line" or a "character".
        fewest_words: Images with fewer text boxes cannot be read.

    Raises:
        DataError: An option is unknown, no page is in the range, or no file can be opened.
    """

    def __init__(
        self,
        source: Path,
        *,
        limit: int | None = None,
        page_range: str | None = None,
        max_pixels: int = DEFAULT_PIXELS,
        crops: str = "none",
        unit: str = "word",
        fewest_words: int = 1,
    ) -> None:
        if crops not in CROPS:
            raise DataError(f"crops={crops!r} is unknown; use one of {', '.join(CROPS)}")
        if unit not in UNITS:
            raise DataError(f"unit={unit!r} is unknown; use one of {', '.join(UNITS)}")
        if max_pixels < 1 or fewest_words < 1:
            raise DataError(f"max_pixels={max_pixels} and fewest_words={fewest_words} must be at least 1")
        self.max_pixels, self.crops, self.unit, self.fewest_words = max_pixels, crops, unit, fewest_words
        wanted = _page_numbers(page_range)
        files = sorted(filter(is_pdf, source.iterdir())) if source.is_dir() else [source]
        self._pages: list[tuple[Path, int]] = []
        broken: list[DataError] = []
        for path in files:
            try:
                with closing(open_pdf(path)) as document:
                    found = [number for number in range(len(document)) if wanted(number + 1)]
            except DataError as error:
                broken.append(error)
                found = [0]
            self._pages += [(path, number) for number in found]
        if len(broken) == len(files):
            raise broken[0] if broken else DataError(f"{source} holds no PDF file")
        if not self._pages:
            raise DataError(f"{source} has no page {page_range}")
        count = len(self._pages) * CROPS[crops]
        self._count = count if limit is None else min(count, limit)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> PdfPage:
        if not 0 <= index < len(self):
            raise IndexError(index)
        page, crop = divmod(index, CROPS[self.crops])
        return PdfPage(*self._pages[page], crop, self)

    def at_most(self, max_pixels: int) -> PdfPages:
        """The same pages with another limit of their pictures."""
        pages = copy.copy(self)
        pages.max_pixels = max_pixels
        return pages


class PdfPage:
    """A page with `image` and `words`. It keeps its words once they are known, never its picture."""

    def __init__(self, path: Path, number: int, crop: int, options: PdfPages) -> None:
        self.name = f"{path.name}, page {number + 1}" + (f", crop {crop + 1}" if options.crops != "none" else "")
        self._path, self._number, self._crop, self._options = path, number, crop, options
        self._words: tuple[TextBox, ...] | None = None

    @property
    def image(self) -> PIL.Image.Image:
        """The picture. Raises `DataError` for a page that cannot be read."""
        options = self._options
        with closing(open_pdf(self._path)) as document:
            try:
                image, words = read_pdf_page(
                    document, self._number, max_pixels=options.max_pixels, crop=(self._crop, CROPS[options.crops]),
                    unit=options.unit,
                )  # fmt: skip
            except DataError as error:
                raise DataError(f"{self.name}: {error}") from error
        self._words = tuple(words)
        return image

    @property
    def words(self) -> tuple[TextBox, ...]:
        """The text boxes. Raises `DataError` for a page that cannot be read, or holds too few."""
        if self._words is None:
            _ = self.image
        words = self._words or ()
        if len(words) < self._options.fewest_words:
            least = self._options.fewest_words
            raise DataError(f"{self.name} holds {len(words)} text boxes, not {least}; a scan without a text layer?")
        return words


def _page_numbers(text: str | None) -> Callable[[int], bool]:
    """Whether a page, counted from 1, is in "1-3,8,20-". Raises `DataError` for another form."""
    ranges = []
    for part in (text or "1-").split(","):
        found = re.fullmatch(r"(\d+)(-(\d*))?", part.strip())
        first, last = (int(found[1]), found[3] or (None if found[2] else found[1])) if found else (0, None)
        if first < 1 or (last is not None and int(last) < first):
            raise DataError(f"page range {text!r} is not like 1-3,8,20-")
        ranges.append((first, math.inf if last is None else int(last)))
    return lambda page: any(first <= page <= last for first, last in ranges)

"""The built-in generators as data sets: page i is made when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsemm.datasets.base import BoxedImage
from sparsemm.errors import DataError

GENERATORS = ("documents", "miniature")
"""Full-size pages of running text (`documents.synthdog`), and the miniatures' held-out pages."""


class GeneratedPages(Sequence):
    """`count` pages of a generator.

    Args:
        name: "documents" or "miniature".
        count: Number of pages.
        seed: Another seed gives other pages.
        size: (width, height) in pixels, or the side of a square; 960 x 1280 and 224 by default.
        unit: Text boxes of a "documents" page: "line" or "word".
        num_words: Words of a "miniature" page, taking turns.
        fonts: "train" or "heldout", whose typefaces (and, on a "miniature" page, words) the other never has; of
            "documents" also "all", the default, where a miniature's pages are held-out ones.
        strength: Of `make_document`.

    Raises:
        DataError: An option is unknown, out of range, or not one of this generator.
    """

    def __init__(
        self,
        name: str,
        count: int,
        *,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        num_words: Sequence[int] | None = None,
        fonts: str | None = None,
        **options: Any,
    ) -> None:
        if name not in GENERATORS:
            raise DataError(f"generator {name!r} is unknown; use one of {', '.join(GENERATORS)}")
        if count < 1:
            raise DataError(f"{count} pages are asked for; it must be at least 1")
        if unit not in (None, "line", "word") or (unit is not None and name == "miniature"):
            raise DataError(f"unit={unit!r} is unknown; documents have lines and words, miniature pages words only")
        given = {*options, *(() if num_words is None else ("num_words",))}
        unknown = given - ({"strength"} if name == "documents" else {"num_words"})
        if unknown:
            raise DataError(f"the generator {name!r} has no option {', '.join(sorted(unknown))}")
        self.name, self.count, self.seed = name, count, seed
        self.size, self.unit, self.num_words, self.options = size, unit or "line", num_words, options
        self.fonts = fonts or ("all" if name == "documents" else "heldout")
        self[0]  # bad options are errors now, not in the middle of a chase

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> BoxedImage:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return (self._document if self.name == "documents" else self._miniature)(index)

    def _document(self, index: int) -> BoxedImage:
        from sparsemm.documents.synthdog import make_document

        size = (self.size, self.size) if isinstance(self.size, int) else self.size or (960, 1280)
        page = make_document(index, size=size, seed=self.seed, fonts=self.fonts, **self.options)
        return BoxedImage(f"{index:06d}.png", page.image, page.lines if self.unit == "line" else page.words)

    def _miniature(self, index: int) -> BoxedImage:
        from sparsemm.documents import make_page

        words = self.num_words or (1, 2, 3, 4)
        side = 224 if self.size is None else self.size
        if not isinstance(side, int):
            raise DataError(f"size={side}: a miniature's page is square; give one number")
        number = words[index % len(words)]
        page = make_page(index, split=self.fonts, task="read", num_words=number, seed=self.seed, size=side)
        return BoxedImage(f"{index:06d}.png", page.image, page.words)

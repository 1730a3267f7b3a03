"""Text boxes drawn onto their image."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sparsemm.documents.pages import TextBox, sound_words

if TYPE_CHECKING:
    import PIL.Image

_COLOURS = ("#d62728", "#1f77b4", "#2ca02c")  # in turn, so that neighbours can be told apart


def draw_boxes(page: Any) -> tuple[PIL.Image.Image, list[TextBox], Counter[str]]:
    """A copy of the page's image with a frame around every text box; the boxes; and words by what is wrong with them.

    Raises:
        DataError: The page cannot be read.
    """
    from PIL import ImageDraw

    image = page.image.copy()
    words, flaws = sound_words(page.words, image.size)
    draw = ImageDraw.Draw(image)
    for index, word in enumerate(words):
        x0, y0, x1, y1 = word.box
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=_COLOURS[index % len(_COLOURS)])
    return image, words, flaws

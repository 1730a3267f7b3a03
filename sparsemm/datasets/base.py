"""An image with its text boxes, read when it is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm.documents.pages import TextBox
from sparsemm.errors import DataError
from sparsemm.models.images import open_image

if TYPE_CHECKING:
    import PIL.Image

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp")


class BoxedImage:
    """One page of a data set. Neither the image nor the boxes are looked at before they are asked for.

    Args:
        name: What messages and converted files call it.
        source: A path, the bytes of an image file, or a `PIL.Image.Image`.
        words: The text boxes in reading order, or a function that makes them.
    """

    def __init__(
        self,
        name: str,
        source: Path | bytes | PIL.Image.Image,
        words: Sequence[TextBox] | Callable[[], Sequence[TextBox]],
    ) -> None:
        self.name = name
        self.source = source
        self._words = words

    @property
    def image(self) -> PIL.Image.Image:
        """The image in RGB. Raises `DataError` when it is missing or broken."""
        return open_image(self.source)

    @property
    def words(self) -> tuple[TextBox, ...]:
        """The text boxes. Raises `DataError` when one is malformed."""
        if callable(self._words):
            self._words = self._words()
        return tuple(self._words)

    def __repr__(self) -> str:
        return f"BoxedImage({self.name!r})"


def read_words(entries: Iterable[Any], where: str) -> list[TextBox]:
    """Text boxes of `{"text": …, "box": …}` or, as SynthDoG's schema has it, `{"chunk": …, "coord": …}` entries.

    Raises:
        DataError: An entry lacks one of the two, or its box is not one; the message starts with `where`.
    """
    words = []
    for number, entry in enumerate(entries):
        text, points = None, None
        if isinstance(entry, dict):
            text = entry.get("text", entry.get("chunk"))
            points = entry.get("box", entry.get("coord"))
        if not isinstance(text, str) or points is None:
            raise DataError(f"{where}, entry {number}: {entry!r} has no text and box (or chunk and coord)")
        words.append(TextBox(text, bounding_box(points, f"{where}, entry {number}")))
    return words


def bounding_box(points: Any, where: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) around points: `[x0, y0, x1, y1, …]` or `[[x0, y0], [x1, y1], …]`, at least two.

    Two are taken as they stand: what reads them counts the inverted ones (`sound_words`).

    Raises:
        DataError: They are not that, or not finite; the message starts with `where`.
    """
    values = _numbers(points, where)
    if len(values) < 4 or len(values) % 2:
        raise DataError(f"{where}: {points!r} is not two or more finite (x, y) points")
    if len(values) == 4:
        return values[0], values[1], values[2], values[3]
    xs, ys = values[0::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def box_of_extent(extent: Any, where: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1), corners included, of COCO's `[x, y, width, height]`, whose area ends before x + width.

    Raises:
        DataError: They are not four finite numbers, or the extent is negative; the message starts with `where`.
    """
    values = _numbers(extent, where)
    if len(values) != 4 or min(values[2:]) < 0:
        raise DataError(f"{where}: {extent!r} is not [x, y, width, height]")
    x, y, width, height = values
    return x, y, x + max(0.0, width - 1), y + max(0.0, height - 1)


def _numbers(values: Any, where: str) -> list[float]:
    """The finite numbers of a list, or of a list of lists."""
    try:
        flat = [one for value in values for one in (value if isinstance(value, (list, tuple)) else (value,))]
        numbers = [float(value) for value in flat]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: {values!r} is not a list of finite coordinates")
    return numbers


def find_images(folder: Path) -> dict[str, Path]:
    """The image files of `folder` by their names without endings. Raises `DataError` when it is no folder."""
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist; give it with --images")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_ENDINGS}


def image_path(folder: Path, name: str, where: str) -> Path:
    """The file called `name` inside `folder`. Raises `DataError` for a name that leads out of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where}: image {name!r} lies outside of {folder}")
    return path

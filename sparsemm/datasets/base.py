"""An image with its text boxes, read when it is looked at."""

from __future__ import annotations

import io
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
        if not isinstance(self.source, bytes):
            return open_image(self.source)
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.source)) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"image {self.name} cannot be read ({error})") from error

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
    """(x0, y0, x1, y1) around points: `[x0, y0, x1, y1, …]` or `[[x0, y0], [x1, y1], …]`, at least two, in any order.

    Raises:
        DataError: They are not that, or not finite; the message starts with `where`.
    """
    try:
        flat = [value for point in points for value in (point if isinstance(point, (list, tuple)) else (point,))]
        values = [float(value) for value in flat]
    except (TypeError, ValueError):
        raise DataError(f"{where}: {points!r} is not a list of coordinates") from None
    if len(values) < 4 or len(values) % 2 or not all(math.isfinite(value) for value in values):
        raise DataError(f"{where}: {points!r} is not two or more finite (x, y) points")
    xs, ys = values[0::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def box_of_extent(values: Any, where: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1), corners included, of COCO's `[x, y, width, height]`, whose area ends before x + width.

    Raises:
        DataError: They are not four finite numbers, or the extent is negative; the message starts with `where`.
    """
    try:
        x, y, width, height = (float(value) for value in values)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {values!r} is not [x, y, width, height]") from None
    if not all(map(math.isfinite, (x, y, width, height))) or width < 0 or height < 0:
        raise DataError(f"{where}: {values!r} is not a finite [x, y, width, height]")
    return x, y, x + max(0.0, width - 1), y + max(0.0, height - 1)


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

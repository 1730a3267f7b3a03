"""Images as models see them: one way in, for paths, bytes and objects, that never changes what a picture shows."""

from __future__ import annotations

import base64
import binascii
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm.errors import DataError

if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger(__name__)

_LARGEST = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535}
"""White of the grey modes that Pillow would clip at 255."""


def open_image(source: Any) -> PIL.Image.Image:
    """An 8-bit RGB image from a `PIL.Image.Image`, a path, a file URI, a base64 data URI or bytes; no downloads.

    Turned as its EXIF orientation says, grey of 16 or 32 bits and floats scaled to 8 bits, transparency over white, of
    an animation the first frame (said in the log).

    Raises:
        DataError: It is none of these, missing, not an image, or its values have no known range.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return _as_shown(source, "image")
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise DataError(f"an image is a PIL image or a path, got {type(source).__name__}")
    text = f"of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    if text.startswith(("http://", "https://")):
        raise DataError(f"{text} is not a local file; download the image and give its path")
    shown = text if len(text) < 200 else text[:60] + "…"
    try:
        file: Any = Path(text.removeprefix("file://"))
        if isinstance(source, bytes):
            file = io.BytesIO(source)
        elif text.startswith("data:"):
            file = io.BytesIO(base64.b64decode(text.partition(",")[2], validate=True))
        with _whole_files_only(), Image.open(file) as image:
            return _as_shown(image, shown)
    except FileNotFoundError as error:
        raise DataError(f"image {shown} does not exist; check the path") from error
    except DataError:
        raise
    except (
        *(UnidentifiedImageError, OSError, SyntaxError, ValueError, binascii.Error),
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"image {shown} cannot be read ({error})") from error


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """A truncated file is an error while the context lasts, whatever a library (lmms-eval) has set for the process."""
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _as_shown(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    from PIL import Image, ImageOps

    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
        if getattr(image, "is_animated", False):
            logger.warning("%s has %d frames; the first one is read", name, image.n_frames)
    image = ImageOps.exif_transpose(image)
    if image.mode in _LARGEST or image.mode in ("I", "F"):
        image = _to_eight_bits(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """A grey image of 16 or 32 bits, or of floats, in mode "L"."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":  # by convention 0..1, or 0..255
        white = 1.0 if high <= 1.0 else 255.0
    elif image.mode == "I":  # how Pillow holds 16-bit files of some formats, and 32-bit ones
        white = 65535.0 if high <= 65535 else 2.0**31 - 1
    else:
        white = float(_LARGEST[image.mode])
    if not (low >= 0.0 and high <= white):
        raise DataError(
            f"{name} holds grey values from {low:g} to {high:g}, of no known range; save it with 8 or 16 bits a pixel"
        )
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))

"""Typefaces of the synthetic pages, all from installed Python packages; the two splits share no family."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import ImageFont

from sparsemm.errors import DataError

_FAMILIES: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    # split -> (package, folder inside it, file names)
    "train": (
        (
            "matplotlib",
            "mpl-data/fonts/ttf",
            (
                "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf",
                "DejaVuSansMono-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf",
                "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf",
            ),
        ),
        ("font_lato", "files", ("Lato-Regular.ttf", "Lato-Bold.ttf", "Lato-Italic.ttf", "Lato-Light.ttf")),
        (
            "font_source_serif_pro",
            "files",
            ("SourceSerifPro-Regular.ttf", "SourceSerifPro-Semibold.ttf", "SourceSerifPro-It.ttf"),
        ),
    ),
    "heldout": (
        (
            "font_source_sans_pro",
            "files",
            ("SourceSansPro-Regular.ttf", "SourceSansPro-Semibold.ttf", "SourceSansPro-It.ttf"),
        ),
        (
            "font_hanken_grotesk",
            "files",
            ("HankenGrotesk-Regular.otf", "HankenGrotesk-Medium.otf", "HankenGrotesk-Bold.otf"),
        ),
        ("font_caladea", "files", ("Caladea-Regular.ttf", "Caladea-Bold.ttf", "Caladea-Italic.ttf")),
    ),
}  # fmt: skip

_TALL = "bdfhklt0123456789"
_DEEP = "gjpqy"


@cache
def font_paths(split: str) -> tuple[Path, ...]:
    """The font files of `split`. Raises `DataError` naming the package to install when one is missing."""
    if split not in _FAMILIES:
        raise DataError(f"unknown split {split!r}; use one of {', '.join(_FAMILIES)}")
    paths = []
    for package, folder, names in _FAMILIES[split]:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the fonts of {package} are missing: pip install {package.replace('_', '-')}")
        root = Path(next(iter(spec.submodule_search_locations))) / folder
        for name in names:
            if not (root / name).is_file():
                raise DataError(f"font {name} is missing from {root}: reinstall {package.replace('_', '-')}")
            paths.append(root / name)
    return tuple(paths)


class Face:
    """A font at one size: the ink of each character as an alpha mask, placed relative to the baseline."""

    def __init__(self, path: Path, size: int) -> None:
        self.name = path.stem
        self.size = size
        self._font = ImageFont.truetype(str(path), size)
        self._glyphs: dict[str, tuple[np.ndarray, int]] = {}
        self.ascent = max(-self.glyph(c)[1] for c in _TALL)
        self.descent = max(self.glyph(c)[1] + self.glyph(c)[0].shape[0] for c in _DEEP)
        self.width = max(self.glyph(c)[0].shape[1] for c in "mw")

    def glyph(self, character: str) -> tuple[np.ndarray, int]:
        """The ink of `character`: float32 alpha `[height, width]` in 0..1, cropped, and its top below the baseline."""
        if character not in self._glyphs:
            mask, offset = self._font.getmask2(character, mode="L", anchor="ls")
            alpha = np.asarray(mask, dtype=np.float32).reshape(mask.size[1], mask.size[0]) / 255.0
            ys, xs = np.nonzero(alpha > 0)
            top = int(offset[1]) + int(ys.min())
            self._glyphs[character] = alpha[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1], top
        return self._glyphs[character]


@cache
def faces(split: str, cell: int, smallest: int = 11, largest: int = 16) -> tuple[Face, ...]:
    """Every font of `split` in every size of `smallest`..`largest` pixels whose characters fit a `cell`-pixel cell."""
    fitting = []
    for path in font_paths(split):
        for size in range(smallest, largest + 1):
            face = Face(path, size)
            if face.ascent + face.descent <= cell and face.width <= cell:
                fitting.append(face)
    return tuple(fitting)

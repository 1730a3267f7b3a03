"""Typefaces of the synthetic pages, all from installed Python packages; the two splits share no family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sparsemm.errors import DataError

_FONTS: dict[str, dict[str, str]] = {
    # split -> folder of an installed package -> file names
    "train": {
        "matplotlib/mpl-data/fonts/ttf": "DejaVuSans.ttf DejaVuSans-Bold.ttf DejaVuSans-Oblique.ttf DejaVuSansMono.ttf "
        "DejaVuSansMono-Bold.ttf DejaVuSerif.ttf DejaVuSerif-Bold.ttf DejaVuSerif-Italic.ttf STIXGeneral.ttf "
        "STIXGeneralBol.ttf STIXGeneralItalic.ttf cmr10.ttf cmb10.ttf cmss10.ttf cmtt10.ttf",
        "font_lato/files": "Lato-Regular.ttf Lato-Bold.ttf Lato-Italic.ttf Lato-Light.ttf",
        "font_source_serif_pro/files": "SourceSerifPro-Regular.ttf SourceSerifPro-Semibold.ttf SourceSerifPro-It.ttf",
    },
    "heldout": {
        "font_source_sans_pro/files": "SourceSansPro-Regular.ttf SourceSansPro-Semibold.ttf SourceSansPro-It.ttf",
        "font_hanken_grotesk/files": "HankenGrotesk-Regular.otf HankenGrotesk-Medium.otf HankenGrotesk-Bold.otf",
        "font_caladea/files": "Caladea-Regular.ttf Caladea-Bold.ttf Caladea-Italic.ttf",
    },
}

_TALL = "bdfhklt0123456789"
_DEEP = "gjpqy"


@cache
def font_paths(split: str) -> tuple[Path, ...]:
    """The font files of `split`. Raises `DataError` naming the package to install when one is missing."""
    if split not in _FONTS:
        raise DataError(f"unknown split {split!r}; use one of {', '.join(_FONTS)}")
    paths = []
    for place, names in _FONTS[split].items():
        package, _, folder = place.partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the fonts of {package} are missing: pip install {package.replace('_', '-')}")
        root = Path(next(iter(spec.submodule_search_locations))) / folder
        for name in names.split():
            if not (root / name).is_file():
                raise DataError(f"font {name} is missing from {root}: reinstall {package.replace('_', '-')}")
            paths.append(root / name)
    return tuple(paths)


@dataclass(frozen=True)
class Variant:
    """A distortion of a typeface: horizontal stretch, slant (pixels a pixel of height) and weight (1: bolder)."""

    stretch: float = 1.0
    slant: float = 0.0
    weight: int = 0


def _variants() -> tuple[Variant, ...]:
    rng = np.random.default_rng(0)
    draws = ((rng.uniform(0.8, 1.25), rng.uniform(-0.08, 0.25), rng.integers(2)) for _ in range(NUM_VARIANTS))
    return (Variant(), *(Variant(float(stretch), float(slant), int(weight)) for stretch, slant, weight in draws))


NUM_VARIANTS = 9
# Few families can be shipped: training distorts them, so that unseen ones are no surprise. Held-out fonts stay as made.
VARIANTS = {"train": _variants(), "heldout": (Variant(),)}
_SUPERSAMPLING = 4


class Face:
    """A font at one size: the ink of each character as an alpha mask, placed relative to the baseline."""

    def __init__(self, path: Path, size: int, variant: Variant | None = None) -> None:
        self.name = path.stem
        self.size = size
        self.variant = variant or Variant()
        plain = self.variant == Variant()
        self._font = ImageFont.truetype(str(path), size if plain else size * _SUPERSAMPLING)
        self._draw = self._plain if plain else self._distorted
        self._glyphs: dict[str, tuple[np.ndarray, int]] = {}
        self.ascent = max(-self.glyph(c)[1] for c in _TALL)
        self.descent = max(self.glyph(c)[1] + self.glyph(c)[0].shape[0] for c in _DEEP)
        self.width = max(self.glyph(c)[0].shape[1] for c in "mw")

    def fits(self, cell: int) -> bool:
        """Whether every character stays within a cell of `cell` pixels."""
        return self.ascent + self.descent <= cell and self.width <= cell

    def glyph(self, character: str) -> tuple[np.ndarray, int]:
        """The ink of `character`: float32 alpha `[height, width]` in 0..1, cropped, and its top below the baseline."""
        if character not in self._glyphs:
            alpha, top = self._draw(character)
            ys, xs = np.nonzero(alpha > 0.02)
            if len(ys) == 0:
                self._glyphs[character] = np.zeros((1, 1), dtype=np.float32), -1
            else:
                cropped = alpha[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
                self._glyphs[character] = np.ascontiguousarray(cropped), top + int(ys.min())
        return self._glyphs[character]

    def _plain(self, character: str) -> tuple[np.ndarray, int]:
        mask, offset = self._font.getmask2(character, mode="L", anchor="ls")
        return np.asarray(mask, dtype=np.float32).reshape(mask.size[1], mask.size[0]) / 255.0, int(offset[1])

    def _distorted(self, character: str) -> tuple[np.ndarray, int]:
        side, baseline = 2 * self.size, 3 * self.size // 2
        scale = _SUPERSAMPLING
        x0, y0 = self.size * scale // 2, baseline * scale
        canvas = Image.new("L", (side * scale, side * scale))
        ImageDraw.Draw(canvas).text((x0, y0), character, 255, font=self._font, anchor="ls")
        if self.variant.weight:
            canvas = canvas.filter(ImageFilter.MaxFilter(3))
        stretch, slant = self.variant.stretch, self.variant.slant
        # Output (x, y) shows input ((x - x0 + slant * (y - y0)) / stretch + x0, y): slanted about the baseline.
        matrix = (1 / stretch, slant / stretch, x0 - (x0 + slant * y0) / stretch, 0, 1, 0)
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        small = canvas.resize((side, side), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32) / 255.0, -baseline


@cache
def _face(path: Path, size: int, variant: Variant) -> Face:
    return Face(path, size, variant)


def draw_face(rng: np.random.Generator, split: str, cell: int, *, smallest: int = 11, largest: int = 16) -> Face:
    """A random font, size and variant of `split` whose characters fit a cell of `cell` pixels."""
    paths, variants = font_paths(split), VARIANTS[split]
    while True:
        path = paths[rng.integers(len(paths))]
        variant = variants[rng.integers(len(variants))]
        face = _face(path, int(rng.integers(smallest, largest + 1)), variant)
        if face.fits(cell):
            return face

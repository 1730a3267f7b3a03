"""A sheet of paper as a camera sees it: background, perspective, light, grain."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Corners = np.ndarray
"""float64 `[4, 2]`: (x, y) of the upper left, upper right, lower right and lower left corner."""


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Noise in -1..1 whose blotches measure about 1/`cells` of the longer side: float32 `[height, width]`."""
    longest = max(height, width)
    coarse = rng.uniform(-1, 1, size=(height * cells // longest + 2, width * cells // longest + 2)).astype(np.float32)
    image = Image.fromarray(coarse, mode=None).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(image, dtype=np.float32), -1, 1)


def photo_background(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """What a sheet may lie on: a desk with grain, a blur of coloured things, or one colour."""
    first, second = rng.uniform(20, 235, size=(2, 3)).astype(np.float32)
    kind = rng.random()
    if kind < 0.4:  # wood or cloth: noise drawn out in one direction
        grain = smooth_noise(rng, max(2, height // 24), width, 40)
        grain = np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC))
        mix = 0.5 + 0.35 * grain + 0.15 * smooth_noise(rng, height, width, 5)
    else:
        mix = 0.5 + 0.3 * smooth_noise(rng, height, width, 4) + 0.2 * smooth_noise(rng, height, width, 16)
    page = first + np.clip(mix, 0, 1)[..., None] * (second - first)
    image = Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))
    if 0.4 <= kind < 0.8:
        draw = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(4, 12))):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            radius = rng.uniform(0.05, 0.3) * max(width, height)
            box = (x - radius, y - radius * rng.uniform(0.4, 1), x + radius, y + radius)
            draw.ellipse(box, fill=tuple(int(value) for value in rng.uniform(10, 245, size=3)))
        image = image.filter(ImageFilter.GaussianBlur(max(width, height) / 60))
    return image


def paper(rng: np.random.Generator, height: int, width: int, colour: np.ndarray) -> Image.Image:
    """A sheet: `colour` (float32 `[3]`, 0..255) with blotches, fibres and at times a fold."""
    page = np.broadcast_to(colour, (height, width, 3)).astype(np.float32)
    page += rng.uniform(2, 9) * smooth_noise(rng, height, width, 6)[..., None]
    page += rng.uniform(0, 4) * rng.standard_normal((height, width, 1), dtype=np.float32)
    if rng.random() < 0.3:  # light falls differently on the two halves of a folded sheet
        fold, depth = int(rng.uniform(0.3, 0.7) * height), rng.uniform(4, 14)
        page[:fold] -= depth * np.linspace(0, 1, fold, dtype=np.float32)[:, None, None]
    return Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))


def place_corners(rng: np.random.Generator, sheet: tuple[int, int], page: tuple[int, int], strength: float) -> Corners:
    """Where the corners of a (width, height) `sheet` come to lie in the middle of a page: turned and tilted.

    `strength` 0..1 scales tilt, turn and shift; at 0 the sheet lies flat in the middle.
    """
    width, height = sheet
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float64)
    corners -= np.array([width, height]) / 2
    angle = strength * rng.uniform(-0.06, 0.06)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = corners @ turn + strength * rng.uniform(-0.03, 0.03, size=(4, 2)) * np.array([width, height])
    room = np.maximum((np.array(page) - np.ptp(corners, axis=0)) / 2, 0)
    return corners + np.array(page) / 2 + strength * rng.uniform(-0.7, 0.7, size=2) * room


def homography(source: Corners, target: Corners) -> np.ndarray:
    """The projective map that takes four points to four others: float64 `[3, 3]`."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


def project(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points `[n, 2]` under a projective map `[3, 3]`."""
    mapped = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ matrix.T
    return mapped[:, :2] / mapped[:, 2:]


def lay_on(background: Image.Image, sheet: Image.Image, corners: Corners, *, shadow: float) -> Image.Image:
    """`background` with `sheet` on it, its corners at `corners`; `shadow` 0..1 is how dark its shadow is."""
    width, height = sheet.size
    flat = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float64)
    # PIL asks where each pixel of the result comes from.
    back = tuple(homography(corners, flat).flatten()[:8])
    size, kind = background.size, Image.Transform.PERSPECTIVE
    moved = sheet.transform(size, kind, back, Image.Resampling.BICUBIC)
    mask = Image.new("L", sheet.size, 255).transform(size, kind, back, Image.Resampling.BILINEAR)
    dark = mask.filter(ImageFilter.GaussianBlur(max(size) / 80)).point(lambda value: int(value * shadow))
    result = background.copy()
    result.paste(Image.new("RGB", size), mask=dark)
    result.paste(moved, mask=mask)
    return result


def develop(rng: np.random.Generator, image: Image.Image, strength: float) -> Image.Image:
    """Uneven light, blur, grain and compression, all scaled by `strength` 0..1."""
    page = np.asarray(image, dtype=np.float32)
    height, width = page.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.ogrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    light = 1 + strength * rng.uniform(0, 0.3) * (np.cos(angle) * x + np.sin(angle) * y)
    page = page * light[..., None].astype(np.float32)
    page = page + strength * rng.uniform(0, 7) * rng.standard_normal((height, width, 3), dtype=np.float32)
    result = Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))
    if rng.random() < 0.3 * strength:
        result = result.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    if rng.random() < 0.5 * strength:
        buffer = io.BytesIO()
        result.save(buffer, "JPEG", quality=int(rng.integers(45, 95)))
        result = Image.open(buffer).convert("RGB")
    return result

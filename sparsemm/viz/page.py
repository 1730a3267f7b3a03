"""An interactive page of a reading: pick a token and a head, see where it looked. One file, no server, no network."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sparsemm.io import write_bytes_atomic
from sparsemm.viz.page_template import TEMPLATE
from sparsemm.viz.reading import Reading, grid_map
from sparsemm.viz.sheets import attention_colours, is_light

if TYPE_CHECKING:
    from sparsemm.head_scores import HeadScores

_LARGEST_IMAGE = 1024  # pixels of the longer side: more is not shown anyway


def write_page(
    reading: Reading, path: str | Path, *, scores: HeadScores | None = None, title: str = "What heads look at"
) -> None:
    """Write the page of a reading.

    Weights are stored as bytes, scaled to each token's and head's largest one, which is stored beside them.

    Args:
        reading: From `read_with_attention`.
        path: HTML file.
        scores: Heads are then listed and coloured by their share of the score.
        title: Heading of the page.
    """
    data = json.dumps(page_data(reading, scores), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A "</script>" inside a string would end the script.
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    document = TEMPLATE.replace("{{title}}", html.escape(title)).replace("{{data}}", safe)
    write_bytes_atomic(path, document.encode("utf-8"))


def page_data(reading: Reading, scores: HeadScores | None = None) -> dict[str, Any]:
    """All that the page shows, as JSON values."""
    shares = None if scores is None else scores.normalised()
    peaks = reading.weights.amax(-1)
    scaled = (reading.weights / peaks.clamp(min=1e-30)[..., None] * 255).round()
    parts = []
    for name in sorted(reading.layout.grids, key=lambda part: part != reading.layout.main_part):
        rows, cols = reading.layout.grids[name]
        maps = [[grid_map(reading.layout, values, name).flatten() for values in heads] for heads in scaled]
        cells = torch.stack([torch.stack(heads) for heads in maps]).clamp(max=255).to(torch.uint8)
        region = [value / side for value, side in zip(reading.region(name), 2 * reading.image.size, strict=True)]
        weights = base64.b64encode(cells.numpy().tobytes()).decode()
        parts.append({"name": name, "rows": rows, "cols": cols, "region": region, "weights": weights})
    return {
        "image": _data_uri(reading.image),
        "width": reading.image.width,
        "height": reading.image.height,
        "prompt": reading.prompt,
        "tokens": reading.tokens,
        "heads": [
            {"layer": layer, "head": head, "share": None if shares is None else round(float(shares[layer, head]), 6)}
            for layer, head in reading.heads
        ],
        "parts": parts,
        # Largest weight, and share of the attention that falls on the image, of each token and head.
        "peaks": [[round(value, 6) for value in row] for row in peaks.tolist()],
        "on_image": [[round(value, 4) for value in row] for row in reading.weights.sum(-1).tolist()],
        "light": is_light(reading.image),
        "colours": attention_colours(reading.image)(np.arange(256), bytes=True)[:, :3].tolist(),
    }


def _data_uri(image: Image.Image) -> str:
    shown = image.copy()
    shown.thumbnail((_LARGEST_IMAGE, _LARGEST_IMAGE))
    buffer = io.BytesIO()
    small = shown.width * shown.height <= 256 * 256
    shown.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"

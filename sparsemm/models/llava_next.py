"""LLaVA-NeXT (v1.6) with a Llama/Vicuna or Mistral language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemm.models.geometry import ImageLayout, Inputs, Region, base_layout, entries
from sparsemm.models.llava import Llava

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class LlavaNext(Llava):
    name = "llava_next"
    model_class = "LlavaNextForConditionalGeneration"
    processor_class = "LlavaNextProcessor"
    image_tokens = "base grid, then high-resolution rows with newlines"
    pads_grid = True

    def image_layouts(self, config: PretrainedConfig, inputs: Inputs, **sources: Any) -> list[ImageLayout]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        sizes = entries(inputs, "image_sizes")
        return [base_layout(side, *unpadded_grid(config, tuple(size))) for size in sizes]

    def exact_layouts(
        self, config: PretrainedConfig, inputs: Inputs, layouts: Sequence[ImageLayout]
    ) -> list[ImageLayout]:
        return with_shown_regions(config, inputs, layouts)

    def random_image(self, config: PretrainedConfig, dtype: torch.dtype, limit: int) -> dict[str, Tensor]:
        side = config.vision_config.image_size
        height, width = max(config.image_grid_pinpoints, key=lambda size: (size[0] * size[1], size))
        tiles = 1 + (height // side) * (width // side)
        pixels = torch.randn(1, tiles, 3, side, side, dtype=dtype)
        return {"image_sizes": torch.tensor([[height, width]]), "pixel_values": pixels}


def unpadded_grid(config: PretrainedConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of high-resolution tokens left of an image of original (height, width) after unpadding.

    The processor fits the image into the best of the checkpoint's resolutions and pads it evenly; the model then drops
    the token rows or columns that hold nothing but padding. transformers decides by the original aspect ratio, and
    rounds as here (`unpad_image` in its modeling_llava_next).
    """
    from transformers.image_processing_utils import select_best_resolution

    height, width = image_size
    best_height, best_width = select_best_resolution([height, width], config.image_grid_pinpoints)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    rows = best_height // side * (side // patch)
    cols = best_width // side * (side // patch)
    if width / height > cols / rows:
        rows -= (rows - int(round(height * (cols / width), 7))) // 2 * 2
    else:
        cols -= (cols - int(round(width * (rows / height), 7))) // 2 * 2
    return rows, cols


def with_shown_regions(config: PretrainedConfig, inputs: Inputs, layouts: Sequence[ImageLayout]) -> list[ImageLayout]:
    """The layouts of a batch, the high-resolution grid of each over the pixels that it shows."""
    sizes = entries(inputs, "image_sizes")
    return [
        replace(layout, regions={"high_res": shown_region(config, tuple(size))})
        for layout, size in zip(layouts, sizes, strict=True)
    ]


def shown_region(config: PretrainedConfig, image_size: tuple[int, int]) -> Region:
    """What the unpadded grid shows of an image of (height, width), in the image's pixels.

    As many columns are dropped on the left as on the right, and only whole ones: up to half a column of padding stays
    at either edge, or as much of the image goes.
    """
    from transformers.image_processing_utils import select_best_resolution

    best = select_best_resolution(list(image_size), config.image_grid_pinpoints)
    scale = min(target / extent for target, extent in zip(best, image_size, strict=True))
    patch = config.vision_config.patch_size
    edges = []
    for extent, target, cells in zip(image_size, best, unpadded_grid(config, image_size), strict=True):
        fitted = min(math.ceil(extent * scale), target)
        first = (target // patch - cells) // 2 * patch - (target - fitted) // 2
        edges.append([edge * extent / fitted for edge in (first, first + cells * patch)])
    (top, bottom), (left, right) = edges
    return left, top, right, bottom


LLAVA_NEXT = LlavaNext()

"""LLaVA-NeXT (v1.6) with a Llama/Vicuna or Mistral language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemm.models.geometry import ImageLayout, base_layout
from sparsemm.models.llava import Llava

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class LlavaNext(Llava):
    name = "llava_next"
    model_class = "LlavaNextForConditionalGeneration"
    processor_class = "LlavaNextProcessor"
    image_tokens = "base grid, then high-resolution rows with newlines"

    def image_layouts(
        self, config: PretrainedConfig, inputs: Mapping[str, Tensor], **sources: Any
    ) -> list[ImageLayout]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else []
        return [base_layout(side, *unpadded_grid(config, tuple(size))) for size in sizes]

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


LLAVA_NEXT = LlavaNext()

"""LLaVA-OneVision: as LLaVA-NeXT, with a grid that shrinks when the image has too many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsemm.models.family import ModelFamily
from sparsemm.models.geometry import ImageLayout, Inputs, base_layout, entries
from sparsemm.models.llava_next import unpadded_grid, with_shown_regions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class LlavaOnevision(ModelFamily):
    name = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    processor_class = "LlavaOnevisionProcessor"
    image_tokens = "base grid, then high-resolution rows with newlines, fewer where there are too many"
    pads_grid = True

    def image_layouts(self, config: PretrainedConfig, inputs: Inputs, **sources: Any) -> list[ImageLayout]:
        sizes = entries(inputs, "image_sizes")
        # A prompt with several images shows each by its base tokens and one newline.
        counts = inputs["batch_num_images"].tolist() if "batch_num_images" in inputs else [1] * len(sizes)
        alone = [count == 1 for count in counts for _ in range(count)]
        side = config.vision_config.image_size // config.vision_config.patch_size
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        layouts = []
        for size, high_res in zip(sizes, alone, strict=True):
            rows, cols = unpadded_grid(config, tuple(size)) if high_res else (1, 0)
            ratio = math.sqrt(rows * cols / (most * side**2))
            if ratio > 1.1:
                rows, cols = int(rows // ratio), int(cols // ratio)
            layouts.append(base_layout(side, rows, cols))
        return layouts

    def exact_layouts(
        self, config: PretrainedConfig, inputs: Inputs, layouts: Sequence[ImageLayout]
    ) -> list[ImageLayout]:
        return with_shown_regions(config, inputs, layouts)


LLAVA_ONEVISION = LlavaOnevision()

"""InternVL3 and 3.5 in their Hugging Face classes: tiles, then a thumbnail; Qwen2 or Qwen3 as language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sparsemm.models.family import ModelFamily, need_sources
from sparsemm.models.geometry import ImageLayout, tiled_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


class InternVL(ModelFamily):
    name = "internvl"
    model_class = "InternVLForConditionalGeneration"
    processor_class = "InternVLProcessor"
    image_tokens = "tiles, then a thumbnail"

    def image_layouts(
        self,
        config: PretrainedConfig,
        inputs: Mapping[str, Tensor],
        *,
        processor: ProcessorMixin | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[ImageLayout]:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        if "pixel_values" not in inputs:
            return []
        processor, image_sizes = need_sources(self.name, processor, image_sizes)
        tiler, side = processor.image_processor, math.isqrt(processor.image_seq_length)
        tile, bounds = (tiler.size["height"], tiler.size["width"]), (tiler.min_patches, tiler.max_patches)
        layouts = []
        for width, height in image_sizes:  # the number of tiles alone would not tell their arrangement
            columns, rows = get_optimal_tiled_canvas((height, width), tile, *bounds)
            layouts.append(tiled_layout(rows, columns, side, "thumbnail"))
        return layouts


INTERNVL = InternVL()

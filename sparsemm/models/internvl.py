"""InternVL3 and 3.5 in their Hugging Face classes: tiles, then a thumbnail; Qwen2 or Qwen3 as language model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparsemm.models.family import ModelFamily
from sparsemm.models.geometry import ImageLayout, Inputs, tiled_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


class InternVL(ModelFamily):
    name = "internvl"
    model_class = "InternVLForConditionalGeneration"
    processor_class = "InternVLProcessor"
    image_tokens = "tiles, then a thumbnail"

    def image_layout(
        self, config: PretrainedConfig, inputs: Inputs, processor: ProcessorMixin, image_size: tuple[int, int]
    ) -> ImageLayout:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        tiler, (width, height) = processor.image_processor, image_size
        tile = (tiler.size["height"], tiler.size["width"])
        # The number of tiles alone would not tell their arrangement.
        columns, rows = get_optimal_tiled_canvas((height, width), tile, tiler.min_patches, tiler.max_patches)
        return tiled_layout(rows, columns, math.isqrt(processor.image_seq_length), "thumbnail")


INTERNVL = InternVL()

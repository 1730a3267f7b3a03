"""Gemma 3: every image made a square grid; with pan and scan, crops of it follow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm.models.family import ModelFamily
from sparsemm.models.geometry import ImageLayout, Inputs, grid_layout, tiled_layout

if TYPE_CHECKING:
    from transformers import BatchFeature, PretrainedConfig, ProcessorMixin

_PAN_AND_SCAN = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
"""What the processor takes where its image processor has no value."""


class Gemma3(ModelFamily):
    name = "gemma3"
    model_class = "Gemma3ForConditionalGeneration"
    processor_class = "Gemma3Processor"
    image_tokens = "one grid of the image made square; with pan and scan, crops of it follow"
    nested_images = True

    def call_options(self, processor: ProcessorMixin) -> dict[str, Any]:
        """The settings of pan and scan, which the processor does not ask its image processor for."""
        own = {name: getattr(processor.image_processor, name, None) for name in _PAN_AND_SCAN}
        return _PAN_AND_SCAN | {name: value for name, value in own.items() if value is not None}

    def finish_inputs(self, processor: ProcessorMixin, inputs: BatchFeature) -> BatchFeature:
        # By these the model lets the tokens of an image attend to each other in both directions.
        if "token_type_ids" not in inputs:
            (image_token_id,) = processor.image_token_ids
            inputs["token_type_ids"] = (inputs["input_ids"] == image_token_id).long()
        return inputs

    def image_layout(
        self, config: PretrainedConfig, inputs: Inputs, processor: ProcessorMixin, image_size: tuple[int, int]
    ) -> ImageLayout:
        side, (width, height) = math.isqrt(config.mm_tokens_per_image), image_size
        options = self.call_options(processor)
        cut = options.pop("do_pan_and_scan")
        crops = len(processor.image_processor.pan_and_scan(np.empty((3, height, width)), **options)) if cut else 0
        if not crops:
            return grid_layout(side, side)
        rows, cols = (1, crops) if width >= height else (crops, 1)
        # All crops but the last are of one size; that one is up to `crops` pixels smaller.
        region = (0, 0, cols * math.ceil(width / cols), rows * math.ceil(height / rows))
        return tiled_layout(rows, cols, side, "whole", overview_first=True, region=region)


GEMMA3 = Gemma3()

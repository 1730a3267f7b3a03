"""Idefics3 and SmolVLM: tiles, then the whole image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sparsemm.models.family import ModelFamily, need_sources
from sparsemm.models.geometry import ImageLayout, tiled_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


class Idefics3(ModelFamily):
    name = "idefics3"
    model_class = "Idefics3ForConditionalGeneration"
    processor_class = "Idefics3Processor"
    image_tokens = "tiles, then the whole image"
    nested_images = True

    def text_model(self, model: nn.Module) -> nn.Module:
        return model.model.text_model

    def image_layouts(
        self,
        config: PretrainedConfig,
        inputs: Mapping[str, Tensor],
        *,
        processor: ProcessorMixin | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[ImageLayout]:
        if "pixel_values" not in inputs:
            return []
        processor, image_sizes = need_sources(self.name, processor, image_sizes)
        side = math.isqrt(processor.image_seq_len)
        layouts = []
        for width, height in image_sizes:  # a small image is not cut: no rows, no columns
            _, rows, cols = processor.image_processor.get_number_of_image_patches(height, width)
            layouts.append(tiled_layout(rows, cols, side, "global"))
        return layouts


class SmolVLM(Idefics3):
    name = "smolvlm"
    model_class = "SmolVLMForConditionalGeneration"
    processor_class = "SmolVLMProcessor"


IDEFICS3, SMOLVLM = Idefics3(), SmolVLM()

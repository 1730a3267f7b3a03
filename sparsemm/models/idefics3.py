"""Idefics3 and SmolVLM: tiles, then the whole image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from sparsemm.models.family import ModelFamily
from sparsemm.models.geometry import ImageLayout, Inputs, tiled_layout

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

    def image_layout(
        self, config: PretrainedConfig, inputs: Inputs, processor: ProcessorMixin, image_size: tuple[int, int]
    ) -> ImageLayout:
        width, height = image_size
        # A small image is not cut: no rows, no columns.
        _, rows, cols = processor.image_processor.get_number_of_image_patches(height, width)
        return tiled_layout(rows, cols, math.isqrt(processor.image_seq_len), "global")


class SmolVLM(Idefics3):
    name = "smolvlm"
    model_class = "SmolVLMForConditionalGeneration"
    processor_class = "SmolVLMProcessor"
    needs = "num2words"


IDEFICS3, SMOLVLM = Idefics3(), SmolVLM()

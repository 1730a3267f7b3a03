"""Mistral Small 3: a grid at the image's own aspect ratio; the tokens that end its rows are no image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsemm.models.family import ModelFamily
from sparsemm.models.geometry import ImageLayout, Inputs, entries, grid_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Mistral3(ModelFamily):
    name = "mistral3"
    model_class = "Mistral3ForConditionalGeneration"
    processor_class = "PixtralProcessor"
    needs = "torchvision"
    image_tokens = "one grid at the image's own aspect ratio"

    def image_layouts(self, config: PretrainedConfig, inputs: Inputs, **sources: Any) -> list[ImageLayout]:
        cell = config.vision_config.patch_size * config.spatial_merge_size
        sizes = entries(inputs, "image_sizes")
        return [grid_layout(height // cell, width // cell) for height, width in sizes]  # sizes after resizing


MISTRAL3 = Mistral3()

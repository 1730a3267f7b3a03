"""Qwen2-VL: images at their own aspect ratio, positions in three axes (M-RoPE)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemm.errors import ConfigError, DataError
from sparsemm.models.family import ModelFamily
from sparsemm.models.geometry import ImageLayout, Inputs, entries, grid_layout
from sparsemm.models.messages import Messages, media_items, source_of

if TYPE_CHECKING:
    from transformers import BatchFeature, PretrainedConfig, ProcessorMixin


class Qwen2VL(ModelFamily):
    name = "qwen2_vl"
    model_class = "Qwen2VLForConditionalGeneration"
    processor_class = "Qwen2VLProcessor"
    image_tokens = "one grid at the image's own aspect ratio"

    def load_processor(
        self, path: str, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ProcessorMixin:
        """The processor of a checkpoint; `min_pixels` and `max_pixels` bound the area images are resized to."""
        processor = super().load_processor(path)
        _limit_pixels(processor.image_processor, min_pixels, max_pixels)
        return processor

    def largest_picture(self, config: PretrainedConfig, processor: ProcessorMixin) -> int | None:
        return processor.image_processor.size["longest_edge"]

    def finish_inputs(self, processor: ProcessorMixin, inputs: BatchFeature) -> BatchFeature:
        # M-RoPE positions are computed from these: without them the model refuses, or numbers image tokens as text.
        if "mm_token_type_ids" not in inputs:
            ids = inputs["input_ids"]
            image, video = processor.image_token_id, processor.video_token_id
            inputs["mm_token_type_ids"] = (ids == image).long() + 2 * (ids == video).long()
        return inputs

    def read_media(self, conversation: Messages) -> dict[str, list[Any]]:
        """As for every family; addresses and videos through `qwen-vl-utils`, where it imports."""
        items = list(media_items(conversation))
        if not any(
            item.get("type") == "video" or str(source_of(item)).startswith(("http://", "https://")) for item in items
        ):
            return super().read_media(conversation)
        try:
            from qwen_vl_utils import process_vision_info
        except ImportError as error:
            raise DataError(
                "images by address and videos in messages need qwen-vl-utils and torchvision: install the [qwen] "
                "extra, or give PIL images or local paths"
            ) from error
        images, videos = process_vision_info(conversation)[:2]
        return {"images": images or [], "videos": videos or []}

    def image_layouts(self, config: PretrainedConfig, inputs: Inputs, **sources: Any) -> list[ImageLayout]:
        merge = config.vision_config.spatial_merge_size
        grids = entries(inputs, "image_grid_thw")
        return [grid_layout(height // merge, width // merge, frames=frames) for frames, height, width in grids]

    def random_image(self, config: PretrainedConfig, dtype: torch.dtype, limit: int) -> dict[str, Tensor]:
        vision = config.vision_config
        side = min(64, math.isqrt(limit)) * vision.spatial_merge_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(side * side, patch, dtype=dtype)
        return {"image_grid_thw": torch.tensor([[1, side, side]]), "pixel_values": pixels}


def _limit_pixels(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    for name, value in {"min_pixels": min_pixels, "max_pixels": max_pixels}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be a number of pixels, at least 1")
    size = dict(image_processor.size)
    smallest = size["shortest_edge"] if min_pixels is None else min_pixels
    largest = size["longest_edge"] if max_pixels is None else max_pixels
    if smallest > largest:
        raise ConfigError(f"min_pixels={smallest} is above max_pixels={largest}; set both")
    if min_pixels is not None or max_pixels is not None:
        image_processor.size = type(image_processor.size)(**{"shortest_edge": smallest, "longest_edge": largest})


QWEN2_VL = Qwen2VL()
